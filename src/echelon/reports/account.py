"""The account of a run whose rewards were shaped by evidence: one page that says what was tried, and why what won won.

`write_account` makes of a run's `account.json` a single HTML file with no other file, font or address behind it. It
works on a run that is under way, and on methods that try nothing in branches. The charts are inline SVG, the switch
between measures is plain CSS: the page has no script at all.

Text from data (names, diagnoses, a model's replies) is never trusted: it is escaped wherever it stands, and the page's
content security policy lets no script run. The same account gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from echelon._files import atomic_write_text, read_json
from echelon.errors import EchelonError
from echelon.reports.charts import (
    _BOTTOM,
    _H,
    _LEFT,
    _RIGHT,
    _TOP,
    _W,
    COLOURS,
    DASHES,
    MARKERS,
    TSR_AXIS,
    Axis,
    Plot,
    Series,
    Style,
    _n,
    _points,
    _text,
    linear_axis,
    panel_svg,
    swatch_svg,
)
from echelon.reports.parts import (
    Section,
    counted,
    data_table,
    decimal,
    esc,
    foldable,
    in_words,
    listed,
    quiet,
    slug,
    step_count,
)

__all__ = ["write_account"]

FORMAT = 1
CONTROL, REFERENCE = "no change", "reference"
TASK_REWARD = "task reward"

_LONGEST = 20_000
"""Characters of one text (a prompt, a reply) that the page holds; account.json has the rest."""
_POINTS = 400
"""Points of a curve: more than that many pixels tell nothing more."""
_DEEPEST = 6

_NUMBERS = (
    ("last_k", "last k", "mean of the last five evaluations"),
    ("auc", "AUC", "area under the curve: mean of all evaluations"),
    ("final", "final", "the last evaluation"),
    ("best", "best", "the best evaluation"),
    ("std", "std", "standard deviation of the last five evaluations"),
    ("spike_gap", "gap", "how far the last evaluations are below the best one"),
    ("score", "score", "0.45 last k + 0.35 AUC + 0.20 final - 0.10 std"),
)
# What a reader wants first of a card and a review; files may have sorted their keys.
_FIRST = (
    "decision", "recommended_candidate_id", "confidence", "short_reason", "ranking",
    "analysis_summary", "failure_modes", "reward_design_needs", "initial_search_priors", "risky_directions",
)  # fmt: skip


# ---------------------------------------------------------------- the file


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
Json = Mapping[str, Any]


class _Part(BaseModel):
    # Whatever else a writer adds is not the page's business; what isn't there yet is empty.
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Config(_Part):
    mode: str
    beta: float
    weights: dict[str, float] = {}


class _Point(_Part):
    step: float
    tsr: Number = None
    task_return: Number = None


class _MainPoint(_Point):
    spent: float
    segment: str = ""
    config: str = TASK_REWARD


class _Candidate(_Part):
    id: str
    type: str = ""
    config: _Config | None = None
    rationale: str = ""


class _Proposed(_Part):
    stage: str = ""
    policy: str = ""
    candidates: list[_Candidate] = []
    note: Json = {}


class _Round(_Part):
    proposed: _Proposed = _Proposed()
    review: Json | None = None
    review_note: Json | None = None


class _Branch(_Part):
    name: str
    round: int | None = None
    seed: int = 0
    run: str = ""
    config: _Config | None = None
    curve: list[_Point] = []
    problem: str | None = None


class _Verdict(_Part):
    accepted: bool
    winner: str | None = None
    reasons: list[str] = []
    best: str | None = None
    rejected: dict[str, str] = {}
    scores: dict[str, Number] = {}


class _Stage(_Part):
    name: str
    at: float
    spent: float
    current: _Config | None = None
    evidence: Json | None = None
    card: Json | None = None
    card_note: Json | None = None
    rounds: list[_Round] = []
    branches: list[_Branch] = []
    summaries: dict[str, dict[str, Number]] = {}
    lead: dict[str, list[Number]] = {}
    verdict: _Verdict | None = None
    cost: float = 0

    @cached_property
    def tried(self) -> dict[str, list[_Branch]]:
        """The branches by name, one a seed."""
        found: dict[str, list[_Branch]] = {}
        for branch in self.branches:
            found.setdefault(branch.name, []).append(branch)
        return found

    @cached_property
    def proposed(self) -> dict[str, _Candidate]:
        """All candidates by name: those that were proposed, then what was tried without having been."""
        found = {c.id: c for r in self.rounds for c in r.proposed.candidates}
        for name, (branch, *_) in self.tried.items():
            if name not in (CONTROL, REFERENCE):
                found.setdefault(name, _Candidate(id=name, config=branch.config))
        return found


class _Segment(_Part):
    run: str
    start: float | None = Field(None, alias="from")
    to: float | None = None
    config: _Config | None = None
    why: str = ""


class _Final(_Part):
    config: Any = None
    tsr: Number = None
    task_return: Number = None
    steps: float | None = None
    spent: float | None = None


class _Account(_Part):
    format: int
    method: str = "also"
    base: str = ""
    environment: str = ""
    seed: int | None = None
    steps: float | None = None
    proposer: str = ""
    best_return: Number = None
    vocabulary: str = ""
    stages: list[_Stage] = []
    mainline: list[_MainPoint] = []
    segments: list[_Segment] = []
    final: _Final | None = None

    @cached_property
    def line(self) -> list[_MainPoint]:
        """The mainline's evaluations in the order in which their steps were spent."""
        return sorted(self.mainline, key=lambda point: point.spent)

    @property
    def spent(self) -> float:
        """All environment steps so far."""
        known = [point.spent for point in self.mainline] + [stage.spent + stage.cost for stage in self.stages]
        return max([self.final.spent or 0 if self.final else 0, *known])

    @property
    def in_branches(self) -> float:
        return math.fsum(stage.cost for stage in self.stages)

    @property
    def by_rules(self) -> bool:
        return self.proposer == "heuristic"


