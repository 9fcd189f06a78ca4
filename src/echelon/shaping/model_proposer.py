"""A language model proposes: a Critic that sees the evidence, and a Generator that sees only the Critic's card.

Roles, keys and rules are LLM-ALSO's (cards and repair rounds); the words of the prompts are ours and lie in `prompts/`.
Nothing that a model writes is trusted: it is read by schema, checked, and cleaned before it is shown again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np

from echelon.errors import EchelonError, unknown_name
from echelon.llm.prompts import Block, PromptTemplate, clean, lines
from echelon.llm.text import TextModel, TextPrompt, TextReply
from echelon.shaping.base import ShapingConfig, TermSet
from echelon.shaping.candidates import (
    FALLBACK_TYPES,
    Checked,
    CriticCard,
    GeneratorReply,
    Policy,
    Proposal,
    ResultDiagnosis,
    check_candidates,
    read_reply,
)
from echelon.shaping.gate import SHOWN, Stage
from echelon.shaping.heuristic import HeuristicProposer
from echelon.shaping.situation import Proposed, Situation, Trial, fresh_id

__all__ = ["ModelProposer"]

_PROMPTS = Path(__file__).parent / "prompts"
_FIELDS: Mapping[str, frozenset[str]] = {
    "critic": frozenset({"vocabulary", "current", "evidence", "trials", "feedback"}),
    "generator": frozenset({"vocabulary", "current", "card", "trials", "rules", "feedback", "count"}),
    "review": frozenset({"current", "trials", "feedback"}),
}
_TRIALS = 24  # in a prompt, the last ones
_REPLY, _ERROR = 16_000, 300  # characters that are kept

R = TypeVar("R", CriticCard, GeneratorReply, ResultDiagnosis)


class ModelProposer:
    """Asks a model that writes text, up to `tries` times: a reply that breaks a rule is sent back with the reasons.

    A model that fails, or never writes anything usable, costs what it should have written: no card, no advice, and
    candidates that the rules of `HeuristicProposer` make in their place (`fill`; the note names them). It never ends
    a run. After an error without a token the model isn't asked again in this round: models try again by themselves.

    What is asked depends on the situation, the seed and the number of the try alone, through the order in which the
    prompt tells the modes (what comes first is preferred by many models). So a run that was resumed asks the same.
    Notes hold prompts and replies, no times.
    """

    def __init__(
        self,
        writer: TextModel,
        *,
        seed: int = 0,
        tries: int = 3,
        fill: bool = True,
        folder: Path | None = None,
        max_tokens: int = 2048,
    ) -> None:
        """Propose with `writer`.

        Args:
            writer: anything that writes text.
            seed: of the order in which modes are told.
            tries: most replies for one card, one set of candidates, one review.
            fill: whether the rules of `HeuristicProposer` give what candidates are missing.
            folder: where prompt templates lie (`critic.txt`, `critic_system.txt`, and so for generator and review);
                one that isn't there is the shipped one.
            max_tokens: the longest reply, in tokens.

        Raises:
            EchelonError: a number is out of range, or a template can't be used.
        """
        for name, value in (("tries", tries), ("max_tokens", max_tokens)):
            if value < 1:
                raise EchelonError(f"{name} is {value}: it must be at least 1")
        self.writer, self.seed, self.tries, self.max_tokens = writer, seed, tries, max_tokens
        self.name = clean(writer.name)
        self.rules = HeuristicProposer() if fill else None
        self._templates = {role: _template(folder, role) for role in _FIELDS}

    # -- the three roles -----------------------------------------------------------------------

    def diagnose(self, situation: Situation) -> tuple[CriticCard | None, dict[str, Any]]:
        """The Critic's card, from all of the evidence."""
        told = {
            "current": _config(situation.current, situation.terms),
            "evidence": _evidence(situation.evidence),
            "trials": _trials(situation),
        }
        fields = {name: (field, str(field.description)) for name, field in CriticCard.model_fields.items()}
        shape = {
            name: _texts(what) if str(field.annotation).startswith("list") else _text(what)
            for name, (field, what) in fields.items()
        }

        def check(card: CriticCard) -> list[str]:
            # Small models copy the example: that is no diagnosis.
            own = {name: [text.strip("<> ") for text in _strings(getattr(card, name))] for name in fields}
            return [
                f"{name}: your own words are wanted there" for name, (_, what) in fields.items() if what in own[name]
            ]

        card, note = self._ask("critic", situation, told, _object(**shape), CriticCard, check)
        return None if card is None or check(card) else card, note

    def propose(self, situation: Situation, card: CriticCard | None) -> Proposed:
        """The Generator's candidates: it is told the card instead of the evidence, if there is one."""
        told = {
            "current": _config(situation.current, situation.terms),
            "card": _evidence(situation.evidence) if card is None else _card(card),
            "trials": _trials(situation),
            "rules": _rules(situation),
            "count": situation.count,
        }
        kept: list[Proposal] = []
        tried = [trial.candidate.id for trial in situation.trials]

        def check(reply: GeneratorReply) -> list[str]:
            # What was good in an earlier reply stays; a step back that is still missing needs a place.
            lacks = situation.underperforms and not any(p.candidate_type in FALLBACK_TYPES for p in kept)
            room = kept[: situation.count - lacks]
            every = [*room, *_renamed(reply.candidates, [*tried, *(p.candidate_id for p in room)])]
            checked = _check(every, situation)
            usable = {candidate.id for candidate in checked.usable}
            kept[:] = [proposal for proposal in every if proposal.candidate_id in usable]
            stepped = not situation.underperforms or any(p.candidate_type in FALLBACK_TYPES for p in kept)
            return [] if len(kept) == situation.count and stepped else list(checked.reasons)

        reply, note = self._ask("generator", situation, told, _reply_shape(situation), GeneratorReply, check)
        candidates = _check(kept, situation).usable
        stage = reply.stage_diagnosis if reply is not None else "uncertain"
        policy = reply.search_policy if reply is not None else "conservative"
        if self.rules is not None:
            # A step back that is needed and that the model doesn't offer takes its last candidate's place.
            if situation.underperforms and not any(c.type in FALLBACK_TYPES for c in candidates):
                candidates = candidates[: situation.count - 1]
            more = self.rules.fill(situation, candidates)
            candidates, note["filled"] = (*candidates, *more), [candidate.id for candidate in more]
        return Proposed(candidates, stage, policy, note)

    def review(self, situation: Situation) -> tuple[ResultDiagnosis | None, dict[str, Any]]:
        """The Critic's view of this checkpoint's trials; names of anything else are taken out of it."""
        known = [trial.candidate.id for trial in situation.now][-_TRIALS:]
        if not known:
            return None, {"tries": []}

        def check(reply: ResultDiagnosis) -> list[str]:
            named = [*reply.ranking, *([reply.recommended_candidate_id] if reply.recommended_candidate_id else [])]
            strange = [name for name in named if name not in known]
            if strange:
                return [f"{strange[0]} is none of {', '.join(known)}"]
            update = reply.decision == "update"
            return (
                ["an update needs a recommended_candidate_id"] if update and not reply.recommended_candidate_id else []
            )

        told = {"current": _config(situation.current, situation.terms), "trials": _trials(situation)}
        one = {"type": "string", "enum": known}
        shape = _object(
            ranking={"type": "array", "items": one, "maxItems": len(known)},
            recommended_candidate_id={"anyOf": [one, {"type": "null"}]},
            decision={"type": "string", "enum": ["update", "no_change"]},
            confidence={"type": "number", "minimum": 0, "maximum": 1},
            metric_basis=_texts("a number that decided"),
            short_reason=_text("why"),
            risk_notes=_texts("what could go wrong"),
        )
        reply, note = self._ask("review", situation, told, shape, ResultDiagnosis, check)
        if reply is not None and check(reply):
            reply = None  # advice about something that wasn't tried is none
        return reply, note

    # -- asking --------------------------------------------------------------------------------

    def _ask(
        self,
        role: str,
        situation: Situation,
        told: Mapping[str, object],
        shape: Mapping[str, Any],
        schema: type[R],
        check: Callable[[R], list[str]] | None = None,
    ) -> tuple[R | None, dict[str, Any]]:
        """The last reply that fits its schema, and what was asked and answered."""
        system, text = self._templates[role]
        words = system.render(**dict.fromkeys(system.fields, _format(shape)))
        tries: list[dict[str, Any]] = []
        best: R | None = None
        reasons: list[str] = []
        for attempt in range(self.tries):
            fields = {**told, "feedback": _feedback(reasons)}
            if "vocabulary" in text.fields:
                fields["vocabulary"] = _vocabulary(situation.terms, _key(self.seed, role, attempt, told))
            prompt = TextPrompt(words, text.render(**{k: fields[k] for k in text.fields}), shape, self.max_tokens)
            reply = self._write(prompt)
            tries.append(_told(prompt, reply))
            if reply.error is not None and not reply.completion_tokens and not reply.written:
                break
            # What the client found in it may be a part of what broke off.
            found, reasons = read_reply(_last(reply), schema, check)
            best = found if found is not None else best
            if reasons:
                tries[-1]["reasons"] = reasons
            elif found is not None:
                break
        return best, {"model": self.name, "system": words, "tries": tries}

    def _write(self, prompt: TextPrompt) -> TextReply:
        """One reply; what goes wrong is its error."""
        try:
            replies = self.writer.generate([prompt])
            reply = replies[0] if isinstance(replies, list) and len(replies) == 1 else None
        except Exception as error:  # whatever a user's model may raise: it must not end the run
            return TextReply("", clean(f"{type(error).__name__}: {error}")[:_ERROR])
        if not isinstance(reply, TextReply) or not all(isinstance(x, str) for x in (reply.text, *reply.written)):
            return TextReply("", "the model gave something that is no reply")
        return reply


