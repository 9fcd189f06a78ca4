"""A language model chooses each agent's subgoal among the candidates, by the probability that it gives to each.

Constrained planning: the model can't say anything but one of the open candidates, so what remains for the
feasibility chain is what a letter can't know. The model is asked of each candidate by itself whether it is good
(A) or bad (B), or, with templates that show all of them, for the letter of one. Prompts, the order of options and
the way in which a team's choices are joined are our choice; the paper states none of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.kernels import UNREACHABLE
from echelon.errors import EchelonError
from echelon.llm.choice import ChoiceModel, ChoicePrompt, ChoiceScores
from echelon.llm.prompts import LETTERS, Block, PromptTemplate, option_lines
from echelon.planners.base import Asking, ModelPlanner
from echelon.subgoals import EXCLUSIVE, Plan, PlanRequest, SubgoalKind, Verdict

__all__ = ["PROMPTS", "LLMPlanner"]

_BATCH = 64  # questions asked at a time: seconds, not minutes, between two looks at whether to stop
PROMPTS = Path(__file__).parent / "prompts"
_EACH = frozenset({"option", "what", "steps"})  # fields of a template that is about one option
_RATED = frozenset({"what", "steps", "feedback"})  # a template of no others: its questions come again and again
_WHICH = re.compile(r"[\d(),]+")  # ids and cells
_TOOL = int(SubgoalKind.TOOL)
_KINDS, _VERDICTS = len(SubgoalKind), len(Verdict)


@dataclass
class _Questions:
    """What a request comes down to.

    Attributes:
        options: int64 `(n, A, most)`, the candidates that agents are asked about, -1 past the last.
        count: int64 `(n, A)`, how many.
        choice: int64 `(n, A)`, candidates that need no model; -1 for the others.
        taken: bool `(n, T)`, tasks taken, those of `choice` too.
        asked: bool `(n, A)`, agents whose choice is the model's.
        row: int64 `(kinds,)`, by kind the row of the table of rated questions.
        prompts: what must be sent.
        fresh: int64 `(3, m)`, the places in the table (row, verdict, steps) that rated prompts are about; of: the
            agents (row, agent) that others are about.
        tokens: by agent (row, agent), what its question took, where not rated.
    """

    options: NDArray[np.int64]
    count: NDArray[np.int64]
    choice: NDArray[np.int64]
    taken: NDArray[np.bool_]
    asked: NDArray[np.bool_]
    row: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_KINDS, np.int64))
    prompts: list[ChoicePrompt] = field(default_factory=list)
    fresh: NDArray[np.int64] = field(default_factory=lambda: np.empty((3, 0), np.int64))
    of: list[tuple[int, int]] = field(default_factory=list)
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)


class LLMPlanner(ModelPlanner):
    """Scores every agent's open candidates with a model, all agents of all worlds in one batch.

    An agent with one open candidate needs no model. Where two agents want one task, the one that is surer of
    it gets it and the other its next best, or, if others took all that it was shown, the nearest that is left.

    Where a question depends on a candidate's kind and path length alone (the shipped template), its answer is kept
    in a table and never asked for again, so that after a few hundred questions a plan costs no model time at all.

    Attributes:
        asked: agents for whom the model chose; forced: agents that had only one open candidate; fresh: questions that
            were put to the model.
        failures: times that the model gave no usable answer.
    """

    def __init__(self, model: ChoiceModel, *, max_options: int = 8, folder: Path = PROMPTS) -> None:
        """Plan with `model`.

        Args:
            model: anything that scores options.
            max_options: most candidates asked about (the nearest ones), 2 to 26.
            folder: where the templates `choose_system.txt` and `choose.txt` lie. One with the field `options` is
                asked once an agent, for the letter of an option; one with `option` (in words, with its path length)
                or `what` and `steps` (the same in two, without its id or cell) once an option, for A or B. Both may
                have `robot`, `cell` and `feedback`.

        Raises:
            EchelonError: max_options is out of range, or a template can't be used.
        """
        if not 2 <= max_options <= len(LETTERS):
            raise EchelonError(f"max_options is {max_options}: it must be 2 to {len(LETTERS)}")
        self.name = f"llm:{model.name}"
        self.model, self.max_options = model, max_options
        self.shared = PromptTemplate.from_file(folder / "choose_system.txt").render()
        self.template = PromptTemplate.from_file(folder / "choose.txt")
        if "options" in self.template.fields and (both := sorted(_EACH & self.template.fields)):
            raise EchelonError(f"{self.template.source}: it has {{options}} for all, so it can't have {{{both[0]}}}")
        self._rated = bool(_EACH & self.template.fields) and self.template.fields <= _RATED
        self.sees = frozenset({"cells"} if "cell" in self.template.fields or not self._rated else ())
        self.depends_on = (self.shared, self.template.text, str(max_options))
        self._words: dict[str, int] = {}
        # Odds of good against bad, and the tokens that they took, by words, verdict and steps; NaN: not asked yet.
        self._odds = np.full((0, _VERDICTS, 0), np.nan)
        self._tokens = np.zeros((0, _VERDICTS, 0), np.int32)
        self.asked = self.forced = self.fresh = self.failures = 0

    # -- a plan in three parts -----------------------------------------------------------------

    def begin(self, request: PlanRequest, *, split: bool = False, busy: bool = False) -> Asking:
        """Choose what needs no model, and put the rest into questions."""
        assert request.distance is not None
        # Notes are written when later rounds have written over it.
        request = replace(request, rejected=request.rejected.copy())
        c, shape = request.candidates, (*request.need.shape, self.max_options)
        options, choice = np.full(shape, -1, np.int64), np.full(request.need.shape, -1, np.int64)
        count, taken = np.zeros(request.need.shape, np.int64), request.taken.copy()
        _list_open(request.need, c.kind, c.task, request.distance, request.refused, taken, options, count, choice)
        asked = count > 1
        q = _Questions(options, count, choice, taken, asked)
        self.forced += int(np.count_nonzero(count == 1))
        self.asked += int(np.count_nonzero(asked))
        logprobs = self._rate(request, q) if self._rated else self._write(request, q)
        unknown = asked & np.isnan(logprobs[..., 0])
        still = (unknown if split else asked) if unknown.any() else unknown
        plan = self._choose(request, q, logprobs, asked & ~still, None)
        return Asking(request, plan, still, lambda: self._ask(q.prompts), q)

    def end(self, asking: Asking, answers: Any) -> Plan:
        """The most probable candidates, no task twice; agents for whom none is open wait."""
        if not asking.open.any():
            return asking.plan
        q, (scores, broken) = asking.memo, answers
        self.failures += broken is not None
        if self._rated:
            row, verdict, steps = q.fresh[:, : len(scores)]
            # An option's probability is proportional to its odds, as in `ChoicePrompt.each`.
            self._odds[row, verdict, steps] = [float(s.logprobs[0]) - float(s.logprobs[1]) for s in scores]
            self._tokens[row, verdict, steps] = [s.prompt_tokens for s in scores]
            logprobs = self._from_table(asking.request, q)
        else:
            logprobs = np.full(q.options.shape, np.nan)
            for (i, a), answer in zip(q.of, scores, strict=False):
                logprobs[i, a, : len(answer.logprobs)] = answer.logprobs
                q.tokens[i, a] = answer.prompt_tokens
        return self._choose(asking.request, q, logprobs, asking.open, broken)

    def _write(self, request: PlanRequest, q: _Questions) -> NDArray[np.float64]:
        """A question for each agent; nothing is known yet."""
        q.of = [(int(i), int(a)) for i, a in zip(*np.nonzero(q.asked), strict=True)]
        q.prompts = [self.prompt(request, i, a, q.options[i, a, : q.count[i, a]]) for i, a in q.of]
        self.fresh += len(q.of)
        return np.full(q.options.shape, np.nan)

    def _rate(self, request: PlanRequest, q: _Questions) -> NDArray[np.float64]:
        """The log-probabilities of agents' options, NaN where the table lacks an answer, which is then asked for."""
        assert request.distance is not None
        c = request.candidates
        first = np.full((_KINDS, 3), -1, np.int64)
        steps = _survey(q.asked, q.options, q.count, c.kind, request.distance, first)
        words = {}
        for k in np.flatnonzero(first[:, 0] >= 0).tolist():
            i, a, option = first[k].tolist()
            words[k] = " ".join(_WHICH.sub(" ", request.text(i, a, option, brief=True)).split())
            q.row[k] = self._words.setdefault(words[k], len(self._words))
        self._grow(steps)
        logprobs = self._from_table(request, q)
        unknown = q.asked & np.isnan(logprobs[..., 0])
        if unknown.any():
            at = np.nonzero(unknown[..., None] & (q.options >= 0))
            which = (*at[:2], q.options[at])
            kinds, verdicts = c.kind[which].astype(np.int64), request.rejected[at[:2]].astype(np.int64)
            # A kind's words decide the row: kinds of the same words come down to one question.
            places = np.stack([q.row[kinds], verdicts, request.distance[which].astype(np.int64), kinds])
            places = places[:, np.isnan(self._odds[places[0], places[1], places[2]])]
            _, new = np.unique(places[:3], axis=1, return_index=True)
            q.fresh = places[:3, new]
            self.fresh += len(new)
            for _, verdict, steps, kind in places[:, new].T.tolist():
                text = self._render({"what": words[kind], "steps": steps, "feedback": _feedback(verdict)})
                q.prompts.append(ChoicePrompt(self.shared, text, ("good", "bad")))
        return logprobs

    def _from_table(self, request: PlanRequest, q: _Questions) -> NDArray[np.float64]:
        """Log-probabilities `(n, A, most)` of the options of agents that are asked; NaN where an answer is missing."""
        logprobs = np.empty(q.options.shape)
        c = request.candidates
        _look_up(q.asked, q.options, q.count, c.kind, request.distance, request.rejected, q.row, self._odds, logprobs)
        return logprobs

    def _grow(self, steps: int) -> None:
        """Make room in the table for every known word and so many steps."""
        rows, most = len(self._words), self._odds.shape[2]
        if rows > self._odds.shape[0] or steps >= most:
            size = max(64, most)
            while size <= steps:
                size *= 2
            odds, tokens = np.full((rows, _VERDICTS, size), np.nan), np.zeros((rows, _VERDICTS, size), np.int32)
            odds[: self._odds.shape[0], :, :most], tokens[: self._odds.shape[0], :, :most] = self._odds, self._tokens
            self._odds, self._tokens = odds, tokens

    def _choose(
        self,
        request: PlanRequest,
        q: _Questions,
        logprobs: NDArray[np.float64],
        who: NDArray[np.bool_],
        broken: str | None,
    ) -> Plan:
        """The plan in which the agents `who` choose by these log-probabilities, the surest first."""
        assert request.distance is not None
        c = request.candidates
        # No answer is an answer of bad form: sent back, then the fallback decides, and the run goes on.
        unanswered = who & np.isnan(logprobs[..., 0])
        who = who & ~unanswered
        _join(who, q.options, q.count, logprobs, c.kind, c.task, request.distance, request.refused, q.taken, q.choice)
        plan = Plan.chosen(request, q.choice)
        plan.kind[unanswered] = -1
        plan.probability = np.zeros(c.kind.shape, np.float32)
        _spread(who, q.options, q.count, logprobs, plan.probability)
        plan.notes = lambda i: self._note(request, q, i, logprobs, broken)
        return plan

    def _ask(self, prompts: list[ChoicePrompt]) -> tuple[list[ChoiceScores], str | None]:
        """The model's scores up to its first failure, and the reason of that."""
        scores: list[ChoiceScores] = []
        for at in range(0, len(prompts), _BATCH):
            self.between(at, len(prompts))
            some = prompts[at : at + _BATCH]
            try:
                answers = self.model.score(some)
                good = len(answers) == len(some) and all(
                    len(s.logprobs) == len(p.options) and np.isfinite(s.logprobs).all()
                    for s, p in zip(answers, some, strict=True)
                )
            except Exception as error:  # whatever a user's model or its server may raise: it must not stop the run
                return scores, f"{type(error).__name__}: {error}"
            if not good:
                return scores, f"model {self.model.name} gave scores that don't fit its questions"
            scores += answers
        return scores, None

    # -- prompts and notes ---------------------------------------------------------------------

    def prompt(self, request: PlanRequest, i: int, a: int, options: NDArray[np.int64]) -> ChoicePrompt:
        """What the model is asked about agent `a` of row `i` with the candidates `options` (int64 `(k,)`)."""
        assert request.distance is not None
        brief = [request.text(i, a, int(c), brief=True) for c in options]
        steps = [int(request.distance[i, a, c]) for c in options]
        words = tuple(f"{text}, {length} steps" for text, length in zip(brief, steps, strict=True))
        cell = request.where(i, a)
        fields = {"robot": a, "cell": f"row {cell[0]}, column {cell[1]}",
                  "feedback": _feedback(int(request.rejected[i, a]))}  # fmt: skip
        if not self.template.fields & _EACH:
            text = self._render({**fields, "options": option_lines(words)})
            return ChoicePrompt(self.shared, text, words)
        each = tuple(
            self._render({**fields, "option": option, "what": " ".join(_WHICH.sub(" ", text).split()), "steps": length})
            for option, text, length in zip(words, brief, steps, strict=True)
        )
        return ChoicePrompt(self.shared, "\n".join(each), words, each)

    def _render(self, fields: Mapping[str, object]) -> str:
        # A user's own template need not use every field.
        return self.template.render(**{k: v for k, v in fields.items() if k in self.template.fields})

    def open(self, request: PlanRequest, taken: NDArray[np.bool_], i: int, a: int) -> NDArray[np.int64]:
        """The open candidates that agent `a` of row `i` is asked about, the nearest `max_options`, int64 `(k,)`."""
        assert request.distance is not None
        c, one = request.candidates, np.zeros((1, request.need.shape[1]), bool)
        one[0, a] = True
        options, choice = np.full((*one.shape, self.max_options), -1, np.int64), np.full(one.shape, -1, np.int64)
        count = np.zeros(one.shape, np.int64)
        _list_open(one, c.kind[i : i + 1], c.task[i : i + 1], request.distance[i : i + 1],
                   request.refused[i : i + 1], taken[i : i + 1].copy(), options, count, choice)  # fmt: skip
        return options[0, a, : count[0, a]]

    def _note(
        self,
        request: PlanRequest,
        q: _Questions,
        i: int,
        logprobs: NDArray[np.float64],
        broken: str | None,
    ) -> dict[str, Any]:
        """What a person wants to know of row `i`."""
        agents: dict[int, dict[str, Any]] = {int(a): {"forced": True} for a in np.flatnonzero(q.count[i] == 1)}
        for a in np.flatnonzero(q.asked[i]).tolist():
            options = q.options[i, a, : q.count[i, a]]
            prompt = self.prompt(request, i, a, options)
            if np.isnan(logprobs[i, a, 0]):
                agents[a] = {"prompt": prompt.text} | ({"error": broken} if broken is not None else {})
                continue
            chances = np.exp(logprobs[i, a, : len(options)]).round(4).tolist()
            at = np.flatnonzero(options == q.choice[i, a])
            agents[a] = {
                "system": prompt.shared,
                "prompt": prompt.text,
                "options": [{"text": t, "probability": p} for t, p in zip(prompt.options, chances, strict=True)],
                "chosen": int(at[0]) if len(at) else None,
                "prompt_tokens": self._cost(request, q, i, a),
            }
        return {"model": self.model.name, "agents": agents}

    def _cost(self, request: PlanRequest, q: _Questions, i: int, a: int) -> int:
        """The tokens of an agent's questions together."""
        assert request.distance is not None
        if not self._rated:
            return q.tokens.get((i, a), 0)
        options = q.options[i, a, : q.count[i, a]]
        row = q.row[request.candidates.kind[i, a, options]]
        return int(self._tokens[row, int(request.rejected[i, a]), request.distance[i, a, options]].sum())

    # -- state ---------------------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        """Agents whose choice was the model's, that had one candidate only, questions put to it, and failures."""
        return {"asked": self.asked, "forced": self.forced, "questions": self.fresh, "failures": self.failures}

    def state_dict(self) -> dict[str, Any]:
        """Its counters, and the words of its table."""
        return {"asked": self.asked, "forced": self.forced, "fresh": self.fresh, "failures": self.failures,
                "words": list(self._words)}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.asked, self.forced = int(state["asked"]), int(state["forced"])
        self.fresh, self.failures = int(state.get("fresh", 0)), int(state["failures"])
        self._words = {str(word): row for row, word in enumerate(state.get("words", ()))}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The table: what is planned at once and what waits for the model depends on it."""
        return {"odds": self._odds.copy(), "tokens": self._tokens.copy()}

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `arrays` gave, behind `load_state_dict`."""
        self._odds, self._tokens = arrays["odds"].copy(), arrays["tokens"].copy()


