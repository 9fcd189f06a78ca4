"""How an account is drawn: a name and a style for each configuration, and charts with stages, seeds and hints."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from echelon.reports.account.file import TASK_REWARD, Account, Config, MainPoint, Point
from echelon.reports.charts import (
    BOTTOM,
    COLOURS,
    DASHES,
    HEIGHT,
    LEFT,
    MARKERS,
    RIGHT,
    TOP,
    TSR_AXIS,
    WIDTH,
    Axis,
    Plot,
    Series,
    Style,
    linear_axis,
    panel_svg,
    svg_line,
    svg_text,
    tenth,
)
from echelon.reports.parts import esc, in_words

__all__ = ["Looks", "by_measure", "chart_svg", "curve_of", "mean_of", "thinned"]

_POINTS = 400
"""Points of a curve: more than that many pixels tell nothing more."""


class Looks:
    """A name and a style for each configuration, the same wherever it stands; and the order and words of the terms."""

    def __init__(self, account: Account) -> None:
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

    def _key(self, point: MainPoint) -> Any:
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

    def name(self, config: Config | None) -> str:
        return self._names[_identity(config)]

    def style(self, config: Config | None) -> Style:
        return self.styles[_identity(config)]

    def at(self, point: MainPoint) -> tuple[str, Style]:
        """The name and the style of what was trained on at a point of the mainline."""
        key = self._key(point)
        return self._names[key], self.styles[key]


def _identity(config: Config | None) -> Any:
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


def chart_svg(
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
    bottom, inset = HEIGHT - BOTTOM, 2.0

    def at(x: float, y: float) -> tuple[float, float]:
        wide = WIDTH - RIGHT - LEFT - 2 * inset
        return LEFT + inset + plot.x.part(x) * wide, bottom - min(1.0, max(0.0, plot.y.part(y))) * (bottom - TOP)

    under = []
    for start, end, name, words in bands:
        left, right = at(start, 0)[0], at(end, 0)[0]
        under.append(
            f'<rect class="stage" x="{tenth(left)}" y="{tenth(TOP - 10)}" width="{max(1.0, right - left):.1f}" '
            f'height="{tenth(bottom - TOP + 10)}"><title>{esc(words)}</title></rect>'
        )
        under.append(svg_text((left + right) / 2, TOP - 14, name, "middle", "stage-name"))
    for series in faint:
        way = [at(x, y) for x, y in zip(series.x, series.y, strict=True)]
        under.append(f'<path class="line seed c{series.style.colour}" d="{svg_line(way)}"/>')
    under += [f'<path class="joint" d="{svg_line(at(x, y) for x, y in way)}"/>' for way in joints]
    over = []
    for x, y, words in told:
        cx, cy = at(x, y)
        over.append(f'<circle class="hit" cx="{tenth(cx)}" cy="{tenth(cy)}" r="6"><title>{esc(words)}</title></circle>')
    head, _, body = panel_svg(plot, in_words(plot)).partition(">")
    return f"{head}>{''.join(under)}{body.removesuffix('</svg>')}{''.join(over)}</svg>"


def by_measure(values: Sequence[Point], chart: Callable[[str, Axis], str], *, best: float | None = None) -> str:
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


def curve_of(name: str, style: Style, points: Sequence[Point], key: str) -> Series | None:
    """One measure of a branch, where it was taken; None where it never was."""
    found = [(p.step, y) for p in points if (y := getattr(p, key)) is not None]
    if not found:
        return None
    x, y = zip(*thinned(found), strict=True)
    return Series(name, style, x, y)


def thinned(points: Sequence[Any]) -> list[Any]:
    """At most `_POINTS` of them, evenly spaced, the first and the last among them."""
    if len(points) <= _POINTS:
        return list(points)
    return [points[round(k * (len(points) - 1) / (_POINTS - 1))] for k in range(_POINTS)]


def mean_of(name: str, style: Style, curves: Sequence[Series]) -> Series:
    """The mean over seeds where all have been measured."""
    values = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*map(set, values)))
    return Series(name, style, tuple(steps), tuple(math.fsum(v[x] for v in values) / len(values) for x in steps))
