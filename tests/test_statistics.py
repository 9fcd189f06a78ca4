"""Statistics against SciPy, against numbers worked out by hand, and against what must hold for any data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from echelon.evaluation.convergence import (
    area_under_curve,
    convergence_time,
    kaplan_meier,
    log_rank,
    restricted_mean,
    smoothing_window,
)
from echelon.evaluation.hypothesis_tests import (
    anova,
    brown_forsythe,
    eta_squared,
    hedges_g,
    holm,
    omega_squared,
    one_way,
    pairwise,
    shapiro_wilk,
    welch_anova,
)
from echelon.evaluation.statistics import (
    Interval,
    RunMean,
    difference_of_means,
    difference_of_rates,
    episode_noise,
    interval_of_mean,
    iqm,
    mean_score,
    median_score,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    ratio_of_means,
    resample,
    run_mean,
    stratified_bootstrap,
    wider,
    wilson,
)

RATES = st.floats(0, 1).map(lambda x: round(x, 3))
TASKS = st.lists(st.lists(RATES, min_size=1, max_size=6), min_size=1, max_size=4)
GROUPS = [
    [24.5, 23.5, 26.4, 27.1, 29.9],
    [28.4, 34.2, 29.5, 32.2, 30.1],
    [26.1, 28.3, 24.3, 26.2],
    [20.0, 31.0, 40.0, 22.0, 25.0, 28.0],
]


def holds(interval: Interval | None) -> bool:
    return interval is not None and interval.low <= interval.value <= interval.high


# Aggregates ------------------------------------------------------------------------------------------------------


def test_aggregates_by_hand() -> None:
    scores = [[0.0, 0.5, 1.0], [0.2, 0.4, 0.9], [1.0, 1.0]]
    # Task means are 0.5, 0.5 and 1; of eight runs the middle half is 0.4, 0.5, 0.9, 1.0.
    assert mean_score(scores) == pytest.approx(2 / 3)
    assert median_score(scores) == pytest.approx(0.5)
    assert iqm(scores) == pytest.approx((0.4 + 0.5 + 0.9 + 1.0) / 4)
    assert optimality_gap(scores) == pytest.approx(1 / 3)
    assert optimality_gap(scores, target=0.5) == pytest.approx((0.5 / 3 + (0.3 + 0.1) / 3) / 3)
    np.testing.assert_allclose(performance_profile(scores, [0.0, 0.45, 1.0]), [8 / 9, (2 / 3 + 1 / 3 + 1) / 3, 0.0])


def test_iqm_is_a_trimmed_mean_of_all_runs() -> None:
    scores = np.random.default_rng(0).random((5, 3))
    assert iqm(list(scores.T)) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))


def test_probability_of_improvement_by_hand() -> None:
    # 3 of 4 pairs and one tie; then 0 of 2.
    assert probability_of_improvement([[1, 3]], [[1, 0]]) == pytest.approx(3.5 / 4)
    assert probability_of_improvement([[1, 3], [0.0]], [[1, 0], [1.0, 1.0]]) == pytest.approx(3.5 / 8)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        probability_of_improvement([[1.0]], [[1.0], [2.0]])


def test_probability_of_improvement_is_mann_whitney_s_u() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, 7), rng.integers(0, 6, 5)
    expected = stats.mannwhitneyu(a, b).statistic / 35
    assert probability_of_improvement([a], [b]) == pytest.approx(expected)


@given(TASKS)
def test_aggregates_lie_among_the_runs(scores: list[list[float]]) -> None:
    runs = np.concatenate(scores)
    for statistic in (iqm, mean_score, median_score):
        assert runs.min() - 1e-12 <= statistic(scores) <= runs.max() + 1e-12
    profile = performance_profile(scores, np.linspace(0, 1, 11))
    assert (np.diff(profile) <= 1e-12).all()
    assert profile[-1] == 0


@given(TASKS, st.data())
def test_improvement_of_one_and_of_the_other_add_up_to_one(a: list[list[float]], data: st.DataObject) -> None:
    b = data.draw(st.lists(st.lists(RATES, min_size=1, max_size=6), min_size=len(a), max_size=len(a)))
    there, back = probability_of_improvement(a, b), probability_of_improvement(b, a)
    assert there + back == pytest.approx(1)
    assert 0 <= there <= 1


@given(TASKS)
def test_statistics_leave_leading_axes_alone(scores: list[list[float]]) -> None:
    stacked = [np.stack([t, np.asarray(t)[::-1], np.full(len(t), 0.5)]) for t in map(np.asarray, scores)]
    for statistic in (iqm, mean_score, median_score, optimality_gap):
        got = statistic(stacked)
        assert got.shape == (3,)
        np.testing.assert_allclose(got, [statistic(scores), statistic(scores), statistic([s[2] for s in stacked])])
    assert performance_profile(stacked, [0.1, 0.2]).shape == (3, 2)


# The bootstrap ---------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(TASKS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_bootstrap_is_seeded_and_knows_no_order_of_runs(scores: list[list[float]], seed: int, random) -> None:  # type: ignore[no-untyped-def]
    one = stratified_bootstrap(iqm, scores, resamples=50, seed=seed)
    assert holds(one)
    shuffled = [random.sample(task, len(task)) for task in scores]
    again = stratified_bootstrap(iqm, shuffled, resamples=50, seed=seed)
    assert again is not None
    assert (again.low, again.high) == (one.low, one.high)  # type: ignore[union-attr]
    assert again.value == pytest.approx(one.value)  # type: ignore[union-attr]


def test_the_bootstrap_resamples_runs_within_their_task() -> None:
    drawn = resample([[1.0, 2.0, 3.0], [10.0, 20.0]], np.random.default_rng(0), 200)
    assert [d.shape for d in drawn] == [(200, 3), (200, 2)]
    assert set(drawn[0].ravel()) == {1.0, 2.0, 3.0}
    assert set(drawn[1].ravel()) == {10.0, 20.0}
    # Tasks that don't scatter leave nothing to chance, however different they are.
    assert stratified_bootstrap(mean_score, [[0.0, 0.0], [1.0, 1.0]]) == Interval(0.5, 0.5, 0.5)


def test_the_bootstrap_of_a_mean_is_about_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(0.6, 0.1, 400)
    interval = stratified_bootstrap(mean_score, [values], resamples=4000)
    assert interval is not None
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_bootstrap_says_none_of_what_is_not_finite() -> None:
    assert stratified_bootstrap(lambda a, b: mean_score(a) / mean_score(b), [[1.0, 1.0]], [[0.0, 0.5]]) is None
    for scores in ([], [[]], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one"):
            stratified_bootstrap(mean_score, scores)


@pytest.mark.parametrize(("runs", "least"), [(3, 0.62), (5, 0.78), (10, 0.86)])
def test_how_often_the_bootstrap_s_95_percent_hold_the_truth(runs: int, least: float) -> None:
    """One task: far from 95% with few runs, as its docstring says; the bounds keep it from getting worse."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        interval = stratified_bootstrap(mean_score, [rng.normal(0.7, 0.1, runs)], resamples=300, seed=seed)
        assert interval is not None
        held += interval.low <= 0.7 <= interval.high
    assert least <= held / 300 <= 0.97