def _feedback(verdict: int) -> Block:
    return Block(f"Your last choice was refused: {Verdict(verdict).reason}.\n" if verdict else "")


@numba.njit(cache=True)
def _is_open(c, kind, task, distance, refused, taken):  # type: ignore[no-untyped-def]
    t = task[c]
    return kind[c] > 0 and distance[c] != UNREACHABLE and not refused[c] and not (t >= 0 and taken[t])


@numba.njit(cache=True)
def _skips_tools(kind, task, distance, refused, taken):  # type: ignore[no-untyped-def]
    """As for `hungarian`: who can finish something isn't asked about a tool, else robots go from rack to rack."""
    skips = False
    for c in range(kind.shape[0]):
        skips |= kind[c] != _TOOL and _is_open(c, kind, task, distance, refused, taken)
    return skips


@numba.njit(cache=True)
def _list_open(need, kind, task, distance, refused, taken, options, count, choice):  # type: ignore[no-untyped-def]
    """Write each needing agent's nearest open candidates into `options`, in their order; a single one is chosen."""
    most = options.shape[2]
    for i in range(need.shape[0]):
        for a in range(need.shape[1]):
            if not need[i, a]:
                continue
            args = (kind[i, a], task[i, a], distance[i, a], refused[i, a], taken[i])
            skip = _skips_tools(*args)
            found = options[i, a]
            n = 0
            for c in range(kind.shape[2]):
                if not _is_open(c, *args) or (skip and kind[i, a, c] == _TOOL):
                    continue
                # Sorted by length while they are collected; of equals the first comes first.
                at = min(n, most)
                while at > 0 and distance[i, a, found[at - 1]] > distance[i, a, c]:
                    if at < most:
                        found[at] = found[at - 1]
                    at -= 1
                if at < most:
                    found[at] = c
                    n = min(n + 1, most)
            found[:n].sort()
            count[i, a] = n
            if n == 1:
                choice[i, a] = found[0]
                t = task[i, a, found[0]]
                if t >= 0 and EXCLUSIVE[kind[i, a, found[0]]]:
                    taken[i, t] = True


