"""What the sections are told with: texts of others, notes, configurations, and what became of a candidate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from echelon.reports.account.file import CONTROL, REFERENCE, TASK_REWARD, Account, Config, Json, Stage, says_rules
from echelon.reports.account.looks import Looks
from echelon.reports.charts import swatch_svg
from echelon.reports.parts import decimal, esc, foldable, quiet, slug

__all__ = [
    "RULES",
    "Fate",
    "branch_anchor",
    "bullets",
    "config_card",
    "fate_of",
    "notes",
    "nothing",
    "number_text",
    "outcome_of",
    "pill",
    "said",
    "straight",
    "tree",
]

_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
_LONGEST = 20_000
"""Characters of one text (a prompt, a reply) that the page holds; account.json has the rest."""
_DEEPEST = 6
# What a reader wants first of a card and a review; files may have sorted their keys.
_FIRST = (
    "decision", "recommended_candidate_id", "confidence", "short_reason", "ranking",
    "analysis_summary", "failure_modes", "reward_design_needs", "initial_search_priors", "risky_directions",
)  # fmt: skip


def said(value: object) -> str:
    """Text of others as HTML: escaped, and what would turn the line round shown by its name."""
    return _TURNS.sub(lambda m: f"[U+{ord(m.group()):04X}]", esc(value))


def straight(text: str) -> str:
    """Text without what would turn the line round, for where its name would be in the way; not escaped."""
    return _TURNS.sub("", text)


def number_text(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else decimal(value, digits)


RULES = "rules, no model"
"""What is said of what rules made."""


def pill(kind: str, words: str) -> str:
    """A few words that stand out, in the colour of their kind (see `Fate`)."""
    return f'<span class="verdict plain-{kind} {kind}">{esc(words)}</span>'


def _label(key: str) -> str:
    return key.replace("_", " ").capitalize()


def bullets(values: Iterable[object], kind: str = "said") -> str:
    """Texts of others below each other."""
    return f'<ul class="{kind}">{"".join(f"<li>{said(value)}</li>" for value in values)}</ul>'


def tree(value: object, depth: int = 0) -> str:
    """Any JSON value as HTML: what a model or a rule left, in whatever form."""
    if isinstance(value, str):
        cut = quiet(f"… {len(value):,} characters in all; the rest is in account.json") if len(value) > _LONGEST else ""
        text = said(value[:_LONGEST])
        return (f'<pre tabindex="0">{text}</pre>{cut}') if "\n" in value or len(value) > 160 else f"<span>{text}</span>"
    if isinstance(value, Mapping | list) and not value:
        return quiet("none")
    if depth >= _DEEPEST and isinstance(value, Mapping | list):
        return tree(json.dumps(value, ensure_ascii=False, indent=1)[: _LONGEST + 1])
    if isinstance(value, Mapping):
        keys = [key for key in _FIRST if key in value] + [key for key in value if key not in _FIRST]
        rows = (f"<dt>{said(_label(str(key)))}</dt><dd>{tree(value[key], depth + 1)}</dd>" for key in keys)
        return f'<dl class="said-of">{"".join(rows)}</dl>'
    if isinstance(value, list):
        if all(isinstance(item, str) and len(item) <= 24 for item in value) and len(value) <= 8:
            return f"<span>{said(', '.join(value))}</span>"
        if all(not isinstance(item, Mapping | list) for item in value):
            return bullets(value)
        return f"<ol>{''.join(f'<li>{tree(item, depth + 1)}</li>' for item in value)}</ol>"
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    return esc(f"{value:.4g}" if isinstance(value, float) else value)


def notes(account: Account, what: str, note: Json | None) -> str:
    """Prompts, replies and whatever else a proposer kept, behind a line."""
    if not note:
        return ""
    if account.by_rules or says_rules(note):
        kept = "how the rules came to it"
    else:
        kept = "how it came about" if "exhausted" in note else "prompts and replies"
    return f'<div class="notes">{foldable(f"{what}: {kept}", tree(note))}</div>'


def nothing(note: Json | None, words: str) -> str:
    """That there is nothing, in some words, and why, where a note says so."""
    why = (note or {}).get("exhausted")
    return f"<p>{quiet(f'{words}: {straight(str(why))}.' if why else f'{words}.')}</p>"


def config_card(looks: Looks, config: Config | None, current: Config | None = None, *, change: bool = False) -> str:
    """A configuration as bars; with `change` a mark shows where each stood in the `current` one."""
    if config is None:
        return f'<p class="config-name">{swatch_svg(looks.style(None))}{TASK_REWARD} {quiet("nothing is shaped")}</p>'
    rows = [("β", config.beta, None if current is None else current.beta, "strength of the shaping")]
    for term in looks.terms:
        before = None if current is None else current.weights.get(term, 0.0)
        rows.append((term, config.weights.get(term, 0.0), before, looks.meaning.get(term, "")))
    items = []
    for k, (term, value, before, words) in enumerate(rows):
        mark = moved = ""
        if change and before is not None:
            mark = f'<b style="left:{_percent(before)}%"></b>'
            if abs(value - before) >= 0.005:
                moved = f" (was {before:.2f})"
        kind = " ".join(filter(None, ("beta" if k == 0 else "", "zero" if value == 0 else "")))
        items.append(
            f'<li class="{kind}" title="{said(f"{term}: {value:.3f}{moved}. {words}")}"><span>{said(term)}</span>'
            f'<span class="meter"><i class="c{looks.style(config).colour}" style="width:{_percent(value)}%"></i>{mark}'
            f"</span><span>{value:.2f}</span></li>"
        )
    name = f'<p class="config-name">{swatch_svg(looks.style(config))}{said(config.mode)}</p>'
    return f'{name}<ul class="weights">{"".join(items)}</ul>'


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.1f}"


def branch_anchor(stage: int, name: str) -> str:
    """The id of a branch's card, for links to it."""
    return f"branch-{stage}-{slug(name)}"