def _read(path: Path) -> _Account:
    try:
        data = read_json(path, "account of a shaped run")
    except OSError as error:
        raise EchelonError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise EchelonError(f"account of a shaped run {path} is damaged: it is nested too deeply") from None
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(found, int) or isinstance(found, bool):
        raise EchelonError(f"account of a shaped run {path} is damaged: it has no format")
    if found != FORMAT:
        raise EchelonError(f"{path} is of format {found}, this Echelon reads format {FORMAT}: use a newer Echelon")
    try:
        return _Account.model_validate(data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise EchelonError(f"account of a shaped run {path} is damaged: {place}: {fault['msg']}") from None


def write_account(folder: Path) -> Path:
    """Write `<folder>/account.html`, the page of a run's account; the file appears whole or not at all.

    Args:
        folder: a run's folder with its `account.json` (format 1), finished or not.

    Returns:
        Where the page is.

    Raises:
        EchelonError: there is no account, it is damaged or of a newer format, or the page can't be written.
    """
    folder = Path(folder)
    account = _read(folder / "account.json")
    path = folder / "account.html"
    atomic_write_text(path, _page(account))
    return path


# ---------------------------------------------------------------- looks and charts


class _Looks:
    """A name and a style for each configuration, the same wherever it stands; and the order and words of the terms."""

    def __init__(self, account: _Account) -> None:
        self._names: dict[Any, str] = {None: TASK_REWARD}
        self._of_segment = {segment.run: segment.config for segment in account.segments}
        main = [segment.config for segment in account.segments] + [stage.current for stage in account.stages]
        tried = [b.config for stage in account.stages for b in stage.branches]
        tried += [c.config for stage in account.stages for c in stage.proposed.values()]
        known = [config for config in (*main, *tried) if config is not None]
        for config in known:
            self._add(_identity(config), f"{config.mode} · β {config.beta:.2f}")
        self._of_mode = {config.mode: config for config in reversed(known)}
        for point in account.mainline:
            if self._key(point) not in self._names:
                self._add(self._key(point), point.config)
        self.styles = {key: _style(k) for k, key in enumerate(self._names)}
        self.meaning = dict(re.findall(r"^- ([\w.-]+): (.+)$", account.vocabulary.split("\nNamed ")[0], re.M))
        own = sorted({term for config in known for term in config.weights})
        self.terms = [term for term in self.meaning if term in own] + [term for term in own if term not in self.meaning]

    def _add(self, key: Any, name: str) -> None:
        if key not in self._names:
            same = sum(other == name or other.startswith(f"{name} (") for other in self._names.values())
            self._names[key] = f"{name} ({same + 1})" if same else name

    def _key(self, point: _MainPoint) -> Any:
        """The identity of a mainline point's configuration, by its segment or else by its mode's name."""
        if point.segment in self._of_segment:
            config = self._of_segment[point.segment]
        elif point.config == TASK_REWARD:
            config = None
        elif point.config in self._of_mode:
            config = self._of_mode[point.config]
        else:
            return point.config
        return _identity(config)

    def name(self, config: _Config | None) -> str:
        return self._names[_identity(config)]

    def style(self, config: _Config | None) -> Style:
        return self.styles[_identity(config)]

    def at(self, point: _MainPoint) -> tuple[str, Style]:
        key = self._key(point)
        return self._names[key], self.styles[key]


def _identity(config: _Config | None) -> Any:
    """What a configuration does, to six digits, and its name; None where nothing is shaped (also with a β of 0)."""
    if config is None or round(config.beta, 6) == 0:
        return None
    weights = ((term, round(weight, 6)) for term, weight in sorted(config.weights.items()))
    return config.mode, round(config.beta, 6), tuple((term, weight) for term, weight in weights if weight > 0)


def _style(k: int) -> Style:
    if k == 0:
        return Style(0, "circle", "solid")
    colours = len(COLOURS) - 1
    return Style(1 + (k - 1) % colours, MARKERS[k % len(MARKERS)], list(DASHES)[(k - 1) // colours % len(DASHES)])


def _chart(
    plot: Plot,
    *,
    bands: Sequence[tuple[float, float, str, str]] = (),
    faint: Sequence[Series] = (),
    joints: Sequence[Sequence[tuple[float, float]]] = (),
    told: Iterable[tuple[float, float, str]] = (),
) -> str:
    """The plot's SVG with more than a `Plot` has, on the same axes.

    Args:
        plot: what stands between.
        bands: (from, to, name, words) of stretches of the x axis.
        faint: thin lines behind the curves, such as one a seed.
        joints: dotted lines between what belongs together but was not measured as one.
        told: (x, y, words) of the points that say something when pointed at.
    """
    bottom, inset = _H - _BOTTOM, 2.0

    def at(x: float, y: float) -> tuple[float, float]:
        wide = _W - _RIGHT - _LEFT - 2 * inset
        return _LEFT + inset + plot.x.part(x) * wide, bottom - min(1.0, max(0.0, plot.y.part(y))) * (bottom - _TOP)

    under = []
    for start, end, name, words in bands:
        left, right = at(start, 0)[0], at(end, 0)[0]
        under.append(
            f'<rect class="stage" x="{_n(left)}" y="{_n(_TOP - 10)}" width="{max(1.0, right - left):.1f}" '
            f'height="{_n(bottom - _TOP + 10)}"><title>{esc(words)}</title></rect>'
        )
        under.append(_text((left + right) / 2, _TOP - 14, name, "middle", "stage-name"))
    for series in faint:
        way = [at(x, y) for x, y in zip(series.x, series.y, strict=True)]
        under.append(f'<path class="line seed c{series.style.colour}" d="{_points(way)}"/>')
    under += [f'<path class="joint" d="{_points(at(x, y) for x, y in way)}"/>' for way in joints]
    over = []
    for x, y, words in told:
        cx, cy = at(x, y)
        over.append(f'<circle class="hit" cx="{_n(cx)}" cy="{_n(cy)}" r="6"><title>{esc(words)}</title></circle>')
    head, _, body = panel_svg(plot, in_words(plot)).partition(">")
    return f"{head}>{''.join(under)}{body.removesuffix('</svg>')}{''.join(over)}</svg>"


def _both(values: Sequence[_Point], chart: Callable[[str, Axis], str], *, best: float | None = None) -> str:
    """A chart for each measure (the page shows one of them); `chart` takes the measure's key and its axis.

    The axes hold all `values`; where `best`, the best return, is given, they go up to the best that there can be.
    """
    rates = [p.tsr for p in values if p.tsr is not None]
    returns = [p.task_return for p in values if p.task_return is not None]
    axes = {
        "tsr": TSR_AXIS if best is not None else linear_axis("TSR", max([0.02, *rates])),
        "task_return": linear_axis("task return", max([best or 0.0, *returns]), min([0.0, *returns])),
    }
    return "".join(f'<div class="m-{key.rpartition("_")[2]}">{chart(key, axis)}</div>' for key, axis in axes.items())


def _curve(name: str, style: Style, points: Sequence[_Point], key: str) -> Series | None:
    found = [(p.step, y) for p in points if (y := getattr(p, key)) is not None]
    if not found:
        return None
    x, y = zip(*_thinned(found), strict=True)
    return Series(name, style, x, y)


def _thinned(points: Sequence[Any]) -> list[Any]:
    """At most `_POINTS` of them, evenly spaced, the first and the last among them."""
    if len(points) <= _POINTS:
        return list(points)
    return [points[round(k * (len(points) - 1) / (_POINTS - 1))] for k in range(_POINTS)]


def _mean(name: str, style: Style, curves: Sequence[Series]) -> Series:
    """The mean over seeds where all have been measured."""
    values = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*map(set, values)))
    return Series(name, style, tuple(steps), tuple(math.fsum(v[x] for v in values) / len(values) for x in steps))


# ---------------------------------------------------------------- words


def _said(value: object) -> str:
    """Text of others as HTML: escaped, and what would turn the line round shown by its name."""
    return re.sub("[\u202a-\u202e\u2066-\u2069]", lambda m: f"[U+{ord(m.group()):04X}]", esc(value))


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else decimal(value, digits)


def _pill(kind: str, words: str) -> str:
    return f'<span class="verdict plain-{kind} {kind}">{esc(words)}</span>'


def _label(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _lines(values: Iterable[object], kind: str = "said") -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{_said(value)}</li>" for value in values)}</ul>'


def _tree(value: object, depth: int = 0) -> str:
    """Any JSON value as HTML: what a model or a rule left, in whatever form."""
    if isinstance(value, str):
        cut = quiet(f"… {len(value):,} characters in all; the rest is in account.json") if len(value) > _LONGEST else ""
        text = _said(value[:_LONGEST])
        return (f'<pre tabindex="0">{text}</pre>{cut}') if "\n" in value or len(value) > 160 else f"<span>{text}</span>"
    if isinstance(value, Mapping | list) and not value:
        return quiet("none")
    if depth >= _DEEPEST and isinstance(value, Mapping | list):
        return _tree(json.dumps(value, ensure_ascii=False, indent=1)[: _LONGEST + 1])
    if isinstance(value, Mapping):
        keys = [key for key in _FIRST if key in value] + [key for key in value if key not in _FIRST]
        rows = (f"<dt>{_said(_label(str(key)))}</dt><dd>{_tree(value[key], depth + 1)}</dd>" for key in keys)
        return f'<dl class="said-of">{"".join(rows)}</dl>'
    if isinstance(value, list):
        if all(isinstance(item, str) and len(item) <= 24 for item in value) and len(value) <= 8:
            return f"<span>{_said(', '.join(value))}</span>"
        if all(not isinstance(item, Mapping | list) for item in value):
            return _lines(value)
        return f"<ol>{''.join(f'<li>{_tree(item, depth + 1)}</li>' for item in value)}</ol>"
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    return esc(f"{value:.4g}" if isinstance(value, float) else value)


def _notes(account: _Account, what: str, note: Json | None) -> str:
    """Prompts, replies and whatever else a proposer kept, behind a line."""
    if not note:
        return ""
    kept = "how the rules came to it" if account.by_rules else "prompts and replies"
    return f'<div class="notes">{foldable(f"{what}: {kept}", _tree(note))}</div>'


def _config_card(looks: _Looks, config: _Config | None, current: _Config | None = None, *, change: bool = False) -> str:
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
            f'<li class="{kind}" title="{_said(f"{term}: {value:.3f}{moved}. {words}")}"><span>{_said(term)}</span>'
            f'<span class="meter"><i class="c{looks.style(config).colour}" style="width:{_percent(value)}%"></i>{mark}'
            f"</span><span>{value:.2f}</span></li>"
        )
    name = f'<p class="config-name">{swatch_svg(looks.style(config))}{_said(config.mode)}</p>'
    return f'{name}<ul class="weights">{"".join(items)}</ul>'


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.1f}"