def test_difference_of_rates_is_newcombe_s() -> None:
    # Newcombe 1998, table II: 56/70 against 48/80, method 10: 0.0524 to 0.3339.
    interval = difference_of_rates(56, 70, 48, 80)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@given(st.integers(0, 30), st.integers(30, 60), st.integers(0, 30), st.integers(30, 60))
def test_difference_of_rates_holds_its_estimate_and_turns_round(wa: int, na: int, wb: int, nb: int) -> None:
    one, other = difference_of_rates(wa, na, wb, nb), difference_of_rates(wb, nb, wa, na)
    assert holds(one)
    assert -1 <= one.low <= one.high <= 1
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert wilson(wa, na).value - wilson(wb, nb).value == one.value


# Few runs --------------------------------------------------------------------------------------------------------


def test_one_task_s_intervals_are_student_s_and_welch_s() -> None:
    a, b = [0.7, 0.9, 0.85, 0.6], [0.3, 0.5, 0.45]
    mean = interval_of_mean(run_mean([a]))
    assert (mean.low, mean.high) == pytest.approx(stats.t.interval(0.95, 3, np.mean(a), stats.sem(a)))
    gap, expected = difference_of_means(run_mean([a]), run_mean([b])), stats.ttest_ind(a, b, equal_var=False)
    assert (gap.low, gap.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert gap.value == pytest.approx(np.mean(a) - np.mean(b))


def test_tasks_are_strata() -> None:
    # Tasks that differ much and whose runs don't: what lies between tasks is no error.
    a = run_mean([[0.1, 0.2], [0.9, 0.8, 0.7]])
    assert a.value == pytest.approx((0.15 + 0.8) / 2)
    assert a.variance == pytest.approx((0.005 / 2 + 0.01 / 3) / 4)
    assert a.spare == pytest.approx(((0.005 / 2) ** 2 / 1 + (0.01 / 3) ** 2 / 2) / 16)


def test_runs_that_agree_have_the_noise_of_their_episodes() -> None:
    noise = episode_noise(300, 300)
    assert np.sqrt(noise) * stats.norm.ppf(0.975) == pytest.approx(1 - wilson(300, 300).low)
    sure, half = run_mean([[1.0, 1.0, 1.0]], [noise]), run_mean([[0.5, 0.5, 0.5]], [episode_noise(150, 300)])
    for one in (interval_of_mean(sure), difference_of_means(sure, sure), ratio_of_means(sure, sure)):
        assert one is not None
        assert one.low < one.value < one.high
        assert one.high - one.low < 0.12
    gap = difference_of_means(sure, half)
    assert gap.low < 0.5 - (wilson(150, 300).high - 0.5)
    # Noise is a floor: runs that scatter more already hold it.
    assert run_mean([[0.2, 0.9]], [0.001]).variance == run_mean([[0.2, 0.9]]).variance
    assert run_mean([[0.4]], [0.001]) == RunMean(0.4, 0.001, 0.0)


def test_a_ratio_turns_round_and_needs_two_positive_means() -> None:
    a, b = run_mean([[0.8, 0.9, 0.7]]), run_mean([[0.3, 0.4, 0.5]])
    there, back = ratio_of_means(a, b), ratio_of_means(b, a)
    assert there is not None and back is not None
    assert (there.value, there.low, there.high) == pytest.approx((2.0, 1 / back.high, 1 / back.low))
    zero = run_mean([[0.0, 0.0]])
    assert ratio_of_means(a, zero) is None and ratio_of_means(zero, a) is None
    for scores in ([], [[]], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one"):
            run_mean(scores)


@pytest.mark.parametrize(("tasks", "spread"), [(1, 0.0), (1, 0.05), (3, 0.0), (3, 0.05)])
def test_how_often_the_verdicts_95_percent_hold_the_truth_from_three_runs(tasks: int, spread: float) -> None:
    """As the docstring of `run_mean` says; the bootstrap's would fall below every one of these bounds."""
    rng, held = np.random.default_rng(tasks), np.zeros(3)
    for _ in range(400):
        sides = []
        for rate in (0.84, 0.7):
            true = np.clip(rng.normal(rate, spread, (tasks, 3)), 0, 1)
            won = rng.binomial(320, true)
            sides.append(run_mean(list(won / 320), [episode_noise(int(w.sum()), 960) for w in won]))
        one, gap, ratio = interval_of_mean(sides[0]), difference_of_means(*sides), ratio_of_means(*sides)
        assert ratio is not None
        truths = ((one, 0.84), (gap, 0.14), (ratio, 0.84 / 0.7))
        held += [x.low <= truth <= x.high for x, truth in truths]
    assert (held / 400 >= 0.93).all(), held / 400


def test_the_wider_of_two_intervals_at_each_end() -> None:
    assert wider(Interval(0.5, 0.4, 0.9), Interval(0.5, 0.45, 0.95)) == Interval(0.5, 0.4, 0.95)


# Tests between groups --------------------------------------------------------------------------------------------


def test_anova_and_welch_are_scipy_s() -> None:
    expected = stats.f_oneway(*GROUPS)
    statistic, df, p = anova(GROUPS)
    assert (statistic, p) == pytest.approx((expected.statistic, expected.pvalue))
    assert df == (3, 16)
    two = GROUPS[:2]
    statistic, df, p = welch_anova(two)
    t = stats.ttest_ind(*two, equal_var=False)
    assert (statistic, df[1], p) == pytest.approx((t.statistic**2, t.df, t.pvalue))


def test_welch_s_test_of_four_groups_by_hand() -> None:
    """The formulas of Welch 1951, one group after the other."""
    n = [len(g) for g in GROUPS]
    m = [sum(g) / len(g) for g in GROUPS]
    w = [k / (sum((x - mean) ** 2 for x in g) / (k - 1)) for g, k, mean in zip(GROUPS, n, m, strict=True)]
    centre = sum(a * b for a, b in zip(w, m, strict=True)) / sum(w)
    tail = sum((1 - a / sum(w)) ** 2 / (k - 1) for a, k in zip(w, n, strict=True))
    top = sum(a * (b - centre) ** 2 for a, b in zip(w, m, strict=True)) / 3
    statistic, df, p = welch_anova(GROUPS)
    assert statistic == pytest.approx(top / (1 + 2 * 2 / 15 * tail))
    assert df == pytest.approx((3, 15 / (3 * tail)))
    assert p == pytest.approx(stats.f.sf(statistic, *df))


def test_checks_of_assumptions_are_scipy_s() -> None:
    assert shapiro_wilk(GROUPS[0]) == pytest.approx(stats.shapiro(GROUPS[0]).pvalue)
    assert brown_forsythe(GROUPS) == pytest.approx(stats.levene(*GROUPS, center="median").pvalue)
    # Too few different values to have a shape, or to scatter.
    assert shapiro_wilk([1.0, 2.0]) is None
    assert shapiro_wilk([1.0, 1.0, 1.0, 1.0]) is None
    assert shapiro_wilk([1.0, 1.0, 0.9]) is None
    assert brown_forsythe([[1.0, 2.0], [3.0, 5.0]]) is None
    assert brown_forsythe([[1.0] * 3, [2.0] * 3]) is None


@pytest.mark.parametrize("equal", [True, False])
def test_pairs_are_scipy_s_tukey_and_games_howell(equal: bool) -> None:
    if not equal and "equal_var" not in (stats.tukey_hsd.__kwdefaults__ or {}):
        pytest.skip("this SciPy has no Games-Howell")
    expected = stats.tukey_hsd(*GROUPS) if equal else stats.tukey_hsd(*GROUPS, equal_var=False)
    band = expected.confidence_interval()
    pairs = pairwise(GROUPS, equal_variances=equal)
    assert [(q.a, q.b) for q in pairs] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for q in pairs:
        assert q.p == pytest.approx(expected.pvalue[q.a, q.b], abs=1e-9)
        assert q.difference.value == pytest.approx(expected.statistic[q.a, q.b])
        assert (q.difference.low, q.difference.high) == pytest.approx((band.low[q.a, q.b], band.high[q.a, q.b]))


def test_a_single_pair_is_a_t_test() -> None:
    for equal in (True, False):
        (pair,) = pairwise(GROUPS[:2], equal_variances=equal)
        expected = stats.ttest_ind(*GROUPS[:2], equal_var=equal)
        assert pair.p_single == pytest.approx(expected.pvalue)
        assert pair.p == pytest.approx(expected.pvalue, rel=1e-6)
        band = expected.confidence_interval()
        assert (pair.difference.low, pair.difference.high) == pytest.approx((band.low, band.high), rel=1e-6)


def test_pairs_of_groups_without_spread() -> None:
    always, never, some = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.5, 0.6, 0.7]
    first, second, third = pairwise([always, never, some], equal_variances=False)
    assert (first.difference, first.p, first.p_single, first.hedges_g) == (Interval(1.0, 1.0, 1.0), None, None, None)
    # Beside a group without spread, the other's alone is what counts: a one-sample t test.
    assert second.p_single == pytest.approx(stats.ttest_1samp(some, 1.0).pvalue)
    assert third.p_single == pytest.approx(stats.ttest_1samp(some, 0.0).pvalue)
    assert second.p is not None
    # 0.1 has no exact binary form, so that its mean is rounded: no spread even so.
    assert pairwise([[0.1] * 3, [0.7] * 6], equal_variances=True)[0].p is None


def test_effect_sizes_by_hand() -> None:
    groups = [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]
    # Means 2, 3, 6 about 11/3: SSB = 3 (25/9 + 4/9 + 49/9) = 26, SSW = 6, MSW = 1.
    assert eta_squared(groups) == pytest.approx(26 / 32)
    assert omega_squared(groups) == pytest.approx((26 - 2) / 33)
    assert eta_squared([[1.0, 1.0], [1.0, 1.0]]) is None
    assert omega_squared([[1.0, 1.0], [1.0, 1.0]]) is None
    assert eta_squared([[1.0, 1.0], [0.0, 0.0]]) == 1.0
    # d = -4 with 4 degrees of freedom; J = gamma(2) / (sqrt(2) gamma(1.5)).
    assert hedges_g(groups[0], groups[2]) == pytest.approx(-4 * math.gamma(2) / (math.sqrt(2) * math.gamma(1.5)))
    assert hedges_g(groups[0], [1.0]) is None
    assert hedges_g([1.0, 1.0], [0.0, 0.0]) is None


def test_hedges_correction_is_near_its_usual_approximation() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, 12), rng.normal(1, 1, 12)
    d = (a.mean() - b.mean()) / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    assert hedges_g(a, b) == pytest.approx(d * (1 - 3 / (4 * 22 - 1)), rel=1e-3)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.5, 0.9]) == [pytest.approx(0.06), None, 1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
def test_holm_is_monotone_and_never_below_p(ps: list[float | None]) -> None:
    adjusted = holm(ps)
    known = sorted((p, q) for p, q in zip(ps, adjusted, strict=True) if p is not None and q is not None)
    assert [q is None for q in adjusted] == [p is None for p in ps]
    assert all(p <= q <= 1 for p, q in known)
    assert all(x[1] <= y[1] for x, y in itertools.pairwise(known))
    # Never harsher than Bonferroni.
    assert all(q <= min(1.0, p * len(known)) for p, q in known)


# Which test ------------------------------------------------------------------------------------------------------


def test_anova_where_its_assumptions_hold() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(m, 1, 8) for m in (0, 0, 2)]
    result = one_way(groups)
    assert result.test == "anova"
    assert result.p == pytest.approx(stats.f_oneway(*groups).pvalue)
    assert result.df == (2, 21)
    assert all(p is not None and p > 0.05 / 3 for p in result.normality)