@numba.njit(cache=True)
def _survey(asked, options, count, kind, distance, first):  # type: ignore[no-untyped-def]
    """Write where each kind of option comes up first (row, agent, candidate) into `first`; the longest way."""
    longest = 0
    for i in range(asked.shape[0]):
        for a in range(asked.shape[1]):
            if asked[i, a]:
                for k in range(count[i, a]):
                    c = options[i, a, k]
                    longest = max(longest, int(distance[i, a, c]))
                    if first[kind[i, a, c], 0] < 0:
                        first[kind[i, a, c]] = i, a, c
    return longest


@numba.njit(cache=True)
def _look_up(asked, options, count, kind, distance, rejected, row, odds, logprobs):  # type: ignore[no-untyped-def]
    """Write the log-probabilities of options, proportional to their odds; NaN for agents that lack an answer."""
    for i in range(asked.shape[0]):
        for a in range(asked.shape[1]):
            if not asked[i, a]:
                continue
            most, known, n = -np.inf, True, count[i, a]
            for k in range(n):
                c = options[i, a, k]
                x = odds[row[kind[i, a, c]], rejected[i, a], distance[i, a, c]]
                known &= not np.isnan(x)
                logprobs[i, a, k] = x
                most = max(most, x)
            total = 0.0
            for k in range(n):
                total += np.exp(logprobs[i, a, k] - most)
            for k in range(n):
                logprobs[i, a, k] = logprobs[i, a, k] - most - np.log(total) if known else np.nan


