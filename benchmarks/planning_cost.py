"""What planning with a language model costs while executors learn, what success it costs, and whether a run repeats.

One process measures everything on the 20x20 warehouse with 4 robots and 8 packages:

- **speed**: environment steps a second of training, all cases in turns so that a noisy machine is noisy for all; the
  ratio to `hungarian` is taken within each turn. A turn's rate is all its steps by all its time: what the model is
  asked, what is written, and what it still works on when the turn ends. What a case asks before it runs steadily (the
  table of ratings, the student's first questions) is told apart, as its start.
- **naive**: the same worlds with every decision asked of the model and nothing remembered, for one rollout.
- **success**: executors trained in each way and evaluated on unseen worlds, planned once by the model at every
  decision and once by what planned while they were trained; the same executors and worlds, so differences are paired.
- **replay**: a run with a model beside the simulation, and the same again from its record with no model.

The prompts: `rated` (shipped) asks about each candidate by itself, so that a small table soon knows every answer;
`letters` shows all candidates, so that no question comes twice and only a student can spare the model.

    OMP_NUM_THREADS=1 python benchmarks/planning_cost.py [--quick] [--only PART ...] [--json FILE]
    python benchmarks/planning_cost.py --tables docs/results/planning.json --page docs/results/planning.md
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from echelon import building
from echelon.algorithms import MAPPOConfig
from echelon.configs import PlanningConfig, RunConfig
from echelon.envs import WarehouseConfig
from echelon.evaluation import evaluate, mean_interval, wilson
from echelon.llm import CausalChoiceModel, ChoicePrompt
from echelon.llm.choice import ChoiceScores
from echelon.planners.base import Asking, ModelPlanner
from echelon.planners.distilled import DistilConfig, Student
from echelon.planners.frugal import FrugalPlanner
from echelon.planners.llm import PROMPTS, LLMPlanner
from echelon.planners.plan_cache import CachedPlans, PlanCache
from echelon.planners.student import open_counts
from echelon.rollout import PlanTime
from echelon.runs import load_policy, processor, versions
from echelon.subgoals import Plan, PlanRequest
from echelon.training import Progress, Rollouts, Trainer

MODEL = "smollm2-135m"
LETTERS = PROMPTS / "letters"
REFERENCE = "hungarian"
RATED, WAIT, FREE, FEW = "rated", "letters, student, wait", "letters, student, free", "rated, 1 world of 64"
NAIVE = {"rated": "rated, naive", "letters": "letters, naive", "cached": "letters, plan cache"}
ALLOWED = {"ratio": 0.80, "difference": -0.02}
FOREVER = 1_000_000_000


def cases(args: argparse.Namespace, worlds: int, seed: int = 0) -> dict[str, RunConfig]:
    """The runs that are measured, by name."""
    base = RunConfig(
        env=WarehouseConfig(size=20, num_agents=4, num_packages=8), num_envs=worlds, seed=seed, steps=FOREVER,
        checkpoint_every=FOREVER, model=MODEL, llm_share=1.0,
    )  # fmt: skip
    student = DistilConfig(enabled=True, start=args.start, calls_per_million=args.calls)
    letters = replace(base, planning=PlanningConfig(prompts=str(LETTERS)), distil=student)
    return {
        REFERENCE: replace(base, planner="hungarian"),
        RATED: base,
        WAIT: letters,
        FREE: replace(letters, planning=replace(letters.planning, timing="free")),
        FEW: replace(base, llm_share=1 / 64),
    }


def student_of(worlds: Any) -> Student | None:
    """The student that takes part, if there is one."""
    planner = worlds.planners[0][0]
    return planner.student if isinstance(planner, FrugalPlanner) else None


def counters(config: RunConfig, worlds: Any) -> dict[str, float]:
    """What the model and its planner have counted so far."""
    planner = worlds.planners[0][0]
    if not isinstance(planner, ModelPlanner):
        return {}
    spent = building.spent_by(config, worlds)
    return {"questions": planner.counters()["questions"], **{k: spent[k] for k in ("calls", "prompt_tokens")}}


# -- speed ---------------------------------------------------------------------------------------


class Case:
    """A run that is trained a turn at a time."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Build it and let it get over its start."""
        building.forget_answers()
        self.config, begun, before = config, time.perf_counter(), self._spent_before(config)
        self.trainer = Trainer(config, folder)
        student = student_of(self.trainer.worlds)
        updates = 0

        def report(progress: Progress) -> None:
            nonlocal updates
            updates += 1

        def begins() -> bool:
            return updates >= 3 and (student is None or student.answers >= min(config.distil.start, student.asked))

        self.trainer.run(report, begins)
        self.start = {
            "seconds": time.perf_counter() - begun,
            "steps": float(self.trainer.step),
            **{k: v - before.get(k, 0) for k, v in counters(config, self.trainer.worlds).items()},
        }
        self.turns: list[dict[str, float]] = []
        self.stages: dict[str, float] = {}

    @staticmethod
    def _spent_before(config: RunConfig) -> dict[str, float]:
        return {} if config.planner is not None else dict(building.model_of(config.model).state_dict())

    def turn(self, seconds: float) -> None:
        """Train for so long, at least two updates; the first one after the others' turns doesn't count."""
        worlds, per_update = self.trainer.worlds, self.trainer.rollouts.steps_per_update
        walls: list[float] = []
        marks: list[dict[str, float]] = []  # at the first report, and behind the last
        last = 0.0

        def mark() -> None:
            planning = sum(spent.seconds for spent in worlds.plan_time.values())
            marks.append({"planning": planning, "processor": time.process_time(), **counters(self.config, worlds)})

        def report(progress: Progress) -> None:
            nonlocal last
            now = time.perf_counter()
            if not marks:
                mark()
            else:
                walls.append(now - last)
                for stage, share in progress.shares.items():
                    self.stages[stage] = self.stages.get(stage, 0.0) + share * per_update / progress.rate
            last = now

        def should_stop() -> bool:
            if sum(walls) < seconds or not walls:
                return False
            # What is still asked for belongs to this turn's cost.
            start = time.perf_counter()
            worlds.close()
            walls[-1] += time.perf_counter() - start
            mark()
            return True

        self.trainer.run(report, should_stop)
        spent = {k: v - marks[0][k] for k, v in marks[1].items()}
        self.turns.append({"steps": float(len(walls) * per_update), "seconds": sum(walls), **spent})

    def result(self) -> dict[str, Any]:
        """What came of all turns."""
        total = {k: sum(t[k] for t in self.turns) for k in self.turns[0]}
        student = student_of(self.trainer.worlds)
        return {
            "start": self.start,
            "turns": self.turns,
            "steps_per_second": [t["steps"] / t["seconds"] for t in self.turns],
            "shares": {stage: spent / sum(self.stages.values()) for stage, spent in self.stages.items()},
            **{f"{k}_per_million": 1e6 * total[k] / total["steps"] for k in ("questions", "calls", "prompt_tokens")
               if k in total},
            **({} if student is None else {"student": student.report()}),
        }  # fmt: skip