def test_welch_where_methods_scatter_unequally() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(0, s, 10) for s in (0.1, 1, 5)]
    result = one_way(groups)
    assert result.test == "welch"
    assert "scatter unequally" in result.reason
    assert result.p == pytest.approx(welch_anova(groups)[2])


def test_welch_where_scores_are_not_normal() -> None:
    skewed = [0.0, 0.01, 0.02, 0.03, 0.02, 0.01, 0.0, 0.9]
    result = one_way([skewed, [0.1 + x for x in skewed]])
    assert result.test == "welch"
    assert "Shapiro-Wilk" in result.reason
    assert "scatter" not in result.reason


def test_two_runs_are_too_few_to_check_and_welch_needs_no_check() -> None:
    result = one_way([[0.1, 0.2], [0.5, 0.8]])
    assert (result.test, result.normality, result.equal_variances) == ("welch", (None, None), None)
    assert "too few runs" in result.reason
    assert result.p == pytest.approx(stats.ttest_ind([0.1, 0.2], [0.5, 0.8], equal_var=False).pvalue)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([], "at least two methods"),
        ([[0.1, 0.2]], "at least two methods"),
        ([[0.1, 0.2], [0.3]], "at least two finished runs"),
        ([[1.0] * 3, [1.0] * 3], "all runs of all methods have the same score"),
        ([[1.0] * 3, [0.0] * 3], "no method's runs differ"),
        ([[1.0] * 3, [0.4, 0.5, 0.7]], "only one's do"),
    ],
)
def test_no_test_has_a_reason(groups: list[list[float]], reason: str) -> None:
    result = one_way(groups)
    assert (result.test, result.statistic, result.df, result.p) == (None, None, None, None)
    assert reason in result.reason