# -- templates and schemas ---------------------------------------------------------------------


def _template(folder: Path | None, role: str) -> tuple[PromptTemplate, PromptTemplate]:
    """A role's system message and message, each the user's if there is one."""
    found = []
    for name, known in ((f"{role}_system.txt", frozenset({"format"})), (f"{role}.txt", _FIELDS[role])):
        own = folder is not None and (folder / name).exists()
        template = PromptTemplate.from_file((folder if own and folder is not None else _PROMPTS) / name)
        for used in sorted(template.fields - known):
            raise unknown_name(f"field of {template.source}", used, known)
        found.append(template)
    return found[0], found[1]


def _object(**properties: Any) -> dict[str, Any]:
    """The JSON schema of an object with exactly these keys, as strict servers want it."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(what: str) -> dict[str, Any]:
    return {"type": "string", "description": what}


def _texts(what: str) -> dict[str, Any]:
    return {"type": "array", "items": _text(what), "maxItems": 12}


def _strings(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _reply_shape(situation: Situation) -> dict[str, Any]:
    """The JSON schema of a Generator's reply: all words that it may use are named."""
    number, terms = {"type": "number", "minimum": 0}, list(situation.terms.names)
    candidate = _object(
        candidate_id=_text("a short name"),
        candidate_type={"type": "string", "enum": list(situation.types)},
        pbrs_version={"type": "string", "enum": ["v2"]},
        mode={"type": "string", "enum": list(situation.terms.modes)},
        beta={"type": "number", "minimum": 0, "maximum": 1},
        active_terms={"type": "array", "items": {"type": "string", "enum": terms}, "maxItems": len(terms)},
        weights=_object(**dict.fromkeys(terms, number)),
        rationale=_text("why it should help"),
        expected_effect=_text("what should change"),
        risk_notes=_text("what could go wrong"),
        evidence_keys_used=_texts("a number or a flag that it rests on"),
    )
    return _object(
        stage_diagnosis={"type": "string", "enum": list(get_args(Stage))},
        search_policy={"type": "string", "enum": list(get_args(Policy))},
        candidates={"type": "array", "items": candidate, "minItems": 1, "maxItems": 12},
    )