# ---------------------------------------------------------------- what became of it


@dataclasses.dataclass(frozen=True)
class _Fate:
    """What became of a branch: "good", "bad" or "open", a word, and reasons."""

    kind: str
    word: str
    reasons: tuple[str, ...] = ()


def _fate(stage: _Stage, name: str) -> _Fate:
    verdict, branches = stage.verdict, stage.tried.get(name, [])
    problems = tuple(dict.fromkeys(b.problem for b in branches if b.problem is not None))
    if name in (CONTROL, REFERENCE):
        return _Fate("open", "control" if name == CONTROL else "reference", problems)
    if verdict is None:
        return _Fate("open", "not judged yet" if branches else "in no branch", problems)
    own = tuple(reason.removeprefix(f"{name}: ") for reason in verdict.reasons)
    if verdict.accepted and verdict.winner == name:
        return _Fate("good", "✓ promoted", own)
    if name in verdict.rejected:
        reason = verdict.rejected[name]
        return _Fate("bad", "✕ not judged", (reason, *(p for p in problems if p != reason)))
    if name == verdict.best:
        return _Fate("bad", "✕ best, but refused", own)
    score, best = verdict.scores.get(name), verdict.scores.get(verdict.best or "")
    if score is not None and best is not None:
        return _Fate("bad", "✕ not the best", (f"score {score:.4f}, {verdict.best} has {best:.4f}", *problems))
    return _Fate("bad" if branches else "open", "✕ not chosen" if branches else "in no branch", problems)


