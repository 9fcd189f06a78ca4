"""The field's evaluation protocol: judged while it trains, and at the end by an absolute metric.

Every so many steps a run is evaluated on a few episodes; at the end the best of those policies and the last one are
judged by the absolute metric, many more episodes on worlds that neither training nor the choice of the best has seen
(Gorsane et al. 2022, "Towards a Standardised Performance Evaluation Protocol for Cooperative MARL").
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from echelon._files import atomic_write_bytes, atomic_write_json, atomic_write_text, read_json
from echelon.building import settled
from echelon.configs import RunConfig, read_toml, to_toml
from echelon.errors import EchelonError
from echelon.evaluation.episodes import EpisodeResults, evaluate
from echelon.methods import method
from echelon.runs import run_costs
from echelon.training import Trainer

__all__ = [
    "BEST",
    "POLICIES",
    "Policy",
    "Protocol",
    "Report",
    "best_of",
    "is_due",
    "judge_trained",
    "other_settings",
    "policy_file",
    "read_policy",
    "run_by_protocol",
    "same_run",
]

FORMAT = 1
_ABSOLUTE = 1  # the absolute metric's stream of evaluation worlds
BEST = "best.safetensors"
"""The file of a run's folder with the policy of its best evaluation."""
POLICIES = "policies"
"""The folder of a run's folder with the policies of all evaluations, where they are kept."""
Policy = dict[str, torch.Tensor] | None
Report = Callable[[str, float, float, str], None]


