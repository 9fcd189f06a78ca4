"""The segments that a run is a tree of: each an ordinary run of the base method, in a folder of its own.

The study engine trains and judges them, from the beginning or as forks of another segment's last checkpoint. One that
is done stays done, also after a crash.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echelon._files import atomic_directory
from echelon.also.configs import AlsoConfig
from echelon.checkpoints import checkpoints_of
from echelon.envs import env_name
from echelon.errors import BusyError
from echelon.evaluation.protocol import BEST, POLICIES, Protocol
from echelon.forking import fork_run
from echelon.rng import spawn_keys
from echelon.runs import SEGMENTS
from echelon.shaping import ShapingConfig
from echelon.studies.backends import PoolBackend, cores
from echelon.studies.engine import Matrix, do_runs, kept_result
from echelon.studies.spec import Study, StudyRun

__all__ = ["Grown", "Progress", "Segment", "Segments", "StoppedError"]

_FRESH = 65  # streams of root seeds
_KEPT = ("config.toml", "versions.json", "metrics.jsonl", "timings.jsonl", "plans.jsonl", "checkpoints")

Progress = Callable[[int, int, tuple[str, ...]], None]
"""Told of steps done, segments under way, and news in words."""


@dataclass(frozen=True)
class Segment:
    """A stretch of training: where it begins, under which shaping, and how far it goes.

    Attributes:
        id: its name, also of its folder.
        source: the segment that it goes on from; None: it begins from scratch.
        begin, until: steps at which it begins and ends.
        shaping: None: the task reward alone.
        stream: 0: with the random numbers of the run itself; above 0: with others.
    """

    id: str
    source: str | None
    begin: int
    until: int
    shaping: ShapingConfig | None
    stream: int = 0


@dataclass(frozen=True)
class Grown:
    """What became of a segment: its evaluations after where it began, and its last step; or what went wrong."""

    segment: Segment
    curve: list[dict[str, Any]]
    end: int
    problem: str | None = None

    @property
    def steps(self) -> int:
        """Steps spent on it."""
        return self.end - self.segment.begin


class StoppedError(Exception):
    """The caller wants no more."""


class Segments:
    """A run's segments, under `work/runs/` in its folder.

    Attributes:
        every: steps between two evaluations.
    """

    def __init__(self, config: AlsoConfig, folder: Path, *, keep_policies: bool) -> None:
        """Nothing is done yet.

        Args:
            config: the run's.
            folder: the run's.
            keep_policies: keep the policy of each evaluation.
        """
        self._config, self._folder = config, folder
        self._slots = config.workers or cores()
        self.every = config.evaluated_every
        # All in the same worlds, also those that begin from scratch with another seed.
        worlds = config.seed if config.also.world_seed is None else config.also.world_seed
        protocol = Protocol(self.every, config.also.episodes, 1, world_seed=worlds, keep_policies=keep_policies)
        self._study = Study(name="also", imports=config.imports, protocol=protocol)
        self._backend: PoolBackend | None = None
        self._seen: list[str] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Workers are at hand until the end of the block."""
        self._seen = []
        self._backend = PoolBackend(self._slots, self._folder / "workers.log")
        try:
            yield
        finally:
            self._backend.close()
            self._backend = None

    def train(
        self,
        segments: Sequence[Segment],
        report: Progress,
        should_stop: Callable[[], bool],
        *,
        retry_failed: bool = False,
    ) -> list[Grown]:
        """Train and judge some segments, side by side; those that are done are only read.

        Args:
            segments: which; their sources are done.
            report: called about twice a second.
            should_stop: asked as often; segments under way then save a checkpoint.
            retry_failed: try again what failed the last time.

        Raises:
            StoppedError: `should_stop` said so.
            BusyError: another process holds one.
            EchelonError: files are damaged. A segment that merely fails says so itself.
        """
        c = self._config
        if not segments:
            return []
        assert self._backend is not None
        # A recurrent network's results depend on the number of threads.
        threads = 1 if c.algorithm.recurrent else max(1, self._slots // len(segments))
        world, runs = env_name(c.env), []
        for s in segments:
            folder = self.folder(s.id)
            run = c.run(s.shaping, steps=s.until, threads=threads)
            if s.source is None:
                run = dataclasses.replace(run, seed=_seed(c.seed, s.stream))
            else:
                fork_run(self.folder(s.source), folder, run.shaping, steps=s.until, stream=s.stream, threads=threads)
            runs.append(StudyRun(s.id, run, world, c.env.size, c.env.num_agents, c.base, c.seed))
            self._seen.append(s.id)

        def told(matrix: Matrix) -> None:
            done = 0
            for s in segments:
                said = matrix.running.get(s.id)
                if said is not None and said["stage"] == "training":
                    done += max(0, int(said["done"]) - s.begin)
                elif s.id not in matrix.running and kept_result(self.folder(s.id))[0] is not None:
                    done += s.until - s.begin
            report(done, len(matrix.running), tuple(line for line in matrix.news if ": finished" not in line))

        do_runs(
            self._study, runs, self._folder / SEGMENTS.parent, self._backend, retry_failed=retry_failed, report=told,
            should_stop=should_stop,
        )  # fmt: skip
        return [self._grown(s, should_stop) for s in segments]

    def _grown(self, segment: Segment, should_stop: Callable[[], bool]) -> Grown:
        state, told = kept_result(self.folder(segment.id))
        if state == "finished":
            points = [{k: e[k] for k in ("step", "tsr", "task_return")} for e in told["evaluations"]]
            # Where a fork begins, all of them are the same.
            curve = [point for point in points if point["step"] > segment.begin or segment.source is None]
            return Grown(segment, curve, int(told["last"]["step"]))
        if state == "failed":
            return Grown(segment, [], segment.until, str(told.get("reason") or "it failed"))
        if should_stop():
            raise StoppedError
        raise BusyError(f"segment {segment.id} of {self._folder} isn't done: another process may hold it; run again")

    def prune(self, keep: set[str], mainline: set[str]) -> None:
        """Remove what nothing goes on from: with a replay memory a checkpoint may take 100 MB.

        Args:
            keep: segments whose checkpoints stay.
            mainline: segments whose policies stay, where these are kept: the mainline was theirs once.
        """
        for name in self._seen:
            if name not in keep:
                shutil.rmtree(self.folder(name) / "checkpoints", ignore_errors=True)
                (self.folder(name) / BEST).unlink(missing_ok=True)
            if name not in keep | mainline:
                shutil.rmtree(self.folder(name) / POLICIES, ignore_errors=True)

    def publish(self, name: str, target: Path) -> None:
        """Copy a segment as an ordinary run to `target`, unless that holds it already."""
        source = self.folder(name)
        if _same_policy(target, source):
            return  # with what it was evaluated on
        with atomic_directory(target) as temp:
            for kept in _KEPT:
                for file in _files(source / kept):
                    copy = temp / file.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)

    def failed(self, name: str) -> bool:
        """Whether a segment was tried and failed."""
        return kept_result(self.folder(name))[0] == "failed"

    def checkpoint(self, name: str) -> Path | None:
        """The newest checkpoint of a segment."""
        return next(reversed(checkpoints_of(self.folder(name) / "checkpoints")), None)

    def folder(self, name: str) -> Path:
        """Where a segment lives."""
        return self._folder / self.place(name)

    def place(self, name: str) -> str:
        """The same, in the run's folder."""
        return (SEGMENTS / name).as_posix()


def _seed(seed: int, stream: int) -> int:
    """The root seed of a segment that begins from scratch."""
    return int(spawn_keys(seed, (_FRESH, stream), 1)[0] >> np.uint64(1)) if stream else seed


def _same_policy(one: Path, other: Path) -> bool:
    """Whether two runs' folders have the same config and the same newest checkpoint."""
    found = []
    for folder in (one, other):
        newest = checkpoints_of(folder / "checkpoints")[-1:]
        files = [folder / "config.toml", *(checkpoint / "manifest.json" for checkpoint in newest)]
        found.append([file.read_bytes() for file in files if file.is_file()])
    return len(found[0]) == 2 and found[0] == found[1]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (p for p in sorted(path.rglob("*")) if p.is_file())