def _outcome(account: _Account, stage: _Stage) -> _Fate:
    """What became of a whole stage, in a line."""
    verdict = stage.verdict
    if verdict is None:
        last = stage is account.stages[-1] and account.final is None
        return _Fate("open", "undecided yet" if last or stage.branches else "no branches were tried")
    if verdict.accepted and verdict.winner is not None:
        candidate = stage.proposed.get(verdict.winner)
        config = candidate.config if candidate else None
        kind = f", {candidate.type}" if candidate and candidate.type else ""
        became = f": {config.mode}, β {config.beta:.2f}" if config else ""
        return _Fate("good", f"✓ {verdict.winner} promoted", (f"{verdict.winner}{kind}{became}",))
    return _Fate("bad", "no change", tuple(verdict.reasons[:3]))


# ---------------------------------------------------------------- the run


def _head(account: _Account) -> str:
    final, branches = account.final, account.in_branches
    judged = [stage for stage in account.stages if stage.verdict is not None]
    accepted = sum(stage.verdict.accepted for stage in judged if stage.verdict)
    best = f" of {account.best_return:g}" if account.best_return else ""
    budget = f" of {step_count(account.steps)}" if account.steps else ""
    share = f" ({100 * branches / account.spent:.0f}%)" if account.spent and branches else ""
    counts = [
        (_number(final.tsr) if final else "–", "final TSR"),
        (_number(final.task_return, 2) if final else "–", f"final task return{best}"),
        (step_count(account.spent), f"environment steps{budget}"),
        (step_count(branches), f"of them in branches{share}"),
    ]  # fmt: skip
    if judged:
        counts.append((f"{accepted} of {len(judged)}", "changes accepted" if len(judged) != 1 else "change accepted"))
    who = _said(account.proposer or "none")
    if account.by_rules:
        who = f"heuristic {_pill('open', 'rules, no model')}"
    facts = [("Method", _said(account.method)), ("Base", _said(account.base or "–")),
             ("Environment", _said(account.environment or "–")),
             ("Seed", esc("–" if account.seed is None else account.seed)), ("Proposer", who)]  # fmt: skip
    unfinished = (
        "" if final else '<p class="unfinished">This run is not finished: what is here is what there is so far.</p>'
    )
    return (
        f'<dl class="facts">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts)}</dl>{unfinished}'
        f'<ul class="counts">{"".join(f"<li><b>{esc(n)}</b> {esc(words)}</li>" for n, words in counts)}</ul>'
    )


