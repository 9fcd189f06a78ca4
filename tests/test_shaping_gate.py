"""The promotion gate: LLM-ALSO's example, each rule by itself, and what must hold of any candidates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from echelon.errors import EchelonError
from echelon.shaping import ShapingConfig, Summary, gate, hopeless, reference_leads, score_lead, summarise

few = settings(max_examples=150)

NC = Summary(0.40, 0.35, 0.42, 0.45, 0.03)
A = Summary(0.46, 0.39, 0.45, 0.50, 0.04)


def test_the_example_of_the_paper() -> None:
    assert NC.score == pytest.approx(0.3835)
    assert A.score == pytest.approx(0.4295)
    verdict = gate(NC, {"a": A})
    assert verdict.accepted
    assert verdict.winner == verdict.best == "a"
    assert verdict.scores == pytest.approx({"a": 0.4295, "no change": 0.3835})


def test_the_score_is_the_formula_of_the_paper() -> None:
    s = A
    long = 0.35 * s.last_k + 0.35 * s.auc + 0.20 * s.final + 0.10 * s.best - 0.10 * (s.best - s.last_k + s.std)
    assert s.score == pytest.approx(long)


def test_summaries_may_be_tuples_or_dicts() -> None:
    table = {"last_k": 0.46, "auc": 0.39, "final": 0.45, "best": 0.50, "std": 0.04}
    assert gate((0.40, 0.35, 0.42, 0.45, 0.03), {"a": table}) == gate(NC, {"a": A})
    rejected = gate(
        NC, {"a": {**table, "valid": False}, "b": {**table, "problem": "its checkpoint is missing"}, "c": None}
    )
    assert not rejected.accepted
    assert rejected.rejected == {
        "a": "the branch isn't valid", "b": "its checkpoint is missing", "c": "there is no summary",
    }  # fmt: skip
    assert rejected.reasons == tuple(f"{name}: {why}" for name, why in rejected.rejected.items())


def test_what_is_no_summary_says_so() -> None:
    with pytest.raises(EchelonError, match="summary of a has 2 numbers"):
        gate(NC, {"a": (0.1, 0.2)})
    with pytest.raises(EchelonError, match="summary of a lacks final"):
        gate(NC, {"a": {"last_k": 1, "auc": 1, "best": 1, "std": 0}})
    with pytest.raises(EchelonError, match="did you mean 'last_k'"):
        gate(NC, {"a": {"lastk": 1}})
    with pytest.raises(EchelonError, match="no number"):
        gate(NC, {"a": (0.1, "x", 0.1, 0.1, 0.1)})  # type: ignore[arg-type]


FIVE = dict(zip(("last_k", "auc", "final", "best", "std"), (0.46, 0.39, 0.45, 0.50, 0.04), strict=True))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"control": 5}, "summary of no change is 5: it must hold last_k"),
        ({"control": "12345"}, "summary of no change is '12345': it must"),
        ({"candidates": {"a": 5}}, "summary of a is 5: it must hold last_k"),
        ({"candidates": {"a": [0.1, [0.2], 0.1, 0.1, 0.1]}}, "summary of a holds something that is no number"),
        ({"candidates": {"a": replace(A, auc="x")}}, "summary of a holds something that is no number"),
        ({"candidates": {"a": {**FIVE, "auc": 10**400}}}, "summary of a holds something that is no number"),
        ({"candidates": {"a": {**FIVE, "config": {"w": 1}}}}, "config of a: not a shaping configuration"),
        ({"candidates": {"a": {**FIVE, "config": [1]}}}, r"config of a is \[1\]: give a ShapingConfig"),
        ({"candidates": {"a": replace(A, config=[1])}}, r"config of a is \[1\]: give a ShapingConfig"),
        ({"candidates": {"a": A, 1: A}}, "a candidate is called 1: a name is a text"),
        ({"candidates": {"no change": A}}, "a candidate is called 'no change', as the control is"),
        ({"candidates": [A]}, "candidates are summaries by name, not "),
        ({"reference": 5}, "summary of reference is 5"),
        ({"lead": {"a": None}}, "lead of a holds something that is no number"),
        ({"lead": 0.1}, "lead is the lower end of an interval by candidate, not 0.1"),
    ],
)
def test_whatever_can_not_be_read_is_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(EchelonError, match=says) as caught:
        gate(**{"control": NC, "candidates": {"a": A}, **given})
    assert "\n" not in str(caught.value)


def test_configurations_may_be_as_an_account_holds_them() -> None:
    def kept(beta: float) -> dict[str, Any]:
        return {**FIVE, "config": ShapingConfig("m", beta, {"x": 1}).to_json()}

    verdict = gate(
        kept(0.1), {"a": kept(0.5), "b": kept(0.5), "c": kept(0.1), "d": replace(A, config=kept(0.1)["config"])}
    )
    assert verdict.rejected == {
        "b": "the same configuration as a", "c": "the same configuration as no change",
        "d": "the same configuration as no change",
    }  # fmt: skip
    # Where a number couldn't be had, an account has null.
    lost = gate(NC, {"a": A, "b": {**dict.fromkeys(FIVE), "score": None, "spike_gap": None}})
    assert lost.winner == "a" and lost.rejected == {"b": "last_k and auc and final and best and std not finite"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # The margins are .04 and .035 here; what is just enough, and what isn't.
        ({"last_k": 0.44}, None),
        ({"last_k": 0.4399}, "last_k"),
        ({"auc": 0.385}, None),
        ({"auc": 0.3849}, "auc"),
        ({"final": 0.40}, None),
        ({"final": 0.3999}, "final"),
        ({"best": 0.56}, None),
        ({"best": 0.5601}, "spike_gap"),
        ({"std": 0.08}, None),
        ({"std": 0.0801}, "std"),
    ],
)
def test_each_rule_by_itself(change: dict[str, float], says: str | None) -> None:
    verdict = gate(NC, {"a": replace(A, **change)})
    assert verdict.accepted is (says is None)
    if says is not None:
        assert verdict.winner is None
        assert verdict.best == "a"
        assert [reason.split(" is ")[0] for reason in verdict.reasons] == [f"a: {says}"]


def test_margins_of_low_and_of_other_returns() -> None:
    # At nothing: .01 and .005 instead of .03 and .02.
    zero = Summary(0, 0, 0, 0, 0)
    small = Summary(0.02, 0.01, 0.03, 0.03, 0.01)
    assert gate(zero, {"a": small}).accepted
    assert not gate(zero, {"a": small}, low_return=False).accepted
    # At high returns the relative margin is the harder one.
    high, better = Summary(0.8, 0.7, 0.8, 0.85, 0.02), Summary(0.84, 0.74, 0.85, 0.88, 0.02)
    assert gate(high, {"a": better}, low_return=False).accepted
    assert not gate(high, {"a": better}).accepted
    # Below nothing too, margins point upwards.
    assert not gate(Summary(-1, -1, -1, -1, 0), {"a": Summary(-0.95, -0.95, -1, -0.95, 0)}).accepted


def test_the_first_replacement_needs_more() -> None:
    just = replace(A, last_k=0.445)
    assert gate(NC, {"a": just}).accepted
    verdict = gate(NC, {"a": just}, first_replacement=True)
    assert [r.split(" is ")[0] for r in verdict.reasons] == ["a: last_k", "a: auc"]
    assert gate(NC, {"a": replace(A, auc=0.406)}, first_replacement=True).accepted


def test_a_reference_that_leads_must_nearly_be_reached() -> None:
    # It leads from .04 on: min(.05, max(.02, .1 * .4)).
    assert not reference_leads(NC, replace(NC, last_k=0.4399))
    assert reference_leads(NC, replace(NC, last_k=0.44))
    good = replace(A, last_k=0.5, auc=0.41)
    assert gate(NC, {"a": good}, replace(NC, last_k=0.53)).accepted
    verdict = gate(NC, {"a": good}, replace(NC, last_k=0.531))
    assert [r.split(" is ")[0] for r in verdict.reasons] == ["a: reference: last_k"]
    # Its lead costs .02 on both margins, and a first replacement another .02.
    assert not gate(NC, {"a": A}, replace(NC, last_k=0.45)).accepted
    reference = replace(NC, last_k=0.45)
    assert gate(NC, {"a": replace(A, last_k=0.481, auc=0.426)}, reference, first_replacement=True).accepted
    assert not gate(NC, {"a": replace(A, last_k=0.479, auc=0.426)}, reference, first_replacement=True).accepted
    # One that can't be judged is left out.
    assert gate(NC, {"a": A}, replace(NC, last_k=math.nan)).accepted


def test_a_tie_changes_nothing() -> None:
    zero = Summary(0, 0, 0, 0, 0.0)
    # .45 * .0142 + .35 * .0104 = .01003; a little less is a tie although all other rules hold.
    assert gate(zero, {"a": Summary(0.0142, 0.0104, 0, 0.0142, 0)}).accepted
    verdict = gate(zero, {"a": Summary(0.0141, 0.0104, 0, 0.0141, 0)})
    assert not verdict.accepted
    assert "tie" in verdict.reasons[0]


def test_only_the_best_score_is_looked_at() -> None:
    spiky = replace(A, last_k=0.6, auc=0.5, best=0.9)
    verdict = gate(NC, {"a": A, "spiky": spiky})
    assert not verdict.accepted
    assert verdict.best == "spiky"


def test_a_control_that_can_not_be_judged_keeps_things_as_they_are() -> None:
    for control in (None, replace(NC, auc=math.nan), replace(NC, problem="unfinished")):
        verdict = gate(control, {"a": A})
        assert not verdict.accepted
        assert verdict.reasons[0].startswith("no change can't be judged")
    assert gate(NC, {}).reasons == ("there is no candidate",)


def test_candidates_that_are_not_finite_or_not_new_are_out() -> None:
    config = ShapingConfig("m", 0.5, {"x": 1})
    same = ShapingConfig("other name", 0.5, {"x": 2})
    verdict = gate(
        replace(NC, config=ShapingConfig("m", 0.1, {"x": 1})),
        {
            "b": replace(A, config=same, last_k=0.9),
            "a": replace(A, config=config),
            "c": replace(A, config=ShapingConfig("m", 0.1, {"x": 1})),
            "d": replace(A, final=math.inf),
        },
    )
    assert verdict.winner == "a"
    assert verdict.rejected == {
        "b": "the same configuration as a", "c": "the same configuration as no change", "d": "final not finite",
    }  # fmt: skip


def test_the_soft_rule_looks_at_the_score_alone() -> None:
    # A leads by .046 > .03 and is accepted however spiky; a penalty of .005 for a reference out of reach.
    assert gate(NC, {"a": replace(A, best=0.9)}, soft=True).accepted
    assert not gate(NC, {"a": replace(A, last_k=0.42)}, soft=True).accepted
    near = replace(A, last_k=0.43)  # .416: ahead by .0025
    assert gate(NC, {"a": near}, soft=True).accepted
    assert not gate(NC, {"a": near}, replace(NC, last_k=0.6), soft=True).accepted


def test_a_lead_that_may_be_chance_is_none() -> None:
    assert gate(NC, {"a": A}, lead={"a": 0.01}).accepted
    verdict = gate(NC, {"a": A}, lead={"a": -0.01})
    assert not verdict.accepted
    assert "lead" in verdict.reasons[0]


def test_a_curve_by_hand() -> None:
    # The last five of 1 2 3 4 5 6: mean 4, variance 2; of best 10.
    assert summarise([1, 2, 3, 4, 5, 6], best_return=10) == Summary(
        0.4, pytest.approx(0.35), 0.6, 0.6, pytest.approx(math.sqrt(2) / 10)
    )
    seeds = summarise([[0, 2], [2, 4]])
    assert (seeds.auc, seeds.final, seeds.best) == (2, 3, 3)
    assert summarise([]).fault == "no evaluation was made"
    assert summarise([1, math.nan]).fault == "an evaluation isn't finite"
    with pytest.raises(ValueError, match="best_return"):
        summarise([1], best_return=0)
    with pytest.raises(ValueError, match="curve is"):
        summarise(np.zeros((1, 1, 1)))


def test_the_lead_of_several_seeds() -> None:
    rng = np.random.default_rng(0)
    control, better = rng.normal(0.3, 0.02, (5, 8)), rng.normal(0.5, 0.02, (4, 8))
    lead, low, high = score_lead(control, better)
    assert 0.15 < low < lead < high < 0.25
    assert score_lead(control[::-1], better[::-1]) == pytest.approx((lead, low, high), abs=1e-12)
    _, low, high = score_lead(control, control)
    assert low < 0 < high
    with pytest.raises(ValueError, match="finite"):
        score_lead(control, [[math.nan]])


# -- properties -----------------------------------------------------------------------------------------------------

shares = st.integers(0, 100).map(lambda n: n / 100)
summaries = st.builds(
    lambda k, auc, final, gap, std: Summary(k, auc, final, k + gap, std),
    shares, shares, shares, st.integers(0, 20).map(lambda n: n / 100), st.integers(0, 20).map(lambda n: n / 100),
)  # fmt: skip
several = st.dictionaries(st.sampled_from("abcdef"), summaries, min_size=1, max_size=5)
gains = st.integers(0, 30).map(lambda n: n / 100)


@few
@given(summaries, several, st.none() | summaries, st.booleans(), st.booleans(), st.booleans(), st.data())
def test_a_candidate_that_gets_better_in_everything_is_never_worse_off(nc, those, ref, first, low, soft, data) -> None:
    options = {"first_replacement": first, "low_return": low, "soft": soft}
    before = gate(nc, those, ref, **options)
    assume(before.accepted)
    won = those[before.winner]
    more = data.draw(gains)
    better = Summary(
        won.last_k + more, won.auc + data.draw(gains), won.final + data.draw(gains),
        won.best + data.draw(st.sampled_from([0, more])), won.std * data.draw(st.sampled_from([0, 0.5, 1])),
    )  # fmt: skip
    after = gate(nc, {**those, before.winner: better}, ref, **options)
    assert after.winner == before.winner


@few
@given(summaries, several, st.none() | summaries)
def test_who_wins_is_beaten_by_nobody_in_everything(nc, those, ref) -> None:
    best = gate(nc, those, ref).best
    won = those[best]
    for name, other in those.items():
        ahead = other.last_k > won.last_k and other.auc > won.auc and other.final > won.final and other.std < won.std
        assert name == best or not ahead


@few
@given(summaries, several, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(nc, those, random) -> None:
    names = list(those)
    random.shuffle(names)
    assert gate(nc, {name: those[name] for name in names}) == gate(nc, those)


@few
@given(summaries, st.booleans(), st.booleans())
def test_no_change_never_beats_itself(nc, low, soft) -> None:
    assert not gate(nc, {"same": nc}, low_return=low, soft=soft).accepted


@few
@given(summaries, summaries, summaries)
def test_a_reference_never_makes_it_easier(nc, it, ref) -> None:
    for soft in (False, True):
        if gate(nc, {"a": it}, ref, soft=soft).accepted:
            assert gate(nc, {"a": it}, soft=soft).accepted


def test_a_rise_is_no_spike() -> None:
    rise = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8]
    published, ours = summarise(rise), summarise(rise, rising=True)
    assert published.spike_gap == pytest.approx(0.38)
    assert ours.spike_gap == pytest.approx(0.0)
    assert ours.std < 0.03 < published.std
    told = ("last_k", "auc", "final", "best")
    assert [getattr(ours, name) for name in told] == [getattr(published, name) for name in told]
    assert ours.best == ours.final == 0.8
    # The gate as published sends this branch away for its rise; a fall from a peak is a fall for both.
    still = summarise([0.0] * 6)
    assert not gate(still, {"a": published}).accepted
    assert gate(still, {"a": ours}).accepted
    fall = summarise([0.1, 0.2, 0.8, 0.5, 0.3, 0.3], rising=True)
    assert fall.spike_gap == pytest.approx(0.8 - 0.475)
    assert not gate(still, {"a": fall}).accepted


@few
@given(
    st.tuples(*[st.floats(0, 1)] * 5), st.tuples(*[st.floats(0, 1)] * 5), st.booleans(), st.booleans(), st.booleans()
)
def test_where_it_is_hopeless_nothing_is_accepted(
    control: tuple[float, ...], branch: tuple[float, ...], first: bool, low: bool, soft: bool
) -> None:
    settings: dict[str, bool] = {"first_replacement": first, "low_return": low, "soft": soft}
    if hopeless(control, **settings):
        assert not gate(control, {"a": branch}, **settings).accepted  # type: ignore[arg-type]


def test_hopeless_begins_where_margins_end_above_one() -> None:
    def still(level: float) -> tuple[float, ...]:
        return (level, level, level, level, 0.0)

    assert [hopeless(still(x)) for x in (0.0, 0.9, 0.91, 1.0)] == [False, False, True, True]
    assert [hopeless(still(x), low_return=False) for x in (0.97, 0.975)] == [False, True]
    assert hopeless(still(0.9), first_replacement=True) and not hopeless(still(0.96), soft=True)


def test_a_summary_as_accounts_keep_it_is_one() -> None:
    """With its own spike gap, and a score that is worked out anew."""
    rise, still = summarise([0.0, 0.1, 0.2, 0.4, 0.6, 0.8], rising=True), summarise([0.0] * 6)
    kept = {name: getattr(rise, name) for name in ("last_k", "auc", "final", "best", "std", "score", "spike_gap")}
    assert gate(still, {"a": kept}) == gate(still, {"a": rise})
    assert gate(still, {"a": {**kept, "spike_gap": math.nan}}).rejected == {"a": "spike_gap not finite"}


def test_two_evaluations_that_rise_are_steady() -> None:
    rise = summarise([0.0, 0.9], rising=True)
    assert rise.std == pytest.approx(0.0) and gate(summarise([0.0, 0.0]), {"a": rise}).accepted


def test_the_lead_is_of_the_scores_that_the_gate_sees() -> None:
    still, rise = [[0.0] * 6] * 2, [[0.0, 0.1, 0.2, 0.4, 0.6, 0.8]] * 2
    for rising in (False, True):
        lead, low, high = score_lead(still, rise, rising=rising)
        ours, theirs = (summarise(curves, rising=rising) for curves in (still, rise))
        assert lead == pytest.approx(theirs.score - ours.score) == pytest.approx(low) == pytest.approx(high)


def test_of_a_flat_curve_the_rise_changes_nothing() -> None:
    flat = [0.5] * 7
    assert summarise(flat, rising=True) == summarise(flat)
