"""Runs whose shaping grows with them, as runs of a study: beside others, judged by the same protocol.

Steps are steps spent, those of branches counted; the policy at a step is the mainline's of then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tomllib
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

from echelon._files import atomic_write_bytes, read_json
from echelon.also.configs import (
    ALSO_METHODS,
    AlsoConfig,
    AlsoSettings,
    also_from_toml,
    also_to_toml,
    resolved_proposer,
)
from echelon.also.training import AlsoProgress, AlsoTrainer
from echelon.building import settled
from echelon.checkpoints import checkpoints_of
from echelon.errors import EchelonError
from echelon.evaluation.protocol import (
    BEST,
    POLICIES,
    Protocol,
    Report,
    best_of,
    is_due,
    judge_trained,
    other_settings,
    policy_file,
    read_policy,
)
from echelon.llm.gguf import GGUFConfig
from echelon.llm.server import ServerConfig
from echelon.runs import FORK, SEGMENTS, load_policy, segments_seconds, steps_done, trained_folder
from echelon.shaping import ShapingSettings, needs_model
from echelon.studies.costs import Cost, estimate
from echelon.studies.engine import kept_result
from echelon.studies.kinds import RunKind, register

__all__ = ["ShapedRuns"]

_PROMPT_TOKENS = 1300.0  # of a question to a proposing model: SmolLM2's in the warehouse had 1,000 to 1,800


class ShapedRuns(RunKind):
    """Runs that `AlsoTrainer` does; what it is given as `config` is an `AlsoConfig`."""

    @property
    def methods(self) -> Collection[str]:
        """LLM-ALSO, its ablations and its controls."""
        return ALSO_METHODS

    @property
    def keys(self) -> frozenset[str]:
        """The fields of an `AlsoConfig`."""
        return frozenset(f.name for f in dataclasses.fields(AlsoConfig))

    def read(self, data: dict[str, Any], source: str, *, protocol: Protocol, imports: tuple[str, ...]) -> AlsoConfig:
        """A run with branches one after the other; unless it says otherwise, evaluated as the study's others are."""
        kind = ALSO_METHODS[data["method"]]
        judged: dict[str, int] = {"episodes": protocol.episodes}
        if protocol.world_seed is not None:
            judged["world_seed"] = protocol.world_seed
        if kind.stages == "none" and kind.start != "grid":  # no gate asks for more
            judged["every"] = protocol.every
        own = data.get("also", {})
        also = {**judged, **own} if isinstance(own, dict) else own
        return also_from_toml({"workers": 1, **data, "imports": list(imports), "also": also}, source)

    def write(self, config: AlsoConfig) -> str:
        """A run's config.toml, which means the same in every folder."""
        return also_to_toml(dataclasses.replace(config, proposer=resolved_proposer(config.proposer)))

    def restore(self, text: str, source: str) -> AlsoConfig:
        """A run's config.toml, read."""
        return also_from_toml(tomllib.loads(text), source)

    def decides(self, config: AlsoConfig) -> str:
        """Its config, but for how many branches run at once, where code is, and what is for others than its method."""
        usual: dict[str, Any] = {"workers": None, "imports": ()}
        if not config.proposer.startswith("openai:"):
            usual["server"] = ServerConfig()
        if not config.proposer.startswith("gguf:"):
            usual["gguf"] = GGUFConfig()
        if config.kind.stages == "none":
            usual |= {"proposer": AlsoConfig.proposer, "server": ServerConfig(), "gguf": GGUFConfig()}
            if config.kind.start == "none":
                usual["shaping"] = ShapingSettings()
            # Those of the evaluations, and what the grid is chosen by.
            kept = ("branch", "rising") if config.kind.start == "grid" else ()
            told = {name: getattr(config.also, name) for name in ("episodes", "world_seed", *kept)}
            usual["also"] = AlsoSettings(every=config.evaluated_every, **told)
        return also_to_toml(dataclasses.replace(config, **usual))

    def estimate(self, config: AlsoConfig, protocol: Protocol) -> Cost:
        """As of a run of the base method with as many steps, evaluated as often as branches are; and the proposer's."""
        often = dataclasses.replace(protocol, every=config.evaluated_every, episodes=config.also.episodes)
        cost = estimate(config.run(config.start), often)
        if config.kind.stages == "none" or not needs_model(config.proposer):
            return cost
        stages = len(config.also.checkpoints) if config.kind.stages == "all" else 1
        rounds = config.also.rounds * (2 if config.kind.branches else 1)  # a proposal, and a look at what came of it
        calls = stages * (config.kind.critic + rounds)
        return cost + Cost(model_calls=calls, model_tokens=calls * _PROMPT_TOKENS)

    def steps_done(self, folder: Path) -> int:
        """Steps of all segments, those under way included."""
        with contextlib.suppress(EchelonError, OSError, LookupError, TypeError, ValueError):
            return sum(_steps(segment) for segment in (folder / SEGMENTS).iterdir())
        return 0  # nothing yet; what is damaged, the run itself will tell

    def execute(
        self, config: AlsoConfig, folder: Path, protocol: Protocol, *, record: int, report: Report,
        should_stop: Callable[[], bool],
    ) -> dict[str, Any] | None:  # fmt: skip
        """Train, branches and all; then the absolute metric of the mainline's last and of its best policy."""
        if (folder / "config.toml").exists():
            trainer = AlsoTrainer.resume(folder, like=config, keep_policies=True)
        else:
            trainer = AlsoTrainer(config, folder, keep_policies=True)
        if _plain(trainer.config) != _plain(config):
            raise other_settings(folder)

        def told(p: AlsoProgress) -> None:
            report("training", p.spent, p.steps, p.stage)

        if not trainer.run(told, should_stop):
            return None
        run, policy = load_policy(trained_folder(folder))
        mainline = _Mainline(folder, trainer.account, protocol.every)
        mainline.keep_policies(all_of_them=protocol.keep_policies)
        best = mainline.best, lambda: read_policy(folder / BEST, f"remove {folder} to do this run anew")
        found = judge_trained(
            run, folder, protocol, mainline.evaluations, (mainline.spent, policy), best, record=record, report=report,
            should_stop=should_stop,
        )  # fmt: skip
        if found is None:
            return None
        steps, seconds, evaluating = _work_done(folder)
        calls, tokens = _proposer_costs(trainer.account) if needs_model(config.proposer) else (0, 0)
        return {
            **found,
            "evaluation_seconds": found["evaluation_seconds"] + evaluating,
            "learns": True,
            "precision": settled(run).algorithm.precision,
            "training_seconds": seconds,
            "steps_per_second": steps / seconds if seconds else None,
            "training_model_calls": calls,
            "training_model_tokens": tokens,
            "training_model_seconds": 0.0,  # the account holds no times: the same run has the same account
            "shaping": trainer.account["final"]["config"],
        }

    def tidy(self, folder: Path) -> None:
        """All checkpoints but the newest of what became of the mainline, and all policies on the way to it."""
        segments = folder / SEGMENTS
        spent = checkpoints_of(trained_folder(folder) / "checkpoints")[:-1]
        for old in [*segments.glob("*/checkpoints"), *segments.glob(f"*/{POLICIES}"), *spent]:
            shutil.rmtree(old, ignore_errors=True)


