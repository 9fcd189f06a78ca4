"""Checkpoints: folders of named parts with a manifest of hashes, whole or absent; no pickle.

A checkpoint is `manifest.json`, `progress.json` (JSON-able values), `worlds.safetensors` (arrays) and
`algorithm.safetensors` (tensors). Folders are named `step-000000008192`; the newest is where a run goes on.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from echelon._files import atomic_directory, atomic_write_json, explain_os_error, read_json, sha256_file
from echelon.errors import EchelonError

__all__ = ["FORMAT", "Checkpoint", "checkpoints_of", "load_checkpoint", "newest_checkpoint", "save_checkpoint"]

FORMAT = 1
_PARTS = ("progress.json", "worlds.safetensors", "algorithm.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        progress: JSON-able values (step, positions in logs, counters, states of planners).
        worlds: arrays by name, what `TeamWorlds.state_dict` gave.
        algorithm: tensors by name, what the algorithm's `state_dict` gave.
    """

    progress: dict[str, Any]
    worlds: dict[str, NDArray[Any]]
    algorithm: dict[str, Tensor]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write a checkpoint into `folder/step-…`, whole or not at all, then remove all but the newest `keep`.

    Raises:
        EchelonError: the disk is full or can't be written; what was there still is.
    """
    path = folder / f"step-{step:012d}"
    with atomic_directory(path) as temp:
        try:
            atomic_write_json(temp / "progress.json", checkpoint.progress)
            worlds = {name: np.asarray(a, order="C") for name, a in checkpoint.worlds.items()}
            (temp / "worlds.safetensors").write_bytes(safetensors.numpy.save(worlds))
            (temp / "algorithm.safetensors").write_bytes(safetensors.torch.save(checkpoint.algorithm))
            manifest = {"format": FORMAT, "step": step, "sha256": {p: sha256_file(temp / p) for p in _PARTS}}
            atomic_write_json(temp / "manifest.json", manifest)
        except OSError as error:
            raise explain_os_error(error, path) from error
    for old in checkpoints_of(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first (none if there is no such folder); also damaged ones."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{12,}", p.name))


def newest_checkpoint(folder: Path, *, saved_once: bool) -> Checkpoint | None:
    """The newest checkpoint of a run; None if it was stopped before its first.

    Args:
        folder: the run's.
        saved_once: whether its logs go on after its first checkpoint was due. Work is logged first and saved then, so
            if there is none, they were removed; to begin the run again would erase those logs.

    Raises:
        EchelonError: its checkpoints are gone; or the newest is damaged, see `load_checkpoint`.
    """
    if saved := checkpoints_of(folder / "checkpoints"):
        return load_checkpoint(saved[-1])
    if saved_once:
        raise EchelonError(
            f"the checkpoints of {folder} are gone, and to begin it again would erase its logs: put them back, train "
            f"in another folder, or move its logs (*.jsonl) away to begin again here"
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every part against the manifest.

    Raises:
        EchelonError: it is damaged, incomplete, or of a newer format; the line says what to do.
    """
    try:
        manifest = read_json(path / "manifest.json", "checkpoint manifest")
    except EchelonError as error:
        raise EchelonError(f"{error}; {_way_out(path)}") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise EchelonError(
            f"checkpoint {path} has format {version}, this Echelon reads up to {FORMAT}: use a newer Echelon"
        )
    if version != FORMAT or not isinstance(manifest.get("sha256"), dict):
        raise EchelonError(f"checkpoint {path} is damaged: its manifest.json is no manifest; {_way_out(path)}")
    for part in _PARTS:
        file = path / part
        if not file.exists():
            raise EchelonError(f"checkpoint {path} is damaged: {part} is missing; {_way_out(path)}")
        if sha256_file(file) != manifest["sha256"].get(part):
            raise EchelonError(f"checkpoint {path} is damaged: {part} isn't what was saved; {_way_out(path)}")
    try:
        return Checkpoint(
            read_json(path / "progress.json", "checkpoint progress"),
            safetensors.numpy.load_file(path / "worlds.safetensors"),
            safetensors.torch.load_file(path / "algorithm.safetensors"),
        )
    except (SafetensorError, OSError) as error:
        raise EchelonError(f"checkpoint {path} can't be read: {error}; {_way_out(path)}") from None


def _way_out(path: Path) -> str:
    older = [p.name for p in checkpoints_of(path.parent) if p.name < path.name]
    if older:
        return f"move it away to go on from {older[-1]}"
    return "there is no older one: train again"
