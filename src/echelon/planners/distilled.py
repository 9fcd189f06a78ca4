"""The distilled planner: a small network that learns a model's choices, and a gate that knows when to trust it.

The network (`student`) learns from the model's probabilities of the candidates (soft targets, Hinton et al. 2015,
"Distilling the knowledge in a neural network") while the run goes on. Every answer is first predicted, then learnt, so
that each is a test on what the student had not seen (prequential: Dawid 1984); the last of these tests set the gate's
threshold. The gate asks the model where the student is unsure, as far as the budget goes, and now and then where it
is sure, so that what it believes of itself stays true. Features, network, gate and budget are our choice.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from echelon._files import atomic_write_bytes
from echelon.errors import EchelonError
from echelon.planners.student import RAW, Network, list_open, open_counts, questions
from echelon.rng import spawn_keys, uniform
from echelon.subgoals import EXCLUSIVE, Plan, PlanRequest

__all__ = ["NEVER", "DistilConfig", "DistilledPlanner", "Student", "calibrate", "choose", "wilson"]

NEVER = 2.0
"""A threshold that no confidence reaches: the gate is closed."""

_AUDIT = np.uint64(0xA0D17)  # which of an agent's random numbers decides whether it is audited
_TIE = 1e-6  # probabilities of the model that are no farther apart count as equal
_LEAST = 1e-6  # no candidate is less probable than this in a regret
_Z = 1.959963984540054  # 95%, two sides


@dataclass(frozen=True)
class DistilConfig:
    """Whether and how a small network learns the model's choices and takes its place. All defaults are our choice."""

    enabled: bool = False
    """Let a student learn from the model and plan where it is sure."""
    agreement: float = 0.95
    """Share of the student's sure choices that the model would have made too, below 1: the gate's lower bound."""
    calls_per_million: int = 2000
    """Questions (agents) to the model per million environment steps, beyond `start`."""
    start: int = 500
    """Questions before the gate may open; so many may be asked at once."""
    audit: float = 0.02
    """Share of sure decisions that the model is asked about all the same, 0 to 1; at most half of the questions."""
    window: int = 512
    """The last so many answers set the gate's threshold."""
    hidden: int = 32
    """Units of each of the student's two hidden layers."""
    learning_rate: float = 0.003
    """Adam's step size."""
    batch: int = 64
    """Answers in a gradient step."""
    every: int = 4
    """One gradient step for every so many answers."""
    memory: int = 8192
    """The last so many answers are kept to learn from."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("agreement", 0 < self.agreement < 1, "above 0 and below 1"),
            ("calls_per_million", self.calls_per_million >= 0, "at least 0"),
            ("start", self.start >= 0, "at least 0"),
            ("audit", 0 <= self.audit <= 1, "0 to 1"),
            ("window", self.window >= 1, "at least 1"),
            ("hidden", 1 <= self.hidden <= 1024, "1 to 1024"),
            ("learning_rate", 0 < self.learning_rate < 1, "above 0 and below 1"),
            ("batch", 1 <= self.batch <= 65536, "1 to 65536"),
            ("every", self.every >= 1, "at least 1"),
            ("memory", self.memory >= 1, "at least 1"),
        ):
            if not good:
                raise EchelonError(f"distil.{name} is {getattr(self, name)}: it must be {need}")


def wilson(successes: Any, trials: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ends of Wilson's 95% score interval (Wilson 1927), elementwise; of no trials 0 and 1."""
    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = (k + _Z**2 / 2) / (n + _Z**2)
        half = _Z / (n + _Z**2) * np.sqrt(np.where(n > 0, k * (n - k) / n, 0) + _Z**2 / 4)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def calibrate(confidence: NDArray[np.float32], agreed: NDArray[np.bool_], agreement: float) -> float:
    """The smallest recorded confidence from which on the student may be trusted.

    Among the answers with at least this confidence, the lower end of Wilson's 95% interval of the agreement is at
    least `agreement`. That the best of many thresholds is taken errs towards trust; that sure answers are recorded
    only when audited, so that unsure ones weigh more, errs the other way. What comes of both is what audits measure.

    Args:
        confidence: float32 `(k,)`; agreed: bool `(k,)`, the recorded answers.
        agreement: what is wanted, above 0 and below 1.

    Returns:
        The threshold, or `NEVER` if there is none.
    """
    if not len(confidence):
        return NEVER
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    # Equal confidences are above a threshold together.
    last = np.append(sorted_confidence[1:] != sorted_confidence[:-1], True)
    low, _ = wilson(np.cumsum(agreed[order]), np.arange(1, len(order) + 1))
    good = np.flatnonzero(last & (low >= agreement))
    return float(sorted_confidence[good[-1]]) if len(good) else NEVER


