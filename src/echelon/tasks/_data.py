"""Items of a task: texts and problems from a user's file, or from the sets that come with Echelon."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.errors import EchelonError

__all__ = ["read_json_lines", "read_text", "shipped", "split_items"]

_SPLIT_STREAM = 0x5457  # the key of this draw among others from the same seed


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text in `path`.

    Raises:
        EchelonError: there is none, it can't be read, or it is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise EchelonError(f"no {what} at {path}") from None
    except UnicodeDecodeError as error:
        raise EchelonError(f"{what} {path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise EchelonError(f"could not read {what} {path}: {error.strerror or error}") from None
    if not text.strip():
        raise EchelonError(f"{what} {path} is empty")
    return text


def shipped(name: str) -> str:
    """The text of a file in this package's `data`."""
    return files("echelon.tasks").joinpath("data", name).read_text(encoding="utf-8")


def read_json_lines(text: str, where: str) -> list[dict[str, Any]]:
    """One JSON object a line; blank lines don't count.

    Raises:
        EchelonError: a line is something else; it is named.
    """
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise EchelonError(f"{where}, line {number}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise EchelonError(f"{where}, line {number}: expected a JSON object, got {type(value).__name__}")
        found.append(value)
    return found


def split_items(count: int, eval_fraction: float, seed: int, what: str) -> dict[str, NDArray[np.int64]]:
    """Which of `count` items are for training and which for evaluation: a random draw that depends on nothing but
    `count` and `seed`.

    Returns:
        "train" and "eval": int64, ascending, nothing in common, at least one item each.

    Raises:
        EchelonError: the fraction is not between 0 and 1, or there are fewer than 2 items.
    """
    if not 0.0 < eval_fraction < 1.0:
        raise EchelonError(f"eval_fraction must be between 0 and 1, got {eval_fraction}")
    if count < 2:
        raise EchelonError(f"{what} has {count} item{'s' * (count != 1)}; at least 2 are needed (train and eval)")
    held_out = min(max(round(count * eval_fraction), 1), count - 1)
    order = np.random.Generator(np.random.Philox(key=[seed, _SPLIT_STREAM])).permutation(count)
    return {
        "train": np.sort(order[held_out:]).astype(np.int64),
        "eval": np.sort(order[:held_out]).astype(np.int64),
    }
