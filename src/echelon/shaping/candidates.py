"""What the Critic and the Generator write: schemas of their JSON, and which proposals may be tried.

The types and rules are LLM-ALSO's. Nothing here is trusted: a reply is read, checked against its schema, and each
proposal against the rules; what is wrong with it is said in lines that a repair round can send back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from echelon.errors import EchelonError
from echelon.llm.json_text import json_pieces
from echelon.llm.prompts import clean
from echelon.shaping.base import ShapingConfig, TermSet
from echelon.shaping.gate import Stage

__all__ = [
    "CONTINUING_TYPES",
    "FALLBACK_TYPES",
    "INITIAL_TYPES",
    "Candidate",
    "Checked",
    "CriticCard",
    "GeneratorReply",
    "Policy",
    "Proposal",
    "ResultDiagnosis",
    "check_candidates",
    "is_nontrivial",
    "new_candidates",
    "read_reply",
]

INITIAL_TYPES = (
    "conservative",
    "balanced",
    "exploration_boost",
    "progress_shift",
    "collection_or_coordination_focus",
    "recovery",
    "reference_like",
)
"""Types of proposals for a run's first shaping."""

CONTINUING_TYPES = (
    "conservative_neighbor",
    "beta_down",
    "beta_up",
    "wc_down_wp_up",
    "wc_up_wp_down",
    "reference_like",
    "recovery",
    "coverage_recovery",
    "allocation_rebalance",
    "stability_recovery",
    "progress_shift",
)
"""Types of proposals at a checkpoint. `wc` is the weight of what is done, `wp` that of what leads to it."""

FALLBACK_TYPES = frozenset({"recovery", "reference_like"})
"""Steps back: at most one among the proposals, and one at least where the run does worse than its reference."""

_NOTHING = ShapingConfig("task reward", 0.0, {"none": 1.0})  # equal to all that add nothing
_LOOK = 1 << 16  # characters of a reply that are looked at
_REASONS = 16  # lines that a repair round is told


def _short(text: str) -> str:
    return clean(text)[:600]


def _named(text: object) -> object:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")[:64] if isinstance(text, str) else text