def _run(account: _Account, looks: _Looks) -> Section:
    section = Section("run", "The run")
    if account.line:
        shown = dict(looks.at(point) for point in account.line)
        legend = "".join(f"<li>{swatch_svg(style)}{_said(name)}</li>" for name, style in shown.items())
        chart = _both(account.line, partial(_mainline, account, looks), best=account.best_return or 0.0)
        bands = " The shaded stretches are the steps that branches took." if account.in_branches else ""
        picture = (
            f"<figcaption><strong>The mainline.</strong> Evaluations on the task reward over all steps spent.{bands} "
            f'</figcaption>{chart}<ul class="legend" aria-label="Configurations">{legend}</ul>'
        )
    else:
        picture = '<p class="quiet">The mainline has no evaluation yet.</p>'
    section.body.append(
        f'<div class="overview"><figure>{picture}</figure><div><h3>What happened</h3>{_overview(account, looks)}</div>'
        "</div>"
    )
    return section


def _mainline(account: _Account, looks: _Looks, key: str, y: Axis) -> str:
    points = _thinned([(p, v) for p in account.line if (v := getattr(p, key)) is not None])
    best = f" of {account.best_return:g}" if account.best_return else ""
    parts: list[list[Any]] = []
    for point, value in points:
        if not parts or looks.at(parts[-1][-1][0]) != looks.at(point):
            parts.append([])
        parts[-1].append((point, value))
    series = tuple(
        Series(*looks.at(part[0][0]), tuple(p.spent for p, _ in part), tuple(v for _, v in part)) for part in parts
    )
    told = [
        (p.spent, v, f"{looks.at(p)[0]}\n{step_count(p.spent)} steps spent, mainline at {step_count(p.step)}\n"
         f"TSR {_number(p.tsr)}, task return {_number(p.task_return, 2)}{best}")
        for p, v in points
    ]  # fmt: skip
    joints = [((a[-1][0].spent, a[-1][1]), (b[0][0].spent, b[0][1])) for a, b in pairwise(parts)]
    bands = [
        (stage.spent, stage.spent + stage.cost, stage.name, f"{stage.name} at mainline step {step_count(stage.at)}: "
         f"{counted(len(stage.branches), 'branch run')}, {step_count(stage.cost)} steps; "
         f"{_outcome(account, stage).word}")
        for stage in account.stages if stage.cost > 0
    ]  # fmt: skip
    x = linear_axis("environment steps spent, all branches counted", account.spent)
    return _chart(Plot("the mainline", x, y, series), bands=bands, joints=joints, told=told)


def _overview(account: _Account, looks: _Looks) -> str:
    """The tree in short: the mainline downwards, at each stage what branched off."""
    first = account.segments[0].config if account.segments else None
    if not account.segments and account.stages:
        first = account.stages[0].current
    items = [f"<li><p><b>Start</b> {_said(looks.name(first))}</p></li>"]
    for k, stage in enumerate(account.stages):
        fate = _outcome(account, stage)
        leaves = []
        for name in [*(n for n in (CONTROL, REFERENCE) if n in stage.tried), *stage.proposed]:
            own = _fate(stage, name)
            kind = "won" if own.kind == "good" else "control" if name in (CONTROL, REFERENCE) else ""
            mark = "✓ " if kind == "won" else ""
            title = _said("; ".join((own.word, *own.reasons)))
            leaves.append(
                f'<li><a class="{kind}" href="#{_anchor(k, name)}" title="{title}">{mark}{_said(name)}</a></li>'
            )
        why = "".join(f"<p>{_said(reason)}</p>" for reason in fate.reasons)
        items.append(
            f'<li class="{fate.kind}"><p><b><a href="#stage-{k}">{_said(stage.name)}</a></b> at '
            f"{step_count(stage.at)} {_pill(fate.kind, fate.word)}</p>{why}"
            + (f'<ul class="leaves" aria-label="Branches">{"".join(leaves)}</ul>' if leaves else "")
            + "</li>"
        )
    if account.final:
        last = account.segments[-1].config if account.segments else None
        final = account.final
        items.append(
            f"<li><p><b>End</b> at {step_count(final.steps or 0)}, on {_said(looks.name(last))}: TSR "
            f"{_number(final.tsr)}, task return {_number(final.task_return, 2)}</p></li>"
        )
    else:
        items.append(f"<li><p>{quiet('under way …')}</p></li>")
    return f'<ol class="tree">{"".join(items)}</ol>'


