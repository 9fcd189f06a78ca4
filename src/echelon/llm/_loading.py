"""Loading a causal model into this process: from the store, a folder or the hub, with or without a LoRA adapter."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from echelon._files import read_json
from echelon.errors import EchelonError, unknown_name
from echelon.llm._optional import quiet_transformers, require
from echelon.llm.store import SHIPPED_PLANNERS, ModelStore, resolve

__all__ = ["Device", "Dtype", "LoadedModel", "base_of", "load_causal", "locate"]

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float32"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# What a checkpoint is made of. No pickled weights (*.bin), whose reading could run a stranger's code, and no copies
# in other formats that many repositories hold beside it.
_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "model.safetensors",
    "model-*.safetensors",
    "adapter_model.safetensors",
)
_WAIT = 10  # seconds for the hub to answer


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A transformers model in evaluation mode on its device, and its tokenizer."""

    model: Any
    tokenizer: Any


def load_causal(
    spec: str, *, store: ModelStore | None = None, dtype: Dtype = "auto", device: Device = "auto"
) -> LoadedModel:
    """Load a causal language model.

    Args:
        spec: a known model's name or `hf:<folder or id>`, see `locate`.
        store: where fetched models are; the default store if None.
        dtype: "auto" is bfloat16 where the device computes in it, else float32.
        device: "auto" is a GPU where torch finds one, else the processor.

    Raises:
        EchelonError: an unknown, absent or damaged model, a missing library, an adapter that doesn't fit its base
            model, no GPU.
    """
    where = _device(device)
    kind = _dtype(dtype, where)
    folder = locate(spec, store)
    load = _load_adapter if (folder / "adapter_config.json").is_file() else _load_folder
    loaded = load(folder, spec, store, kind, where)
    loaded.model.eval().requires_grad_(False)
    try:
        loaded.model.to(where)
    except RuntimeError as error:  # torch's words for a full GPU
        raise EchelonError(f"model {spec} could not be moved to {where}: {_line(error)}") from error
    return loaded


def locate(spec: str, store: ModelStore | None = None) -> Path:
    """The folder of a model's checkpoint or LoRA adapter.

    Args:
        spec: a known model's name (`smollm2-135m`) or a shipped planner's (`smollm2-135m-echelon`, the folder of its
            adapter in this installation); `hf:<folder>`, a folder that holds a causal language model as
            transformers saves it (config.json, tokenizer and *.safetensors) or a LoRA adapter as PEFT saves it
            (adapter_config.json, adapter_model.safetensors); or `hf:<org>/<name>`, the same on the Hugging Face hub.
            A folder of that name goes first. What the hub's cache on this machine holds whole is used as it is,
            without a network; else it is downloaded into that cache. Cache, proxies, offline mode and the token for
            gated models are set by the hub library's own environment variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, …).
        store: where fetched models are; the default store if None.

    Raises:
        EchelonError: an unknown name, a model that isn't fetched or is damaged, a folder without a model, a hub that
            doesn't have it or doesn't answer within seconds.
    """
    if spec in SHIPPED_PLANNERS:
        return SHIPPED_PLANNERS[spec].folder
    if not spec.startswith("hf:"):
        return resolve(spec, store)
    name = spec.removeprefix("hf:")
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file():
        return folder
    if folder.is_dir() or not _HUB_ID.fullmatch(name):
        return resolve(spec, store)
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    """The folder in the hub's cache that holds a model, downloaded if it isn't there whole."""
    hub = require("huggingface_hub")
    for file in ("adapter_config.json", "config.json"):
        found = hub.try_to_load_from_cache(name, file)
        if isinstance(found, str) and _whole(Path(found).parent):
            return Path(found).parent
    help_ = "put its files into a folder and use hf:<folder>"
    try:
        # One question first, without the downloader's patience: whether the hub answers at all, and has the model.
        hub.HfApi().model_info(name, timeout=_WAIT)
        folder = Path(hub.snapshot_download(name, allow_patterns=list(_FILES), etag_timeout=_WAIT))
    except hub.errors.GatedRepoError as error:
        raise EchelonError(
            f"model 'hf:{name}' is gated: accept its terms on its page of the hub and set HF_TOKEN, or {help_}"
        ) from error
    except hub.errors.RepositoryNotFoundError as error:
        raise EchelonError(
            f"model 'hf:{name}': there is no folder {name}, and the hub has no such model, or it is private (then set "
            "HF_TOKEN)"
        ) from error
    except hub.errors.OfflineModeIsEnabled as error:
        raise EchelonError(
            f"model 'hf:{name}': there is no folder {name}, the hub's cache on this machine does not hold it, and "
            f"HF_HUB_OFFLINE forbids a download: unset it, or {help_}"
        ) from error
    except Exception as error:  # whatever a network makes a third party raise
        raise EchelonError(
            f"model 'hf:{name}': there is no folder {name}, the hub's cache on this machine does not hold it, and the "
            f"hub could not be reached ({_line(error)}): {help_}"
        ) from error
    if not _whole(folder):
        raise EchelonError(f"model 'hf:{name}': the hub has no whole model of *.safetensors files under this name")
    return folder


