"""A causal language model that learns: a LoRA adapter or the weights themselves, their optimiser, state and files."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.utils.checkpoint
from torch import Tensor

from echelon._files import atomic_directory, atomic_write_json, atomic_write_text
from echelon.errors import EchelonError, unknown_name
from echelon.llm._loading import Device, Dtype, LoadedModel, _device, _dtype, base_of, load_causal, locate
from echelon.llm._optional import quiet_transformers, require
from echelon.llm.store import ModelStore

__all__ = ["Adapt", "Trainable", "compute_again"]

Adapt = Literal["lora", "full"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")

# Calls a function now and once more in the backward pass, instead of keeping what that needs; nothing here is random.
compute_again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)


class Trainable:
    """A transformers model in evaluation mode of which some weights learn, in float32, by AdamW without decay.

    With `adapt="lora"` (Hu et al. 2022) the model's own weights stay as they are, in the dtype that they compute in,
    and low-rank matrices beside them learn. The second of each pair begins at zero, so the model begins as its own
    reference, and the reference is this model with the adapter switched off: no second copy. With `adapt="full"` the
    weights learn, in float32, while products are computed in `dtype` (autocast); the reference is then a **copy** of
    what learns, 4 bytes a weight, beside Adam's 8.

    Several adapters may stand beside one frozen base (`load` with `beside`): each is a `Trainable` of its own, with its
    own optimiser, reference, state and files, and the same bits in all of them as if it were alone. The model is
    switched to an adapter when it runs, so those who share a base are used by one thread at a time.

    Attributes:
        model, tokenizer: of transformers.
        spec: what was loaded.
        updates: optimiser steps taken.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        spec: str,
        *,
        adapt: Adapt,
        config: Any = None,
        weights: Mapping[str, Tensor] | None = None,
        beside: Trainable | None = None,
        compute: torch.dtype,
        layers: int = 0,
        freeze_embeddings: bool = False,
        lr: float,
        max_grad_norm: float,
        checkpointing: bool,
        seed: int,
    ) -> None:
        """Make a loaded model learn; `load` explains the settings."""
        self.model, self.tokenizer, self.spec = loaded.model, loaded.tokenizer, spec
        self._lr, self._max_grad_norm = lr, max_grad_norm
        self._peft: Any = None
        self._home: Path | None = None  # the folder of the base model, where `load` made this
        if adapt == "lora":
            self._insert(config, weights, seed, beside)
        else:
            self._unfreeze(layers, freeze_embeddings)
        self._autocast = compute if compute != self.model.dtype else None
        # By the names of a lone adapter, whatever this one is called among several.
        self.named = {self._lone(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.named:
            raise EchelonError(f"model {spec}: with these settings nothing of it would learn")
        # The adapter that learning goes on from, or all weights; None: the adapter switched off.
        self._anchor: dict[str, Tensor] | None = None
        if adapt == "full" or weights is not None:
            self.anchor()
        kind = require("transformers.modeling_layers").GradientCheckpointingLayer
        self._layers = [module for module in self.model.modules() if isinstance(module, kind)] if checkpointing else []
        if checkpointing and not self._layers:
            raise EchelonError(f"model {spec} has no layers that can be computed again: leave checkpointing off")
        self._optimizer = self._new_optimizer()
        self.updates = 0

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        store: ModelStore | None,
        dtype: Dtype,
        device: Device,
        adapt: Adapt,
        layers: int,
        rank: int,
        alpha: float,
        targets: Sequence[str] | None,
        freeze_embeddings: bool,
        lr: float,
        max_grad_norm: float,
        checkpointing: bool,
        seed: int,
        beside: Trainable | None = None,
    ) -> Trainable:
        """Load what `spec` names; if that is a LoRA adapter, it is the one that goes on learning.

        With `beside`, an adapter on the base that this one has loaded: dtype and device are that one's.

        Raises:
            EchelonError: as `load_causal`; a setting out of its range; LoRA has nothing to be put beside; another base
                than `beside` has.
        """
        if adapt not in get_args(Adapt):
            raise unknown_name("adapt", adapt, get_args(Adapt))
        for name, value, good in (("layers", layers, layers >= 0), ("rank", rank, rank >= 1)):
            if not good:
                raise EchelonError(f"{name} is {value}: it must be at least {1 if name == 'rank' else 0}")
        for name, number in (("alpha", alpha), ("lr", lr), ("max_grad_norm", max_grad_norm)):
            if not number > 0:
                raise EchelonError(f"{name} is {number}: it must be above 0")
        if beside is not None and (adapt == "full" or beside._peft is None):
            raise EchelonError(f"model {spec} can't share the weights of {beside.spec}: with adapt 'full' they learn")
        compute = _dtype(dtype, _device(device)) if beside is None else beside.model.dtype
        common: dict[str, Any] = {
            "adapt": adapt, "compute": compute, "lr": lr, "max_grad_norm": max_grad_norm,
            "checkpointing": checkpointing, "seed": seed,
        }  # fmt: skip
        if adapt == "full":
            # What learns by steps of 1e-5 of itself needs float32 to notice them.
            loaded = load_causal(spec, store=store, dtype="float32", device=device)
            return cls(loaded, spec, layers=layers, freeze_embeddings=freeze_embeddings, **common)
        peft = require("peft")
        folder = home = locate(spec, store)
        base, config, weights = spec, None, None
        if (folder / "adapter_config.json").is_file():
            base, config, weights = _read_adapter(folder, spec, store)
            home = locate(base, store)
        if beside is None:
            loaded = load_causal(base, store=store, dtype=dtype, device=device)
        elif home.resolve() == beside._home:
            loaded = LoadedModel(beside.model, beside.tokenizer)
        else:
            raise EchelonError(f"model {spec} is not on the base of {beside.spec}: {home} and {beside._home}")
        if config is None:
            count = int(loaded.model.config.num_hidden_layers)
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=alpha,
                target_modules=sorted(targets if targets is not None else _linear_names(loaded.model)),
                layers_to_transform=list(range(max(0, count - layers), count)) if layers else None,
                base_model_name_or_path=_base_name(spec),
                task_type="CAUSAL_LM",
            )
        made = cls(loaded, spec, config=config, weights=weights, beside=beside, **common)
        made._home = home.resolve()
        return made

    # -- running -------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self.model.device
        return found

    @property
    def checkpointing(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return bool(self._layers)

    @property
    def num_held(self) -> int:
        """How many numbers are kept as weights, tied ones once, with the reference's copy where it has one."""
        return sum(self.held().values())

    def held(self) -> dict[int, int]:
        """The sizes of what `num_held` counts, by place in memory. Others' adapters on the same base are not in it."""
        others = {name for name in self._peft.peft_config if name != self._adapter} if self._peft is not None else set()
        own = [p for name, p in self.model.named_parameters() if others.isdisjoint(name.split("."))]
        return {tensor.data_ptr(): tensor.numel() for tensor in [*own, *(self._anchor or {}).values()]}

    @contextlib.contextmanager
    def running(self, *, reference: bool = False, grad: bool = False) -> Iterator[Any]:
        """The model to run inside the block, as it is or as the reference, with a gradient or without."""
        self._activate()
        with contextlib.ExitStack() as stack:
            if reference:
                stack.enter_context(self.as_reference())
            # Behind the reference: autocast keeps the casts of the weights that it met until the block ends.
            stack.enter_context(self.computing(grad))
            if grad:
                stack.enter_context(self._checkpointed())
            yield self.model

    @contextlib.contextmanager
    def computing(self, grad: bool = False) -> Iterator[None]:
        """Inside the block products are computed in the wanted dtype, with a gradient or without.

        That part of `running` which holds for the calling thread alone: who runs layers in several calls it in each.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            if self._autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self._autocast))
            yield

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside the block the model is its reference, for all threads; without a gradient."""
        self._activate()
        if self._anchor is None:
            with self._peft.disable_adapter():
                yield
            return
        own = [p.data for p in self.named.values()]
        try:
            for name, p in self.named.items():
                p.data = self._anchor[name]
            yield
        finally:
            for p, data in zip(self.named.values(), own, strict=True):
                p.data = data

    def anchor(self) -> None:
        """From now on the reference is the model as it is now (after imitation, say); a copy of what learns."""
        self._anchor = {name: p.detach().clone() for name, p in self.named.items()}

    # -- learning ------------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """AdamW's step size; it is a setting, and no part of the state."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = lr
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> float:
        """Clip the gradients, one step of AdamW, clear them; the norm before clipping (0 without gradients).

        Raises:
            EchelonError: the gradients are not finite; the weights are as they were, the gradients cleared.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.named.values(), self._max_grad_norm))
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise EchelonError(f"training model {self.spec} diverged at update {self.updates}: lower lr")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what learns, Adam's moments, the number of updates, and the reference where it is a copy."""
        state = {f"weight.{name}": p.detach().clone() for name, p in self.named.items()}
        state |= {f"anchor.{name}": tensor.clone() for name, tensor in (self._anchor or {}).items()}
        for name, p in self.named.items():
            for key, value in self._optimizer.state.get(p, {}).items():
                state[f"adam.{key}.{name}"] = value.detach().clone()
        state["updates"] = torch.tensor(self.updates)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave; gradients are cleared, and what other processes had is left out.

        Raises:
            EchelonError: it is of another model or of other settings; nothing has changed then.
        """
        state = {name: tensor for name, tensor in state.items() if not name.startswith("rank")}  # see `distributed`
        anchored = any(key.startswith("anchor.") for key in state)
        wanted = {"updates": torch.Size([])}
        for name, p in self.named.items():
            wanted[f"weight.{name}"] = p.shape
            if anchored or self._peft is None:
                wanted[f"anchor.{name}"] = p.shape
            if f"adam.step.{name}" in state:
                wanted |= {f"adam.exp_avg.{name}": p.shape, f"adam.exp_avg_sq.{name}": p.shape}
                wanted[f"adam.step.{name}"] = torch.Size([])
        wrong = [key for key in {**wanted, **state} if key not in state or state[key].shape != wanted.get(key)]
        if wrong:
            raise EchelonError(
                f"the saved state does not fit model {self.spec} with these settings: {sorted(wrong)[0]}"
            )
        self._optimizer = self._new_optimizer()
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(state[f"weight.{name}"])
                p.grad = None
                if f"adam.step.{name}" in state:
                    moments = {key: state[f"adam.{key}.{name}"].to(p.device, copy=True) for key in _MOMENTS}
                    self._optimizer.state[p] = moments
        self._anchor = None
        if anchored:
            self._anchor = {name: state[f"anchor.{name}"].to(p.device, copy=True) for name, p in self.named.items()}
        self.updates = int(state["updates"])

    def save(self, folder: Path, files: Mapping[str, str] | None = None, *, base: str | None = None) -> None:
        """Write what was learnt into `folder`, whole or not at all, fit for `hf:<folder>`.

        Args:
            folder: gets a LoRA adapter in PEFT's format (adapter_config.json, adapter_model.safetensors), float32; or,
                of full weights, the whole model in float32 with its tokenizer.
            files: more text files for it, by name.
            base: what the adapter calls its base model; default: what was loaded, a folder by its absolute path.

        Raises:
            EchelonError: the place can't be written.
        """
        with atomic_directory(folder) as temp, quiet_transformers():
            for name, text in (files or {}).items():
                atomic_write_text(temp / name, text)
            if self._peft is None:
                self.model.save_pretrained(temp)
                self.tokenizer.save_pretrained(temp)
                return
            config = self._peft.peft_config[self._adapter]
            settings = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
            settings |= {"base_model_name_or_path": base or self._base, "inference_mode": True}
            # Not PEFT's own writer: it may ask the hub about the base model, and its file's order varies.
            tensors = require("peft").get_peft_model_state_dict(
                self._peft, adapter_name=self._adapter, save_embedding_layers=False
            )
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
            require("safetensors.torch").save_file(tensors, temp / "adapter_model.safetensors", {"format": "pt"})
            atomic_write_json(temp / "adapter_config.json", settings)

    # -- inside --------------------------------------------------------------------------------

    def _insert(self, config: Any, weights: Mapping[str, Tensor] | None, seed: int, beside: Trainable | None) -> None:
        """Put LoRA's matrices into the model, those of an adapter or fresh ones, and switch the model to them."""
        peft = require("peft")
        self._adapter = "default" if beside is None else f"adapter{len(beside._peft.peft_config)}"
        self._base = config.base_model_name_or_path  # peft puts a folder of this machine there
        with quiet_transformers(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if beside is None:
                    self._peft = peft.get_peft_model(self.model, config)
                else:
                    self._peft = beside._peft
                    self._peft.add_adapter(self._adapter, config)
                    self._activate()
                if weights is not None:
                    result = peft.set_peft_model_state_dict(self._peft, dict(weights), adapter_name=self._adapter)
                    own = [name for name in result.missing_keys if self._adapter in name.split(".")]
                    lacking = [name for name in own if "lora_" in name]
                    if wrong := sorted([*lacking, *result.unexpected_keys]):
                        raise ValueError(f"{wrong[0]} and {len(wrong) - 1} more are in one of the two only")
            except Exception as error:  # whatever a strange layer or adapter makes a third party raise
                line = (str(error).strip().splitlines() or [""])[0][:200]
                raise EchelonError(f"model {self.spec}: LoRA does not fit it ({line})") from error
        self._peft.eval()
        if weights is not None:
            return
        # Drawn here, on the processor and in the order of names, so that they are the same everywhere.
        generator = torch.Generator().manual_seed(seed)
        for name, p in sorted(self.model.named_parameters()):
            if p.requires_grad and "lora_A" in name:
                fresh = torch.empty(p.shape)
                torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
                p.data.copy_(fresh)

    def _activate(self) -> None:
        """Switch the model to this adapter, if another one on its base ran last."""
        if self._peft is not None and self._peft.active_adapter != self._adapter:
            self._peft.set_adapter(self._adapter)

    def _lone(self, name: str) -> str:
        parts = name.split(".")
        return name if self._peft is None else ".".join("default" if p == self._adapter else p for p in parts)

    def _unfreeze(self, layers: int, freeze_embeddings: bool) -> None:
        self.model.requires_grad_(True)
        if layers:
            stack = self.model.base_model.layers
            self.model.requires_grad_(False)
            for layer in stack[max(0, len(stack) - layers) :]:
                layer.requires_grad_(True)
        if freeze_embeddings:
            for part in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
                part.requires_grad_(False)

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.named.values(), lr=self._lr, weight_decay=0.0, fused=True)

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        # Set here, layer by layer: the model's own switch would also ask for the gradients of the embeddings, and so
        # for passes back through layers that don't learn; and "training" would bring dropout, were it for the parts.
        for layer in self._layers:
            layer._gradient_checkpointing_func = compute_again
            layer.training = layer.gradient_checkpointing = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.training = layer.gradient_checkpointing = False


def _linear_names(model: Any) -> list[str]:
    """The last parts of the names of all linear layers but the output layer; adapters are looked through."""
    kinds = (torch.nn.Linear, require("transformers.pytorch_utils").Conv1D)
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    found = (name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head)
    return sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in found if ".lora_" not in name})


def _base_name(spec: str) -> str:
    """A spec as an adapter's base_model_name_or_path; `_loading._base` reads it back."""
    name = spec.removeprefix("hf:")
    folder = Path(name).expanduser()
    return str(folder.resolve()) if spec != name and folder.is_dir() else name


def _read_adapter(folder: Path, spec: str, store: ModelStore | None) -> tuple[str, Any, dict[str, Tensor]]:
    """The spec of an adapter's base model, its configuration, ready to learn, and its tensors."""
    base = base_of(folder, spec, store)
    try:
        config = require("peft").LoraConfig.from_pretrained(folder)
        weights = require("safetensors.torch").load_file(folder / "adapter_model.safetensors")
    except Exception as error:  # whatever a broken file makes a third party raise
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise EchelonError(f"model {spec}: its adapter in {folder} can't be read ({line})") from error
    config.inference_mode, config.lora_dropout = False, 0.0
    config.base_model_name_or_path = _base_name(base)
    return base, config, weights
