"""Studies: methods × environments × sizes × seeds, their runs, and what can be said of them."""

from __future__ import annotations

from echelon.studies.backends import Backend, PoolBackend
from echelon.studies.engine import Matrix, collect, run_study
from echelon.studies.presets import preset, presets
from echelon.studies.spec import Study, StudyRun, read_study

__all__ = [
    "Backend",
    "Matrix",
    "PoolBackend",
    "Study",
    "StudyRun",
    "collect",
    "preset",
    "presets",
    "read_study",
    "run_study",
]
