"""The distilled planner: what it learns, when it trusts itself, what it may ask, and that it forgets nothing."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from echelon.envs import SubgoalKind
from echelon.errors import EchelonError
from echelon.evaluation import statistics
from echelon.planners import Planner
from echelon.planners.distilled import (
    NEVER,
    DistilConfig,
    DistilledPlanner,
    Student,
    calibrate,
    choose,
    wilson,
)
from echelon.planners.llm import LLMPlanner
from echelon.planners.student import Network, open_counts, questions
from echelon.subgoals import PlanRequest, SubgoalTracker
from test_planners import WORLDS, ask, check_sound, options, tracker_of, used

Teacher = Callable[[PlanRequest], NDArray[np.float32]]
SMALL = {"size": 10, "num_agents": 3, "num_packages": 5}


def stream(seed: int = 0, num_envs: int = 64, **env: Any) -> Iterator[PlanRequest]:
    """Requests of worlds in which a crowd moves about; about a third of the agents need a subgoal."""
    tracker: SubgoalTracker = tracker_of("warehouse", num_envs, seed, **{**SMALL, **env})
    world, rng = tracker.env, np.random.default_rng(seed)
    while True:
        for _ in range(4):
            world.advance(rng.integers(0, 5, (num_envs, world.num_agents)).astype(np.int8))
            if (world.terminated | world.truncated).any():
                world.autoreset()
            tracker.tick += 1
        tracker.need[:] = rng.random(tracker.need.shape) < 0.35
        yield ask(tracker)


def take(count: int, **env: Any) -> list[PlanRequest]:
    return list(itertools.islice(stream(**env), count))


def is_open(request: PlanRequest) -> NDArray[np.bool_]:
    """Open candidates, written down anew; in warehouses, where there are no tools."""
    assert request.distance is not None
    c = request.candidates
    taken = np.array([[request.taken[i, np.maximum(t, 0)] & (t >= 0) for t in row] for i, row in enumerate(c.task)])
    return (c.kind > 0) & (request.distance != 65535) & ~request.refused & ~taken & request.need[..., None]


def by_length(worth: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Teacher:
    """A teacher whose probabilities are proportional to exp(worth(path lengths))."""

    def teach(request: PlanRequest) -> NDArray[np.float32]:
        assert request.distance is not None
        good = is_open(request)
        logits = np.where(good, worth(request.distance.astype(float)), -np.inf)
        top = np.where(good.any(-1), logits.max(-1), 0)[..., None]
        odds = np.exp(logits - top)
        total = odds.sum(-1, keepdims=True)
        return (odds / np.where(total > 0, total, 1)).astype(np.float32)

    return teach


nearest = by_length(lambda d: -50.0 * d)
farthest = by_length(lambda d: 50.0 * d)
soft = by_length(lambda d: -d / 4)
whim = by_length(lambda d: 4.0 * np.sin(d * 2.4))


def by_chance(request: PlanRequest) -> NDArray[np.float32]:
    rng = np.random.default_rng(int(request.keys[0, 0] >> np.uint64(1)))
    odds = np.where(is_open(request), rng.exponential(size=request.candidates.kind.shape), 0)
    total = odds.sum(-1, keepdims=True)
    return (odds / np.where(total > 0, total, 1)).astype(np.float32)


def taught(teacher: Teacher, answers: int = 2000, *, seed: int = 0, **config: Any) -> Student:
    """A student that was asked about everything."""
    student = Student(DistilConfig(**config), seed)
    for request in stream(seed):
        student.learn(request, request.need, teacher(request))
        if student.answers >= answers:
            return student
    raise AssertionError


def agreement(student: Student, teacher: Teacher, requests: list[PlanRequest]) -> tuple[float, int]:
    """How often the student's most probable candidate is one of the teacher's, over agents with a choice."""
    agreed = []
    for request in requests:
        probability, _ = student.decide(request, request.need)
        target = teacher(request)
        several = is_open(request).sum(-1) > 1
        mine = np.take_along_axis(target, probability.argmax(-1)[..., None], -1)[..., 0]
        agreed += (mine >= target.max(-1) - 1e-6)[several].tolist()
    return float(np.mean(agreed)), len(agreed)


@pytest.fixture(scope="module")
def of_nearest() -> Student:
    return taught(nearest)


# -- the network ----------------------------------------------------------------------------------------------------


def torch_loss(network: Network, raw: Any, count: Any, target: Any, picks: Any, flat: torch.Tensor) -> torch.Tensor:
    """The same network, candidate by candidate in float64, from the description in words."""
    H, at, parts = network.hidden, 0, []
    for shape in ((8, H), (64, H), (18, H), (H,), (H, H), (H, H), (H, H), (H,), (H,)):
        size = int(np.prod(shape))
        parts.append(flat[at : at + size].reshape(shape))
        at += size
    assert at == len(flat)
    kinds, lengths, scalars, bias, second, of_mean, of_peak, bias2, last = parts
    losses = []
    for q in picks:
        rows = raw[q, : count[q]].astype(np.float64)
        near = rows[0, 1]
        features = []
        for kind, length, down, right, nearer in rows:
            del kind
            rank, gap = int((rows[:, 1] < length).sum()), length - near
            features.append([
                length / 32, np.log1p(length) / 4, 1 / (1 + length), np.exp(-length / 6), min(rank, 16) / 8,
                1 / (1 + rank), rank == 0, gap / 16, np.log1p(gap) / 3, abs(down) / 16, abs(right) / 16,
                np.sign(down), np.sign(right), (length - abs(down) - abs(right)) / 16, min(nearer, 8) / 4, nearer == 0,
                1 / len(rows), min(len(rows), 32) / 16,
            ])  # fmt: skip
        x = torch.tensor(np.array(features, np.float64))
        kind_of, length_of = rows[:, 0].astype(int), np.minimum(rows[:, 1], 63).astype(int)
        h = torch.relu(kinds[kind_of] + lengths[length_of] + x @ scalars + bias)
        context = h.mean(0) @ of_mean + h.max(0).values @ of_peak + bias2
        logits = torch.relu(h @ second + context) @ last
        losses.append(-(torch.tensor(target[q, : count[q]]).double() * torch.log_softmax(logits, 0)).sum())
    return torch.stack(losses).mean()


def test_answers_and_gradient_are_those_of_autograd() -> None:
    network = Network(7, 3)
    rng = np.random.default_rng(0)
    network.flat += rng.normal(0, 0.2, network.flat.shape).astype(np.float32)
    request = take(1, size=18, num_packages=7)[0]
    raw, count, target = questions(request, request.need, soft(request))
    assert (count > 3).any()
    picks = np.flatnonzero(count > 1)[[0, 3, 3, 5, 8, 1]]
    flat = torch.tensor(network.flat, dtype=torch.float64, requires_grad=True)
    loss = torch_loss(network, raw, count, target, picks, flat)
    loss.backward()
    assert flat.grad is not None
    assert flat.grad.abs().max() > 0.05
    np.testing.assert_allclose(network.gradient(raw, count, target, picks), flat.grad.numpy(), rtol=2e-4, atol=2e-6)
    predicted = network.predict(raw, count)
    ours = -np.mean([(target[q, : count[q]] * np.log(predicted[q, : count[q]])).sum() for q in picks])
    assert ours == pytest.approx(float(loss.detach()), rel=1e-5)


def test_adam_is_torchs() -> None:
    network = Network(4, 0)
    request = take(1)[0]
    raw, count, target = questions(request, request.need, soft(request))
    one = np.flatnonzero(count > 1)[:1]
    weights = torch.tensor(network.flat.copy(), requires_grad=True)
    theirs = torch.optim.Adam([weights], lr=0.01)
    for _ in range(5):
        weights.grad = torch.tensor(network.gradient(raw[one], count[one], target[one], np.zeros(3, np.int64)).copy())
        theirs.step()
        network.step(raw[one], count[one], target[one], 1, 3, 0.01, np.uint64(7))
        np.testing.assert_allclose(network.flat, weights.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_what_is_told_of_a_candidate() -> None:
    """By hand: kinds, path lengths, straight ways and robots that are nearer, the nearest first."""
    tracker = tracker_of(size=9, layout="open", num_agents=2, num_packages=2, num_zones=1)
    env = tracker.env
    env.pos[0] = [env.cell_index(4, 4), env.cell_index(0, 1)]
    env.task_cell[0] = [env.cell_index(0, 4), env.cell_index(5, 3)]
    request = ask(tracker)
    raw, count, order = questions(request, request.need, np.array([[[0, 1, 9], [2, 3, 9]]], np.float32))
    fetch = int(SubgoalKind.FETCH)
    assert count.tolist() == [2, 2]
    assert raw[0, :2].tolist() == [[fetch, 2, 1, -1, 0], [fetch, 4, -4, 0, 1]]
    assert raw[1, :2].tolist() == [[fetch, 3, 0, 3, 0], [fetch, 7, 5, 2, 1]]
    assert order.tolist() == [[1, 0, 0], [2, 3, 0]]
    # Who needs nothing is nobody's rival; who was asked for before, and is no longer, still is.
    again = dataclasses.replace(request, need=np.array([[True, False]]))
    np.testing.assert_array_equal(questions(again, again.need, np.zeros((1, 2, 3), np.float32))[0][0], raw[0])
    tracker.need[0, 1] = False
    alone = ask(tracker)
    assert questions(alone, alone.need, np.zeros((1, 2, 3), np.float32))[0][0, :, 4].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"probabilities \(1, 2, 2\) of candidates \(1, 2, 3\)"):
        questions(alone, alone.need, np.zeros((1, 2, 2), np.float32))


@pytest.mark.parametrize(("name", "env"), WORLDS)
def test_open_is_what_the_language_model_is_asked_about(name: str, env: dict[str, Any]) -> None:
    class Deaf:
        name = "deaf"

        def score(self, prompts: Any) -> Any:
            raise AssertionError

    tracker = used(name, **env)
    tracker.need[:] = True
    request = ask(tracker)
    request.refused[::3, :, 0] = True
    planner = LLMPlanner(Deaf(), max_options=26)
    probability, _ = Student(DistilConfig(), 0).decide(request, request.need)
    counts = open_counts(request, request.need)
    for i, a in np.argwhere(request.need):
        shown = planner.open(request, request.taken, int(i), int(a))
        assert np.flatnonzero(probability[i, a]).tolist() == shown.tolist()
        assert counts[i, a] == len(shown)
    assert (counts > 1).any()


# -- what it learns -------------------------------------------------------------------------------------------------


def test_it_learns_a_teacher_and_carries_it_over_to_other_sizes(of_nearest: Student) -> None:
    assert of_nearest.report()["agreement"] > 0.95
    for env in (SMALL, {"size": 20}, {"size": 20, "num_agents": 4, "num_packages": 12}):
        share, count = agreement(of_nearest, nearest, take(8, seed=9, **env))
        assert share > 0.95 and count > 200, env


def test_it_learns_how_probable_each_candidate_is() -> None:
    student = taught(soft, 3000)
    distances, means = [], []
    for request in take(6, seed=5):
        several = is_open(request).sum(-1) > 1
        told, (mine, _) = soft(request)[several], student.decide(request, request.need)
        distances.append(np.abs(mine[several] - told).sum(-1).mean() / 2)
        even = is_open(request)[several] / is_open(request)[several].sum(-1, keepdims=True)
        means.append(np.abs(even - told).sum(-1).mean() / 2)
    assert np.mean(distances) < 0.04
    assert np.mean(means) > 0.2, "there is something to learn"


def test_a_models_whim_about_single_numbers_is_learnt() -> None:
    """Language models like some numbers better than others: nothing that is smooth in the path length is enough."""
    student = taught(whim, 3000)
    assert student.report()["agreement"] > 0.9
    assert agreement(student, whim, take(6, seed=4))[0] > 0.9
    assert agreement(student, nearest, take(6, seed=4))[0] < 0.7


def test_nothing_is_learnt_from_broken_answers() -> None:
    student = Student(DistilConfig(every=1), 0)
    request = take(1)[0]
    several = open_counts(request, request.need) > 1
    good, weights = nearest(request), student.network.flat.copy()
    for bad in (np.full_like(good, np.nan), np.full_like(good, np.inf), -good, good * 0):
        student.learn(request, request.need, bad)
    assert student.answers == 0 and student.dropped == 4 * several.sum()
    np.testing.assert_array_equal(student.network.flat, weights)
    student.learn(request, request.need & ~several, good)
    student.learn(request, np.zeros_like(request.need), good)
    assert student.answers == 0 and student.dropped == 4 * several.sum()
    student.learn(request, request.need, good * 7)
    assert student.answers == student.network.updates == several.sum()
    assert np.isfinite(student.network.flat).all()


def test_the_memory_holds_the_last_answers() -> None:
    student = Student(DistilConfig(memory=50, window=20, every=1000), 0)
    expected: list[list[float]] = []
    for request in take(4):
        target = soft(request)
        student.learn(request, request.need, target)
        _, count, wanted = questions(request, request.need, target)
        expected += wanted[count > 1].tolist()
        held = student.arrays()["target"]
        kept = np.array(expected[-50:], np.float32)
        np.testing.assert_allclose(held[np.lexsort(held.T)], kept[np.lexsort(kept.T)], atol=1e-5)
    assert student.network.updates == student.answers // 1000


# -- the gate -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=60), st.sampled_from([0.3, 0.5, 0.8, 0.95]))
@settings(max_examples=200)
def test_the_threshold_is_the_smallest_that_is_good_enough(records: list[tuple[int, bool]], wanted: float) -> None:
    confidence = np.array([c for c, _ in records], np.float32) / 12
    agreed = np.array([a for _, a in records], bool)
    good = []
    for t in confidence:
        above = agreed[confidence >= t]
        if statistics.wilson(int(above.sum()), len(above)).low >= wanted:
            good.append(float(t))
    assert calibrate(confidence, agreed, wanted) == min(good, default=NEVER)


def test_wilson_is_the_houses() -> None:
    for k, n in ((0, 1), (1, 1), (3, 7), (99, 100), (500, 512)):
        told = statistics.wilson(k, n)
        low, high = wilson(k, n)
        assert (float(low), float(high)) == (pytest.approx(told.low), pytest.approx(told.high))
    assert [float(x) for x in wilson(0, 0)] == pytest.approx([0, 1])


def test_73_answers_without_a_fault_are_needed_for_95_percent() -> None:
    same = np.full(80, 0.9, np.float32)
    assert calibrate(same[:72], np.ones(72, bool), 0.95) == NEVER
    assert calibrate(same[:73], np.ones(73, bool), 0.95) == pytest.approx(0.9)


def run(student: Student, teacher: Teacher, rounds: int, *, per: int = 0, seed: int = 1) -> list[dict[str, Any]]:
    """Plan as in a run, `per` environment steps a round; what was decided in each."""
    told = []
    for k, request in enumerate(itertools.islice(stream(seed), rounds)):
        request = dataclasses.replace(request, steps=k * per)
        probability, confidence = student.decide(request, request.need)
        threshold, several = student.threshold, open_counts(request, request.need) > 1
        if student.asked < student.config.start:
            threshold = NEVER
        sure, ask_ = student.gate(request, request.need, confidence)
        told.append({"sure": sure, "ask": ask_, "several": several, "confidence": confidence, "steps": k * per,
                     "unsure": several & (confidence < np.float32(threshold)), "trained": student.network.updates > 0,
                     "asked": student.asked, "request": request})  # fmt: skip
        student.learn(request, ask_, teacher(request))
        del probability
    return told


def test_a_teacher_that_throws_dice_never_opens_the_gate() -> None:
    student = Student(DistilConfig(start=100, calls_per_million=1_000_000, audit=0.5), 0)
    told = run(student, by_chance, 40, per=1000)
    assert student.answers > 1500 and student.report()["open"] == 0
    assert all((t["sure"] == (~t["several"] & t["request"].need)).all() for t in told), "no choice, no doubt"
    assert student.report()["agreement"] < 0.6
    assert student.spared == student.audited == 0


def test_it_opens_for_a_teacher_that_can_be_learnt_and_only_after_the_start() -> None:
    student = Student(DistilConfig(start=300, calls_per_million=0), 0)
    told = run(student, nearest, 30)
    for t in told:
        if t["asked"] < 300:
            assert not (t["sure"] & t["several"]).any()
    assert student.asked == 300 and student.audited == 0
    report = student.report()
    assert report["open"] == 1 and student.spared > 500
    assert (
        report["agreement"] > 0.95 and report["agreement_low"] < report["agreement"] < report["agreement_high"] + 1e-9
    )


def test_a_teacher_that_changes_its_mind_closes_the_gate_again() -> None:
    student = Student(DistilConfig(start=300, calls_per_million=1_000_000, audit=0.3, window=200), 0)
    run(student, nearest, 20, per=1000)
    assert student.report()["open"] == 1
    before = student.report()["sure_agreement"]
    assert before > 0.95
    told = run(student, farthest, 30, per=10_000, seed=2)
    sure = [float((t["sure"] & t["several"]).sum() / t["several"].sum()) for t in told]
    assert sure[0] > 0.5 and min(sure) == 0.0
    assert student.report()["sure_agreement"] < before


@pytest.mark.parametrize("rate", [0, 7_000, 40_000])
def test_the_budget_is_kept_to_the_question(rate: int) -> None:
    student = Student(DistilConfig(start=60, calls_per_million=rate, agreement=0.999), 0)
    over = 0
    for t in run(student, soft, 25, per=500):
        allowed = 60 + rate * t["steps"] // 1_000_000
        assert t["asked"] <= allowed
        beyond = t["unsure"] & ~t["ask"]
        if beyond.any():
            assert t["asked"] == allowed, "who could still be asked is asked"
            asked = t["unsure"] & t["ask"]
            if asked.any():
                assert t["confidence"][asked].max() <= t["confidence"][beyond].min(), "the least sure first"
        assert (t["sure"][beyond] == t["trained"]).all()
        over += int(beyond.sum()) if t["trained"] else 0
        assert not (t["ask"] & t["sure"]).any()
    assert student.over_budget == over > 0
    assert student.report()["calls_left"] == 0


def test_before_anything_was_learnt_the_fallback_decides() -> None:
    student = Student(DistilConfig(start=0, calls_per_million=0), 0)
    request = take(1)[0]
    _, confidence = student.decide(request, request.need)
    sure, ask_ = student.gate(request, request.need, confidence)
    several = open_counts(request, request.need) > 1
    assert not ask_.any() and (sure == (request.need & ~several)).all()
    assert student.untrained == several.sum() > 0 and student.over_budget == 0


def test_a_busy_model_is_not_asked(of_nearest: Student) -> None:
    student = through_files(of_nearest, Student(DistilConfig(calls_per_million=10**6, audit=1.0), 0))
    request = dataclasses.replace(take(1)[0], steps=10**9)
    student.asked = 500
    several = open_counts(request, request.need) > 1
    for threshold, over in ((NEVER, several.sum()), (0.0, 0)):
        student.threshold, student.over_budget = threshold, 0
        sure, ask_ = student.gate(request, request.need, np.full(request.need.shape, 0.7, np.float32), busy=True)
        assert (sure == request.need).all() and not ask_.any() and student.over_budget == over
    assert student.asked == 500
    assert student.gate(request, request.need, np.ones(request.need.shape, np.float32))[1].sum() == several.sum()


def sure_of_everything(**config: Any) -> Student:
    student = Student(DistilConfig(start=0, **config), 0)
    student.threshold = 0.0
    return student


def test_audits_are_the_wanted_share_and_the_same_each_time() -> None:
    requests = [dataclasses.replace(r, steps=10**9) for r in take(40, num_envs=64)]
    student, again = (sure_of_everything(audit=0.1, calls_per_million=10**6) for _ in range(2))
    sure = audited = 0
    for request in requests:
        _, confidence = student.decide(request, request.need)
        decided, ask_ = student.gate(request, request.need, confidence)
        several = open_counts(request, request.need) > 1
        assert (decided == request.need).all() and not (ask_ & ~several).any()
        np.testing.assert_array_equal(again.gate(request, request.need, confidence)[1], ask_)
        sure, audited = sure + int(several.sum()), audited + int(ask_.sum())
    assert sure > 1500
    assert abs(audited - 0.1 * sure) < 4 * (0.09 * sure) ** 0.5
    assert (student.audited, student.spared, student.asked) == (audited, sure - audited, audited)


def test_audits_are_at_most_half_of_what_the_budget_allows() -> None:
    student = sure_of_everything(audit=1.0, calls_per_million=1000)
    for k, request in enumerate(take(10)):
        request = dataclasses.replace(request, steps=k * 7000)
        student.gate(request, request.need, np.ones(request.need.shape, np.float32))
        assert student.audited == student.asked == k * 7 // 2


def test_audits_and_the_least_sure_share_what_is_left() -> None:
    student = sure_of_everything(audit=1.0, calls_per_million=1000)
    student.threshold = 0.8
    request = dataclasses.replace(take(1)[0], steps=8000)
    several = open_counts(request, request.need) > 1
    confidence = np.random.default_rng(0).uniform(0.5, 1, request.need.shape).astype(np.float32)
    sure, ask_ = student.gate(request, request.need, confidence)
    unsure = several & (confidence < np.float32(0.8))
    assert (student.asked, student.audited) == (8, 4) == (ask_.sum(), (ask_ & sure).sum())
    assert sorted(confidence[ask_ & unsure]) == sorted(confidence[unsure])[:4]


def test_regret_by_hand() -> None:
    """A student that knows nothing takes the nearest; the model prefers what is 2 steps farther, 3 to 1."""
    tracker = tracker_of(size=9, layout="open", num_agents=2, num_packages=2, num_zones=1)
    env = tracker.env
    env.pos[0] = [env.cell_index(4, 4), env.cell_index(4, 0)]
    env.task_cell[0] = [env.cell_index(0, 4), env.cell_index(5, 3)]
    request = ask(tracker)
    student = Student(DistilConfig(every=100), 0)
    student.learn(request, request.need, np.array([[[0.75, 0.25, 0], [0.2, 0.8, 0]]], np.float32))
    report = student.report()
    assert report["agreement"] == 0.5 and report["agreement_count"] == 2
    assert report["regret"] == pytest.approx(np.log(3) / 2)
    assert report["extra_steps"] == -1.0
    # A draw is agreement, whichever of the two it is.
    student.learn(request, request.need, np.array([[[0.5, 0.5, 0], [0.5 + 2e-7, 0.5, 0]]], np.float32))
    assert student.report()["agreement"] == 0.75
    # What the model holds for impossible costs no more than a factor of a million.
    student.learn(request, request.need & [True, False], np.array([[[1, 0, 0], [0, 0, 0]]], np.float32))
    assert student.report()["regret"] == pytest.approx((np.log(3) + np.log(1e6)) / 5, rel=1e-6)
    assert json.loads(json.dumps(report)) == report


# -- choices of a team ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "env"), WORLDS)
@pytest.mark.parametrize("everybody", [False, True])
def test_a_team_gets_no_task_twice(of_nearest: Student, name: str, env: dict[str, Any], everybody: bool) -> None:
    tracker = used(name, **env)
    if everybody:
        tracker.need[:] = True
    request = ask(tracker)
    planner: Planner = DistilledPlanner(of_nearest)
    before = request.taken.copy()
    plan = planner.plan(request)
    np.testing.assert_array_equal(request.taken, before)
    check_sound(tracker, request, plan)
    assert plan.probability is not None and plan.notes is not None
    total = plan.probability.sum(-1)
    np.testing.assert_allclose(total[(total > 0)], 1, rtol=1e-5)
    assert not total[~request.need].any()
    told = json.loads(json.dumps(plan.notes(0)))
    assert list(told["agents"]) == [str(a) for a in np.flatnonzero(request.need[0])]


def test_the_surer_one_gets_the_task_and_the_other_its_next_best() -> None:
    request = ask(tracker_of(size=12, num_agents=3, num_packages=4, seed=2))
    assert request.distance is not None
    request.distance[0, 2, :4] = [9, 4, 6, 5]
    probability = np.zeros((1, 3, 5), np.float32)
    probability[0, :2, :4] = [[0.1, 0.6, 0.2, 0.1], [0.05, 0.8, 0.05, 0.1]]
    confidence = np.array([[0.75, 0.9, 0.0]], np.float32)
    assert choose(request, request.need, probability, confidence).tolist() == [[2, 1, 3]]
    # Who isn't asked about takes nothing; who comes last and knows nothing gets the nearest that is left.
    only = np.array([[False, True, True]])
    assert choose(request, only, probability, confidence).tolist() == [[-1, 1, 3]]
    request.refused[0, 2, 3] = True
    assert choose(request, only, probability, confidence).tolist() == [[-1, 1, 2]]
    request.taken[0, :3] = True
    assert choose(request, only, probability, confidence).tolist() == [[-1, 3, -1]]


def permuted(request: PlanRequest, agents: list[int], candidates: list[int]) -> PlanRequest:
    c, both = request.candidates, np.ix_(range(len(request.rows)), agents, candidates)
    assert request.distance is not None
    return dataclasses.replace(
        request, need=request.need[:, agents], distance=request.distance[both], refused=request.refused[both],
        pos=request.pos[:, agents], keys=request.keys[:, agents],
        candidates=dataclasses.replace(c, kind=c.kind[both], cell=c.cell[both], task=c.task[both]),
    )  # fmt: skip


def test_the_order_of_agents_and_candidates_means_nothing(of_nearest: Student) -> None:
    request = take(1, num_agents=4, num_packages=6, size=14)[0]
    request.need[:] |= np.random.default_rng(0).random(request.need.shape) < 0.5
    agents, candidates = [2, 0, 3, 1], [int(c) for c in np.random.default_rng(1).permutation(7)]
    assert request.candidates.kind.shape[2] == len(candidates)
    turned = permuted(request, agents, candidates)
    probability, confidence = of_nearest.decide(request, request.need)
    p, sureness = of_nearest.decide(turned, turned.need)
    np.testing.assert_array_equal(p, probability[:, agents][..., candidates])
    np.testing.assert_array_equal(sureness, confidence[:, agents])
    mine = DistilledPlanner(of_nearest).plan(request).task
    theirs = DistilledPlanner(of_nearest).plan(turned).task
    # Of equals the first agent chooses first, so rows with equals are left out.
    distinct = np.array([len(set(c[n].tolist())) == n.sum() for c, n in zip(confidence, request.need, strict=True)])
    assert distinct.sum() > 20
    np.testing.assert_array_equal(theirs[distinct], mine[:, agents][distinct])


def test_a_worlds_answer_does_not_depend_on_the_batch(of_nearest: Student) -> None:
    tracker = tracker_of(num_envs=6, **SMALL)
    whole, part = ask(tracker), ask(tracker, [4, 1])
    for x, y in zip(of_nearest.decide(whole, whole.need), of_nearest.decide(part, part.need), strict=True):
        np.testing.assert_array_equal(x[[4, 1]], y)


def test_nobody_to_plan_for_and_nothing_to_do(of_nearest: Student) -> None:
    request = ask(tracker_of(num_envs=3, **SMALL))
    nobody = np.zeros_like(request.need)
    probability, confidence = of_nearest.decide(request, nobody)
    assert not probability.any() and not confidence.any()
    nothing = dataclasses.replace(request, refused=np.ones_like(request.refused))
    before = of_nearest.state_dict()
    for r, who in ((request, nobody), (nothing, request.need)):
        student = Student(DistilConfig(), 0)
        probability, confidence = student.decide(r, who)
        sure, ask_ = student.gate(r, who, confidence)
        assert (sure == who).all() and not ask_.any() and not confidence.any()
        assert (student.choose(r, who, probability, confidence) == -1).all()
        student.learn(r, who, probability)
        assert student.answers == student.dropped == student.asked == student.spared == 0
    assert DistilledPlanner(of_nearest).plan(nothing).kind.tolist() == [[SubgoalKind.WAIT] * 3] * 3
    empty = ask(tracker_of(num_envs=3, **SMALL), np.empty(0, np.int64))
    assert DistilledPlanner(of_nearest).plan(empty).kind.shape == (0, 3)
    assert of_nearest.state_dict() == before
    one = dataclasses.replace(request, refused=request.refused.copy())
    one.refused[:, :, 1:] = True
    assert (of_nearest.decide(one, one.need)[1] == 1).all(), "what is the only one is sure"
    assert options(one, 0, 0)


# -- state ----------------------------------------------------------------------------------------------------------


def through_files(student: Student, other: Student) -> Student:
    """What a checkpoint does: JSON for the state, one .npz for the arrays."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = student.arrays()
    np.savez(buffer, **arrays)
    buffer.seek(0)
    other.load_state_dict(json.loads(json.dumps(student.state_dict())))
    with np.load(buffer, allow_pickle=False) as file:
        other.load_arrays(dict(file))
    return other