def speed(args: argparse.Namespace, worlds: int) -> dict[str, Any]:
    """Each case's rates, turn by turn, and their ratios to the reference of the same turn."""
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, Case] = {}
        for name, config in cases(args, worlds).items():
            if name == FEW:
                continue
            running[name] = Case(config, Path(folder) / str(len(running)))
            say(f"speed, {worlds} worlds, {name}: started in {running[name].start['seconds']:.1f} s")
        for number in range(args.turns):
            # Turned round every other time: a machine that slows down is slow for all alike.
            for name in list(running)[:: 1 if number % 2 == 0 else -1]:
                running[name].turn(args.seconds)
        found = {name: case.result() for name, case in running.items()}
        for case in running.values():
            case.trainer.worlds.close()
    reference = found[REFERENCE]["steps_per_second"]
    for name, result in found.items():
        ratios = [a / b for a, b in zip(result["steps_per_second"], reference, strict=True)]
        result["ratio"] = spread(ratios)
        result["pooled_ratio"] = pooled(result) / pooled(found[REFERENCE])
        result["processor_ratio"] = processor_time(result) / processor_time(found[REFERENCE])
        say(f"speed, {worlds} worlds, {name}: {pooled(result):,.0f} steps/s, ratio {result['pooled_ratio']:.2f}, "
            f"processor time × {result['processor_ratio']:.2f}, "
            f"turns {', '.join(f'{r:.2f}' for r in ratios)}")  # fmt: skip
    return found


def pooled(result: Mapping[str, Any]) -> float:
    """All steps by all seconds."""
    return float(sum(t["steps"] for t in result["turns"]) / sum(t["seconds"] for t in result["turns"]))


