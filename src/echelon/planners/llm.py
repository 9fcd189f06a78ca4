"""A language model chooses each agent's subgoal among the candidates, by the probability that it gives to each.

Constrained planning: the model can't say anything but one of the open candidates, so what remains for the
feasibility chain is what a letter can't know. The model is asked of each candidate by itself whether it is good
(A) or bad (B), or, with templates that show all of them, for the letter of one. Prompts, the order of options and
the way in which a team's choices are joined are our choice; the paper states none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.envs.kernels import UNREACHABLE
from echelon.errors import EchelonError
from echelon.llm.choice import ChoiceModel, ChoicePrompt, ChoiceScores
from echelon.llm.prompts import LETTERS, Block, PromptTemplate, option_lines
from echelon.subgoals import Plan, PlanRequest, SubgoalKind, Verdict

__all__ = ["LLMPlanner"]

_BATCH = 64  # questions asked at a time: seconds, not minutes, between two looks at whether to stop
PROMPTS = Path(__file__).parent / "prompts"
_EACH = frozenset({"option", "what", "steps"})  # fields of a template that is about one option
_WHICH = re.compile(r"[\d(),]+")  # ids and cells


class LLMPlanner:
    """Scores every agent's open candidates with a model, all agents of all worlds in one batch.

    An agent with one open candidate needs no model. Where two agents want one task, the one that is surer of
    it gets it and the other its next best, or, if others took all that it was shown, the nearest that is left.

    Attributes:
        asked: agents for whom the model was asked; forced: agents that had only one open candidate.
        failures: times that the model gave no usable answer.
        between: called as (questions answered, questions) before each batch of a plan; what it raises gets through,
            so that a long plan can be stopped.
    """

    needs_distance = True
    cost = "model"

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
        self.asked = self.forced = self.failures = 0
        self.between: Callable[[int, int], None] = lambda answered, questions: None

    def plan(self, request: PlanRequest) -> Plan:
        """The most probable candidates, no task twice; agents for whom none is open wait."""
        assert request.distance is not None
        choice = np.full(request.need.shape, -1, np.int64)
        questions: list[tuple[int, int, NDArray[np.int64], ChoicePrompt]] = []
        notes: list[dict[str, Any]] = [{"model": self.model.name, "agents": {}} for _ in request.rows]
        taken = request.taken.copy()
        for i, a in zip(*np.nonzero(request.need), strict=True):
            options = self.open(request, taken, int(i), int(a))
            if len(options) == 1:
                self.forced += 1
                notes[int(i)]["agents"][int(a)] = {"forced": True}
                self._take(request, taken, choice, int(i), int(a), int(options[0]))
            elif len(options) > 1:
                questions.append((int(i), int(a), options, self.prompt(request, int(i), int(a), options)))
        self.asked += len(questions)
        scores, broken = self._ask([q[3] for q in questions])
        if broken is not None:
            for i, a, _, prompt in questions:
                notes[i]["agents"][a] = {"prompt": prompt.text, "error": broken}
        # The surest first, so that of two that want one task the surer gets it; of equals the first asked.
        order = sorted(range(len(scores)), key=lambda q: -float(scores[q].logprobs.max()))
        for q in order:
            i, a, options, prompt = questions[q]
            ranked = options[np.argsort(-scores[q].logprobs, kind="stable")]
            best = next((int(c) for c in ranked if not self._is_taken(request, taken, i, a, int(c))), -1)
            if best < 0 and len(left := self.open(request, taken, i, a)):
                # Others took all that it was shown.
                best = int(left[np.argmin(request.distance[i, a, left])])
            if best >= 0:
                self._take(request, taken, choice, i, a, best)
            notes[i]["agents"][a] = self._note(prompt, scores[q], options, best)
        plan = Plan.chosen(request, choice)
        plan.notes = notes.__getitem__
        if broken is not None:
            # No answer is an answer of bad form: sent back, then the fallback decides, and the run goes on.
            for i, a, _, _ in questions:
                plan.kind[i, a] = -1
        return plan

    def _ask(self, prompts: list[ChoicePrompt]) -> tuple[list[ChoiceScores], str | None]:
        """The model's scores, or none and the reason why."""
        scores: list[ChoiceScores] = []
        for at in range(0, len(prompts), _BATCH):
            self.between(at, len(prompts))
            some = prompts[at : at + _BATCH]
            try:
                scores += self.model.score(some)
                good = len(scores) == at + len(some) and all(
                    len(s.logprobs) == len(p.options) and np.isfinite(s.logprobs).all()
                    for s, p in zip(scores[at:], some, strict=True)
                )
            except Exception as error:  # whatever a user's model or its server may raise: it must not stop the run
                self.failures += 1
                return [], f"{type(error).__name__}: {error}"
            if not good:
                self.failures += 1
                return [], f"model {self.model.name} gave scores that don't fit its questions"
        return scores, None

    def prompt(self, request: PlanRequest, i: int, a: int, options: NDArray[np.int64]) -> ChoicePrompt:
        """What the model is asked about agent `a` of row `i` with the candidates `options` (int64 `(k,)`)."""
        assert request.distance is not None
        brief = [request.text(i, a, int(c), brief=True) for c in options]
        steps = [int(request.distance[i, a, c]) for c in options]
        words = tuple(f"{text}, {length} steps" for text, length in zip(brief, steps, strict=True))
        verdict = Verdict(int(request.rejected[i, a]))
        feedback = f"Your last choice was refused: {verdict.reason}.\n" if verdict else ""
        cell = request.where(i, a)
        fields = {"robot": a, "cell": f"row {cell[0]}, column {cell[1]}", "feedback": Block(feedback)}
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
        c, lengths = request.candidates, request.distance[i, a]
        usable = (c.kind[i, a] > 0) & (lengths != UNREACHABLE) & ~request.refused[i, a]
        options = [int(k) for k in np.flatnonzero(usable) if not self._is_taken(request, taken, i, a, int(k))]
        # As for `hungarian`: whoever can finish something is not asked about a tool, else robots go from rack to rack.
        options = [k for k in options if c.kind[i, a, k] != SubgoalKind.TOOL] or options
        nearest = sorted(options, key=lambda k: (int(lengths[k]), k))[: self.max_options]
        return np.array(sorted(nearest), np.int64)

    @staticmethod
    def _is_taken(request: PlanRequest, taken: NDArray[np.bool_], i: int, a: int, c: int) -> bool:
        task = int(request.candidates.task[i, a, c])
        return task >= 0 and bool(taken[i, task])

    @staticmethod
    def _take(
        request: PlanRequest, taken: NDArray[np.bool_], choice: NDArray[np.int64], i: int, a: int, c: int
    ) -> None:
        choice[i, a] = c
        task = int(request.candidates.task[i, a, c])
        if task >= 0 and request.is_exclusive(int(request.candidates.kind[i, a, c])):
            taken[i, task] = True

    @staticmethod
    def _note(prompt: ChoicePrompt, scores: ChoiceScores, options: NDArray[np.int64], best: int) -> dict[str, Any]:
        chances = np.exp(scores.logprobs).round(4).tolist()
        at = np.flatnonzero(options == best)
        return {
            "system": prompt.shared,
            "prompt": prompt.text,
            "options": [{"text": t, "probability": p} for t, p in zip(prompt.options, chances, strict=True)],
            "chosen": int(at[0]) if len(at) else None,
            "prompt_tokens": scores.prompt_tokens,
        }

    def state_dict(self) -> dict[str, Any]:
        """Its counters."""
        return {"asked": self.asked, "forced": self.forced, "failures": self.failures}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.asked, self.forced = int(state["asked"]), int(state["forced"])
        self.failures = int(state["failures"])
