"""What the figures of a study show, apart from how they are drawn, and the drawing for the page.

A `Figure` is a row of panels: curves (`Plot`), estimates with their intervals (`Forest`) or the ways of a team
over a map (`PathMap`). The page draws them as inline SVG that follows its theme (`panel_svg`); `reports.figures`
draws the same ones with matplotlib. So a figure in a paper can't differ from the one on the page.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from echelon.reports.replay import Replay

__all__ = [
    "AGENT_COLOURS",
    "BOTTOM",
    "COLOURS",
    "HEIGHT",
    "LEFT",
    "RIGHT",
    "TOP",
    "TSR_AXIS",
    "WIDTH",
    "Axis",
    "Figure",
    "Forest",
    "Panel",
    "PathMap",
    "Plot",
    "Row",
    "Series",
    "Style",
    "clean",
    "exact_axis",
    "linear_axis",
    "log_axis",
    "mark_scale",
    "method_styles",
    "offset",
    "panel_svg",
    "path_map",
    "positive_axis",
    "short",
    "stretches",
    "svg_line",
    "svg_text",
    "swatch_svg",
    "tenth",
    "wall_runs",
]

# Okabe and Ito (2008), colours that people with the common kinds of colour blindness tell apart. Black stands
# first, as the page's ink; the yellow is left out (too faint on white). A dark page has lighter ones (study.html).
COLOURS = ("#1b1f24", "#0072b2", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#56b4e9")
INK, BLUE, GREEN, VERMILION, ORANGE, PURPLE, SKY = range(7)

# The colours of agents in the replay page, so that a path map and its replay agree.
AGENT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8d97a3", "#e3d000")

DASHES = {"solid": "", "dash": "7 4", "dots": "1.5 3.5", "dashdot": "8 3 1.5 3", "long": "10 3"}
MARKERS = ("circle", "square", "triangle", "diamond", "down", "cross", "star", "bar")


@dataclass(frozen=True)
class Style:
    """How a method looks, the same in every figure: never told by its colour alone."""

    colour: int
    """An index into COLOURS."""
    marker: str
    """One of MARKERS."""
    dash: str
    """One of DASHES."""


_KNOWN = {
    "l2m2": Style(BLUE, "circle", "solid"),
    "rule-goals": Style(GREEN, "square", "solid"),
    "flat-mappo": Style(VERMILION, "triangle", "dash"),
    "qmix": Style(ORANGE, "diamond", "dashdot"),
    "random-goals": Style(PURPLE, "down", "dots"),
    "llm-only": Style(SKY, "cross", "dash"),
    "classical": Style(INK, "star", "long"),
    "l2m2-qmix": Style(BLUE, "diamond", "dashdot"),
    "direct-integration": Style(GREEN, "circle", "dash"),
    "flat-ippo": Style(VERMILION, "bar", "dots"),
    "vdn": Style(ORANGE, "down", "dash"),
    "llm-untrained": Style(SKY, "star", "dots"),
}


def method_styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style for each method: its own where Echelon knows it, else the next that nobody has."""
    methods = list(dict.fromkeys(methods))
    styles = {name: _KNOWN[name] for name in methods if name in _KNOWN}
    dashes, taken = list(DASHES), {(style.marker, style.dash) for style in _KNOWN.values()}
    # All three change from one to the next; marker and dash come together again only after 40.
    every = (Style(k % len(COLOURS), MARKERS[(k + 4) % len(MARKERS)], dashes[k % len(dashes)]) for k in range(280))
    own, others = list[Style](), list[Style]()
    for style in every:
        if style not in _KNOWN.values():
            (others if (style.marker, style.dash) in taken else own).append(style)
    spare = iter([*own, *others])
    for name in methods:
        if name not in styles:
            styles[name] = next(spare)
    return {name: styles[name] for name in methods}


def clean(text: object) -> str:
    """Text from data as it can stand in any file: no control characters, no halves of characters."""
    whole = str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", whole)