def test_a_student_put_back_in_the_middle_goes_on_to_the_last_bit() -> None:
    config = DistilConfig(start=100, calls_per_million=20_000, audit=0.2, memory=150, window=64, agreement=0.75)
    requests = [dataclasses.replace(r, steps=1000 * k) for k, r in enumerate(take(16))]
    for cut in (0, 1, 9):
        student, other = Student(config, 3), Student(config, 4)
        for k, request in enumerate(requests):
            if k == cut:
                other = through_files(student, other)
            for s in (student, other) if k >= cut else (student,):
                _, confidence = s.decide(request, request.need)
                _, ask_ = s.gate(request, request.need, confidence)
                s.learn(request, ask_, whim(request))
        assert student.audited > 0 and student.answers > 150 and student.over_budget > 0
        assert other.state_dict() == student.state_dict() and other.report() == student.report()
        for name, array in student.arrays().items():
            np.testing.assert_array_equal(other.arrays()[name], array, err_msg=name)
    fresh = Student(config, 4)
    assert (fresh.network.flat != Student(config, 3).network.flat).any(), "another seed, another student"


def test_a_student_meets_more_candidates_than_before() -> None:
    student = Student(DistilConfig(memory=100), 0)
    for packages in (3, 9, 2):
        request = take(1, num_packages=packages)[0]
        student.learn(request, request.need, nearest(request))
    again = through_files(student, Student(DistilConfig(memory=100), 0))
    np.testing.assert_array_equal(again.arrays()["target"], student.arrays()["target"])
    assert student.arrays()["target"].shape[1] == 10


