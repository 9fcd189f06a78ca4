"""Turn a GGUF into a checkpoint that loads in a third of a second and needs neither gguf nor accelerate."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from echelon.errors import EchelonError
from echelon.llm._optional import quiet_transformers, require

__all__ = ["convert_gguf"]


def convert_gguf(gguf: Path, folder: Path, *, split_digits: bool) -> dict[str, str]:
    """Write a bf16 safetensors checkpoint, its configuration and its tokenizer into `folder`.

    Args:
        gguf: the GGUF file of a causal language model.
        folder: an existing, empty folder.
        split_digits: the tokenizer was trained with every digit a token of its own; what is read back from
            a GGUF lacks that step and splits white space before a digit wrongly, so it is put back.

    Returns:
        The versions of the libraries that took part.

    Raises:
        EchelonError: a library is missing, or the GGUF does not hold the whole model.
    """
    transformers = require("transformers")
    require("gguf")
    require("accelerate")
    import torch

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # A conversion must not move the random numbers of the program that asked for it.
    with quiet_transformers(), _without_bar(), torch.random.fork_rng(devices=[]):
        unpack = {}
        if hasattr(transformers, "GgufConfig"):
            # Newer releases may keep the blocks packed, and those can't be saved as a plain checkpoint.
            unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
        source = transformers.AutoModelForCausalLM.from_pretrained(**where, **unpack, dtype=torch.bfloat16)
        # save_pretrained refuses a model that came from a GGUF: rebuild it without the quantisation entry.
        values = source.config.to_dict()
        values.pop("quantization_config", None)
        values.pop("_name_or_path", None)
        config = type(source.config).from_dict(values)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(source.state_dict(), strict=True)
        if not all(bool(torch.isfinite(weight).all()) for weight in model.parameters()):
            raise EchelonError(f"{gguf.name} holds weights that are not finite numbers")
        model.save_pretrained(folder)

        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        if split_digits:
            steps = require("tokenizers").pre_tokenizers
            tokenizer.backend_tokenizer.pre_tokenizer = steps.Sequence(
                [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)]
            )
        tokenizer.save_pretrained(folder)
    names = ("torch", "transformers", "tokenizers", "gguf", "accelerate", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """The reader of GGUF files draws a bar that transformers' own switch does not turn off."""
    reader = require("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return

    def nothing(items: Iterable[Any], **_: Any) -> Iterable[Any]:
        return items

    reader.tqdm = nothing
    try:
        yield
    finally:
        reader.tqdm = bar