def test_groups_without_spread_are_left_out_of_welch_s_test_and_named() -> None:
    groups = [[1.0] * 3, [0.4, 0.5, 0.7], [0.1, 0.2, 0.6]]
    result = one_way(groups)
    assert (result.test, result.without_spread) == ("welch", (0,))
    assert result.p == pytest.approx(welch_anova(groups[1:])[2])


def test_functions_that_cannot_answer_raise() -> None:
    for function in (anova, welch_anova):
        for groups in ([[1.0, 2.0]], [[1.0, 1.0], [2.0, 2.0]]):
            with pytest.raises(ValueError, match="needs two groups"):
                function(groups)
    with pytest.raises(ValueError, match="two runs"):
        pairwise([[1.0, 2.0], [1.0]], equal_variances=True)


def test_equal_means_whose_rounding_differs_are_equal() -> None:
    """The sum of squares between such groups may come out below 0."""
    same = [0.0, 0.0, 0.0, 0.0, 0.1], [0.0, 0.0, 0.1, 0.0, 0.0]
    assert anova(same) == (0.0, (1.0, 8.0), 1.0)


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]), min_size=2, max_size=5), min_size=2, max_size=3)
)
def test_whatever_the_runs_pairs_and_test_are_finite(groups: list[list[float]]) -> None:
    result = one_way(groups)
    assert (result.test is None) == (result.p is None)
    assert result.p is None or 0 <= result.p <= 1
    for pair in pairwise(groups, equal_variances=result.test == "anova"):
        assert holds(pair.difference)
        assert (pair.p is None) == (pair.p_single is None) == (pair.hedges_g is None)
        assert pair.p is None or 0 <= pair.p_single <= pair.p <= 1  # type: ignore[operator]


