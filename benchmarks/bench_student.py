"""What the distilled planner's student costs: to decide, to learn, and how soon it agrees with its teacher.

Each time is the best of many turns, so that what else the machine does counts least. Run it with

    python benchmarks/bench_student.py

With `--model smollm2-135m` (`echelon models fetch smollm2-135m`) the teacher is that language model, else it is a
planner that likes some path lengths better than others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from echelon.envs import make
from echelon.envs.kernels import UNREACHABLE
from echelon.planners.distilled import DistilConfig, Student
from echelon.planners.student import open_counts
from echelon.subgoals import FEATURES, PlanRequest, SubgoalConfig, SubgoalTracker

Teacher = Callable[[PlanRequest], "NDArray[np.float32]"]


def stream(share: float, *, packages: int = 8, seed: int = 0) -> Iterator[PlanRequest]:
    """Requests of 64 worlds of 20x20 with 4 robots that move at random; `share` of them need a subgoal."""
    env = make("warehouse", num_envs=64, seed=seed, extra_features=FEATURES, size=20, num_agents=4,
               num_packages=packages)  # fmt: skip
    tracker = SubgoalTracker(env, SubgoalConfig(), 0.99, seed)
    rng = np.random.default_rng(seed)
    while True:
        for _ in range(4):
            env.advance(rng.integers(0, 5, (64, 4)).astype(np.int8))
            if (env.terminated | env.truncated).any():
                env.autoreset()
        tracker.need[:] = rng.random(tracker.need.shape) < share
        yield tracker.request(np.arange(64), distance=True)


def whim(request: PlanRequest) -> NDArray[np.float32]:
    """Probabilities that hang on the path length in no smooth way."""
    assert request.distance is not None
    good = (request.candidates.kind > 0) & (request.distance != UNREACHABLE) & request.need[..., None]
    odds = np.where(good, np.exp(3 * np.sin(request.distance * 2.4)), 0)
    return (odds / np.maximum(odds.sum(-1, keepdims=True), 1e-9)).astype(np.float32)


def of_model(name: str) -> Teacher:
    """The language model's probabilities."""
    from echelon.llm import CausalChoiceModel
    from echelon.planners.llm import LLMPlanner

    planner = LLMPlanner(CausalChoiceModel.load(name, threads=1))

    def teach(request: PlanRequest) -> NDArray[np.float32]:
        probability = planner.plan(request).probability
        assert probability is not None
        return probability

    return teach


def best(work: Callable[[], object], turns: int = 300) -> float:
    """The shortest of many turns, ms."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a language model as the teacher")
    parser.add_argument("--answers", type=int, default=4000, help="answers to learn from")
    settings = parser.parse_args()
    teach = of_model(settings.model) if settings.model else whim
    student = Student(DistilConfig(), 0)

    print("answers  agreement of the last 512 (95%)  threshold  regret (nats)  ms a round of learning")
    shown = 500
    for request in stream(0.35):
        target, start = teach(request), time.perf_counter()
        student.learn(request, request.need, target)
        took = 1000 * (time.perf_counter() - start)
        if student.answers >= min(shown, settings.answers):
            shown *= 2
            r = student.report()
            share = f"{r['agreement']:.3f} ({r['agreement_low']:.3f} to {r['agreement_high']:.3f})"
            print(f"{student.answers:7d}  {share:31s}  {r['threshold']:9.3f}  {r['regret']:13.4f}  {took:9.1f}")
        if student.answers >= settings.answers:
            break

    print("\nms, 64 worlds x 4 robots                    all ask    1 in 20 asks")
    requests = [next(stream(share, seed=1)) for share in (1.1, 0.05)]
    rows: list[tuple[str, Callable[[PlanRequest], object]]] = [
        ("decide", lambda r: student.decide(r, r.need)),
        ("gate", lambda r: student.gate(r, r.need, np.ones(r.need.shape, np.float32))),
        ("choose", lambda r: student.choose(r, r.need, whim(r), np.ones(r.need.shape, np.float32))),
        ("decide, gate and choose", lambda r: plan(student, r)),
    ]
    for name, work in rows:
        taken = [best(lambda work=work, r=r: work(r)) for r in requests]  # type: ignore[misc]
        if name == "choose":  # the making of its input doesn't count
            taken = [t - best(lambda r=r: whim(r)) for t, r in zip(taken, requests, strict=True)]  # type: ignore[misc]
        print(f"{name:40s}  {taken[0]:9.3f}  {taken[1]:12.3f}")
    counts = [open_counts(r, r.need) for r in requests]
    print(f"{'(candidates)':40s}  {counts[0].sum():9d}  {counts[1].sum():12d}")

    arrays = student.arrays()
    step = best(
        lambda: student.network.step(
            arrays["raw"], arrays["count"], arrays["target"], len(arrays["raw"]), student.config.batch, 1e-3,
            np.uint64(1)
        )
    )  # fmt: skip
    print(f"\na gradient step of {student.config.batch} answers: {step:.3f} ms; one for every 4 answers")


def plan(student: Student, request: PlanRequest) -> None:
    """What a step of a run costs that asks nobody."""
    probability, confidence = student.decide(request, request.need)
    sure, _ = student.gate(request, request.need, confidence)
    student.choose(request, sure, probability, confidence)


if __name__ == "__main__":
    main()
