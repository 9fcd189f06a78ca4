"""A proposer without a model: rules over the same evidence that a Critic is told. All rules are our choice.

The flags and the curve's stage say what the team lacks ("needs"); a need says which terms should weigh more, hence
which of the world's mixtures come first; and each type of proposal has a list of ideas, of which the first that wasn't
tried is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any, get_args

from echelon.shaping.base import ShapingConfig, TermSet
from echelon.shaping.candidates import FALLBACK_TYPES, Candidate, CriticCard, ResultDiagnosis, is_nontrivial
from echelon.shaping.gate import Stage
from echelon.shaping.situation import Proposed, Situation, Trial, fresh_id, score_of

__all__ = ["NEEDS", "HeuristicProposer"]

NEEDS: Mapping[str, str] = {
    "reach": "reward for getting near goals and for looking at new places",
    "handle": "reward for taking up and carrying on what is near",
    "finish": "reward for what is done in full",
    "spread": "reward for standing near different goals",
    "order": "reward for keeping apart and for steady ways",
    "calm": "less shaping, on what is done: what was learnt should stay",
    "retreat": "a step back: the last returns are below earlier or unchanged ones",
}
"""What a team may lack, and what a shaping should then do."""

# Which terms serve a need, by the terms' names, and where a world means something else by a name.
_TERMS: Mapping[str, frozenset[str]] = {
    "reach": frozenset({"approach", "app", "fetch", "seen", "cov", "shelf"}),
    "handle": frozenset({"pickup", "carry", "equipped", "ready", "goal"}),
    "finish": frozenset({"found", "explored", "deliv", "repaired", "col"}),
    "spread": frozenset({"spread", "apart", "cov", "alloc"}),
    "order": frozenset({"traffic", "stab", "apart"}),
}
_OWN: Mapping[tuple[str, str], frozenset[str]] = {
    ("search", "handle"): frozenset({"seen", "explored"}),  # what is near are regions, and they are there to be seen
    ("repair", "reach"): frozenset({"fetch", "unlocked"}),
    ("repair", "handle"): frozenset({"equipped", "approach"}),
    ("repair", "spread"): frozenset({"unlocked", "traffic"}),
}
_CALM = frozenset({"order", "calm", "retreat"})  # needs for which a weaker shaping is better
_CALM_SHARE = 0.3  # what a strength of 0 instead of 1 counts for those, in weight of terms

_FLAGS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "goal_discovery_failure": (("reach",), "in most episodes nobody was ever near a goal"),
    "near_goal_failure": (("handle", "finish"), "robots get near goals and nothing comes of it"),
    "over_concentration": (("spread",), "robots crowd around one goal"),
    "blocked_traffic": (("order",), "robots block each other"),
    "unstable_behavior": (("order",), "robots go to and fro or around in circles"),
    "low_coverage": (("reach", "spread"), "the team sees little of the map"),
    "idle_team": (("reach",), "robots stand still most of the time"),
    "insufficient_evidence": ((), "too few episodes were recorded to say how the team behaves"),
}
_STAGES: Mapping[str, tuple[str, ...]] = {
    "exploration": ("reach", "handle"),
    "acceleration": ("handle", "finish"),
    "plateau": ("handle", "finish"),
    "regression": ("retreat",),
    "uncertain": (),
}
_GOOD = 0.7  # a plateau from here on is one at success
_CLEAR = 0.02  # by how much a score must be below the control's to speak against shaping

_INITIAL: Mapping[str, tuple[str, ...]] = {
    "reach": ("exploration_boost",),
    "handle": ("progress_shift",),
    "finish": ("collection_or_coordination_focus",),
    "spread": ("collection_or_coordination_focus",),
    "order": ("conservative",),
    "calm": ("conservative",),
    "retreat": ("conservative", "recovery"),
}
_CONTINUING: Mapping[str, tuple[str, ...]] = {
    "reach": ("coverage_recovery", "beta_up"),
    "handle": ("progress_shift",),
    "finish": ("wc_up_wp_down",),
    "spread": ("allocation_rebalance",),
    "order": ("stability_recovery",),
    "calm": ("stability_recovery", "beta_down"),
    "retreat": ("beta_down", "recovery", "stability_recovery"),
}
# What remains, in order; those whose name promises least come first, since they take any leftover too.
_REST = (
    ("balanced", "finish"), ("conservative_neighbor", "finish"), ("exploration_boost", "reach"),
    ("progress_shift", "handle"), ("collection_or_coordination_focus", "finish"), ("coverage_recovery", "reach"),
    ("allocation_rebalance", "spread"), ("stability_recovery", "order"), ("conservative", "calm"),
    ("wc_up_wp_down", "finish"), ("wc_down_wp_up", "reach"), ("beta_up", "reach"), ("beta_down", "calm"),
    ("reference_like", "calm"), ("recovery", "calm"),
)  # fmt: skip


class HeuristicProposer:
    """Rules over the evidence, no model; the same situation always has the same answer.

    Proposals are named mixtures of the world first, then stronger, weaker and shifted ones and mixtures of two, so
    that there is something to try in any world with a few modes. They pass `check_candidates`; there are fewer than
    wanted only where the types are used up (each may occur once, one of them a step back: 6 and 10).
    """

    name = "heuristic"

    def diagnose(self, situation: Situation) -> tuple[CriticCard, dict[str, Any]]:
        """The flags and the curve in words, and which needs follow from them."""
        terms, curve, flags = situation.terms, _part(situation.evidence, "curve"), _flags(situation.evidence)
        needs = _needs(situation)
        refused = [trial for trial in situation.trials if not trial.accepted][-3:]
        risky = [
            f"{trial.candidate.config.mode} at beta {trial.candidate.config.beta:.2f} was refused" for trial in refused
        ]
        if needs[0] in _CALM:
            risky.append("a larger beta")
        card = CriticCard(
            analysis_summary=f"{_stage(situation.evidence)}: the task return stands at {_number(curve, 'last_k'):.0%} "
            f"of the best, the best evaluation at {_number(curve, 'best'):.0%}, after {_number(curve, 'points'):.0f} "
            f"evaluations; {_number(curve, 'slope'):+.3f} an evaluation lately",
            failure_modes=[f"{flag}: {_FLAGS[flag][1]}" for flag in flags],
            reward_design_needs=[f"{need}: {NEEDS[need]}" for need in needs[:3]],
            initial_search_priors=[f"{need}: {', '.join(_ranked(terms, need)[:2])}" for need in needs],
            risky_directions=risky,
            objective_interpretation=f"the task return of {terms.world}, without any shaping",
        )  # fmt: skip
        return card, {"rules": True, "flags": list(flags), "needs": list(needs)}

    def propose(self, situation: Situation, card: CriticCard | None) -> Proposed:
        """Candidates by the card's needs; without a card, or with one that names none, by the evidence."""
        needs = _needs_in(card) or _needs(situation)
        stage = _stage(situation.evidence)
        step_back = situation.underperforms or needs[0] == "retreat"
        careful = stage == "acceleration" or needs[0] == "calm"
        policy = "recovery" if step_back else "conservative" if careful else "moderate"
        candidates = self.fill(situation, (), needs=needs)
        return Proposed(candidates, stage, policy, {"rules": True, "needs": list(needs)})

    def fill(
        self, situation: Situation, have: Sequence[Candidate], *, needs: Sequence[str] | None = None
    ) -> tuple[Candidate, ...]:
        """Candidates that go with those in `have`, up to `situation.count` in all; those in `have` aren't among them.

        Where a step back is needed and there is none in `have`, the first is one.
        """
        needs = _needs(situation) if needs is None else needs
        ideas = _Ideas(situation)
        old = situation.in_force
        seen = {old, *situation.tried, *(c.config for c in have)}
        kinds = {c.type for c in have}
        names = {c.id for c in (*have, *(t.candidate for t in situation.trials))}
        found: list[Candidate] = []

        def take(kind: str, configs: Iterable[tuple[ShapingConfig, str]]) -> None:
            if len(have) + len(found) >= situation.count or kind in kinds:
                return
            if kind in FALLBACK_TYPES and kinds & FALLBACK_TYPES:
                return
            for config, why in configs:
                if config not in seen and is_nontrivial(config, old):
                    name = fresh_id(config.mode, names)
                    found.append(Candidate(name, kind, config, why))
                    seen.add(config)
                    kinds.add(kind)
                    names.add(name)
                    return

        slots = _slots(situation, needs)
        if situation.underperforms:
            take("reference_like", ideas.of("reference_like", "calm"))
            take("recovery", chain(ideas.of("recovery", "calm"), ideas.leftovers()))
        for kind, need in slots:
            take(kind, ideas.of(kind, need))
        for kind, _ in sorted(slots, key=lambda slot: slot[0].startswith(("beta", "wc"))):
            take(kind, ideas.leftovers())
        return tuple(found)

    def review(self, situation: Situation) -> tuple[ResultDiagnosis | None, dict[str, Any]]:
        """The trials of this checkpoint by the gate's score, beside the control's; None where none can be judged."""
        note = {"rules": True}
        scores = {trial.candidate.id: s for trial in situation.now if (s := score_of(trial.summary)) is not None}
        ranking = sorted(scores, key=lambda name: (-scores[name], name))[:24]
        if not ranking:
            return None, note
        control = score_of(situation.control)
        ahead = None if control is None else scores[ranking[0]] - control
        update = ahead is not None and ahead > _CLEAR
        told = "there is no control to compare with" if ahead is None else f"{ahead:+.4f} from no change's"
        diagnosis = ResultDiagnosis(
            ranking=ranking,
            recommended_candidate_id=ranking[0] if update else None,
            decision="update" if update else "no_change",
            confidence=0.5 if ahead is None else round(min(1.0, 0.5 + 5 * abs(ahead - _CLEAR)), 4),
            metric_basis=[f"score of {name}: {scores[name]:.4f}" for name in ranking[:12]],
            short_reason=f"the best score is that of {ranking[0]}, {told}",
            risk_notes=[],
        )
        return diagnosis, note