def _anchor(stage: int, name: str) -> str:
    return f"branch-{stage}-{slug(name)}"


# ---------------------------------------------------------------- a stage


def _stage(account: _Account, looks: _Looks, k: int) -> Section:
    stage = account.stages[k]
    section = Section(f"stage-{k}", f"{stage.name}: mainline at {step_count(stage.at)} steps")
    fate = _outcome(account, stage)
    cost = (
        f"{counted(len(stage.branches), 'branch run')}, {stage.cost:,.0f} environment steps." if stage.branches else ""
    )
    section.body.append(
        f'<p class="outcome">{_pill(fate.kind, fate.word)} '
        f"{_said(listed(fate.reasons) if fate.kind == 'good' else '')} {quiet(cost)}</p>"
    )
    stood = f'<div class="box"><h3>Where the mainline stood</h3>{_config_card(looks, stage.current)}</div>'
    section.body.append(
        f'<div class="known"><div class="stack">{stood}{_evidence(stage)}</div>{_card(account, stage)}</div>'
    )
    shown: set[str] = set()
    draw = _branch_axes(looks, stage)
    for number, round_ in enumerate(stage.rounds, 1):
        proposed = round_.proposed
        about = [proposed.stage and f"stage: {proposed.stage}", proposed.policy and f"search: {proposed.policy}"]
        about += ["marks on the bars: the mainline's values"] if stage.current and proposed.candidates else []
        title = f"Round {number}" if len(stage.rounds) > 1 else "Candidates"
        section.body.append(f"<h3>{title} {quiet(_clean('; '.join(filter(None, about))))}</h3>")
        names = [candidate.id for candidate in proposed.candidates]
        cards = "".join(_branch_card(account, looks, k, name, draw) for name in names if name not in shown)
        section.body.append(
            f'<div class="branches">{cards}</div>' if names else f"<p>{quiet('Nothing was proposed.')}</p>"
        )
        section.body.append(_notes(account, "Proposals", proposed.note))
        shown |= set(names)
    rest = [name for name in stage.proposed if name not in shown]
    rest += [name for name in (REFERENCE, CONTROL) if name in stage.tried]
    if rest:
        title = "Compared with" if shown else "Branches"
        cards = "".join(_branch_card(account, looks, k, name, draw) for name in rest)
        section.body.append(f'<h3>{title}</h3><div class="branches">{cards}</div>')
    if stage.summaries:
        section.body.append(f"<h3>Numbers {quiet('in shares of the best return')}</h3>{_numbers(looks, stage, k)}")
    section.body.append(_decision(account, stage))
    return section


def _clean(text: str) -> str:
    return re.sub("[\u202a-\u202e\u2066-\u2069]", "", text)


def _evidence(stage: _Stage) -> str:
    if not stage.evidence:
        return f'<div class="box"><h3>Evidence</h3><p>{quiet("None was collected.")}</p></div>'
    flags = stage.evidence.get("flags")
    chips = "".join(f"<li>{_said(str(f).replace('_', ' '))}</li>" for f in flags) if isinstance(flags, list) else ""
    parts = [f'<ul class="flags" aria-label="Flags">{chips}</ul>' if chips else f"<p>{quiet('No flag is raised.')}</p>"]
    for key, title in (("curve", "Curve of the task return"), ("behaviour", "Behaviour")):
        values = stage.evidence.get(key)
        if not isinstance(values, Mapping):
            continue
        rows = "".join(
            f"<div><dt>{_said(str(name).replace('_', ' '))}</dt>"
            f"<dd>{_said(decimal(value, 3) if isinstance(value, float) and math.isfinite(value) else value)}</dd></div>"
            for name, value in values.items()
        )
        parts.append(f'<h4>{title}</h4><dl class="mini">{rows}</dl>')
    return f'<div class="box"><h3>Evidence</h3>{"".join(parts)}</div>'


def _card(account: _Account, stage: _Stage) -> str:
    title = "Diagnosis by rules" if account.by_rules else "The critic's card"
    label = f" {_pill('open', 'rules, no model')}" if account.by_rules else ""
    body = _tree(stage.card) if stage.card else f"<p>{quiet('There is none.')}</p>"
    return f'<div class="box card"><h3>{title}{label}</h3>{body}{_notes(account, "Diagnosis", stage.card_note)}</div>'