def processor_time(result: Mapping[str, Any]) -> float:
    """Seconds of processor time a step, of all threads: what a busy machine changes least."""
    return float(sum(t["processor"] for t in result["turns"]) / sum(t["steps"] for t in result["turns"]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """The middle and the ends."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# -- every decision asked ------------------------------------------------------------------------


class Forgetful(LLMPlanner):
    """Asks again in each planning round what it was told before."""

    def begin(self, request: PlanRequest, *, split: bool = False, busy: bool = False) -> Asking:
        """As the planner's, with an empty table."""
        self._odds[:] = np.nan
        return super().begin(request, split=split, busy=busy)


class StandIn:
    """In the model's place where only what is asked matters: always the first letter, as SmolLM2 does."""

    name, asked = "stand-in", 0

    def state_dict(self) -> dict[str, float]:
        """What it was asked."""
        return {"calls": self.asked, "prompt_tokens": 0}

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        """The first of the options with 9 in 10."""
        self.asked += len(prompts)
        answers = []
        for prompt in prompts:
            chances = np.full(len(prompt.options), 0.1 / max(len(prompt.options) - 1, 1))
            chances[0] = 0.9
            answers.append(ChoiceScores(np.log(chances).astype(np.float32), 0))
        return answers


class Counting(FrugalPlanner):
    """Counts what its cache is asked: agents with more than one open candidate."""

    planner: LLMPlanner
    decisions = 0

    def begin(self, request: PlanRequest, *, split: bool = False, busy: bool = False) -> Asking:
        """As the planner's."""
        self.decisions += int((open_counts(request, request.need) > 1).sum())
        return super().begin(request, split=split, busy=busy)


class Midst:
    """The midst of a training run under `hungarian`, from which each planner goes on."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Train up to there."""
        self.config = replace(
            cases(args, args.naive_worlds)[REFERENCE], algorithm=MAPPOConfig(rollout=args.naive_rollout)
        )
        rollouts = Rollouts(self.config)
        rollouts.worlds.start()
        for _ in range(args.naive_after // rollouts.steps_per_update):
            rollouts.learn(rollouts.collect())
        self.worlds, self.algorithm = rollouts.worlds.state_dict(), rollouts.algorithm.state_dict()

    def go_on(self, planner: LLMPlanner | Counting | None, updates: int = 1) -> dict[str, Any]:
        """Train on with another planner; None: with the same."""
        rollouts = Rollouts(self.config)
        worlds = rollouts.worlds
        worlds.load_state_dict(self.worlds)
        rollouts.algorithm.load_state_dict(self.algorithm)
        if planner is not None:
            worlds.planners[0] = (planner, worlds.planners[0][1])
            worlds.plan_time[planner.name] = PlanTime()
        spent = {} if planner is None else dict(planner.model.state_dict())
        start = time.perf_counter()
        for _ in range(updates):
            rollouts.learn(rollouts.collect())
        seconds, steps = time.perf_counter() - start, updates * rollouts.steps_per_update
        told: dict[str, Any] = {"steps": steps, "seconds": seconds, "steps_per_second": steps / seconds}
        if planner is not None:
            told["asked"] = planner.planner.asked if isinstance(planner, Counting) else planner.asked
            told |= {k: planner.model.state_dict()[k] - spent[k] for k in ("calls", "prompt_tokens")}
        return told


def cached(model: Any) -> Counting:
    """The planner that shows all candidates, with an empty plan cache in memory."""
    planner = LLMPlanner(model, folder=LETTERS)
    assert planner.sees is not None
    return Counting(planner, cache=CachedPlans(PlanCache(None, namespace="bench"), planner.sees))


def naive(args: argparse.Namespace) -> dict[str, Any]:
    """What it costs to ask the model at each decision, and what a plan cache saves of that."""
    model, midst = CausalChoiceModel.load(MODEL, threads=args.threads, cache_size=0), Midst(args)
    found: dict[str, Any] = {REFERENCE: midst.go_on(None, updates=16)}
    asking: dict[str, LLMPlanner | Counting] = {
        NAIVE["rated"]: Forgetful(model),
        NAIVE["letters"]: LLMPlanner(model, folder=LETTERS),
        NAIVE["cached"]: cached(model),
    }
    for name, planner in asking.items():
        result = midst.go_on(planner)
        result["times_slower"] = found[REFERENCE]["steps_per_second"] / result["steps_per_second"]
        found[name] = result
        say(f"naive, {name}: {result['steps_per_second']:,.1f} steps/s, {result['times_slower']:,.0f} times slower, "
            f"{result['asked']} decisions")  # fmt: skip
    # How often a scene comes again in a longer run doesn't need the model.
    counting = cached(StandIn())
    long = midst.go_on(counting, updates=max(1, args.cache_steps // (args.naive_worlds * args.naive_rollout)))
    found["cache"] = {"steps": long["steps"], "decisions": counting.decisions, "asked": long["asked"],
                      "spared": 1 - long["asked"] / counting.decisions}  # fmt: skip
    say(f"plan cache: {found['cache']['spared']:.4f} of {counting.decisions:,} decisions were spared")
    return found


# -- success -------------------------------------------------------------------------------------


class Judge:
    """Holds a student, which doesn't learn any more, against each answer of the model to a whole evaluation.

    Attributes:
        questions: agents that the model was asked about; agreed: for how many the student's most probable candidate
            was the model's.
        nats: the sum of what the model's log-probability of its best candidate is above that of the student's.
    """

    def __init__(self, student: Student) -> None:
        """Judge `student`."""
        self.student, self.questions, self.agreed, self.nats = student, 0, 0, 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, every plan of a model is held against the student's."""
        end = LLMPlanner.end

        def heard(planner: LLMPlanner, asking: Asking, answers: Any) -> Plan:
            plan = end(planner, asking, answers)
            self._judge(asking.request, asking.open, plan)
            return plan

        with mock.patch.object(LLMPlanner, "end", heard):
            yield

    def _judge(self, request: PlanRequest, asked: NDArray[np.bool_], plan: Plan) -> None:
        assert plan.probability is not None
        asked = asked & plan.probability.any(-1)
        mine = self.student.decide(request, asked)[0][asked].argmax(-1)
        theirs = plan.probability[asked]
        best, said = theirs.max(-1), theirs[np.arange(len(mine)), mine]
        self.questions += len(mine)
        self.agreed += int((said >= best - 1e-6).sum())
        self.nats += float(np.log(best / np.maximum(said, 1e-6)).sum())

    def result(self) -> dict[str, float]:
        """What came of it."""
        return {"questions": self.questions, "agreed": self.agreed, "regret": self.nats / max(self.questions, 1)}


def trained(config: RunConfig, folder: Path) -> float:
    """Train a run to its end; the seconds that it took."""
    building.forget_answers()
    start = time.perf_counter()
    trainer = Trainer(config, folder)
    trainer.run()
    return time.perf_counter() - start


def success(args: argparse.Namespace) -> dict[str, Any]:
    """Paired TSR: planned by the model at every decision, and by what planned while the executors were trained."""
    found: dict[str, Any] = {}
    for seed in range(args.seeds):
        for name, config in cases(args, 256, seed).items():
            if name == REFERENCE or (name == FEW and not args.few):
                continue
            config = replace(config, steps=args.steps)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "run"
                seconds = trained(config, folder)
                policy = load_policy(folder)[1]
                distils = config.distil.enabled
                episodes = args.letters_episodes if distils else args.episodes
                own = replace(config, planner=f"distilled:{folder}") if distils else config
                runs = {}
                judge = Judge(Student.load(folder / building.STUDENT)) if distils else None
                for way, judged in (("model", config), ("own", own)):
                    listening = judge.listening() if judge is not None and way == "model" else contextlib.nullcontext()
                    with listening:
                        result = evaluate(judged, policy, episodes=episodes)
                    assert result is not None
                    runs[way] = {"tsr": float(result.success.mean()), "makespan": float(result.steps.mean()),
                                 "seconds": result.seconds, "calls": result.plans.get("model_calls", 0)}  # fmt: skip
                line: dict[str, Any] = {"seed": seed, "training_seconds": seconds, "episodes": episodes, **runs}
                if judge is not None:
                    line |= {"student": judge.student.report(), "unseen": judge.result()}
            found.setdefault(name, {"runs": []})["runs"].append(line)
            say(f"success, {name}, seed {seed}: trained in {seconds:.0f} s; model {runs['model']['tsr']:.3f} "
                f"({runs['model']['seconds']:.0f} s), own {runs['own']['tsr']:.3f}")  # fmt: skip
    for result in found.values():
        for what in ("tsr", "makespan"):
            differences = [r["own"][what] - r["model"][what] for r in result["runs"]]
            interval = mean_interval(differences)
            assert interval is not None
            result[f"{what}_difference"] = vars(interval)
    return found


# -- replay --------------------------------------------------------------------------------------


def weights(folder: Path) -> str:
    """One digest of all that a run's algorithm has learnt."""
    policy = load_policy(folder)[1]
    assert policy is not None
    digest = hashlib.sha256()
    for name in sorted(policy):
        digest.update(f"{name} {policy[name].dtype} {tuple(policy[name].shape)}".encode())
        digest.update(policy[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def replay(args: argparse.Namespace) -> dict[str, Any]:
    """A run beside which the model planned, and the same from its record, with a model that doesn't exist."""
    with tempfile.TemporaryDirectory() as temporary:
        first, again = Path(temporary) / "first", Path(temporary) / "again"
        config = cases(args, 256)[FREE]
        # Single questions, and many of them: so that plans come in time to be used, and others too late.
        config = replace(
            config, steps=args.replay_steps, planning=replace(config.planning, batch=1),
            distil=replace(config.distil, start=32, calls_per_million=5000),
        )  # fmt: skip
        trained(config, first)
        trained(replace(config, planner=f"record:{first / 'plans.jsonl'}", model="none"), again)
        metrics = [
            [{k: v for k, v in json.loads(line).items() if not k.startswith("model_")} for line in lines(folder)]
            for folder in (first, again)
        ]
        asked = json.loads(lines(first)[-1])
        record = (first / "plans.jsonl").read_bytes().splitlines(keepends=True)
        kept = [line for line in record if b'"subgoals":' in line]
        steps = asked["step"]
        told = {
            "steps": steps,
            "late_plans": sum(m["subgoals_late"] for m in metrics[0]),
            "outdated_plans": sum(m["subgoals_late_outdated"] for m in metrics[0]),
            "questions": asked["model_questions"],
            "metrics_equal": metrics[0] == metrics[1],
            "weights_equal": weights(first) == weights(again),
            "record_bytes_per_million": 1e6 * sum(map(len, kept)) / steps,
            "told_bytes_per_million": 1e6 * (sum(map(len, record)) - sum(map(len, kept))) / steps,
            "subgoals": sum(len(base64.b64decode(json.loads(line)["subgoals"])) // 20 for line in kept),
        }
    say(f"replay: metrics equal {told['metrics_equal']}, weights equal {told['weights_equal']}")
    return told


def lines(folder: Path) -> list[str]:
    """The lines of a run's metrics."""
    return (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


# -- tables --------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Every table of docs/results/planning.md, by title, in Markdown."""
    made = {f"Speed, {worlds} worlds": speed_table(found) for worlds, found in result.get("speed", {}).items()}
    if {"speed", "naive", "success", "replay"} <= result.keys():
        made = {"Claims": claims_table(claims(result)), **made}
    if "naive" in result:
        made["Every decision asked"] = naive_table(result["naive"])
        made["Plan cache"] = cache_table(result["naive"]["cache"])
    if "success" in result:
        made["Success"] = success_table(result["success"])
        made["Students"] = student_table(result["success"])
    if "replay" in result:
        made["Replay"] = replay_table(result["replay"])
    return made


def claims(result: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """What was wanted, what was measured, and whether that is enough."""
    made = []
    for worlds, found in result["speed"].items():
        for name in (RATED, WAIT, FREE):
            ratio = min(found[name]["pooled_ratio"], found[name]["ratio"]["median"])
            made.append((f"{name}, {worlds} worlds: at least {ALLOWED['ratio']:.2f} of the steps/s with `hungarian`",
                         f"{ratio:.2f}", ratio >= ALLOWED["ratio"]))  # fmt: skip
    for name in (RATED, WAIT, FREE):
        tsr = result["success"][name]["tsr_difference"]
        made.append((f"{name}: TSR at most {-ALLOWED['difference']:.2f} below every decision asked",
                     f"{tsr['value']:+.3f}", tsr["value"] >= ALLOWED["difference"]))  # fmt: skip
    slower = min(result["naive"][NAIVE[prompt]]["times_slower"] for prompt in ("rated", "letters"))
    made.append(("every decision asked: 20 times slower or more", f"{slower:,.0f}", slower >= 20))
    same = result["replay"]["metrics_equal"] and result["replay"]["weights_equal"]
    made.append(("a run repeated from its record: the same metrics and weights", "yes" if same else "no", same))
    return made


def claims_table(made: Sequence[tuple[str, str, bool]]) -> str:
    """Claims with their verdicts."""
    rows = [[claim, measured, "**holds**" if holds else "**fails**"] for claim, measured, holds in made]
    return markdown(["claim", "measured", "verdict"], rows)


def cache_table(told: Mapping[str, Any]) -> str:
    """What a plan cache spares where prompts tell cells."""
    row = [f"{told['steps']:,}", f"{told['decisions']:,}", f"{told['asked']:,}", f"{told['spared']:.1%}"]
    return markdown(["steps", "decisions", "asked all the same", "spared"], [row])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def speed_table(found: Mapping[str, Any]) -> str:
    """Each case's speed and what it asks of the model."""
    rows = []
    for name, r in found.items():
        ratio, asks = r["ratio"], "calls_per_million" in r
        rows.append([
            name, f"{pooled(r):,.0f}", f"**{r['pooled_ratio']:.2f}**",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})", f"{r['processor_ratio']:.2f}",
            f"{r['shares']['plan']:.0%}", f"{r['calls_per_million']:,.0f}" if asks else "-",
            f"{r['prompt_tokens_per_million']:,.0f}" if asks else "-",
            f"{r['start']['calls']:,.0f} calls, {r['start']['seconds']:.0f} s" if asks else "-",
        ])  # fmt: skip
    return markdown(
        ["planner while training", "steps/s", "ratio", "each turn's: median (min to max)", "processor time a step",
         "spent planning", "calls a million steps", "tokens a million steps", "start"], rows,
    )  # fmt: skip


def naive_table(found: Mapping[str, Any]) -> str:
    """How much slower it is to ask each time."""
    rows = [
        [name, f"{r['steps_per_second']:,.1f}", f"**{r['times_slower']:,.0f}**", f"{r['asked']:,}",
         f"{r['calls']:,.0f}", f"{r['steps']:,}", f"{1000 * r['seconds'] / max(r['asked'], 1):,.0f}"]
        for name, r in ((name, found[name]) for name in NAIVE.values())
    ]  # fmt: skip
    head = ["planner", "steps/s", "times slower", "decisions", "calls", "in steps", "ms a decision"]
    return markdown(head, rows)


def success_table(found: Mapping[str, Any]) -> str:
    """Paired success by the way of training."""
    rows = []
    for name, result in found.items():
        runs, tsr, span = result["runs"], result["tsr_difference"], result["makespan_difference"]
        mean = {way: statistics.fmean(r[way]["tsr"] for r in runs) for way in ("model", "own")}
        rows.append([
            name, f"{len(runs)} × {runs[0]['episodes']}", f"{mean['model']:.3f}", f"{mean['own']:.3f}",
            f"**{tsr['value']:+.3f}** [{tsr['low']:+.3f}, {tsr['high']:+.3f}]",
            f"{span['value']:+.1f} [{span['low']:+.1f}, {span['high']:+.1f}]",
            f"{statistics.fmean(r['training_seconds'] for r in runs):.0f} s",
        ])  # fmt: skip
    return markdown(
        ["trained with", "seeds × episodes", "TSR, every decision asked", "TSR, planned as in training", "difference",
         "steps until an episode ends, difference", "training"], rows,
    )  # fmt: skip


def student_table(found: Mapping[str, Any]) -> str:
    """How well the students of the trained runs know the model, all seeds together."""
    rows = []
    for name, result in found.items():
        runs = [r for r in result["runs"] if "student" in r]
        if runs:
            n, agreed = (sum(r["unseen"][k] for r in runs) for k in ("questions", "agreed"))
            share = wilson(agreed, n)
            regret = sum(r["unseen"]["regret"] * r["unseen"]["questions"] for r in runs) / n
            rows.append([
                name, f"{statistics.fmean(r['student']['asked'] for r in runs):,.0f}", f"{n:,}",
                f"**{share.value:.3f}** [{share.low:.3f}, {share.high:.3f}]", f"{regret:.3f}",
                f"{sum(r['student']['open'] for r in runs)} of {len(runs)}",
            ])  # fmt: skip
    return markdown(["trained with", "questions while training", "unseen questions", "agreement [95%]", "regret, nats",
                     "gates open"], rows)  # fmt: skip


def replay_table(told: Mapping[str, Any]) -> str:
    """Whether a run repeats from its record, and how large that is."""
    rows = [
        ["metrics the same", "yes" if told["metrics_equal"] else "no"],
        ["weights the same", "yes" if told["weights_equal"] else "no"],
        ["steps", f"{told['steps']:,}"],
        ["subgoals in the record", f"{told['subgoals']:,}"],
        ["of them late, as the model's plans came", f"{told['late_plans']:,}"],
        ["plans that came too late", f"{told['outdated_plans']:,}"],
        ["record, MB a million steps", f"{told['record_bytes_per_million'] / 1e6:.1f}"],
        ["rounds told in full, MB a million steps", f"{told['told_bytes_per_million'] / 1e6:.1f}"],
    ]
    return markdown(["", ""], rows)


def write_page(page: Path, result: Mapping[str, Any]) -> None:
    """Put the tables between their marks, `<!-- title -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for title, table in tables(result).items():
        start = f"<!-- {title} -->"
        if start in text:
            before, rest = text.split(start, 1)
            text = f"{before}{start}\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    page.write_text(text, encoding="utf-8")


def say(line: str) -> None:
    """Tell how far it is."""
    print(f"[{time.perf_counter() - _BEGUN:6.0f} s] {line}", flush=True)


_BEGUN = time.perf_counter()
PARTS = ("speed", "naive", "success", "replay")


def settings() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="minutes, to see whether it works")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--tables", type=Path, help="measure nothing: print the tables of this file")
    parser.add_argument("--page", type=Path, help="put the tables into this page, between their marks")
    parser.add_argument("--worlds", type=int, nargs="+", default=[64, 256], help="worlds side by side (64 256)")
    parser.add_argument("--turns", type=int, help="turns through the cases (5)")
    parser.add_argument("--seconds", type=float, help="seconds of a turn (6)")
    parser.add_argument("--start", type=int, help="questions that a student begins with (100)")
    parser.add_argument("--calls", type=int, default=20, help="its questions per million steps afterwards (20)")
    parser.add_argument("--naive-worlds", type=int, default=64, help="worlds of the naive runs (64)")
    parser.add_argument("--naive-after", type=int, help="steps of training before them (200,000)")
    parser.add_argument("--naive-rollout", type=int, help="steps of their rollout (32)")
    parser.add_argument("--cache-steps", type=int, help="steps in which the plan cache is watched (200,000)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="the model's, where all wait for it")
    parser.add_argument("--seeds", type=int, help="runs a way of training (5)")
    parser.add_argument("--steps", type=int, help="steps of each (1,000,000)")
    parser.add_argument("--episodes", type=int, help="evaluated, where a table knows the model's answers (200)")
    parser.add_argument("--letters-episodes", type=int, help="evaluated, where each decision is asked (40)")
    parser.add_argument("--few", action="store_true", help="also train with the model in 1 world of 64")
    parser.add_argument("--replay-steps", type=int, help="steps of the run that is repeated (300,000)")
    args = parser.parse_args()
    for name, (quick, full) in {
        "turns": (3, 5), "seconds": (3.0, 6.0), "start": (48, 100), "naive_rollout": (4, 32), "seeds": (1, 5),
        "naive_after": (30_000, 200_000), "cache_steps": (30_000, 200_000), "steps": (100_000, 1_000_000),
        "episodes": (50, 200), "letters_episodes": (6, 40), "replay_steps": (50_000, 300_000),
    }.items():  # fmt: skip
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    return args


def main() -> None:
    """Measure and print."""
    args = settings()
    if args.tables is not None:
        result = json.loads(args.tables.read_text(encoding="utf-8"))
    else:
        told = {k: v for k, v in vars(args).items() if k not in ("json", "tables", "page", "quick", "only")}
        result = {
            "command": " ".join(["python", "benchmarks/planning_cost.py", *sys.argv[1:]]),
            "versions": versions(), "processor": processor(), "cores": os.cpu_count(), "model": MODEL,
            "allowed": ALLOWED, "settings": told,
        }  # fmt: skip
        building.model_of(MODEL)
        if "speed" in args.only:
            result["speed"] = {str(worlds): speed(args, worlds) for worlds in args.worlds}
        for part, measure in (("naive", naive), ("success", success), ("replay", replay)):
            if part in args.only:
                result[part] = measure(args)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for title, text in tables(result).items():
        print(f"\n## {title}\n\n{text}")
    if args.page is not None:
        write_page(args.page, result)


if __name__ == "__main__":
    main()