@numba.njit(cache=True)
def _spread(who, options, count, logprobs, probability):  # type: ignore[no-untyped-def]
    """Write the probabilities of options to where their candidates are."""
    for i in range(who.shape[0]):
        for a in range(who.shape[1]):
            if who[i, a]:
                for k in range(count[i, a]):
                    probability[i, a, options[i, a, k]] = np.exp(logprobs[i, a, k])


@numba.njit(cache=True)
def _join(who, options, count, logprobs, kind, task, distance, refused, taken, choice):  # type: ignore[no-untyped-def]
    """Let the agents `who` choose, the surest first (of equals the first agent), so that no task is given twice."""
    for i in range(who.shape[0]):
        left = who[i].copy()
        while True:
            best, sure = -1, -np.inf
            for a in range(left.shape[0]):
                if left[a]:
                    top = logprobs[i, a, : count[i, a]].max()
                    if best < 0 or top > sure:
                        best, sure = a, top
            if best < 0:
                break
            a = best
            left[a] = False
            pick, most = -1, -np.inf
            for k in range(count[i, a]):
                c = options[i, a, k]
                t = task[i, a, c]
                if not (t >= 0 and taken[i, t]) and (pick < 0 or logprobs[i, a, k] > most):
                    pick, most = c, logprobs[i, a, k]
            if pick < 0:
                # Others took all that it was shown.
                args = (kind[i, a], task[i, a], distance[i, a], refused[i, a], taken[i])
                skip = _skips_tools(*args)
                for c in range(kind.shape[2]):
                    nearer = pick < 0 or distance[i, a, c] < distance[i, a, pick]
                    if nearer and _is_open(c, *args) and not (skip and kind[i, a, c] == _TOOL):
                        pick = c
            choice[i, a] = pick
            if pick >= 0 and task[i, a, pick] >= 0 and EXCLUSIVE[kind[i, a, pick]]:
                taken[i, task[i, a, pick]] = True