def _format(shape: Mapping[str, Any]) -> Block:
    """A reply's shape in words, for models that nothing holds to a schema."""
    return Block(f"Answer with one JSON object and nothing else, of this shape: {json.dumps(_example(shape))}")


def _example(shape: Mapping[str, Any]) -> Any:
    if "anyOf" in shape:
        return " or ".join(str(_example(part)) for part in shape["anyOf"])
    if "enum" in shape:
        return shape["enum"][0] if len(shape["enum"]) == 1 else "one of: " + ", ".join(map(str, shape["enum"]))
    kind = shape["type"]
    if kind == "object":
        return {name: _example(part) for name, part in shape["properties"].items()}
    if kind == "array":
        return [_example(shape["items"])]
    return {"string": f"<{shape.get('description')}>", "number": 0.5, "null": "null"}[kind]


# -- what prompts tell -------------------------------------------------------------------------


def _block(items: Iterable[object]) -> Block:
    """A cleaned line for each item, each with its line break."""
    found = lines(items)
    return Block(found + "\n") if found else found


def _vocabulary(terms: TermSet, key: tuple[int, int]) -> Block:
    """Terms and modes in words, the modes in an order that the key decides."""
    names = list(terms.modes)
    order = np.random.Generator(np.random.Philox(key=list(key))).permutation(len(names))
    return lines(replace(terms, modes={names[i]: terms.modes[names[i]] for i in order}).vocabulary().splitlines())


def _key(seed: int, role: str, attempt: int, told: Mapping[str, object]) -> tuple[int, int]:
    """What is random about a prompt, from all that it depends on."""
    words = json.dumps([seed, role, attempt, {name: str(value) for name, value in sorted(told.items())}])
    digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _config(config: ShapingConfig | None, terms: TermSet) -> str:
    if config is None:
        return "the task reward alone, nothing is added"
    weights = ", ".join(f"{name} {config.weights[name]:.2f}" for name in terms.names if name in config.weights)
    return f"{config.mode}, beta {config.beta:.2f}; {weights}"