class _Mainline:
    """A finished run's mainline, as a run by the study's protocol would have been evaluated.

    Attributes:
        spent: steps spent in all.
        evaluations: at steps spent, in the form of `run_by_protocol`.
        best: the step of the best of these.
    """

    def __init__(self, folder: Path, account: dict[str, Any], every: int) -> None:
        self._folder = folder
        self.spent = int(account["final"]["spent"])
        # Where a branch takes the control's place, both end at one step spent: from there on the branch is it.
        points = {int(point["spent"]): point for point in account["mainline"]}
        # Where branches that came to nothing took the last steps, it ended as it was before them.
        points.setdefault(self.spent, account["mainline"][-1])
        self._places: dict[int, tuple[str, int]] = {}
        self.evaluations: list[dict[str, Any]] = []
        judged = cache(lambda place: kept_result(folder / place)[1]["evaluations"])
        for spent, point in points.items():
            if is_due(spent, list(self._places), every, self.spent):
                self._places[spent] = (point["segment"], point["step"])
                found = next(e for e in judged(point["segment"]) if e["step"] == point["step"])
                self.evaluations.append({**found, "step": spent})
        self.best = best_of(self.evaluations)

    def keep_policies(self, *, all_of_them: bool) -> None:
        """Keep the policy of the best evaluation in the run's folder, as every run does, or those of all, too.

        Those that were tidied away already are there.
        """
        for spent, (place, step) in self._places.items():
            source = self._folder / place / policy_file(step)
            targets = [BEST] * (spent == self.best) + [policy_file(spent)] * all_of_them
            for target in (self._folder / name for name in targets):
                if source.exists():
                    atomic_write_bytes(target, source.read_bytes())


def _plain(config: AlsoConfig) -> AlsoConfig:
    """Without what no result depends on, and where a record is: what it said is in the account."""
    kind, _, _ = config.proposer.partition(":")
    proposer = "recorded:" if kind == "recorded" else config.proposer
    return dataclasses.replace(config, workers=None, imports=(), proposer=proposer)


def _steps(segment: Path) -> int:
    """Environment steps of a segment, up to its newest checkpoint while it is under way."""
    fork, (state, told) = segment / FORK, kept_result(segment)
    begin = read_json(fork, "fork")["step"] if fork.exists() else 0
    end = told["last"]["step"] if state == "finished" else steps_done(segment)
    return max(0, int(end) - int(begin))


def _work_done(folder: Path) -> tuple[int, float, float]:
    """Of all segments that could be trained: their steps, and the seconds of training and of evaluating."""
    found = {path.parent: read_json(path, "result") for path in (folder / SEGMENTS).glob("*/result.json")}
    evaluating = sum(result["evaluation_seconds"] for result in found.values())
    return sum(map(_steps, found)), segments_seconds(folder), evaluating


def _proposer_costs(account: dict[str, Any]) -> tuple[int, int]:
    """How often a language model was asked according to an account, and the tokens of its prompts."""
    notes = [stage["card_note"] for stage in account["stages"] if "card_note" in stage]
    for stage in account["stages"]:
        for turn in stage["rounds"]:
            notes += [turn["proposed"].get("note"), turn["review_note"]]
    tries = [asked for note in notes if note for asked in note.get("tries", ())]
    return len(tries), sum(asked.get("prompt_tokens", 0) for asked in tries)


register(ShapedRuns())
