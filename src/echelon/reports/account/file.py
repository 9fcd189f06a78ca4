"""What `account.json` holds, as far as the page tells it, and reading it with one clear line for whatever is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from echelon._files import read_json
from echelon.errors import EchelonError

__all__ = [
    "CONTROL",
    "REFERENCE",
    "TASK_REWARD",
    "Account",
    "Branch",
    "Candidate",
    "Config",
    "Final",
    "Json",
    "MainPoint",
    "Point",
    "Proposed",
    "Round",
    "Segment",
    "Skipped",
    "Stage",
    "Verdict",
    "read_account",
    "says_rules",
]

FORMAT = 1
CONTROL, REFERENCE = "no change", "reference"
TASK_REWARD = "task reward"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def says_rules(note: Mapping[str, Any] | None) -> bool:
    """Whether a note says that rules, and no model, came to what it is of."""
    return note is not None and note.get("rules") is True


Number = Annotated[float | None, BeforeValidator(_finite)]
Json = Mapping[str, Any]


class _Part(BaseModel):
    # Whatever else a writer adds is not the page's business; what isn't there yet is empty.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Config(_Part):
    mode: str
    beta: float
    weights: dict[str, float] = {}


class Point(_Part):
    step: float
    tsr: Number = None
    task_return: Number = None


class MainPoint(Point):
    spent: float
    segment: str = ""
    config: str = TASK_REWARD


class Candidate(_Part):
    id: str
    type: str = ""
    config: Config | None = None
    rationale: str = ""


class Proposed(_Part):
    stage: str = ""
    policy: str = ""
    candidates: list[Candidate] = []
    note: Json = {}


class Round(_Part):
    proposed: Proposed = Proposed()
    review: Json | None = None
    review_note: Json | None = None

    @cached_property
    def by_rules(self) -> frozenset[str]:
        """The candidates that rules made and no model, by their ids."""
        ids, note = [candidate.id for candidate in self.proposed.candidates], self.proposed.note
        if says_rules(note):
            return frozenset(ids)
        filled = note.get("filled")
        if isinstance(filled, list):
            return frozenset(name for name in ids if name in filled)
        # Older accounts have their number: they are the last ones, if all that were proposed are there.
        return frozenset(ids[-self._filled :] if self._filled and not self.unnamed else ())

    @property
    def unnamed(self) -> int:
        """How many more of them rules may have made: an older account doesn't say which were left out."""
        some = self._filled and self.proposed.note.get("left_out") and self._filled < len(self.proposed.candidates)
        return self._filled if some else 0

    @property
    def _filled(self) -> int:
        filled = self.proposed.note.get("filled")
        return max(0, filled) if isinstance(filled, int) and not isinstance(filled, bool) else 0


class Branch(_Part):
    name: str
    round: int | None = None
    seed: int = 0
    run: str = ""
    config: Config | None = None
    curve: list[Point] = []
    problem: str | None = None


class Verdict(_Part):
    accepted: bool
    winner: str | None = None
    reasons: list[str] = []
    best: str | None = None
    rejected: dict[str, str] = {}
    scores: dict[str, Number] = {}


class Stage(_Part):
    name: str
    at: float
    spent: float
    current: Config | None = None
    evidence: Json | None = None
    card: Json | None = None
    card_note: Json | None = None
    rounds: list[Round] = []
    branches: list[Branch] = []
    summaries: dict[str, dict[str, Number]] = {}
    lead: dict[str, list[Number]] = {}
    verdict: Verdict | None = None
    cost: float = 0

    @cached_property
    def tried(self) -> dict[str, list[Branch]]:
        """The branches by name, one a seed."""
        found: dict[str, list[Branch]] = {}
        for branch in self.branches:
            found.setdefault(branch.name, []).append(branch)
        return found

    @cached_property
    def proposed(self) -> dict[str, Candidate]:
        """All candidates by name: those that were proposed, then what was tried without having been."""
        found = {c.id: c for r in self.rounds for c in r.proposed.candidates}
        for name, (branch, *_) in self.tried.items():
            if name not in (CONTROL, REFERENCE):
                found.setdefault(name, Candidate(id=name, config=branch.config))
        return found


class Skipped(_Part):
    name: str
    at: float
    spent: float
    why: str = ""


class Segment(_Part):
    run: str
    start: float | None = Field(None, alias="from")
    to: float | None = None
    config: Config | None = None
    why: str = ""


class Final(_Part):
    config: Any = None
    tsr: Number = None
    task_return: Number = None
    steps: float | None = None
    spent: float | None = None


class Account(_Part):
    format: int
    method: str = "also"
    base: str = ""
    environment: str = ""
    seed: int | None = None
    steps: float | None = None
    proposer: str = ""
    best_return: Number = None
    vocabulary: str = ""
    stages: list[Stage] = []
    notes: list[str] = []
    skipped: list[Skipped] = []
    mainline: list[MainPoint] = []
    segments: list[Segment] = []
    final: Final | None = None

    @cached_property
    def line(self) -> list[MainPoint]:
        """The mainline's evaluations in the order in which their steps were spent."""
        return sorted(self.mainline, key=lambda point: point.spent)

    @property
    def spent(self) -> float:
        """All environment steps so far."""
        known = [point.spent for point in self.mainline] + [stage.spent + stage.cost for stage in self.stages]
        return max([self.final.spent or 0 if self.final else 0, *known])

    @property
    def in_branches(self) -> float:
        return math.fsum(stage.cost for stage in self.stages)

    @property
    def by_rules(self) -> bool:
        """Whether no model had a part in it, also where a record of rules is repeated."""
        notes = [note for stage in self.stages for note in (stage.card_note, *(r.proposed.note for r in stage.rounds))]
        told = [note for note in notes if note and "exhausted" not in note]
        return self.proposer == "heuristic" or (bool(told) and all(map(says_rules, told)))

    @property
    def made_by_rules(self) -> tuple[int, int]:
        """How many candidates rules made, and how many there are."""
        rounds = [round_ for stage in self.stages for round_ in stage.rounds]
        return sum(len(r.by_rules) + r.unnamed for r in rounds), sum(len(r.proposed.candidates) for r in rounds)


def read_account(path: Path) -> Account:
    """The account in that file; an `EchelonError` of one line where it can't be read, is damaged or too new."""
    try:
        data = read_json(path, "account of a shaped run")
    except OSError as error:
        raise EchelonError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise EchelonError(f"account of a shaped run {path} is damaged: it is nested too deeply") from None
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(found, int) or isinstance(found, bool):
        raise EchelonError(f"account of a shaped run {path} is damaged: it has no format")
    if found != FORMAT:
        raise EchelonError(f"{path} is of format {found}, this Echelon reads format {FORMAT}: use a newer Echelon")
    try:
        return Account.model_validate(data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise EchelonError(f"account of a shaped run {path} is damaged: {place}: {fault['msg']}") from None