# Convergence -----------------------------------------------------------------------------------------------------


def test_convergence_of_a_curve_by_hand() -> None:
    # Seven evaluations: not smoothed. The level is 0.9; from step 30 on all are within 0.05 of it.
    found = convergence_time([0, 10, 20, 30, 40, 50, 60], [0.0, 0.4, 0.8, 0.94, 0.9, 0.88, 0.92])
    assert (found.step, found.converged, found.level) == (30, True, pytest.approx(0.9))


def test_smoothing_forgives_one_bad_evaluation() -> None:
    curve = [0.0, 0.5] + [0.9] * 18
    curve[10] = 0.8
    steps = range(20)
    assert smoothing_window(20) == 3
    # Averages of three: 0.47, 0.77, 0.9, ...; with the dip 0.867, within 0.05 of 0.9.
    assert convergence_time(steps, curve).step == 3
    assert convergence_time(steps, curve, window=1).step == 11


def test_a_curve_below_the_floor_never_converges() -> None:
    flat = [0.4] * 10
    found = convergence_time(range(10), flat)
    assert (found.step, found.converged) == (9, False)
    assert convergence_time(range(10), flat, floor=0.3).converged


def test_a_curve_that_still_rises_is_censored() -> None:
    found = convergence_time(range(11), np.linspace(0, 1, 11))
    assert (found.step, found.converged) == (10, False)