def _whole(folder: Path) -> bool:
    """Whether a folder of the hub's cache, which may hold a part of a model only, holds all of it."""
    if (folder / "adapter_config.json").is_file():
        return (folder / "adapter_model.safetensors").is_file()
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return all(
                (folder / file).is_file() for file in set(read_json(index, "weight index")["weight_map"].values())
            )
        except (EchelonError, KeyError, TypeError, AttributeError):
            return False
    return (folder / "model.safetensors").is_file()


def _load_folder(
    folder: Path, spec: str, store: ModelStore | None, dtype: torch.dtype, device: torch.device
) -> LoadedModel:
    transformers = require("transformers")
    _check_weights(folder, spec)
    # Weights that are missing would be drawn at random: that must not move the program's own numbers.
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                # On the processor torch's fused kernel takes twice the time of plain products at these lengths
                # (bfloat16, 8 rows of 64 tokens behind 92: 3.0 ms a layer against 1.7).
                attn_implementation="eager" if device.type == "cpu" else None,
            )
            tokenizer = _tokenizer(folder)
        except Exception as error:  # whatever a broken folder makes a third party raise
            raise _damaged(folder, spec, _line(error)) from error
    if lacking := sorted(report["missing_keys"]):
        raise _damaged(folder, spec, f"no weights for {lacking[0]} and {len(lacking) - 1} more")
    return LoadedModel(model, tokenizer)


def _load_adapter(
    folder: Path, spec: str, store: ModelStore | None, dtype: torch.dtype, device: torch.device
) -> LoadedModel:
    """The base model with a LoRA adapter added to its weights, so that it costs what the base costs."""
    base_spec = base_of(folder, spec, store)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise EchelonError(
            f"model {spec}: no adapter_model.safetensors in {folder} (pickled weights, *.bin, are not read)"
        )
    peft = require("peft")
    base = _load_folder(locate(base_spec, store), base_spec, store, dtype, device)
    # PEFT fills what it makes with random numbers first, and warns of what it doesn't find.
    with quiet_transformers(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = peft.PeftModel(base.model, peft.PeftConfig.from_pretrained(folder))
            result = adapted.load_adapter(folder, "default", torch_device="cpu")
            if wrong := sorted([*result.missing_keys, *result.unexpected_keys]):
                raise ValueError(f"{wrong[0]} and {len(wrong) - 1} more are in one of the two only")
            model = adapted.merge_and_unload(safe_merge=True)
            own = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
            tokenizer = _tokenizer(folder) if own else base.tokenizer
        except Exception as error:  # whatever a strange adapter makes a third party raise
            raise EchelonError(
                f"model {spec}: its adapter does not fit its base model {base_spec} ({_line(error)})"
            ) from error
    return LoadedModel(model, tokenizer)


def base_of(folder: Path, spec: str, store: ModelStore | None) -> str:
    """The base model of a LoRA adapter, as a spec.

    Raises:
        EchelonError: another kind of adapter, or an unknown base model.
    """
    settings = read_json(folder / "adapter_config.json", "adapter's configuration")
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise EchelonError(f"model {spec}: its adapter is of kind {kind!r}, and only LORA can be used")
    return _base(settings.get("base_model_name_or_path"), folder, spec, store)


def _base(name: object, folder: Path, spec: str, store: ModelStore | None) -> str:
    """What an adapter calls its base model, as a spec."""
    if isinstance(name, str) and name:
        known = (store or ModelStore()).known
        if name in known:
            return name
        for place in (Path(name).expanduser(), folder / name):
            if (place / "config.json").is_file():
                return f"hf:{place}"
        if _HUB_ID.fullmatch(name):
            return f"hf:{name}"
        if Path(name).name in known:  # trained on another machine, from its store
            return Path(name).name
    raise EchelonError(
        f"model {spec}: no base model {name!r}: write its folder, its id on the hub or a known model's name as "
        f"base_model_name_or_path into {folder / 'adapter_config.json'}"
    )


def _tokenizer(folder: Path) -> Any:
    return require("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _device(device: str) -> torch.device:
    if device not in get_args(Device):
        raise unknown_name("device", device, get_args(Device))
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        built = "finds none" if torch.version.cuda else "is built without CUDA"
        raise EchelonError(f"device 'cuda': no GPU, torch {torch.__version__} {built}: use 'auto' or 'cpu'")
    return torch.device("cuda" if found and device != "cpu" else "cpu")


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            # Elsewhere bfloat16 is emulated, and slower than float32.
            probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            fast = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
        return torch.bfloat16 if fast else torch.float32
    if dtype not in get_args(Dtype):
        raise unknown_name("dtype", dtype, get_args(Dtype))
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _check_weights(folder: Path, spec: str) -> None:
    """Read the header of each safetensors file: it gives away a file that was cut off."""
    safetensors = require("safetensors")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _damaged(folder, spec, "no *.safetensors file")
    for path in weights:
        try:
            with safetensors.safe_open(path, "pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise _damaged(folder, spec, f"{path.name}: {error}") from error


def _damaged(folder: Path, spec: str, detail: str) -> EchelonError:
    mend = "put a whole copy there" if spec.startswith("hf:") else f"run: echelon models fetch {spec} --force"
    return EchelonError(f"model {spec} in {folder} is damaged ({detail}): {mend}")


def _line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}"