def test_a_student_is_saved_and_read(tmp_path: Path, of_nearest: Student) -> None:
    of_nearest.save(tmp_path / "student.npz")
    again = Student.load(tmp_path / "student.npz")
    assert again.config == of_nearest.config and again.report() == of_nearest.report()
    request = take(1)[0]
    np.testing.assert_array_equal(
        DistilledPlanner(again).plan(request).task, DistilledPlanner(of_nearest).plan(request).task
    )
    (tmp_path / "bad.npz").write_bytes((tmp_path / "student.npz").read_bytes()[:900])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    whole = bytearray((tmp_path / "student.npz").read_bytes())
    whole[2000:2100] = bytes(100)
    (tmp_path / "spoilt.npz").write_bytes(whole)
    for name in ("bad", "text", "empty", "spoilt", "none"):
        with pytest.raises(EchelonError, match=f"{name}.npz"):
            Student.load(tmp_path / f"{name}.npz")
    with pytest.raises(EchelonError, match="a student with other settings: its weights are"):
        Student(DistilConfig(hidden=8), 0).load_arrays(of_nearest.arrays())


@pytest.mark.parametrize(
    ("field", "value"),
    [("agreement", 1.0), ("audit", -0.1), ("calls_per_million", -1), ("every", 0), ("hidden", 0), ("memory", 0)],
)
def test_settings_that_can_not_be(field: str, value: float) -> None:
    with pytest.raises(EchelonError, match=rf"distil\.{field} is {value}: it must be"):
        DistilConfig(**{field: value})  # type: ignore[arg-type]
