"""Who proposes shapings: rules, a language model, or the record of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from echelon.errors import EchelonError
from echelon.llm.prompts import clean
from echelon.llm.text import TextModel
from echelon.shaping.candidates import CriticCard, ResultDiagnosis
from echelon.shaping.heuristic import HeuristicProposer
from echelon.shaping.model_proposer import ModelProposer
from echelon.shaping.situation import Proposed, Proposer, Situation, Trial

__all__ = [
    "HeuristicProposer",
    "ModelProposer",
    "Proposed",
    "Proposer",
    "RecordedProposer",
    "Situation",
    "Trial",
    "make_proposer",
    "needs_model",
]

_RECORDED = "recorded:"


def needs_model(spec: str) -> bool:
    """Whether a proposer of that name is a language model."""
    return spec != HeuristicProposer.name and not spec.startswith(_RECORDED)


def make_proposer(spec: str, writer: TextModel | None = None, *, seed: int = 0) -> Proposer:
    """The proposer of that name.

    Args:
        spec: "heuristic"; "recorded:<a run's account.json, or its folder>"; anything else is a model's name.
        writer: that model.
        seed: see `ModelProposer`.

    Raises:
        EchelonError: a model without a `writer`, or a record that can't be read.
    """
    if spec == HeuristicProposer.name:
        return HeuristicProposer()
    if spec.startswith(_RECORDED):
        return RecordedProposer(Path(spec.removeprefix(_RECORDED)))
    if writer is None:
        raise EchelonError(f"proposer {spec!r}: heuristic, recorded:<account.json>, or a model that writes text")
    return ModelProposer(writer, seed=seed)


class RecordedProposer:
    """Gives back what another run's account holds: its cards, its proposals and its reviews, each in its order.

    A review is that of the round whose proposals were given last. A run that is resumed calls `resume` with its own
    account, so that the next card is the next one.

    Attributes:
        world: the environment of the recorded run.
    """

    def __init__(self, path: Path) -> None:
        """Read an account.

        Args:
            path: an `account.json`, or the folder of its run.

        Raises:
            EchelonError: no such file, or something in it that is no account's.
        """
        self.name = f"{_RECORDED}{path}"
        self._file = path / "account.json" if path.is_dir() else path
        try:
            account = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or "it is no JSON text"
            raise EchelonError(f"account {self._file}: {reason}") from None
        try:
            if account["format"] != 1:
                raise ValueError(f"its format is {account['format']!r}, not 1")
            self.world = clean(account["environment"])
            asked = [stage for stage in account["stages"] if _was_asked(stage, "card")]
            rounds = [round for stage in account["stages"] for round in stage["rounds"]]
            self._cards = [(_read(CriticCard, stage, "card"), dict(stage.get("card_note") or {})) for stage in asked]
            self._proposed = [Proposed.from_json(round["proposed"]) for round in rounds]
            self._reviews = [
                (_read(ResultDiagnosis, round, "review"), dict(round.get("review_note") or {})) for round in rounds
            ]  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, EchelonError) as error:
            words = str(error) if isinstance(error, EchelonError) else repr(error)
            raise EchelonError(f"account {self._file} is none that can be repeated: {clean(words)[:200]}") from None
        self._card = self._round = 0

    def resume(self, account: Mapping[str, Any]) -> None:
        """Go on behind what a run's own account has had from here already."""
        stages = account["stages"]
        self._card = sum(_was_asked(stage, "card") for stage in stages)
        self._round = sum(len(stage["rounds"]) for stage in stages)

    def diagnose(self, situation: Situation) -> tuple[CriticCard | None, dict[str, Any]]:
        """The next card; behind the record's end there is none.

        Raises:
            EchelonError: the record is of another world.
        """
        self.require(situation.terms.world)
        if self._card >= len(self._cards):
            return None, {"exhausted": f"the record holds {len(self._cards)} of the Critic's cards"}
        self._card += 1
        return self._cards[self._card - 1]

    def propose(self, situation: Situation, card: CriticCard | None) -> Proposed:
        """The next round's proposals; behind the record's end there are none.

        Raises:
            EchelonError: the record is of another world.
        """
        self.require(situation.terms.world)
        if self._round >= len(self._proposed):
            note = {"exhausted": f"the record holds {len(self._proposed)} rounds of proposals"}
            return Proposed((), "uncertain", "conservative", note)
        proposed = self._proposed[self._round]
        for candidate in proposed.candidates:
            candidate.config.vector(situation.terms.names)
        self._round += 1
        return proposed

    def review(self, situation: Situation) -> tuple[ResultDiagnosis | None, dict[str, Any]]:
        """The review of the last round.

        Raises:
            EchelonError: the record is of another world.
        """
        self.require(situation.terms.world)
        return self._reviews[self._round - 1] if self._round else (None, {})

    def require(self, world: str) -> None:
        """Refuse another world than the record's.

        Raises:
            EchelonError: it is another.
        """
        if world != self.world:
            raise EchelonError(f"account {self._file} is of {self.world}, not of {world}")


def _was_asked(part: Mapping[str, Any], name: str) -> bool:
    return bool(part.get(name) or part.get(f"{name}_note"))


def _read(schema: Any, part: Mapping[str, Any], name: str) -> Any:
    """A card or a review, checked as a model's own, or None."""
    if part.get(name) is None:
        return None
    try:
        return schema.model_validate(part[name])
    except ValidationError as error:
        raise EchelonError(f"{name}: {clean(error.errors(include_url=False)[0]['msg'])}") from None