def short(value: float) -> str:
    """A number as few characters: 0, 0.25, 12, 1.5k, 2M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high` with ticks and their words."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def part(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1."""
        if self.log:
            value, low, high = (math.log10(max(x, 1e-12)) for x in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return (value - low) / (high - low)


TSR_AXIS = Axis("TSR", 0.0, 1.0, ((0.0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1.0, "1")))


def linear_axis(label: str, high: float, low: float = 0.0) -> Axis:
    """An axis over `low` to `high` (a little more, up to the next tick) with about five round ticks."""
    if not high > low:
        high = low + 1.0
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw * 0.999)
    first, count = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple((k * step, short(round(k * step, 12))) for k in range(first, count + 1))
    return Axis(label, ticks[0][0], ticks[-1][0], ticks)


def exact_axis(label: str, high: float, low: float = 0.0) -> Axis:
    """As `linear_axis`, but from `low` to `high` and no further: of steps, which end a little above a round number."""
    whole = linear_axis(label, high, low)
    ticks = tuple(tick for tick in whole.ticks if low <= tick[0] <= high)
    return Axis(label, low, high, ticks) if high > low and len(ticks) > 1 else whole


def log_axis(label: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis of whole decades over the positive `values`."""
    first = math.floor(math.log10(min(values)) + 1e-9)
    last = max(first + 1, math.ceil(math.log10(max(values)) - 1e-9))
    each = 1 + (last - first - 1) // 5
    ticks = tuple((10.0**k, short(10.0**k)) for k in range(first, last + 1, each))
    return Axis(label, 10.0**first, 10.0**last, ticks, log=True)


def positive_axis(label: str, values: Sequence[float]) -> Axis:
    """From zero, or logarithmic (and saying so) where the values span more than a factor of 30."""
    positive = [v for v in values if v > 0]
    if positive and max(positive) > 30 * min(positive) and len(positive) == len(values):
        return log_axis(f"{label} (log scale)", positive)
    return linear_axis(label, max(values, default=1.0))


@dataclass(frozen=True)
class Series:
    """One method in a plot; `low` and `high` are the ends of the 95% intervals, empty where there are none."""

    name: str
    style: Style
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    single: tuple[bool, ...] = ()
    """Which points rest on a single run (drawn hollow)."""
    breaks: tuple[int, ...] = ()
    """Points that no line leads to: something between them and the one before was not measured."""
    flat: bool = False
    """A level, not a curve: a method that learns nothing (no markers)."""


@dataclass(frozen=True)
class Plot:
    """Curves over a numeric axis: intervals as bands, or as bars where the points stand for themselves."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    bars: bool = False
    stairs: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One estimate in a forest plot."""

    label: str
    style: Style
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Forest:
    """Estimates below each other on one axis, with a line at `reference`."""

    title: str
    x: Axis
    rows: tuple[Row, ...]
    reference: float | None = None
    notes: tuple[str, ...] = ()


Cell = tuple[int, int]


@dataclass(frozen=True)
class PathMap:
    """Where the agents of one episode went. Cells are (row, column)."""

    title: str
    height: int
    width: int
    walls: tuple[str, ...]
    zones: tuple[Cell, ...]
    tasks: tuple[Cell, ...]
    paths: tuple[tuple[Cell, ...], ...]
    """The cells of each agent, one a step."""
    subgoals: tuple[tuple[Cell, ...], ...]
    """The distinct targets that each agent was given."""
    notes: tuple[str, ...] = ()


Panel = Plot | Forest | PathMap


@dataclass(frozen=True)
class Figure:
    """Panels that belong together. `name` is its file's name, `legend` the methods it shows."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, Style], ...] = ()


def path_map(replay: Replay, title: str, notes: tuple[str, ...] = ()) -> PathMap:
    """The path map of a recording's first episode."""
    episode = replay.episodes[0]
    agents = range(replay.num_agents)
    subgoals: list[dict[Cell, None]] = [{} for _ in agents]
    for frame in episode.frames:
        for a, subgoal in enumerate(frame.subgoals):
            if subgoal is not None:
                subgoals[a][subgoal.target] = None
    return PathMap(
        title,
        replay.height,
        replay.width,
        tuple(episode.walls),
        tuple(dict.fromkeys(cell for zone in episode.zones for cell in zone.cells)),
        tuple(dict.fromkeys(task.cell for task in episode.tasks if task.cell is not None)),
        tuple(tuple(frame.agents[a] for frame in episode.frames) for a in agents),
        tuple(tuple(targets) for targets in subgoals),
        notes,
    )


def wall_runs(walls: Sequence[str]) -> list[tuple[int, int, int]]:
    """The walls as (row, first column, length) of each unbroken run."""
    return [(r, m.start(), len(m.group())) for r, row in enumerate(walls) for m in re.finditer("#+", row)]


def offset(agent: int, agents: int) -> float:
    """How far beside the cells' middles an agent's way is drawn, in cells, so that ways don't hide each other."""
    return (agent - (agents - 1) / 2) * min(0.14, 0.6 / max(1, agents))


def stretches(series: Series) -> list[tuple[int, int]]:
    """(first, end) of each part of the series that one line may join."""
    edges = [0, *series.breaks, len(series.x)]
    return list(pairwise(edges))


def mark_scale(drawn: PathMap) -> float:
    """How many cells wide the marks are: on a large map a mark of one cell would be too small to see."""
    return max(1.0, max(drawn.height, drawn.width) / 25)


# ---------------------------------------------------------------- inline SVG

WIDTH, HEIGHT = 360.0, 236.0
"""Of a panel, in its own units."""
LEFT, RIGHT, TOP, BOTTOM = 44.0, 14.0, 26.0, 40.0
"""Its margins, outside the axes."""


def tenth(value: float) -> str:
    """A coordinate to a tenth, without a trailing zero."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def svg_text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """Words at a place, as SVG."""
    cls = f' class="{kind}"' if kind else ""
    return f'<text x="{tenth(x)}" y="{tenth(y)}" text-anchor="{anchor}"{cls}>{html.escape(clean(words))}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{tenth(x1)} {tenth(y1)}L{tenth(x2)} {tenth(y2)}"/>'


def svg_line(points: Iterable[tuple[float, float]]) -> str:
    """The path through some points, as SVG has it in `d`."""
    return "M" + "L".join(f"{tenth(x)} {tenth(y)}" for x, y in points)


def _marker(x: float, y: float, style: Style, hollow: bool = False, size: float = 4.0) -> str:
    """A marker's path around (x, y); its area is about the same for every shape."""
    s = size
    if style.marker == "circle":
        half = f"a{tenth(s)} {tenth(s)} 0 1 0"
        d = f"M{tenth(x - s)} {tenth(y)}{half} {tenth(2 * s)} 0{half} {tenth(-2 * s)} 0z"
    else:
        shapes: dict[str, tuple[tuple[float, float], ...]] = {
            "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
            "triangle": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
            "down": ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
            "diamond": ((0, -1.3), (1.15, 0), (0, 1.3), (-1.15, 0)),
            "bar": ((-0.45, -1.3), (0.45, -1.3), (0.45, 1.3), (-0.45, 1.3)),
            "cross": (
                (-1.2, -0.7), (-0.7, -1.2), (0, -0.5), (0.7, -1.2), (1.2, -0.7), (0.5, 0),
                (1.2, 0.7), (0.7, 1.2), (0, 0.5), (-0.7, 1.2), (-1.2, 0.7), (-0.5, 0),
            ),
            "star": tuple(
                ((1.45 if k % 2 == 0 else 0.62) * math.sin(k * math.pi / 5),
                 -(1.45 if k % 2 == 0 else 0.62) * math.cos(k * math.pi / 5))
                for k in range(10)
            ),
        }  # fmt: skip
        d = svg_line((x + s * a, y + s * b) for a, b in shapes[style.marker]) + "z"
    return f'<path class="mark c{style.colour}{" hollow" if hollow else ""}" d="{d}"/>'


def _dash(style: Style) -> str:
    pattern = DASHES[style.dash]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def swatch_svg(style: Style) -> str:
    """A method's line and marker, for a legend or beside its name in a table."""
    line = f'<path class="line c{style.colour}" d="M1 8H35"{_dash(style)}/>'
    return (
        f'<svg class="swatch" viewBox="0 0 36 16" width="36" height="16" aria-hidden="true">'
        f"{line}{_marker(18, 8, style)}</svg>"
    )


def panel_svg(panel: Panel, label: str) -> str:
    """The panel as one inline `<svg>`; `label` is what it shows in words, for those who don't see it."""
    size: tuple[float, float]
    if isinstance(panel, PathMap):
        size, body = (panel.width, panel.height), _path_map_svg(panel)
        kind = f'chart map" style="--w:{mark_scale(panel):.2f}'
    elif isinstance(panel, Forest):
        size, body = (WIDTH, 52 + 24 * len(panel.rows)), _forest_svg(panel)
        kind = "chart"
    else:
        size, body = (WIDTH, HEIGHT), _plot_svg(panel)
        kind = "chart"
    return (
        f'<svg class="{kind}" viewBox="0 0 {tenth(size[0])} {tenth(size[1])}" role="img" '
        f'aria-label="{html.escape(clean(label))}">{body}</svg>'
    )


def _frame(x: Axis, y: Axis, inset: float) -> list[str]:
    """Grid, ticks and names of the axes."""
    parts = []
    bottom = HEIGHT - BOTTOM
    for value, words in y.ticks:
        at = bottom - y.part(value) * (bottom - TOP)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "grid"))
        parts.append(svg_text(LEFT - 6, at + 4, words, "end"))
    for value, words in x.ticks:
        at = LEFT + inset + x.part(value) * (WIDTH - RIGHT - LEFT - 2 * inset)
        parts.append(_line(at, bottom, at, bottom + 4, "axis"))
        parts.append(svg_text(at, bottom + 17, words, "middle"))
    parts.append(_line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"))
    parts.append(svg_text(4, 12, y.label, "start", "name"))
    parts.append(svg_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x.label, "middle", "name"))
    return parts