def test_a_method_that_can_do_it_from_the_start_converges_at_once() -> None:
    assert convergence_time([0, 5, 10], [1.0, 1.0, 1.0]).step == 0


def test_noise_of_evaluations_is_allowed_for() -> None:
    """A team at 0.8 from its first evaluation on, each of 32 episodes, has settled as soon as one at 1.0 has."""
    rng = np.random.default_rng(0)
    curves = [np.r_[0.0, rng.binomial(32, 0.8, 20) / 32] for _ in range(100)]
    allowed = np.mean([convergence_time(range(21), c, episodes=32).step for c in curves])
    strict = np.mean([convergence_time(range(21), c).step for c in curves])
    assert allowed < 6 < 12 < strict
    # Where nothing scatters, nothing is allowed for.
    sure = np.r_[0.0, np.ones(20)]
    assert convergence_time(range(21), sure, episodes=32) == convergence_time(range(21), sure)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from([None, 1, 3, 5]))
def test_convergence_is_an_evaluation_s_step_and_needs_its_level(curve: list[float], window: int | None) -> None:
    steps = np.arange(len(curve)) * 100
    found = convergence_time(steps, curve, window=window)
    assert found.step in steps
    assert found.converged or found.step == steps[-1]
    assert not found.converged or found.level > 0.5
    assert 0 <= found.level <= 1