def _branch_axes(looks: _Looks, stage: _Stage) -> Callable[[str], str]:
    """A function that draws one branch against the control, on axes that all branches of the stage share."""
    points = [p for branch in stage.branches for p in branch.curve]
    control = stage.tried.get(CONTROL, [])

    def lines(name: str, branches: Sequence[_Branch], style: Style, key: str) -> tuple[list[Series], list[Series]]:
        """(what is drawn as a curve, what is drawn thin)."""
        own = [s for b in branches if (s := _curve(f"{name}, seed {b.seed}", style, b.curve, key))]
        if len(own) < 2:
            return [dataclasses.replace(s, name=name) for s in own], []
        mean = _mean(f"{name}, mean of {len(own)} seeds", style, own)
        return [mean] if mean.x else [], own

    def draw(name: str) -> str:
        branches = stage.tried.get(name, [])
        if not any(branch.curve for branch in branches):
            return ""
        x = linear_axis("environment steps along the branch", max(p.step for p in points),
                        min(stage.at, *(p.step for p in points)))  # fmt: skip
        if math.isclose(x.low, x.high):
            return ""

        def chart(key: str, y: Axis) -> str:
            base_style = dataclasses.replace(looks.style(stage.current), dash="dash")
            drawn, faint = lines(CONTROL, control, base_style, key)
            if name != CONTROL:
                curves, thin = lines(name, branches, looks.style(branches[0].config), key)
                drawn, faint = drawn + curves, faint + thin
            told = [
                (x_, y_, f"{s.name}\nstep {step_count(x_)}: {y.label} {_number(y_)}")
                for s in drawn
                for x_, y_ in zip(s.x, s.y, strict=True)
            ]
            return _chart(Plot(name, x, y, tuple(drawn)), faint=faint, told=told)

        legend = "" if name == CONTROL or not control else (
            f'<p class="key">{swatch_svg(looks.style(branches[0].config))}this branch '
            f"{swatch_svg(dataclasses.replace(looks.style(stage.current), dash='dash'))}{CONTROL}</p>"
        )  # fmt: skip
        return _both(points, chart) + legend

    return draw


def _branch_card(account: _Account, looks: _Looks, k: int, name: str, draw: Callable[[str], str]) -> str:
    stage = account.stages[k]
    candidate, branches = stage.proposed.get(name), stage.tried.get(name, [])
    fate = _fate(stage, name)
    config = candidate.config if candidate else branches[0].config if branches else None
    about = [candidate.type] if candidate and candidate.type else []
    about += [f"{len(branches)} seeds"] if len(branches) > 1 else []
    kind = "won" if fate.kind == "good" else "control" if name in (CONTROL, REFERENCE) else ""
    summary = stage.summaries.get(name, {})
    numbers = "".join(
        f'<div title="{esc(words)}"><dt>{label}</dt><dd>{_number(summary[key])}</dd></div>'
        for key, label, words in _NUMBERS if key != "spike_gap" and summary.get(key) is not None
    )  # fmt: skip
    if numbers:
        numbers = f'<dl class="mini five">{numbers}</dl>'
    ours, base = summary.get("score"), stage.summaries.get(CONTROL, {}).get("score")
    ahead = ""
    if ours is not None and base is not None and name != CONTROL:
        ahead = f'<p class="key">{quiet(f"score {ours - base:+.3f}".replace("-", "−") + f" against {CONTROL}")}</p>'
    reasons = _lines(fate.reasons, "why") if fate.reasons else ""
    rationale = (
        f'<p class="rationale"><b>Proposed because:</b> {_said(candidate.rationale)}</p>'
        if candidate and candidate.rationale
        else ""
    )
    return (
        f'<article class="branch {kind}" id="{_anchor(k, name)}"><h4>{_said(name)} '
        f"{quiet(_clean(', '.join(about)).replace('_', ' '))}</h4>{_pill(fate.kind, fate.word)}"
        f"{_config_card(looks, config, stage.current, change=name not in (CONTROL, REFERENCE))}"
        f"{draw(name)}{numbers}{ahead}{rationale}{reasons}</article>"
    )


def _numbers(looks: _Looks, stage: _Stage, k: int) -> str:
    """All branches of a stage below each other, the control first, then by score."""
    names = sorted(
        stage.summaries,
        key=lambda n: (n != CONTROL, n != REFERENCE, -(stage.summaries[n].get("score") or -math.inf), n),
    )
    head = ["Branch", *(f'<abbr title="{esc(words)}">{label}</abbr>' for _, label, words in _NUMBERS)]
    head += ["lead, 95%"] if stage.lead else []
    rows = []
    for name in names:
        summary, fate = stage.summaries[name], _fate(stage, name)
        branches, candidate = stage.tried.get(name, []), stage.proposed.get(name)
        config = branches[0].config if branches else candidate.config if candidate else None
        cells = "".join(f"<td>{_number(summary.get(key))}</td>" for key, _, _ in _NUMBERS)
        if stage.lead:
            lead = stage.lead.get(name, [])
            told = f"{_number(lead[0])} [{_number(lead[1])}, {_number(lead[2])}]" if len(lead) == 3 else "–"
            cells += f"<td>{esc(told)}</td>"
        rows.append(
            f'<tr class="{"won" if fate.kind == "good" else ""}"><th scope="row"><a class="method" '
            f'href="#{_anchor(k, name)}">{swatch_svg(looks.style(config))}{_said(name)}</a></th>{cells}'
            f'<td class="fate {fate.kind}">{esc(fate.word)}</td></tr>'
        )
    return data_table([*head, "Gate"], "".join(rows), f"Numbers of {stage.name}", "square")