def _plot_svg(plot: Plot) -> str:
    inset = 18.0 if plot.bars else 2.0
    bottom, wide = HEIGHT - BOTTOM, WIDTH - RIGHT - LEFT - 2 * inset
    parts = _frame(plot.x, plot.y, inset)
    count = len(plot.series)

    def at_x(value: float) -> float:
        return LEFT + inset + plot.x.part(value) * wide

    def at_y(value: float) -> float:
        # An interval may reach beyond the axis (Student's does below 0); it is cut at the frame.
        return bottom - min(1.0, max(0.0, plot.y.part(value))) * (bottom - TOP)

    if not plot.bars:
        for s in plot.series:
            if s.low != s.high and len(s.x) > 1:  # one run has no spread to show
                upper = _stairs(s.x, s.high) if plot.stairs else list(zip(s.x, s.high, strict=True))
                lower = _stairs(s.x, s.low) if plot.stairs else list(zip(s.x, s.low, strict=True))
                ring = [(at_x(x), at_y(y)) for x, y in (*upper, *reversed(lower))]
                parts.append(f'<path class="band c{s.style.colour}" d="{svg_line(ring)}z"/>')
    for i, s in enumerate(plot.series):
        beside = (i - (count - 1) / 2) * min(4.5, 30 / count) if plot.bars else 0.0
        places = [(at_x(x) + beside, at_y(y)) for x, y in zip(s.x, s.y, strict=True)]
        single = s.single or (False,) * len(places)
        weight = " thin" if plot.bars else ""
        for first, end in stretches(s):
            way = places[first:end]
            if plot.stairs:
                way = [(at_x(x), at_y(y)) for x, y in _stairs(s.x[first:end], s.y[first:end])]
            if len(way) > 1:
                parts.append(f'<path class="line c{s.style.colour}{weight}" d="{svg_line(way)}"{_dash(s.style)}/>')
        if plot.bars and s.low:
            for (x, _), low, high in zip(places, s.low, s.high, strict=True):
                if high > low:
                    parts.append(_line(x, at_y(low), x, at_y(high), f"whisker c{s.style.colour}"))
        # On a curve of many points a few markers tell who it is.
        step = max(1, math.ceil(len(places) / 6)) if not plot.bars else 1
        if s.flat:
            parts.append(_marker(*places[-1], s.style, single[-1]))
        else:
            first = 0 if plot.bars else (len(places) - 1) % step
            shown = range(first + (i * step // max(1, count) if step > 2 else 0), len(places), step)
            parts.extend(_marker(*places[k], s.style, single[k]) for k in shown)
    return "".join(parts)


def _stairs(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """A right-continuous step function's corners."""
    corners = [(x[0], y[0])]
    for k in range(1, len(x)):
        corners += [(x[k], y[k - 1]), (x[k], y[k])]
    return corners


def _forest_svg(forest: Forest) -> str:
    longest = max((len(clean(r.label)) for r in forest.rows), default=0)
    left, right, top, row = min(190.0, 20 + 6.0 * longest), 16.0, 10.0, 24.0
    bottom = top + row * len(forest.rows)
    wide = WIDTH - right - left
    parts = []
    for value, words in forest.x.ticks:
        at = left + forest.x.part(value) * wide
        parts.append(_line(at, top, at, bottom, "grid"))
        parts.append(svg_text(at, bottom + 16, words, "middle"))
    parts.append(_line(left, bottom, WIDTH - right, bottom, "axis"))
    if forest.reference is not None:
        at = left + forest.x.part(forest.reference) * wide
        parts.append(_line(at, top, at, bottom, "reference"))
    parts.append(svg_text(left + wide / 2, bottom + 36, forest.x.label, "middle", "name"))
    for k, r in enumerate(forest.rows):
        y = top + row * (k + 0.5)
        low, mid, high = (left + min(1.0, max(0.0, forest.x.part(v))) * wide for v in (r.low, r.value, r.high))
        words = clean(r.label)
        parts.append(svg_text(left - 8, y + 4, words if len(words) <= 29 else words[:28] + "…", "end"))
        parts.append(_line(low, y, high, y, f"whisker c{r.style.colour}"))
        parts.append(_marker(mid, y, r.style))
    return "".join(parts)


def _path_map_svg(m: PathMap) -> str:
    parts = [f'<path class="floor" d="M0 0h{m.width}v{m.height}h-{m.width}z"/>']
    if m.zones:
        parts.append(f'<path class="zone" d="{"".join(f"M{c} {r}h1v1h-1z" for r, c in m.zones)}"/>')
    walls = "".join(f"M{c} {r}h{n}v1h-{n}z" for r, c, n in wall_runs(m.walls))
    if walls:
        parts.append(f'<path class="wall" d="{walls}"/>')
    if m.tasks:
        tasks = "".join(f"M{c + 0.2:g} {r + 0.2:g}h.6v.6h-.6z" for r, c in m.tasks)
        parts.append(f'<path class="task" d="{tasks}"/>')
    for a, cells in enumerate(m.paths):
        shift, colour = 0.5 + offset(a, len(m.paths)), a % len(AGENT_COLOURS)
        corners = [(c, r) for r, c in _corners(cells)]
        way = "M" + "L".join(f"{c + shift:.2f} {r + shift:.2f}" for c, r in corners)
        parts.append(f'<path class="way a{colour}" d="{way}"/>')
    scale = mark_scale(m)
    d = round(0.4 * scale, 2)
    for a, targets in enumerate(m.subgoals):
        diamonds = "".join(f"M{c + 0.5:g} {r + 0.5 - d:g}l{d:g} {d:g}l{-d:g} {d:g}l{-d:g} {-d:g}z" for r, c in targets)
        if diamonds:
            parts.append(f'<path class="subgoal a{a % len(AGENT_COLOURS)}" d="{diamonds}"/>')
    for a, cells in enumerate(m.paths):
        shift, colour = 0.5 + offset(a, len(m.paths)), a % len(AGENT_COLOURS)
        (r, c), (end_r, end_c) = cells[0], cells[-1]
        parts.append(
            f'<circle class="start a{colour}" cx="{c + shift:.2f}" cy="{r + shift:.2f}" r="{0.3 * scale:.2f}"/>'
        )
        parts.append(
            f'<circle class="end a{colour}" cx="{end_c + shift:.2f}" cy="{end_r + shift:.2f}" r="{0.36 * scale:.2f}"/>'
        )
    return "".join(parts)


def _corners(cells: Sequence[Cell]) -> list[Cell]:
    """A way without the cells that it only passes straight through, and without its rests."""
    way = [cell for k, cell in enumerate(cells) if k == 0 or cell != cells[k - 1]]
    kept = way[:1]
    for before, here, after in zip(way, way[1:], way[2:], strict=False):
        if (after[0] - here[0], after[1] - here[1]) != (here[0] - before[0], here[1] - before[1]):
            kept.append(here)
    return kept + way[1:][-1:]