@pytest.mark.parametrize(
    ("steps", "tsr", "options"),
    [([], [], {}), ([0, 0], [1, 1], {}), ([0, 1], [1], {}), ([0, 1], [1, 1], {"window": 2}), ([0], [1], {"last": 0})],
)
def test_a_curve_that_is_none_raises(steps: list[int], tsr: list[float], options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"ascending|odd"):
        convergence_time(steps, tsr, **options)  # type: ignore[arg-type]


def test_area_under_a_curve_by_hand() -> None:
    assert area_under_curve([0, 10, 30], [0.0, 1.0, 1.0]) == pytest.approx((5 + 20) / 30)
    assert area_under_curve([0, 7], [1.0, 1.0]) == 1.0
    with pytest.raises(ValueError, match="two evaluations"):
        area_under_curve([0], [1.0])


def test_kaplan_meier_by_hand() -> None:
    # 5 runs: at 1 one of 5 converges, 2 is censored, at 3 one of 3, at 4 one of 2, at 5 one is censored.
    times, survival = kaplan_meier([1, 2, 3, 4, 5], [True, False, True, True, False])
    np.testing.assert_allclose(times, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(survival, [0.8, 0.8, 0.8 * 2 / 3, 0.8 / 3, 0.8 / 3])


def test_the_restricted_mean_is_the_area_under_kaplan_meier() -> None:
    times, converged = [1, 2, 3, 4, 5], [True, False, True, True, False]
    # 1 of width 1, then 0.8 until 3, 0.533 until 4, 0.267 until 10.
    expected = 1 + 0.8 * 2 + 0.8 * 2 / 3 + 0.8 / 3 * 6
    assert restricted_mean(times, converged, 10).value == pytest.approx(expected)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=1, max_size=8), st.randoms(use_true_random=False)
)
def test_the_restricted_mean_of_runs_censored_at_the_horizon_is_their_mean(runs, random) -> None:  # type: ignore[no-untyped-def]
    times = [float(t) if done else 10.0 for t, done in runs]
    converged = [done for _, done in runs]
    interval = restricted_mean(times, converged, 10.0, resamples=50)
    assert interval.value == pytest.approx(np.mean(times))
    assert interval.low <= interval.value <= interval.high <= 10 + 1e-9
    order = random.sample(range(len(runs)), len(runs))
    assert restricted_mean([times[i] for i in order], [converged[i] for i in order], 10.0, resamples=50) == interval


def test_runs_that_never_converge_lengthen_the_mean() -> None:
    some = restricted_mean([100, 200], [True, True], 1000)
    more = restricted_mean([100, 200, 1000], [True, True, False], 1000)
    assert (some.value, more.value) == (150, pytest.approx(1300 / 3))
    with pytest.raises(ValueError, match="each run needs a time"):
        restricted_mean([], [], 10)


def test_log_rank_is_scipy_s_and_the_textbook_s() -> None:
    a, b = ([1, 3, 4, 9], [True, True, True, False]), ([2, 5, 9, 9], [True, True, False, False])
    found = log_rank(*a, *b)
    x = stats.CensoredData(uncensored=[1, 3, 4], right=[9])
    y = stats.CensoredData(uncensored=[2, 5], right=[9, 9])
    expected = stats.logrank(x, y)
    assert found == pytest.approx((expected.statistic, expected.pvalue))
    # Observed less expected events of the first group over the times 1, 2, 3, 4, 5, and its variance.
    at_risk = [(4, 8), (3, 7), (3, 6), (2, 5), (1, 4)]
    gap = 3 - sum(n1 / n for n1, n in at_risk)
    variance = sum(n1 * (n - n1) / n**2 for n1, n in at_risk)
    assert found is not None
    assert found[0] == pytest.approx(gap / math.sqrt(variance))


def test_log_rank_has_a_sign_and_says_none_of_nothing() -> None:
    early, late = ([1, 2, 3], [True] * 3), ([7, 8, 9], [True] * 3)
    there, back = log_rank(*early, *late), log_rank(*late, *early)
    assert there is not None
    assert back is not None
    assert there[0] > 0 > back[0]
    assert there[1] == pytest.approx(back[1])
    assert log_rank([9, 9], [False, False], [9, 9], [False, False]) is None
    assert log_rank([5, 5], [True, True], [5, 5], [True, True]) is None