def choose(
    request: PlanRequest, who: NDArray[np.bool_], probability: NDArray[np.float32], confidence: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Join a team's choices, as `LLMPlanner` does: the surest first, and no exclusive task twice.

    Args:
        request: what was asked, with path lengths.
        who: bool `(n, A)`, the agents that choose.
        probability: float32 `(n, A, C)`, of each candidate, whoever it comes from. Of equals the shorter way comes
            first, then the first: who has only zeros gets the nearest that is left.
        confidence: float32 `(n, A)`; of equals the first agent chooses first.

    Returns:
        int64 `(n, A)`, each agent's candidate; -1 where there is none left, and for agents not in `who`.

    Raises:
        ValueError: `probability` isn't one of these candidates.
    """
    assert request.distance is not None
    c = request.candidates
    if probability.shape != c.kind.shape:
        raise ValueError(f"probabilities {probability.shape} of candidates {c.kind.shape}")
    choice = np.full(who.shape, -1, np.int64)
    _choose(
        who, probability, confidence, c.kind, c.task, request.distance, request.refused, request.taken.copy(), choice
    )
    return choice


class Student:
    """Learns a model's choices and says when it is sure of them.

    What it does follows from its seed and the sequence of requests and answers alone, to the last bit; put back from
    `state_dict` and `arrays`, it goes on as if it had never stopped.

    Attributes:
        config: its settings.
        network: what it has learnt.
        threshold: from this confidence on it is sure; `NEVER`: of nothing.
        asked: questions that the gate has let through, `audited` of them about sure decisions.
        spared: sure decisions that weren't asked.
        over_budget: unsure decisions that it made all the same, since the budget was spent or the model busy.
        untrained: unsure decisions left to the fallback, since there was nothing to learn from yet.
        answers: answers learnt; dropped: answers of which nothing can be learnt.
        steps: environment steps at the last look through the gate.
    """

    def __init__(self, config: DistilConfig, seed: int) -> None:
        """A student that knows nothing.

        Args:
            config: its settings.
            seed: decides its initial weights, and of which answers it learns when.
        """
        self.config = config
        self.network = Network(config.hidden, seed)
        self.threshold = NEVER
        self.asked = self.audited = self.spared = self.over_budget = self.untrained = self.answers = self.dropped = 0
        self.steps = 0
        self._key = spawn_keys(seed, (0xD16,), 1)[0]
        # Rings: answers to learn from, and how each was predicted before (confidence, agreed, nats, steps).
        self._raw = np.zeros((config.memory, 0, RAW), np.int16)
        self._target = np.zeros((config.memory, 0), np.float32)
        self._count = np.zeros(config.memory, np.int64)
        self._records = np.zeros((config.window, 4), np.float32)
        # Over the whole run: answers, agreed, nats, steps; and the same of those that were drawn for an audit.
        self._all, self._audits = np.zeros(4), np.zeros(4)

    # -- to decide -----------------------------------------------------------------------------

    def decide(self, request: PlanRequest, who: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What the student thinks.

        Args:
            request: what is asked, with path lengths.
            who: bool `(n, A)`, for whom.

        Returns:
            float32 `(n, A, C)`, the probability of each open candidate (all 0 for agents not in `who`; tools are
            open only where nothing else is, as for `LLMPlanner`); and float32 `(n, A)`, its confidence p1 / (p1 + p2)
            of the two most probable ones: 0.5 to 1, 1 where only one is open, 0 where none is. Unlike the greatest
            probability alone, it means the same among two candidates as among twenty.
        """
        return self.network.decide(request, who)

    def gate(
        self, request: PlanRequest, who: NDArray[np.bool_], confidence: NDArray[np.float32], *, busy: bool = False
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Who decides for each agent, and count it.

        Audits come first, in order of their random draw, but make up no more than half of what the budget has allowed
        since `start`; what is left goes to the least sure.

        Args:
            request: what is asked: `steps` says how much may be asked by now.
            who: bool `(n, A)`, for whom.
            confidence: float32 `(n, A)`, from `decide`.
            busy: the model can't be asked now: as if nothing were left of the budget.

        Returns:
            sure: bool `(n, A)`, the student's choice holds: it is sure, or there is nothing to choose, or it is unsure
                but the budget is spent.
            ask: bool `(n, A)`, to be asked of the model; an audit is both.
            Who is neither is left to the fallback: the budget is spent and nothing has been learnt yet.
        """
        c, self.steps = self.config, request.steps
        left = 0 if busy else max(self.allowed(request.steps) - self.asked, 0)
        threshold = self.threshold if self.asked >= c.start else NEVER
        several = open_counts(request, who) > 1
        sure = who & ~(several & (confidence < np.float32(threshold)))
        unsure = who & ~sure
        ask = np.zeros(who.shape, bool)
        draws = self._draws(request, sure & several)
        audits = np.argwhere(draws < c.audit)
        room = min(left, (self.allowed(request.steps) - c.start) // 2 - self.audited)
        if len(audits) > room:
            audits = audits[np.argsort(draws[tuple(audits.T)], kind="stable")][: max(room, 0)]
        ask[tuple(audits.T)] = True
        questions_ = np.argwhere(unsure)
        if len(questions_) > left - len(audits):
            order = np.argsort(confidence[tuple(questions_.T)], kind="stable")
            questions_ = questions_[order][: left - len(audits)]
        ask[tuple(questions_.T)] = True
        self.audited += len(audits)
        self.asked += len(audits) + len(questions_)
        self.spared += int(np.count_nonzero(sure & several)) - len(audits)
        beyond = unsure & ~ask
        if self.network.updates:
            self.over_budget += int(np.count_nonzero(beyond))
            sure |= beyond
        else:
            self.untrained += int(np.count_nonzero(beyond))
        return sure, ask

    def allowed(self, steps: int) -> int:
        """How many questions may have been asked after `steps` environment steps."""
        return self.config.start + self.config.calls_per_million * steps // 1_000_000

    def choose(
        self,
        request: PlanRequest,
        who: NDArray[np.bool_],
        probability: NDArray[np.float32],
        confidence: NDArray[np.float32],
    ) -> NDArray[np.int64]:
        """As the function `choose`."""
        return choose(request, who, probability, confidence)

    @staticmethod
    def _draws(request: PlanRequest, who: NDArray[np.bool_]) -> NDArray[np.float64]:
        """A random number in [0, 1) for each of `who`, 2 for the others."""
        draws = np.full(who.shape, 2.0)
        _draw(request.keys, who, draws)
        return draws

    # -- to learn ------------------------------------------------------------------------------

    def learn(self, request: PlanRequest, asked: NDArray[np.bool_], probability: NDArray[np.float32]) -> None:
        """Compare the model's answers with what the student would have said, move the threshold, then learn them.

        Args:
            request: what was asked.
            asked: bool `(n, A)`, for whom the model was asked.
            probability: float32 `(n, A, C)`, the model's probabilities. What isn't finite, is negative, or has nothing
                for any open candidate, teaches nothing; nor does an agent with fewer than two open ones.

        Raises:
            ValueError: `probability` isn't one of these candidates.
        """
        raw, count, target = questions(request, asked, probability)
        total = target.sum(1, dtype=np.float64)
        good = (count > 1) & np.isfinite(total) & (target >= 0).all(1) & (total > 0)
        self.dropped += int(np.count_nonzero((count > 1) & ~good))
        if not good.any():
            return
        drawn = (self._draws(request, asked)[asked] < self.config.audit)[good]
        raw, count = raw[good], count[good]
        target = (target[good] / total[good, None]).astype(np.float32)
        self._record(raw, self.network.predict(raw, count), target, drawn)
        self._remember(raw, count, target)
        c, network = self.config, self.network
        while (network.updates + 1) * c.every <= self.answers:
            filled = min(self.answers, c.memory)
            network.step(self._raw, self._count, self._target, filled, c.batch, c.learning_rate, self._key)

    def _record(
        self,
        raw: NDArray[np.int16],
        predicted: NDArray[np.float32],
        target: NDArray[np.float32],
        drawn: NDArray[np.bool_],
    ) -> None:
        """Test predictions of answers not yet learnt, and calibrate anew."""
        at = np.arange(len(raw))
        mine, best = predicted.argmax(1), target.argmax(1)
        top = np.partition(predicted, -2, 1)[:, -2:]
        records = np.empty((len(raw), 4), np.float32)
        records[:, 0] = top[:, 1] / (top[:, 0] + top[:, 1])
        records[:, 1] = agreed = target[at, mine] >= target[at, best] - _TIE
        least = np.maximum(target, np.float32(_LEAST))
        records[:, 2] = np.log(least[at, best]) - np.log(least[at, mine])
        lengths = raw[:, :, 1].astype(np.float32)
        records[:, 3] = np.where(agreed, 0, lengths[at, mine] - lengths[at, best])
        # An answer with an audit's draw would have been asked for whether sure or not: a fair sample of the sure ones.
        sums = np.column_stack([np.ones(len(raw)), records[:, 1:].astype(np.float64)])
        fair = drawn & (records[:, 0] >= np.float32(self.threshold)) & (self.asked >= self.config.start)
        self._all += sums.sum(0)
        self._audits += sums[fair].sum(0)
        kept = records[-self.config.window :]
        first = self.answers + len(records) - len(kept)
        self._records[(first + np.arange(len(kept))) % self.config.window] = kept
        seen = self._records[: self.answers + len(records)]
        self.threshold = calibrate(seen[:, 0], seen[:, 1] > 0, self.config.agreement)

    def _remember(self, raw: NDArray[np.int16], count: NDArray[np.int64], target: NDArray[np.float32]) -> None:
        """Put answers into the memory, over the oldest."""
        more = raw.shape[1] - self._raw.shape[1]
        if more > 0:
            self._raw = np.pad(self._raw, ((0, 0), (0, more), (0, 0)))
            self._target = np.pad(self._target, ((0, 0), (0, more)))
        kept = slice(-self.config.memory, None)
        first = self.answers + max(len(raw) - self.config.memory, 0)
        self.answers += len(raw)
        at = np.arange(first, self.answers) % self.config.memory
        self._raw[at, : raw.shape[1]] = raw[kept]
        self._target[at, : raw.shape[1]] = target[kept]
        self._count[at] = count[kept]

    # -- what is known of it -------------------------------------------------------------------

    def report(self) -> dict[str, float | int]:
        """How well it does, and what it has saved; shares are left out where there is nothing to share.

        Returns:
            The counts among the attributes; `updates`; `threshold` and `open` (0 or 1); `calls_left`. Of the last
            `window` answers, each predicted before it was learnt: `agreement` with its 95% interval
            (`agreement_low`, `agreement_high`, by Wilson) and `agreement_count`. Of all answers: `regret` (nats, what
            the model's log-probability of its best candidate is above that of the student's, which is no less than
            log 1e-6) and `extra_steps` (how much longer the way to the student's candidate is than to the model's).
            `sure_*`: the same of sure decisions drawn for an audit, a fair sample of all sure decisions in the run.
        """
        told: dict[str, float | int] = {
            name: getattr(self, name)
            for name in ("asked", "audited", "spared", "over_budget", "untrained", "answers", "dropped", "threshold")
        }
        told["updates"] = self.network.updates
        told["open"] = int(self.threshold < NEVER and self.asked >= self.config.start)
        told["calls_left"] = max(self.allowed(self.steps) - self.asked, 0)
        seen = self._records[: self.answers, 1]
        told |= _share("agreement", int(seen.sum()), len(seen))
        told |= _share("sure_agreement", int(self._audits[1]), int(self._audits[0]))
        for prefix, sums in (("", self._all), ("sure_", self._audits)):
            if sums[0]:
                told[f"{prefix}regret"] = float(sums[2] / sums[0])
                told[f"{prefix}extra_steps"] = float(sums[3] / sums[0])
        return told

    # -- state ---------------------------------------------------------------------------------

    _counters = ("asked", "audited", "spared", "over_budget", "untrained", "answers", "dropped", "steps")

    def state_dict(self) -> dict[str, Any]:
        """Its counters and threshold."""
        return {
            **{name: getattr(self, name) for name in self._counters},
            "updates": self.network.updates,
            "threshold": self.threshold,
            "key": str(self._key),  # of 64 bits: more than some readers of JSON keep of a number
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name in self._counters:
            setattr(self, name, int(state[name]))
        self.network.updates, self.threshold = int(state["updates"]), float(state["threshold"])
        self._key = np.uint64(int(state["key"]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Weights, Adam's moments, the memory of answers, and how they were predicted: copies."""
        filled = min(self.answers, self.config.memory)
        return {
            "weights": self.network.flat.copy(),
            "first": self.network.first.copy(),
            "second": self.network.second.copy(),
            "raw": self._raw[:filled].copy(),
            "target": self._target[:filled].copy(),
            "count": self._count[:filled].copy(),
            "records": self._records.copy(),
            "sums": np.stack([self._all, self._audits]),
        }

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `arrays` gave.

        Raises:
            EchelonError: they are those of a student with other settings.
        """
        c, n, width = self.config, len(arrays["raw"]), arrays["target"].shape[1]
        for name, shape in (
            ("weights", self.network.flat.shape),
            ("first", self.network.flat.shape),
            ("second", self.network.flat.shape),
            ("raw", (min(n, c.memory), width, RAW)),
            ("target", (n, width)),
            ("count", (n,)),
            ("records", self._records.shape),
            ("sums", (2, 4)),
        ):
            if arrays[name].shape != shape:
                raise EchelonError(f"a student with other settings: its {name} are {arrays[name].shape}, not {shape}")
        self.network.flat[:], self.network.first[:] = arrays["weights"], arrays["first"]
        self.network.second[:] = arrays["second"]
        self._raw = np.zeros((c.memory, width, RAW), np.int16)
        self._target = np.zeros((c.memory, width), np.float32)
        self._raw[:n], self._target[:n], self._count[:n] = arrays["raw"], arrays["target"], arrays["count"]
        self._records[:] = arrays["records"]
        self._all, self._audits = np.array(arrays["sums"], np.float64)

    def save(self, path: Path) -> None:
        """Write everything to one file (.npz), whole or not at all.

        Raises:
            StorageError: it can't be written.
        """
        told = json.dumps({"config": asdict(self.config), "state": self.state_dict()})
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"told": np.frombuffer(told.encode(), np.uint8), **self.arrays()}
        np.savez_compressed(buffer, **arrays)
        atomic_write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Student:
        """Read what `save` wrote.

        Raises:
            EchelonError: no such file, or no student's.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                told = json.loads(file["told"].tobytes().decode())
                known = {f.name for f in fields(DistilConfig)}
                student = cls(DistilConfig(**{k: v for k, v in told["config"].items() if k in known}), 0)
                student.load_state_dict(told["state"])
                student.load_arrays({name: file[name] for name in file.files if name != "told"})
        except OSError as error:
            raise EchelonError(f"student {path}: {error.strerror or 'not a file of a student'}") from None
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
            raise EchelonError(f"student {path}: not a file of a student") from None
        return student


class DistilledPlanner:
    """Plans with a student alone: no model, no gate; where it isn't sure its best guess counts."""

    name = "distilled"
    needs_distance = True
    cost = "cheap"

    def __init__(self, student: Student) -> None:
        """Plan with what `student` has learnt."""
        self.student = student

    def plan(self, request: PlanRequest) -> Plan:
        """The student's most probable candidates, no task twice; agents for whom none is open wait."""
        probability, confidence = self.student.decide(request, request.need)
        plan = Plan.chosen(request, choose(request, request.need, probability, confidence))
        plan.probability = probability
        plan.notes = lambda i: {
            "planner": self.name,
            "agents": {
                int(a): {"confidence": round(float(confidence[i, a]), 4)} for a in np.flatnonzero(request.need[i])
            },
        }
        return plan

    def state_dict(self) -> dict[str, Any]:
        """The student's."""
        return self.student.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.student.load_state_dict(state)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The student's."""
        return self.student.arrays()

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `arrays` gave."""
        self.student.load_arrays(arrays)


def _share(name: str, successes: int, trials: int) -> dict[str, float | int]:
    if not trials:
        return {f"{name}_count": 0}
    low, high = wilson(successes, trials)
    return {name: successes / trials, f"{name}_low": float(low), f"{name}_high": float(high), f"{name}_count": trials}


@numba.njit(cache=True, nogil=True)
def _draw(keys, who, draws):  # type: ignore[no-untyped-def]
    for i in range(who.shape[0]):
        for a in range(who.shape[1]):
            if who[i, a]:
                draws[i, a] = uniform(keys[i, a], _AUDIT)


@numba.njit(cache=True, nogil=True)
def _choose(who, probability, confidence, kind, task, distance, refused, taken, choice):  # type: ignore[no-untyped-def]
    order = np.empty(kind.shape[2], np.int64)
    for i in range(who.shape[0]):
        left = who[i].copy()
        while True:
            a = -1
            for b in range(left.shape[0]):
                if left[b] and (a < 0 or confidence[i, b] > confidence[i, a]):
                    a = b
            if a < 0:
                break
            left[a] = False
            p, steps, tasks = probability[i, a], distance[i, a], task[i, a]
            best = -1
            for k in range(list_open(kind[i, a], tasks, steps, refused[i, a], taken[i], order)):
                c = order[k]
                if best < 0 or p[c] > p[best] or (p[c] == p[best] and steps[c] < steps[best]):
                    best = c
            choice[i, a] = best
            if best >= 0 and tasks[best] >= 0 and EXCLUSIVE[kind[i, a, best]]:
                taken[i, tasks[best]] = True
