"""A language model chooses each agent's subgoal among the candidates, by the probability that it gives to each.

Constrained planning: the model can't say anything but one of the open candidates, so what remains for the
feasibility chain is what a letter can't know. The model is asked of each candidate by itself whether it is good
(A) or bad (B), or, with templates that show all of them, for the letter of one. Prompts, the order of options and
the way in which a team's choices are joined are our choice; the paper states none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.errors import EchelonError
from echelon.llm.choice import ChoiceModel, ChoicePrompt, ChoiceScores
from echelon.llm.prompts import LETTERS, Block, PromptTemplate, option_lines
from echelon.planners.base import Asking, ModelPlanner
from echelon.planners.choosing import (
    ABOUT,
    CONTEXT,
    CONTEXTS,
    Choices,
    Reviews,
    agree,
    contexts,
    draw,
    draws,
    list_open,
    look_up,
    pack,
    spread,
    survey,
    unpack,
    words_of_context,
)
from echelon.subgoals import EXCLUSIVE, Plan, PlanRequest, SubgoalKind, Verdict

__all__ = ["LEARNED_PROMPTS", "PROMPTS", "TEMPLATES", "LLMPlanner"]

_BATCH = 64  # questions asked at a time: seconds, not minutes, between two looks at whether to stop
PROMPTS = Path(__file__).parent / "prompts"
LEARNED_PROMPTS = PROMPTS / "learned"
"""The templates of planners that learn: they tell what is around a candidate."""
TEMPLATES = ("choose_system.txt", "choose.txt")
_EACH = frozenset({"option", "what", "steps", "about", *CONTEXT})  # fields of a template that is about one option
_RATED = _EACH - {"option"} | {"feedback"}  # a template of no others: its questions come again and again
_WHICH = re.compile(r"[\d(),]+")  # ids and cells
_GO_ON = "go on: "
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
        steps, context: int64 `(n, A, most)`, where in the table rated options are, beside their row and verdict.
        fresh: int64 `(4, m)`, the places in the table (row, verdict, steps, context) that rated prompts are about; of:
            the agents (row, agent) that others are about.
        tokens: by agent (row, agent), what its question took, where not rated.
    """

    options: NDArray[np.int64]
    count: NDArray[np.int64]
    choice: NDArray[np.int64]
    taken: NDArray[np.bool_]
    asked: NDArray[np.bool_]
    row: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_KINDS, np.int64))
    steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    context: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    prompts: list[ChoicePrompt] = field(default_factory=list)
    fresh: NDArray[np.int64] = field(default_factory=lambda: np.empty((4, 0), np.int64))
    of: list[tuple[int, int]] = field(default_factory=list)
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)