def _part(evidence: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = evidence.get(name)
    return part if isinstance(part, Mapping) else {}


def _number(part: Mapping[str, Any], name: str) -> float:
    value = part.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _flags(evidence: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags that are known, the most telling first."""
    raised = evidence.get("flags") or ()
    return tuple(flag for flag in _FLAGS if flag in raised)


def _stage(evidence: Mapping[str, Any]) -> Stage:
    stage = _part(evidence, "curve").get("stage")
    return next((known for known in get_args(Stage) if known == stage), "uncertain")


def _needs(situation: Situation) -> tuple[str, ...]:
    """What the team lacks, the most urgent first; all needs but the calming ones are somewhere in it."""
    evidence = situation.evidence
    stage, curve = _stage(evidence), _part(evidence, "curve")
    needs: list[str] = []
    if stage == "regression" or _all_worse(situation):
        needs.append("retreat")
    elif stage == "plateau" and _number(curve, "last_k") >= _GOOD:
        needs.append("calm")
    for flag in _flags(evidence):
        needs += _FLAGS[flag][0]
    needs += (*_STAGES[stage], "reach", "handle", "finish", "spread", "order")
    return tuple(dict.fromkeys(needs))


def _all_worse(situation: Situation) -> bool:
    """Whether all that was tried at this checkpoint did clearly worse than no change."""
    control = score_of(situation.control)
    scores = [score_of(trial.summary) for trial in situation.now]
    return control is not None and bool(scores) and all(s is not None and s < control - _CLEAR for s in scores)


def _needs_in(card: CriticCard | None) -> tuple[str, ...]:
    """The needs that a card's priors name, in their order."""
    named = [line.partition(":")[0] for line in card.initial_search_priors] if card is not None else []
    return tuple(dict.fromkeys(need for need in named if need in NEEDS))


def _terms_of(terms: TermSet, need: str) -> tuple[str, ...]:
    """The world's terms that serve a need."""
    need = "finish" if need in ("calm", "retreat") else need
    wanted = _OWN.get((terms.world, need), _TERMS[need])
    return tuple(name for name in terms.names if name in wanted)


def _ranked(terms: TermSet, need: str) -> list[str]:
    """The modes that serve a need better than the mean of them does, best first; of equals the table's first."""
    wanted = _terms_of(terms, need)

    def serves(mode: str) -> float:
        config = terms.modes[mode]
        return sum(config.weights.get(name, 0.0) for name in wanted) + _CALM_SHARE * (need in _CALM) * (1 - config.beta)

    mean = sum(map(serves, terms.modes)) / len(terms.modes)
    return sorted((m for m in terms.modes if serves(m) >= mean - 1e-9), key=lambda m: -round(serves(m), 9))


def _slots(situation: Situation, needs: Sequence[str]) -> list[tuple[str, str]]:
    """Types of proposals in the order in which they are made, each with the need that it serves."""
    table = _INITIAL if situation.initial else _CONTINUING
    wanted = [(kind, need) for need in needs for kind in table[need]]
    if situation.initial:
        wanted.insert(1, ("balanced", "finish"))  # the mixture that is meant to do no matter what is lacking
    elif _stage(situation.evidence) == "acceleration":
        wanted.insert(0, ("conservative_neighbor", needs[0]))
    wanted += [slot for slot in _REST if slot[0] in situation.types]
    first: dict[str, str] = {}
    for kind, need in wanted:
        first.setdefault(kind, need)
    return list(first.items())


class _Ideas:
    """Configurations to try, each with why; what was tried is among them."""

    def __init__(self, situation: Situation) -> None:
        self.terms, self.now = situation.terms, situation.current
        self.default = self.terms.mode(self.terms.default)
        # Changes start from the best trial that did better than no change, else from what is in force.
        self.base = _leader(situation) or self.now or self.default

    def of(self, kind: str, need: str) -> Iterator[tuple[ShapingConfig, str]]:
        """Ideas for a type of proposal, best first."""
        base, default = self.base, self.default
        if kind == "beta_up":
            yield from _strengths(base, (1.5, 2.0, 1.25, 3.0), up=True)
        elif kind == "beta_down":
            yield from _strengths(base, (0.5, 0.75, 0.25, 0.1), up=False)
        elif kind == "reference_like":
            yield default, "the mixture that a fixed shaping would take"
            yield from _strengths(default, (1.5, 2.0), up=True)
            yield from _strengths(default, (0.5, 0.25), up=False)
        elif kind == "recovery":
            if self.now is not None:
                yield _mixed(default, self.now, 0.5, beta=min(default.beta, self.now.beta) / 2), "half way back, weaker"
            yield from _strengths(default, (0.5, 0.25), up=False)
            if self.now is not None:
                yield ShapingConfig(self.now.mode, 0.0, self.now.weights), "back to the task reward alone"
        elif kind == "balanced":
            yield default, "the balanced mixture"
            yield from _strengths(default, (1.5, 0.5, 2.0), up=None)
        elif kind == "conservative_neighbor":
            if base is not self.now:
                yield from _strengths(base, (0.75, 1.25), up=None)
            for mode in _ranked(self.terms, need):
                yield _mixed(self.terms.modes[mode], base, 0.5), f"half way to {mode}"
        elif kind in ("wc_up_wp_down", "wc_down_wp_up"):
            towards = _terms_of(self.terms, "finish")
            if kind == "wc_down_wp_up":
                towards = tuple(name for name in self.terms.names if name not in towards)
            for share in (0.3, 0.5, 0.2, 0.7):
                yield from _shifted(base, towards, share)
        else:
            modes = [self.terms.modes[mode] for mode in _ranked(self.terms, need)]
            for config in modes:
                yield config, f"{need}: {NEEDS[need]}"
            for config in modes:
                yield from _strengths(config, (0.5, 1.5) if need in _CALM else (1.5, 0.5), up=None)
            for share in (0.3, 0.5, 0.7):
                yield from _shifted(base, _terms_of(self.terms, need), share)

    def leftovers(self) -> Iterator[tuple[ShapingConfig, str]]:
        """All modes, grid mixtures and mixtures of two at all strengths, the coarse ones first: thousands."""
        grid = [ShapingConfig(self.default.mode, c.beta, c.weights) for c in self.terms.grid.values()]
        points = [*self.terms.modes.values(), *grid]
        pairs = list(combinations(points, 2))
        for step in (20, 10, 5, 1):
            between = (_mixed(a, b, eighths / 8) for eighths in (4, 2, 6, 1, 3, 5, 7) for a, b in pairs)
            for config in chain(points, between):
                for percent in range(step, 101, step):
                    yield ShapingConfig(config.mode, percent / 100, config.weights), "one that wasn't tried yet"


def _leader(situation: Situation) -> ShapingConfig | None:
    control = score_of(situation.control)

    def score(trial: Trial) -> float:
        own = score_of(trial.summary)
        return -1e9 if own is None else own

    best = max(situation.now, key=score, default=None)
    ahead = best is not None and control is not None and score(best) > control
    return best.candidate.config if best is not None and ahead else None


def _strengths(
    config: ShapingConfig, factors: Sequence[float], *, up: bool | None
) -> Iterator[tuple[ShapingConfig, str]]:
    """Stronger and weaker ones, 0.1 away at least if there is room; `up` leaves out those on the other side."""
    for factor in factors:
        step = max(0.1, abs(factor - 1) * config.beta)
        beta = round(min(1.0, config.beta + step) if factor > 1 else max(0.05, config.beta - step), 4)
        if beta == config.beta or (up is not None and (beta > config.beta) is not up):
            continue
        yield ShapingConfig(config.mode, beta, config.weights), f"{config.mode} at beta {beta:g}, not {config.beta:g}"


def _mixed(a: ShapingConfig, b: ShapingConfig, share: float, *, beta: float | None = None) -> ShapingConfig:
    """A mixture of two, `share` of it from `a`; it has the name of the one with the larger share."""
    weights = {
        name: share * a.weights.get(name, 0.0) + (1 - share) * b.weights.get(name, 0.0)
        for name in sorted({*a.weights, *b.weights})
    }
    beta = round(share * a.beta + (1 - share) * b.beta, 4) if beta is None else beta
    return ShapingConfig((a if share >= 0.5 else b).mode, beta, {name: round(w, 6) for name, w in weights.items()})


def _shifted(config: ShapingConfig, towards: Sequence[str], share: float) -> Iterator[tuple[ShapingConfig, str]]:
    """The same with `share` of all weight given to some terms in equal parts; nothing where there are none."""
    if towards:
        part = ShapingConfig(config.mode, config.beta, dict.fromkeys(towards, 1.0))
        yield _mixed(part, config, share), f"{share:.0%} of the weight to {', '.join(towards)}"