@dataclass(frozen=True)
class Protocol:
    """When a run is judged, and on how many episodes."""

    every: int = 250_000
    """Environment steps between evaluations while training (rounded up to whole rollouts)."""
    episodes: int = 32
    """Episodes of each of those."""
    final_episodes: int = 320
    """Episodes of the absolute metric, for the best and for the last policy."""
    world_seed: int | None = None
    """Which worlds all runs are judged in; default: each in those of its own seed."""
    keep_policies: bool = False
    """Keep the policy of each evaluation while training, not of the best alone: `policies/<step>.safetensors`."""

    def __post_init__(self) -> None:
        for name, least in {"every": 1, "episodes": 1, "final_episodes": 1, "world_seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise EchelonError(f"protocol.{name} is {value}: it must be at least {least}")

    def to_json(self) -> dict[str, int | bool]:
        """What is set; settings that came later only where they say something."""
        told = dataclasses.asdict(self)
        return {name: value for name, value in told.items() if not (value is None or value is False)}


def run_by_protocol(
    run: RunConfig,
    folder: Path,
    protocol: Protocol,
    *,
    record: int = 0,
    report: Report = lambda stage, done, total, info: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train a run and judge it; called again, it goes on where it was stopped or killed.

    Training is the same, bit for bit, as without evaluations. Leaves `protocol.json` (what was judged so far),
    `best.safetensors` (the policy of the best evaluation) and, with `record`, `replays/protocol.json`.

    Args:
        run: what to train; methods that learn nothing are only judged.
        folder: the run's folder, new or the same run's.
        protocol: when and on how many episodes.
        record: how many episodes of the last policy's absolute metric to record for a replay.
        report: called as (stage, done, total, words) while it works; stages are "training" and "evaluating".
        should_stop: asked after each update and each step of an evaluation.

    Returns:
        JSON-able: `evaluations` (step, episodes, success, tsr, steps_to_finish, collisions, task_return, in order of
        steps), `best` and `last` (step and one list entry an episode; the same policy is judged once), `precision`
        (that networks computed in) and what the training took. None if it was stopped.

    Raises:
        EchelonError: the folder holds another run, training diverged, or files are damaged.
        StorageError: files can't be written.
    """
    judge = _Judge(run, folder, protocol, record, report, should_stop)
    policy: Policy = None
    aside: AbstractContextManager[None] = nullcontext()
    if method(run.method).learns:
        trainer = _trainer(run, folder)
        run = judge.run = trainer.config
        while True:
            step = trainer.step
            policy = trainer.rollouts.algorithm.state_dict(policy_only=True)
            with trainer.aside():
                if judge.is_due(step) and not judge.evaluate(step, policy):
                    return None
            if step >= run.steps:
                break
            until = min((step // protocol.every + 1) * protocol.every, run.steps)
            trainer.run(
                lambda p: report("training", p.step, p.steps, f"{p.rate:,.0f} steps/s"), should_stop, until=until
            )
            if trainer.step < until:
                return None
        aside = trainer.aside()
    else:
        if not (folder / "config.toml").exists():
            atomic_write_text(folder / "config.toml", to_toml(run))
        _require_same(run, folder)
        step = 0
        if judge.is_due(0) and not judge.evaluate(0, None):
            return None
    with aside:
        if not judge.finish((step, policy), judge.best_step(), judge.best_policy):
            return None
    costs = run_costs(folder)
    seconds = costs.get("training_seconds") or 0.0
    return {
        **judge.told,
        "learns": method(run.method).learns,
        "precision": settled(run).algorithm.precision,
        "training_seconds": seconds,
        "steps_per_second": step / seconds if seconds else None,
        "training_model_calls": costs.get("training_model_calls", 0),
        "training_model_tokens": costs.get("training_model_tokens", 0),
        "training_model_seconds": costs.get("training_model_seconds", 0.0),
    }


def judge_trained(
    run: RunConfig,
    folder: Path,
    protocol: Protocol,
    evaluations: list[dict[str, Any]],
    last: tuple[int, Policy],
    best: tuple[int, Callable[[], Policy]],
    *,
    record: int = 0,
    report: Report = lambda stage, done, total, info: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """The absolute metric for what was trained, and evaluated on the way, by other means than `run_by_protocol`.

    Args:
        run: what to evaluate the policies as.
        folder: where `protocol.json` and replays are left; called again, it goes on where it was stopped.
        protocol, record, report, should_stop: see `run_by_protocol`.
        evaluations: those on the way, in its form.
        last: the steps after which the last policy was had, and the policy.
        best: the same of the best of these evaluations; its policy is asked for only if it isn't judged yet.

    Returns:
        JSON-able: `evaluations`, `best`, `last`, `evaluation_seconds`; None if it was stopped.
    """
    judge = _Judge(run, folder, protocol, record, report, should_stop)
    judge.told["evaluations"] = evaluations
    return judge.told if judge.finish(last, *best) else None


def same_run(old: RunConfig, new: RunConfig) -> bool:
    """Whether two configs are of one run: threads change the speed alone, steps how long it goes on.

    A new one whose precision is "auto" takes the old one's: a run goes on as it began, also on another processor.
    """
    if new.algorithm.precision == "auto":
        new = dataclasses.replace(new, algorithm=dataclasses.replace(new.algorithm, precision=old.algorithm.precision))

    def plain(run: RunConfig) -> RunConfig:
        return dataclasses.replace(settled(run), threads=None, steps=1)

    return plain(old) == plain(new)


def _require_same(run: RunConfig, folder: Path) -> None:
    if not same_run(read_toml(folder / "config.toml"), run):
        raise other_settings(folder)


def _trainer(run: RunConfig, folder: Path) -> Trainer:
    if not (folder / "config.toml").exists():
        return Trainer(run, folder)
    _require_same(run, folder)
    return Trainer.resume(folder, steps=run.steps)


class _Judge:
    """Evaluates a run's policies, and keeps what was found in `protocol.json`.

    Attributes:
        told: what is in the file.
    """

    def __init__(
        self,
        run: RunConfig,
        folder: Path,
        protocol: Protocol,
        record: int,
        report: Report,
        should_stop: Callable[[], bool],
    ) -> None:
        self.run, self.folder, self.protocol = run, folder, protocol
        self.record, self.report, self.should_stop = record, report, should_stop
        self.told: dict[str, Any] = {"evaluations": [], "best": None, "last": None, "evaluation_seconds": 0.0}
        self._of = {"format": FORMAT, **protocol.to_json()}
        path = folder / "protocol.json"
        if path.exists():
            saved = read_json(path, "evaluation protocol")
            if isinstance(saved, dict) and saved.get("of", {}).get("format", 0) > FORMAT:
                raise EchelonError(
                    f"{path} has format {saved['of']['format']}, this Echelon reads up to {FORMAT}: use a newer Echelon"
                )
            # Evaluated by another protocol: done anew.
            if isinstance(saved, dict) and saved.get("of") == self._of:
                self.told = {k: saved[k] for k in self.told}

    def is_due(self, step: int) -> bool:
        """Whether the policy after `step` steps is one to judge, and wasn't."""
        return is_due(step, [e["step"] for e in self.told["evaluations"]], self.protocol.every, self.run.steps)

    def evaluate(self, step: int, policy: Policy) -> bool:
        """Judge a policy on the way; False if it was stopped."""
        result = self._play(policy, self.protocol.episodes, 0, 0)
        if result is None:
            return False
        finished = result.steps[result.success]
        entry = {
            "step": step,
            "episodes": len(result.success),
            "success": int(result.success.sum()),
            "tsr": float(result.success.mean()),
            "steps_to_finish": float(finished.mean()) if len(finished) else None,
            "collisions": float(result.collisions.mean()),
            "task_return": float(result.task_return.mean()),
        }
        if policy is not None and self.protocol.keep_policies:
            atomic_write_bytes(self.folder / policy_file(step), safetensors.torch.save(policy))
        # Of equals the later one: it has learnt for longer.
        if policy is not None and all(e["success"] <= entry["success"] for e in self.told["evaluations"]):
            atomic_write_bytes(self.folder / BEST, safetensors.torch.save(policy))
        self.told["evaluations"].append(entry)
        self._save()
        return True

    def best_step(self) -> int:
        """The step of the best evaluation."""
        return best_of(self.told["evaluations"])

    def finish(self, last: tuple[int, Policy], best_step: int, best_policy: Callable[[], Policy]) -> bool:
        """The absolute metric of the last and of the best policy; False if it was stopped."""
        step, policy = last
        for name, at in (("last", step), ("best", best_step)):
            if self.told[name] is not None and self.told[name]["step"] == at:
                continue
            if name == "best" and at == step:
                self.told["best"] = self.told["last"]
            else:
                judged = policy if name == "last" else best_policy()
                episodes = self.protocol.final_episodes
                record = min(self.record, episodes) if name == "last" else 0
                result = self._play(judged, episodes, _ABSOLUTE, record)
                if result is None:
                    return False
                self.told[name] = _in_full(result, at)
                if result.replay is not None:
                    atomic_write_json(self.folder / "replays" / "protocol.json", result.replay)
            self._save()
        return True

    def best_policy(self) -> Policy:
        """The policy of that evaluation."""
        return read_policy(self.folder / BEST, f"remove {self.folder / 'protocol.json'} to judge this run anew")

    def _play(self, policy: Policy, episodes: int, stream: int, record: int) -> EpisodeResults | None:
        result = evaluate(
            self.run, policy, episodes=episodes, seed=self.protocol.world_seed, stream=stream, record=record,
            should_stop=self.should_stop,
            report=lambda done, total: self.report("evaluating", done, total, "episodes"),
        )  # fmt: skip
        if result is not None:
            self.told["evaluation_seconds"] += result.seconds
        return result

    def _save(self) -> None:
        told = {**self.told, "of": self._of}
        atomic_write_json(self.folder / "protocol.json", told)


def is_due(step: int, judged: list[int], every: int, steps: int) -> bool:
    """Whether the policy after `step` of `steps` steps is one to judge.

    Args:
        step: the policy's.
        judged: the steps at which policies were judged before.
        every: the protocol's.
        steps: the run's.
    """
    last = step >= steps and all(other < step for other in judged)
    return last or step // every not in [other // every for other in judged]


def best_of(evaluations: list[dict[str, Any]]) -> int:
    """The step of the best evaluation; of equals the later one."""
    return int(max(evaluations, key=lambda e: (e["success"], e["step"]))["step"])


def policy_file(step: int) -> Path:
    """Where the policy of the evaluation at a step is kept, in the run's folder."""
    return Path(POLICIES) / f"{step}.safetensors"


def other_settings(folder: Path) -> EchelonError:
    """The error for a folder that holds another run than the one that is to go on in it."""
    return EchelonError(f"{folder} holds a run with other settings: choose another folder, or move it away")


def read_policy(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """A policy that an evaluation kept.

    Raises:
        EchelonError: the file is damaged or gone; says what to do.
    """
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise EchelonError(f"{path} is damaged ({error}): {remedy}") from None


def _in_full(result: EpisodeResults, step: int) -> dict[str, Any]:
    """An absolute metric with one entry an episode, so that every statistic can be made from it later."""
    found = {
        "step": step,
        "episodes": len(result.success),
        "tsr": float(result.success.mean()),
        "success": [int(x) for x in result.success],
        "steps": [int(x) for x in result.steps],
        "collisions": [int(x) for x in result.collisions],
        "task_return": [round(float(x), 6) for x in result.task_return],
        "seconds": round(result.seconds, 3),
        "plans": result.plans,
    }
    return dict(json.loads(json.dumps(found)))