class LLMPlanner(ModelPlanner):
    """Scores every agent's open candidates with a model, all agents of all worlds in one batch.

    An agent with one open candidate needs no model. Where two agents want one task, the one that is surer of
    it gets it and the other its next best, or, if others took all that it was shown, the nearest that is left.

    Where a question depends on a few small numbers alone (a candidate's kind and path length, what is around it), its
    answer is kept in a table and never asked for again, so that after a few hundred questions a plan costs no model
    time at all. A model that learns changes its answers: `forget` them then.

    Attributes:
        explore: draw subgoals from the model's probabilities instead of taking the most probable (rated ones only).
        on_choices: called with what was chosen from what, when there was a choice (rated ones only).
        on_reviews: called with what was kept and what wasn't.
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
                have `robot`, `cell` and `feedback`; those about one option also `about` (rounded steps), `nearer` (how
                many other robots that ask are nearer to this task, 2: or more), `after` (rounded steps of work that
                come with it) and `gain` (how much there is to be had, up to 4), see `GridEnv.outlook`.

        Raises:
            EchelonError: max_options is out of range, or a template can't be used.
        """
        if not 2 <= max_options <= len(LETTERS):
            raise EchelonError(f"max_options is {max_options}: it must be 2 to {len(LETTERS)}")
        self.name = f"llm:{model.name}"
        self.model, self.max_options = model, max_options
        self.templates = tuple(PromptTemplate.from_file(folder / name) for name in TEMPLATES)
        self.shared, self.template = self.templates[0].render(), self.templates[1]
        if "options" in self.template.fields and (both := sorted(_EACH & self.template.fields)):
            raise EchelonError(f"{self.template.source}: it has {{options}} for all, so it can't have {{{both[0]}}}")
        fields = self.template.fields
        self._rated = bool(_EACH & fields) and fields <= _RATED
        self._told = np.array([name in fields for name in CONTEXT])
        if self._told.any() and not self._rated:
            raise EchelonError(
                f"{self.template.source}: {{{next(n for n in CONTEXT if n in fields)}}} goes with {{what}} and "
                f"{{steps}} or {{about}}, and not with what differs from robot to robot"
            )
        # What is around a candidate is more than a plan cache looks at.
        self.sees = None if self._told.any() else frozenset({"cells"} if "cell" in fields or not self._rated else ())
        self.depends_on = (self.shared, self.template.text, str(max_options))
        # Who can finish something isn't asked about fetching a tool, unless the model is told what that would bring.
        self.spare_tools = not self._told.any()
        self.explore = False
        self.on_choices: Callable[[Choices], None] | None = None
        self.on_reviews: Callable[[Reviews], None] | None = None
        self._words: dict[str, int] = {}
        # Odds of good against bad, and the tokens that they took, by words, verdict, steps and context; NaN: not asked.
        width = CONTEXTS if self._told.any() else 1
        self._odds = np.full((0, _VERDICTS, 0, width), np.nan)
        self._tokens = np.zeros((0, _VERDICTS, 0, width), np.int32)
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
        list_open(request.need, c.kind, c.task, request.distance, request.refused, taken, self.spare_tools, options,
                  count, choice)  # fmt: skip
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
            self._learn_answers(q.fresh, scores)
            logprobs = self._from_table(asking.request, q)
        else:
            logprobs = np.full(q.options.shape, np.nan)
            for (i, a), answer in zip(q.of, scores, strict=False):
                logprobs[i, a, : len(answer.logprobs)] = answer.logprobs
                q.tokens[i, a] = answer.prompt_tokens
        return self._choose(asking.request, q, logprobs, asking.open, broken)

    @property
    def reviews(self) -> bool:
        """Whether it can be asked to keep a subgoal or take it back: if it rates options, and is told of context."""
        return self._rated and bool(self._told.any())

    def review(
        self, request: PlanRequest, kind: NDArray[np.int8], task: NDArray[np.int16], keys: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """Which of the agents `request.need` are to choose a subgoal anew, bool `(n, A)`; the others keep theirs.

        The question is that of the option with "go on: " before it; good means keep.

        Args:
            request: as for a plan, with path lengths.
            kind, task: int8 and int16 `(n, A)`, the subgoals in flight.
            keys: uint64 `(n, A)`, random bits, used if `explore`.
        """
        c = request.candidates
        same = (c.kind == kind[..., None]) & (c.task == task[..., None]) & request.need[..., None]
        asked = same.any(2)
        options = np.where(asked, same.argmax(2), -1)[..., None].astype(np.int64)
        q = _Questions(options, asked.astype(np.int64), np.full(asked.shape, -1, np.int64), request.taken, asked)
        self._rate(request, q, _GO_ON)
        if q.prompts:
            scores, broken = self._ask(q.prompts)
            self.failures += broken is not None
            self._learn_answers(q.fresh, scores)
        i, a = np.nonzero(asked)
        rows, verdict = q.row[c.kind[i, a, options[i, a, 0]]], request.rejected[i, a].astype(np.int64)
        odds = self._odds[rows, verdict, q.steps[i, a, 0], q.context[i, a, 0]]
        keep = 1 / (1 + np.exp(-odds))
        # No answer changes nothing.
        taken_back = (draws(keys[i, a]) >= keep) if self.explore else keep < 0.5
        switch = np.zeros(asked.shape, bool)
        switch[i, a] = taken_back
        if self.on_reviews is not None:
            known = ~np.isnan(odds)
            logp = np.log(np.where(taken_back, 1 - keep, keep)[known])
            places = pack(rows, verdict, q.steps[i, a, 0], q.context[i, a, 0])[known]
            self.on_reviews(Reviews(request.rows[i[known]], a[known], places, taken_back[known], logp))
        return switch

    def _write(self, request: PlanRequest, q: _Questions) -> NDArray[np.float64]:
        """A question for each agent; nothing is known yet."""
        q.of = [(int(i), int(a)) for i, a in zip(*np.nonzero(q.asked), strict=True)]
        q.prompts = [self.prompt(request, i, a, q.options[i, a, : q.count[i, a]]) for i, a in q.of]
        self.fresh += len(q.of)
        return np.full(q.options.shape, np.nan)

    def _rate(self, request: PlanRequest, q: _Questions, prefix: str = "") -> NDArray[np.float64]:
        """The log-probabilities of agents' options, NaN where the table lacks an answer, which is then asked for."""
        assert request.distance is not None
        c = request.candidates
        first = np.full((_KINDS, 3), -1, np.int64)
        survey(q.asked, q.options, q.count, c.kind, first)
        for k in np.flatnonzero(first[:, 0] >= 0).tolist():
            i, a, option = first[k].tolist()
            words = prefix + " ".join(_WHICH.sub(" ", request.text(i, a, option, brief=True)).split())
            q.row[k] = self._words.setdefault(words, len(self._words))
        at = np.maximum(q.options, 0)
        lengths = np.take_along_axis(request.distance, at, 2)
        q.steps = np.where(q.options >= 0, ABOUT[lengths] if "about" in self.template.fields else lengths, 0)
        q.context = np.zeros_like(q.steps)
        if self._told.any():
            contexts(q.asked, q.options, q.count, request.need, c.kind, c.task, request.distance, *request.outlook(),
                     self._told, q.context)  # fmt: skip
        self._grow(int(q.steps[q.asked].max(initial=0)))
        logprobs = self._from_table(request, q)
        unknown = q.asked & np.isnan(logprobs[..., 0])
        if unknown.any():
            which = np.nonzero(unknown[..., None] & (q.options >= 0))
            rows = q.row[c.kind[(*which[:2], q.options[which])]]
            # A kind's words decide the row: kinds of the same words come down to one question.
            places = np.stack([rows, request.rejected[which[:2]].astype(np.int64), q.steps[which], q.context[which]])
            q.fresh = np.unique(places[:, np.isnan(self._odds[tuple(places)])], axis=1)
            self.fresh += q.fresh.shape[1]
            q.prompts = [
                ChoicePrompt(self.shared, self.question(*place), ("good", "bad")) for place in q.fresh.T.tolist()
            ]
        return logprobs

    def going_on(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of the questions whether to go on with what is asked about at `places` (packed, int64 `(n,)`)."""
        words = list(self._words)
        parts = np.array([unpack(place) for place in places.tolist()], np.int64).reshape(-1, 4).T
        kept = [self._words.setdefault(_GO_ON + words[row], len(self._words)) for row in parts[0].tolist()]
        self._grow(0)
        return pack(np.array(kept, np.int64), parts[1], parts[2], parts[3])

    def question(self, row: int, verdict: int, steps: int, context: int) -> str:
        """What the model is asked about an option at that place of the table."""
        told = words_of_context(context)
        return self._render({"what": list(self._words)[row], "steps": steps, "about": steps,
                             "feedback": _feedback(verdict), **told})  # fmt: skip

    def _learn_answers(self, fresh: NDArray[np.int64], scores: list[ChoiceScores]) -> None:
        places = tuple(fresh[:, : len(scores)])
        # An option's probability is proportional to its odds, as in `ChoicePrompt.each`.
        self._odds[places] = [float(s.logprobs[0]) - float(s.logprobs[1]) for s in scores]
        self._tokens[places] = [s.prompt_tokens for s in scores]

    def _from_table(self, request: PlanRequest, q: _Questions) -> NDArray[np.float64]:
        """Log-probabilities `(n, A, most)` of the options of agents that are asked; NaN where an answer is missing."""
        logprobs = np.empty(q.options.shape)
        look_up(q.asked, q.options, q.count, request.candidates.kind, q.steps, q.context, request.rejected, q.row,
                self._odds, logprobs)  # fmt: skip
        return logprobs

    def _grow(self, steps: int) -> None:
        """Make room in the table for every known word and so many steps."""
        rows, (held, _, most, width) = len(self._words), self._odds.shape
        if rows > held or steps >= most:
            size = max(64, most)
            while size <= steps:
                size *= 2
            shape = (rows, _VERDICTS, size, width)
            odds, tokens = np.full(shape, np.nan), np.zeros(shape, np.int32)
            odds[:held, :, :most], tokens[:held, :, :most] = self._odds, self._tokens
            self._odds, self._tokens = odds, tokens

    def forget(self, again: Sequence[NDArray[np.int64]] = ()) -> None:
        """Drop all answers, since the model has changed.

        Args:
            again: places in the table (packed, -1 for none) whose questions are asked anew at once: together they cost
                a few passes, one after another as plans need them many.
        """
        self._odds[:] = np.nan
        places = np.unique(np.concatenate([np.zeros(0, np.int64), *(x.ravel() for x in again)]))
        fresh = np.array([unpack(place) for place in places[places >= 0].tolist()], np.int64).reshape(-1, 4).T
        prompts = [ChoicePrompt(self.shared, self.question(*place), ("good", "bad")) for place in fresh.T.tolist()]
        scores, broken = self._ask(prompts, at_once=True)
        self.failures += broken is not None
        self.fresh += len(scores)
        self._learn_answers(fresh, scores)

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
        args = (c.kind, c.task, request.distance, request.refused, q.taken, self.spare_tools)
        if self.reviews and not self.explore:
            agree(who, q.options, q.count, logprobs, *args, q.choice)
        else:
            column, still, logp = np.full(who.shape, -1), np.zeros(q.options.shape, bool), np.zeros(who.shape)
            explore = self.explore and self._rated
            draw(who, q.options, q.count, logprobs, *args, request.keys, explore, q.choice, column, still, logp)
            if self._rated and self.on_choices is not None:
                self.on_choices(self._choices(request, q, column, still, logp))
        plan = Plan.chosen(request, q.choice)
        plan.kind[unanswered] = -1
        plan.probability = np.zeros(c.kind.shape, np.float32)
        spread(who, q.options, q.count, logprobs, plan.probability)
        plan.notes = lambda i: self._note(request, q, i, logprobs, broken)
        return plan

    def lesson(self, request: PlanRequest, plan: Plan, preference: NDArray[np.float64] | None = None) -> Choices | None:
        """What another planner chose in `plan`, as choices among the options that this one would rate; None if none.

        Agents with one option only, and those for whom the other chose something else, teach nothing.
        """
        counted = self.asked, self.forced, self.fresh
        q: _Questions = self.begin(replace(request, taken=request.taken.copy())).memo
        self.asked, self.forced, self.fresh = counted  # nobody was asked anything
        c = request.candidates
        i, a = np.nonzero(q.asked)
        at = (i[:, None], a[:, None], np.maximum(q.options[i, a], 0))
        same = (c.kind[at] == plan.kind[i, a, None]) & (c.cell[at] == plan.cell[i, a, None])
        same &= (c.task[at] == plan.task[i, a, None]) & (q.options[i, a] >= 0)
        column = np.full(q.asked.shape, -1)
        column[i, a] = np.where(same.any(1), same.argmax(1), -1)
        # What the teacher gave to others wasn't this agent's to choose.
        given = np.zeros(request.taken.shape, bool)
        r, b = np.nonzero(request.need & (plan.task >= 0) & EXCLUSIVE[plan.kind])
        given[r, plan.task[r, b]] = True
        still = q.options >= 0
        still[i, a] &= same | ~(given[i[:, None], np.maximum(c.task[at], 0)] & EXCLUSIVE[c.kind[at]])
        column[still.sum(2) < 2] = -1
        if (column < 0).all():
            return None
        choices = self._choices(request, q, column, still, np.zeros(q.asked.shape))
        if preference is None:
            return choices
        i, a = np.nonzero(column >= 0)
        return replace(choices, liking=preference[i[:, None], a[:, None], np.maximum(q.options[i, a], 0)])

    def _choices(
        self, request: PlanRequest, q: _Questions, column: NDArray[np.int64], still: NDArray[np.bool_],
        logp: NDArray[np.float64],
    ) -> Choices:  # fmt: skip
        """What was chosen from what, where there was a choice."""
        i, a = np.nonzero(column >= 0)
        options = q.options[i, a]
        kinds = request.candidates.kind[i[:, None], a[:, None], np.maximum(options, 0)]
        places = pack(q.row[kinds], request.rejected[i, a].astype(np.int64)[:, None], q.steps[i, a], q.context[i, a])
        return Choices(request.rows[i], a, np.where(options >= 0, places, -1), still[i, a], column[i, a], logp[i, a])

    def _ask(self, prompts: list[ChoicePrompt], *, at_once: bool = False) -> tuple[list[ChoiceScores], str | None]:
        """The model's scores up to its first failure, and the reason of that."""
        scores: list[ChoiceScores] = []
        batch = len(prompts) if at_once else _BATCH
        for at in range(0, len(prompts), max(1, batch)):
            self.between(at, len(prompts))
            some = prompts[at : at + batch]
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
        context = [0] * len(options)
        if self._told.any():
            shape = (*request.need.shape, len(options))
            listed, asked, found = np.full(shape, -1), np.zeros(shape[:2], bool), np.zeros(shape, np.int64)
            listed[i, a], asked[i, a] = options, True
            c = request.candidates
            contexts(asked, listed, np.full(shape[:2], len(options)), request.need, c.kind, c.task, request.distance,
                     *request.outlook(), self._told, found)  # fmt: skip
            context = found[i, a].tolist()
        cell = request.where(i, a)
        fields = {"robot": a, "cell": f"row {cell[0]}, column {cell[1]}",
                  "feedback": _feedback(int(request.rejected[i, a]))}  # fmt: skip
        if not self.template.fields & _EACH:
            text = self._render({**fields, "options": option_lines(words)})
            return ChoicePrompt(self.shared, text, words)
        each = tuple(
            self._render({**fields, "option": option, "what": " ".join(_WHICH.sub(" ", text).split()), "steps": length,
                          "about": int(ABOUT[length]), **words_of_context(around)})
            for option, text, length, around in zip(words, brief, steps, context, strict=True)
        )  # fmt: skip
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
        list_open(one, c.kind[i : i + 1], c.task[i : i + 1], request.distance[i : i + 1], request.refused[i : i + 1],
                  taken[i : i + 1].copy(), self.spare_tools, options, count, choice)  # fmt: skip
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
        row, n = q.row[request.candidates.kind[i, a, options]], len(options)
        return int(self._tokens[row, int(request.rejected[i, a]), q.steps[i, a, :n], q.context[i, a, :n]].sum())

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