Line = Annotated[str, Field(max_length=4000), AfterValidator(_short)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Lines = Annotated[list[Line], Field(max_length=12)]
# Names of one's own may be put into any words: they are made names.
OwnName = Annotated[str, Field(min_length=1, max_length=64), BeforeValidator(_named)]
Policy = Literal["conservative", "moderate", "recovery"]


class _Reply(BaseModel):
    # JSON numbers and strings are what they are: "0.5" is no number, and NaN none either.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class CriticCard(_Reply):
    """The Critic's diagnosis: all that the Generator gets to see. Texts are one line each, at most 600 characters."""

    analysis_summary: Annotated[Line, Field(description="what the team does, and where it gets stuck")]
    failure_modes: Annotated[Lines, Field(description="a way in which it fails")]
    reward_design_needs: Annotated[Lines, Field(description="what the added reward should pay for")]
    initial_search_priors: Annotated[Lines, Field(description="a term or mixture to try first, and why")]
    risky_directions: Annotated[Lines, Field(description="what an added reward could teach wrongly")]
    objective_interpretation: Annotated[Line, Field(description="what the task reward asks for")]


class Proposal(_Reply):
    """One configuration as the Generator writes it."""

    candidate_id: OwnName
    candidate_type: Name
    pbrs_version: Literal["v2"] = "v2"
    mode: Name
    beta: Annotated[float, Field(ge=0, le=1)]
    active_terms: Annotated[list[Name], Field(min_length=1, max_length=32)]
    weights: Annotated[dict[Name, Annotated[float, Field(ge=0)]], Field(min_length=1, max_length=32)]
    rationale: Line = ""
    expected_effect: Line = ""
    risk_notes: Line = ""
    evidence_keys_used: Lines = []


class GeneratorReply(_Reply):
    """What the Generator proposes for one round."""

    stage_diagnosis: Stage
    search_policy: Policy
    candidates: Annotated[list[Proposal], Field(min_length=1, max_length=12)]


class ResultDiagnosis(_Reply):
    """The Critic's view of a round's branches. It is advice: the gate decides."""

    ranking: Annotated[list[Name], Field(max_length=24)]
    recommended_candidate_id: Name | None = None
    decision: Literal["update", "no_change"]
    confidence: Annotated[float, Field(ge=0, le=1)]
    metric_basis: Lines
    short_reason: Line
    risk_notes: Lines


R = TypeVar("R", bound=_Reply)


def read_reply(text: str, schema: type[R], check: Callable[[R], list[str]] | None = None) -> tuple[R | None, list[str]]:
    """The first JSON object in a text that fits a schema, whatever stands around it.

    Args:
        text: what a model wrote: anything. Its first 64 Ki characters count, behind `</think>` where there is one.
        schema: what it must fit.
        check: what else may be wrong with it, in lines.

    Returns:
        the reply, or None; and what is wrong with it, a line each, for a repair round: what broke off, isn't JSON, or
        doesn't fit. One that fits its schema is given back also where `check` has complaints.
    """
    reasons: list[str] = []
    # Not strict: line breaks in a reason are no reason to lose a reply.
    for piece in json_pieces(text[:_LOOK], "{", strict=False):
        if piece.fault is not None:
            wrong = [piece.fault]
        else:
            try:
                reply = schema.model_validate(piece.value)
            except ValidationError as error:
                faults = error.errors(include_url=False, include_input=False)[:_REASONS]
                wrong = [f"{_place(fault['loc'])}: {clean(fault['msg'])[:200]}" for fault in faults]
            else:
                return reply, [] if check is None else check(reply)[:_REASONS]
        reasons = reasons or wrong  # about the first one: what follows it is mostly an example or a draft
    return None, reasons or ["the reply holds no JSON object"]


def _place(path: tuple[int | str, ...]) -> str:
    return clean(".".join(str(part) for part in path))[:120] or "reply"


@dataclass(frozen=True)
class Candidate:
    """A proposal that may be tried."""

    id: str
    type: str
    config: ShapingConfig
    rationale: str = ""


@dataclass(frozen=True)
class Checked:
    """What is left of some proposals.

    Attributes:
        usable: those that may be tried, in their order.
        reasons: what is wrong with the proposals or with their set, a line each; empty if nothing is.
    """

    usable: tuple[Candidate, ...]
    reasons: tuple[str, ...]


def is_nontrivial(new: ShapingConfig, old: ShapingConfig) -> bool:
    """Whether a change is one: another mode or other active terms, |Δβ| ≥ .10, some |Δw| ≥ .10, or Σ |Δw| ≥ .20."""
    slack = 1e-9
    names = {*new.weights, *old.weights}
    moved = [abs(new.weights.get(name, 0.0) - old.weights.get(name, 0.0)) for name in names]
    return (
        new.mode != old.mode
        or new.active_terms != old.active_terms
        or abs(new.beta - old.beta) >= 0.10 - slack
        or max(moved) >= 0.10 - slack
        or sum(moved) >= 0.20 - slack
    )


def check_candidates(
    proposals: Sequence[Proposal],
    terms: TermSet,
    *,
    count: int,
    types: Sequence[str] = CONTINUING_TYPES,
    current: ShapingConfig | None = None,
    tried: Iterable[ShapingConfig] = (),
    underperforms: bool = False,
) -> Checked:
    """Which proposals may be tried: known words, numbers in range, no duplicates, no trivial change, diverse types.

    A proposal that breaks a rule is left out; the first of two that break one together stays. With too few left, the
    caller asks for a repair, or tries those.

    Args:
        proposals: as they were read.
        terms: the world's terms and modes.
        count: how many are wanted; more than that are left out.
        types: the types that there are; no two proposals may have the same one.
        current: the configuration in force: what a change is measured against; None: there is none yet.
        tried: configurations that were tried before.
        underperforms: the run does worse than its reference: one proposal must be a step back (`FALLBACK_TYPES`).
    """
    reasons: list[str] = []
    usable: list[Candidate] = []
    seen = _seen(current, tried)
    for proposal in proposals:
        fault, config = _fault(proposal, terms, types, current, seen, usable)
        if fault or config is None:
            reasons.append(f"{proposal.candidate_id}: {fault}")
            continue
        if len(usable) == count:
            reasons.append(f"{proposal.candidate_id}: only {count} candidates are wanted")
            continue
        seen[config] = f"candidate {proposal.candidate_id}"
        usable.append(Candidate(proposal.candidate_id, proposal.candidate_type, config, proposal.rationale))
    if len(usable) < count:
        reasons.append(f"{count} candidates are wanted, {len(usable)} can be used")
    if underperforms and not any(candidate.type in FALLBACK_TYPES for candidate in usable):
        reasons.append("the run does worse than its reference: one type must be recovery or reference_like")
    return Checked(tuple(usable), tuple(reasons))


def new_candidates(
    candidates: Iterable[Candidate], *, current: ShapingConfig | None, tried: Iterable[ShapingConfig] = ()
) -> Checked:
    """Those candidates that nothing shapes as yet: what the gate would call the same configuration costs no branch.

    For proposals that `check_candidates` hasn't seen, such as those of a proposer of one's own or of a record, or that
    were made before something else was tried.

    Args:
        candidates: as they are proposed; of equal ones the first stays.
        current: the configuration in force; None: the task reward alone, which is any mixture at a strength of 0.
        tried: configurations that were tried already at this stage.

    Returns:
        the new ones in their order, and for each that isn't a line of its name and what it equals.
    """
    seen = _seen(current or _NOTHING, tried)
    usable: list[Candidate] = []
    reasons: list[str] = []
    for candidate in candidates:
        if candidate.config in seen:
            reasons.append(f"{candidate.id}: the same as {seen[candidate.config]}")
        else:
            seen[candidate.config] = f"candidate {candidate.id}"
            usable.append(candidate)
    return Checked(tuple(usable), tuple(reasons))


def _seen(current: ShapingConfig | None, tried: Iterable[ShapingConfig]) -> dict[ShapingConfig, str]:
    """What a candidate must not equal, and what that is in words."""
    seen: dict[ShapingConfig, str] = {} if current is None else {current: "the configuration in force"}
    for past in tried:
        seen.setdefault(past, "one that was tried before")
    return seen


def _fault(
    proposal: Proposal,
    terms: TermSet,
    types: Sequence[str],
    current: ShapingConfig | None,
    seen: dict[ShapingConfig, str],
    usable: list[Candidate],
) -> tuple[str | None, ShapingConfig | None]:
    """What is wrong with one proposal, or None and its configuration."""
    kind = proposal.candidate_type
    if kind not in types:
        return f"candidate_type {kind!r} is none of {', '.join(types)}", None
    if any(candidate.id == proposal.candidate_id for candidate in usable):
        return "another candidate has the same candidate_id", None
    if any(candidate.type == kind for candidate in usable):
        return f"another candidate is of type {kind} too: types must differ", None
    if kind in FALLBACK_TYPES and any(candidate.type in FALLBACK_TYPES for candidate in usable):
        return f"only one candidate may be of type {' or '.join(sorted(FALLBACK_TYPES))}", None
    if proposal.mode not in terms.modes:
        return f"mode {proposal.mode!r} is none of {', '.join(terms.modes)}", None
    unknown = [name for name in (*proposal.active_terms, *proposal.weights) if name not in terms.names]
    if unknown:
        return f"term {unknown[0]!r} is none of {', '.join(terms.names)}", None
    try:
        config = ShapingConfig(proposal.mode, proposal.beta, proposal.weights, tuple(proposal.active_terms))
    except EchelonError as error:
        return str(error), None
    if config in seen:
        return f"the same as {seen[config]}", None
    if current is not None and not is_nontrivial(config, current):
        return "too small a change: move beta or a weight by 0.10, weights by 0.20 in all, or change the mode", None
    return None, config