# ---------------------------------------------------------------- what became of it


@dataclass(frozen=True)
class Fate:
    """What became of a branch or a stage: "good", "bad" or "open", a word, and reasons."""

    kind: str
    word: str
    reasons: tuple[str, ...] = ()


def fate_of(stage: Stage, name: str) -> Fate:
    """What became of a candidate, or of what it was compared with."""
    verdict, branches = stage.verdict, stage.tried.get(name, [])
    problems = tuple(dict.fromkeys(b.problem for b in branches if b.problem is not None))
    if name in (CONTROL, REFERENCE):
        return Fate("open", "control" if name == CONTROL else "reference", problems)
    if verdict is None:
        return Fate("open", "not judged yet" if branches else "in no branch", problems)
    own = tuple(reason.removeprefix(f"{name}: ") for reason in verdict.reasons)
    if verdict.accepted and verdict.winner == name:
        return Fate("good", "✓ promoted", own)
    if name in verdict.rejected:
        reason = verdict.rejected[name]
        return Fate("bad", "✕ not judged", (reason, *(p for p in problems if p != reason)))
    if name == verdict.best:
        return Fate("bad", "✕ best, but refused", own)
    score, best = verdict.scores.get(name), verdict.scores.get(verdict.best or "")
    if score is not None and best is not None:
        return Fate("bad", "✕ not the best", (f"score {score:.4f}, {verdict.best} has {best:.4f}", *problems))
    return Fate("bad" if branches else "open", "✕ not chosen" if branches else "in no branch", problems)


def outcome_of(account: Account, stage: Stage) -> Fate:
    """What became of a whole stage, in a line."""
    verdict = stage.verdict
    if verdict is None:
        last = stage is account.stages[-1] and account.final is None
        return Fate("open", "undecided yet" if last or stage.branches else "no branches were tried")
    if verdict.accepted and verdict.winner is not None:
        candidate = stage.proposed.get(verdict.winner)
        config = candidate.config if candidate else None
        kind = f", {candidate.type}" if candidate and candidate.type else ""
        became = f": {config.mode}, β {config.beta:.2f}" if config else ""
        return Fate("good", f"✓ {verdict.winner} promoted", (f"{verdict.winner}{kind}{became}",))
    return Fate("bad", "no change", tuple(verdict.reasons[:3]))
