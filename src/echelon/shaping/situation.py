"""What a proposer of shapings is told, what it gives back, and what every proposer can do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeGuard

from echelon.errors import EchelonError
from echelon.llm.prompts import clean
from echelon.shaping.base import ShapingConfig, TermSet
from echelon.shaping.candidates import CONTINUING_TYPES, INITIAL_TYPES, Candidate, CriticCard, ResultDiagnosis
from echelon.shaping.gate import NUMBERS, Summary

__all__ = ["Proposed", "Proposer", "Situation", "Trial", "fresh_id", "score_of"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TEXT = 600  # characters of a rationale
# What else is spoken of beside candidates, however it is written: no reader shall take one for the other.
_RESERVED = frozenset({"reference", "control", "none", "nochange", "mainline"})


@dataclass(frozen=True)
class Trial:
    """Something that was tried in a branch.

    Attributes:
        candidate: what was tried.
        summary: what came of it: `last_k`, `auc`, `final`, `best`, `std` and perhaps more (see `gate.Summary`).
        accepted: whether it replaced the configuration in force; while a checkpoint's rounds go on, whether the gate
            would let it in if it were the only one.
        reasons: what the gate said.
    """

    candidate: Candidate
    summary: Mapping[str, float]
    accepted: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Situation:
    """All that a proposer is told.

    Attributes:
        terms: the world's terms and modes.
        count: how many candidates are wanted.
        initial: they are for a run's first shaping (`INITIAL_TYPES`), not for a change (`CONTINUING_TYPES`).
        current: the configuration in force; None: the task reward alone.
        evidence: what `shaping.evidence` gave. Its behaviour is for the Critic alone.
        control: summary of the branch that changes nothing, once there is one.
        trials: of earlier checkpoints, then of this one's earlier rounds; in order.
        underperforms: the run does worse than its reference: one candidate must be a step back.
        earlier: how many of the trials are of earlier checkpoints: their numbers can't be held against `control`.
    """

    terms: TermSet
    count: int
    initial: bool
    current: ShapingConfig | None
    evidence: Mapping[str, Any]
    control: Mapping[str, float] | None = None
    trials: tuple[Trial, ...] = ()
    underperforms: bool = False
    earlier: int = 0

    @property
    def types(self) -> tuple[str, ...]:
        """The types that candidates may have."""
        return INITIAL_TYPES if self.initial else CONTINUING_TYPES

    @property
    def in_force(self) -> ShapingConfig:
        """What a change is measured against: the task reward alone is the default mode at a strength of 0."""
        default = self.terms.mode(self.terms.default)
        return self.current or ShapingConfig(default.mode, 0.0, default.weights)

    @property
    def tried(self) -> tuple[ShapingConfig, ...]:
        """The configurations of all trials."""
        return tuple(trial.candidate.config for trial in self.trials)

    @property
    def now(self) -> tuple[Trial, ...]:
        """The trials of this checkpoint."""
        return self.trials[self.earlier :]


@dataclass(frozen=True)
class Proposed:
    """What is to be tried.

    Attributes:
        candidates: at most as many as were wanted; `check_candidates` has let them through.
        stage: exploration, acceleration, plateau, regression or uncertain.
        policy: conservative, moderate or recovery.
        note: how they came about, JSON-able, and the same again for the same run. `rules`: true where no model had a
            part in it; `filled`: ids of those that rules made in a model's place.
    """

    candidates: tuple[Candidate, ...]
    stage: str
    policy: str
    note: dict[str, Any] = field(default_factory=dict)

    def named(self, taken: Iterable[str]) -> Proposed:
        """The same under names that nothing in `taken` has, fit for folders; a note that names candidates follows."""
        used, names, found = list(taken), dict[str, str](), list[Candidate]()
        for candidate in self.candidates:
            name = fresh_id(candidate.id, used)
            names.setdefault(candidate.id, name)
            used.append(name)
            found.append(replace(candidate, id=name))
        filled = self.note.get("filled")
        note = {**self.note, "filled": [names.get(old, old) for old in filled]} if _are_names(filled) else self.note
        return replace(self, candidates=tuple(found), note=note)

    def to_json(self) -> dict[str, Any]:
        """As plain values for a run's account."""
        candidates = [
            {"id": c.id, "type": c.type, "config": c.config.to_json(), "rationale": c.rationale}
            for c in self.candidates
        ]  # fmt: skip
        return {"stage": self.stage, "policy": self.policy, "candidates": candidates, "note": self.note}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Proposed:
        """What `to_json` gave.

        Raises:
            EchelonError: something is missing or out of range.
        """
        try:
            candidates = tuple(
                Candidate(
                    id=_name(c["id"]),
                    type=_name(c["type"]),
                    config=ShapingConfig.from_json(c["config"]),
                    rationale=clean(c["rationale"])[:_TEXT],
                )
                for c in data["candidates"]
            )  # fmt: skip
            return cls(candidates, clean(data["stage"]), clean(data["policy"]), dict(data["note"]))
        except (KeyError, TypeError, ValueError) as error:
            raise EchelonError(f"not a round's proposals: {clean(repr(error))[:200]}") from None


class Proposer(Protocol):
    """Who diagnoses a run and proposes shapings; nothing that it says is binding: candidates are checked, and the gate
    decides. A model that fails costs candidates, never the run.

    Attributes:
        name: what it is called in runs and reports.
    """

    name: str

    def diagnose(self, situation: Situation) -> tuple[CriticCard | None, dict[str, Any]]:
        """What goes wrong, or None where it can't say; and how that came about."""
        ...

    def propose(self, situation: Situation, card: CriticCard | None) -> Proposed:
        """What to try. With a card that is all it knows of how the team behaves; with None it sees the evidence."""
        ...

    def review(self, situation: Situation) -> tuple[ResultDiagnosis | None, dict[str, Any]]:
        """What it thinks of this checkpoint's trials (advice), or None; and how that came about."""
        ...


def score_of(summary: Mapping[str, float] | None) -> float | None:
    """The gate's score of a summary, or None where it can't be judged."""
    try:
        last_k, auc, final, best, std = (float((summary or {})[name]) for name in NUMBERS)
    except (KeyError, TypeError, ValueError):
        return None
    read = Summary(last_k, auc, final, best, std)
    return None if read.fault else read.score


def fresh_id(wanted: str, taken: Iterable[str]) -> str:
    """`wanted` as a name that no other candidate or branch has, nor the control, and that is fit for a folder."""
    base = re.sub(r"[^A-Za-z0-9_.-]", "_", wanted).strip(".-")[:56] or "candidate"
    if re.sub(r"[^a-z0-9]", "", base.lower()) in _RESERVED:
        base = f"candidate-{base}"[:56]
    used = {name.lower() for name in taken}  # some file systems don't tell A from a
    name, number = base, 2
    while name.lower() in used:
        name, number = f"{base}-{number}", number + 1
    return name


def _are_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or not value.strip("."):
        raise ValueError(f"{value!r} is no name")
    return value