def _evidence(evidence: Mapping[str, Any]) -> Block:
    """All numbers and flags, a line each part."""
    told = []
    for name, title in (("curve", "Evaluation curve"), ("behaviour", "Behaviour")):
        part = evidence.get(name)
        if isinstance(part, Mapping):
            told.append(f"{title}: {', '.join(f'{key} {value}' for key, value in part.items())}")
    flags = evidence.get("flags") or ("none",)
    return _block([*told, f"Flags: {', '.join(map(str, flags))}"])


def _card(card: CriticCard) -> Block:
    told: list[str] = ["The Critic's card:"]
    for name, value in card.model_dump().items():
        title = name.replace("_", " ")
        told += [f"- {title}: {value}"] if isinstance(value, str) else [f"- {title}: {text}" for text in value]
    return _block(told)


def _trials(situation: Situation) -> Block:
    told = []
    if situation.control is not None:
        told.append(f"No change at this checkpoint: {_numbers(situation.control)}")
    first = len(situation.trials) - _TRIALS
    for i, trial in enumerate(situation.trials):
        if i < first:
            continue
        earlier = i < situation.earlier
        word = "refused" if not trial.accepted else "accepted" if earlier else "good enough so far"
        told.append(
            f"- {_trial(trial, word, situation.terms)} (tried {'earlier' if earlier else 'at this checkpoint'})"
        )
    return _block(["Tried so far (never again):", *told] if situation.trials else told)


def _trial(trial: Trial, verdict: str, terms: TermSet) -> str:
    candidate = trial.candidate
    why = f" because {'; '.join(trial.reasons)}"[:300] if trial.reasons and not trial.accepted else ""
    config = _config(candidate.config, terms)
    return f"{candidate.id} ({candidate.type}): {config}: {_numbers(trial.summary)}: {verdict}{why}"


def _numbers(summary: Mapping[str, float]) -> str:
    numbers = [(name, summary.get(name)) for name in SHOWN]
    return ", ".join(f"{name} {value:.4f}" for name, value in numbers if isinstance(value, int | float))


def _rules(situation: Situation) -> Block:
    told = [
        f"- candidate_type is one of: {', '.join(situation.types)}; all different.",
        "- recovery or reference_like once at most.",
        "- Each must differ from what is in force: in its mode, its active terms, beta or a weight by 0.10, or weights "
        "by 0.20 in all. Nothing that was tried, nothing twice.",
        "- mode is the named mixture that it is closest to; weights are your own.",
    ]
    if situation.underperforms:
        told.append(
            "- The run does worse than its reference: one candidate must be of type recovery or reference_like."
        )
    return _block(told)


def _feedback(reasons: Sequence[str]) -> Block:
    """What was wrong with the last reply."""
    return _block(
        ["Your last answer can't be used as it is. Answer anew:", *(f"- {r}" for r in reasons)] if reasons else ()
    )


# -- what comes back ---------------------------------------------------------------------------


def _check(proposals: Sequence[Proposal], situation: Situation) -> Checked:
    return check_candidates(
        proposals, situation.terms, count=situation.count, types=situation.types, current=situation.in_force,
        tried=situation.tried, underperforms=situation.underperforms,
    )  # fmt: skip


def _renamed(proposals: Iterable[Proposal], taken: Iterable[str]) -> list[Proposal]:
    """The same with names that nothing else has: they become names of branches and folders."""
    names, renamed = set(taken), []
    for proposal in proposals:
        name = fresh_id(proposal.candidate_id, names)
        names.add(name)
        renamed.append(proposal.model_copy(update={"candidate_id": name}))
    return renamed


def _told(prompt: TextPrompt, reply: TextReply) -> dict[str, Any]:
    """A prompt and what was written to it, for JSON and for eyes; no times: the same run has the same account."""
    earlier = reply.written[:-1]
    told: dict[str, Any] = {"prompt": prompt.text, "reply": _kept(_last(reply))}
    if earlier:  # the client itself asked again, since there was no JSON in them
        told["earlier_replies"] = [_kept(text) for text in earlier]
    if reply.error is not None:
        told["error"] = clean(reply.error)[:_ERROR] or "an error without a reason"
    for name in ("prompt_tokens", "completion_tokens"):
        if getattr(reply, name):
            told[name] = getattr(reply, name)
    return told


def _last(reply: TextReply) -> str:
    """What the model wrote last, whole."""
    return (reply.written or (reply.text,))[-1]


def _kept(text: str) -> str:
    """What an account keeps of a reply: all of it, but for the middle of one that is very long."""
    more = len(text) - _REPLY
    if more > 0:
        text = f"{text[: _REPLY // 2]}\n[{more} characters are left out]\n{text[-(_REPLY // 2) :]}"
    return "\n".join(map(clean, text.splitlines()))