def _decision(account: _Account, stage: _Stage) -> str:
    """The gate's verdict, and beside it what the proposer would have advised."""
    verdict = stage.verdict
    parts = []
    if verdict is not None:
        fate = _outcome(account, stage)
        kind = "holds" if verdict.accepted else "fails"
        title, how = "The gate", "Fixed rules on these numbers; no model has a say."
        if not stage.branches:
            title, how = "Decision", "No branch was run: there was nothing to judge by."
        reasons = _lines(verdict.reasons, kind) if verdict.reasons else ""
        out = "".join(f"<li>{_said(name)}: {_said(why)}</li>" for name, why in verdict.rejected.items())
        out = f'<h4>Not judged</h4><ul class="said">{out}</ul>' if out else ""
        parts.append(
            f'<div class="box gate"><h3>{title} {_pill(fate.kind, fate.word)}</h3>{reasons}{out}'
            f'<p class="note">{how}</p></div>'
        )
    elif stage.branches:
        parts.append(f'<div class="box gate"><h3>The gate</h3><p>{quiet("No verdict yet.")}</p></div>')
    reviews = [(n, r) for n, r in enumerate(stage.rounds, 1) if r.review or r.review_note]
    if reviews:
        by = " by rules" if account.by_rules else ""
        body = "".join(
            (f"<h4>Round {n}</h4>" if len(stage.rounds) > 1 else "")
            + (_tree(r.review) if r.review else f"<p>{quiet('There is none.')}</p>")
            + _notes(account, "Review", r.review_note)
            for n, r in reviews
        )
        parts.append(
            f'<div class="box advice"><h3>Review{by} {_pill("open", "advisory")}</h3>{body}'
            '<p class="note">Advice only: it decides nothing.</p></div>'
        )
    return f'<div class="two-boxes">{"".join(parts)}</div>' if parts else ""


# ---------------------------------------------------------------- the rest, and the page


def _details(account: _Account, looks: _Looks) -> Section | None:
    section = Section("details", "Details")
    if account.segments:
        rows = "".join(
            f'<tr><th scope="row" class="id">{_said(s.run)}</th><td>{_span(s)}</td><td><span class="method">'
            f"{swatch_svg(looks.style(s.config))}{_said(looks.name(s.config))}</span></td><td>{_said(s.why)}</td></tr>"
            for s in account.segments
        )
        table = data_table(
            ["Run", "Mainline steps", "Configuration", "Why"], rows, "Segments of the mainline", "all-runs"
        )
        section.body.append(foldable(f"Segments of the mainline ({len(account.segments)})", table))
    if account.vocabulary:
        section.body.append(foldable("What the terms and modes mean", f"<pre>{_said(account.vocabulary)}</pre>"))
    return section if section.body else None


def _span(segment: _Segment) -> str:
    start, end = (step_count(v) if v is not None else "…" for v in (segment.start, segment.to))
    return esc(f"{start} to {end}")


def _page(account: _Account) -> str:
    looks = _Looks(account)
    details = _details(account, looks)
    stages = [_stage(account, looks, k) for k in range(len(account.stages))]
    sections = [_run(account, looks), *stages, *([details] if details else [])]
    names = ["The run", *(stage.name for stage in account.stages), *(["Details"] if details else [])]
    title = f"{account.method} over {account.base or '?'} on {account.environment or '?'}"
    # One look for all that is made of these parts: the report's, and what is the account's own after it.
    report = files("echelon.reports").joinpath("study.html").read_text(encoding="utf-8")
    parts = {
        "STYLE": report.split("<style>", 1)[1].split("</style>", 1)[0],
        "TITLE": _said(f"{title}: account"),
        "HEADING": _said(title),
        "HEAD": _head(account),
        "CONTENTS": "".join(
            f'<li><a href="#{s.anchor}">{_said(n)}</a></li>' for s, n in zip(sections, names, strict=True)
        ),
        "BODY": "\n".join(
            f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title">'
            f'<h2 id="{s.anchor}-title">{_said(s.title)}</h2>{"".join(s.body)}</section>'
            for s in sections
        ),
    }
    template = files("echelon.reports").joinpath("account.html").read_text(encoding="utf-8")
    # In one pass, so that text from data which looks like a place isn't taken for one.
    return re.sub(r"__([A-Z_]+?)__", lambda match: parts[match.group(1)], template)
