"""The figures of a study as files for a paper: SVG and PDF, drawn by matplotlib from `reports.charts`.

The same figure gives the same bytes (with one version of matplotlib): no date, and ids from a fixed salt.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from typing import Any

import matplotlib as mpl
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from echelon.reports.charts import (
    AGENT_COLOURS,
    COLOURS,
    Axis,
    Figure,
    Forest,
    Panel,
    PathMap,
    Plot,
    Style,
    clean,
    mark_scale,
    offset,
    stretches,
    wall_runs,
)

__all__ = ["figure_pdf", "figure_svg"]

_MARKERS = {
    "circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v", "cross": "X", "star": "*", "bar": "|",
}  # fmt: skip
_DASHES: dict[str, Any] = {
    "solid": "-", "dash": (0, (4, 2)), "dots": (0, (1, 1.6)), "dashdot": (0, (5, 1.6, 1, 1.6)), "long": (0, (7, 2)),
}  # fmt: skip
_GREY = "#5c646e"
_SETTINGS = {
    "svg.hashsalt": "echelon",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    # "$" in a name is a dollar, not mathematics.
    "text.parse_math": False,
    "text.usetex": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c939b",
    "axes.labelcolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.grid": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "path.simplify": False,
}


def figure_svg(figure: Figure) -> bytes:
    """The figure as an SVG file; text is drawn as outlines, so it looks the same everywhere."""
    return _render(figure, "svg", {"Date": None, "Creator": "Echelon", "Title": clean(figure.title)})


def figure_pdf(figure: Figure) -> bytes:
    """The figure as a PDF file with embedded TrueType fonts."""
    return _render(figure, "pdf", {"CreationDate": None, "Creator": "Echelon", "Title": clean(figure.title)})


def _render(figure: Figure, format: str, metadata: dict[str, Any]) -> bytes:
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # a user's own matplotlibrc must not change a study's figures
        mpl.rcParams.update(_SETTINGS)
        # A name in letters that the font lacks is drawn as boxes; the page has it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        file = io.BytesIO()
        _draw(figure).savefig(file, format=format, metadata=metadata)
        return file.getvalue()


def _draw(figure: Figure) -> Canvas:
    columns = min(3, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    height = max(map(_inches, figure.panels))
    width = 4.2 if isinstance(figure.panels[0], Forest) else 2.9 if len(figure.panels) > 1 else 3.6
    across = max(1, min(len(figure.legend), 2 * columns))
    legend = 0.25 + 0.17 * -(-len(figure.legend) // across)
    canvas = Canvas(figsize=(width * columns, height * rows + legend), layout="constrained")
    grid = canvas.subplots(rows, columns, squeeze=False)
    axes = [ax for row in grid for ax in row]
    for ax, panel in zip(axes, figure.panels, strict=False):
        # A map's title has a line of its own for what happened.
        ax.set_title("\n".join([clean(panel.title), *(_wrapped(panel) if isinstance(panel, PathMap) else [])]))
        if isinstance(panel, PathMap):
            _draw_map(ax, panel)
        elif isinstance(panel, Forest):
            _draw_forest(ax, panel)
        else:
            _draw_plot(ax, panel)
        if panel.notes and not isinstance(panel, PathMap):
            ax.set_xlabel("\n".join([ax.get_xlabel(), *_wrapped(panel)]), fontsize=7)
    for ax in axes[len(figure.panels) :]:
        ax.set_axis_off()
    if figure.legend:
        handles = [_handle(name, style) for name, style in figure.legend]
        canvas.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=7.5)
    return canvas


def _wrapped(panel: Panel) -> list[str]:
    """A panel's notes in lines that it has room for."""
    return [line for note in panel.notes for line in textwrap.wrap(clean(note), 46) or [""]]


def _inches(panel: Panel) -> float:
    notes = 0.13 * len(_wrapped(panel))
    if isinstance(panel, Forest):
        return 0.9 + 0.22 * len(panel.rows) + notes
    return (3.2 if isinstance(panel, PathMap) else 2.3) + notes


def _handle(name: str, style: Style) -> Line2D:
    look = {"color": COLOURS[style.colour], "marker": _MARKERS[style.marker], "linestyle": _DASHES[style.dash]}
    return Line2D([], [], label=clean(name), **look)


def _scale(set_scale: Any, set_limits: Any, set_ticks: Any, axis: Axis) -> None:
    if axis.log:
        set_scale("log")
    set_limits(axis.low, axis.high)
    set_ticks([value for value, _ in axis.ticks], [words for _, words in axis.ticks])


def _draw_plot(ax: Any, plot: Plot) -> None:
    _scale(ax.set_xscale, ax.set_xlim, ax.set_xticks, plot.x)
    _scale(ax.set_yscale, ax.set_ylim, ax.set_yticks, plot.y)
    ax.minorticks_off()
    ax.set_xlabel(plot.x.label)
    ax.set_ylabel(plot.y.label)
    ax.grid(axis="y", color="#e2dfd7", linewidth=0.6)
    ax.set_axisbelow(True)
    count, span = len(plot.series), plot.x.high - plot.x.low
    if plot.bars and not plot.x.log:
        ax.set_xlim(plot.x.low - 0.07 * span, plot.x.high + 0.07 * span)
    for i, s in enumerate(plot.series):
        colour, marker = COLOURS[s.style.colour], _MARKERS[s.style.marker]
        beside = (i - (count - 1) / 2) * min(0.016, 0.1 / count) * span if plot.bars else 0.0
        x = [value + beside for value in s.x]
        step = max(1, -(-len(x) // 6)) if not plot.bars else 1
        drawing = {"drawstyle": "steps-post"} if plot.stairs else {}
        for first, end in stretches(s):
            ax.plot(
                x[first:end], s.y[first:end], color=colour, linestyle=_DASHES[s.style.dash], marker=marker,
                markevery=[len(x) - 1] if s.flat else (i * step // max(1, count) if step > 2 else 0, step),
                linewidth=0.9 if plot.bars else 1.4, clip_on=False, zorder=3 + i, **drawing,
            )  # fmt: skip
        hollow = [k for k, single in enumerate(s.single) if single]
        if hollow:
            ax.plot([x[k] for k in hollow], [s.y[k] for k in hollow], linestyle="", marker=marker, color=colour,
                    markerfacecolor="white", clip_on=False, zorder=4 + i)  # fmt: skip
        if s.low and plot.bars:
            below = [max(0.0, y - low) for y, low in zip(s.y, s.low, strict=True)]
            above = [max(0.0, high - y) for y, high in zip(s.y, s.high, strict=True)]
            ax.errorbar(x, s.y, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=1.0, zorder=2 + i)
        elif s.low and len(x) > 1:
            ax.fill_between(x, s.low, s.high, color=colour, alpha=0.15, linewidth=0,
                            step="post" if plot.stairs else None)  # fmt: skip


def _draw_forest(ax: Any, forest: Forest) -> None:
    _scale(ax.set_xscale, ax.set_xlim, ax.set_xticks, forest.x)
    ax.set_xlabel(forest.x.label)
    ax.set_ylim(len(forest.rows) - 0.5, -0.5)
    ax.set_yticks(range(len(forest.rows)), [clean(row.label) for row in forest.rows])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#e2dfd7", linewidth=0.6)
    ax.set_axisbelow(True)
    if forest.reference is not None:
        ax.axvline(forest.reference, color=_GREY, linewidth=0.9, linestyle=(0, (3, 2)))
    for k, row in enumerate(forest.rows):
        colour = COLOURS[row.style.colour]
        ax.plot([row.low, row.high], [k, k], color=colour, linewidth=1.2, clip_on=False)
        ax.plot([row.value], [k], color=colour, marker=_MARKERS[row.style.marker], linestyle="", clip_on=False)


def _draw_map(ax: Any, m: PathMap) -> None:
    ax.set_xlim(0, m.width)
    ax.set_ylim(m.height, 0)
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(True)

    def boxes(cells: list[tuple[float, float, float, float]], colour: str) -> None:
        corners = [((x, y), (x + w, y), (x + w, y + h), (x, y + h)) for x, y, w, h in cells]
        # A thin edge closes the seams between boxes that touch.
        ax.add_collection(PolyCollection(corners, facecolors=colour, edgecolors=colour, linewidths=0.3))

    boxes([(c, r, 1, 1) for r, c in m.zones], "#dcecf7")
    boxes([(c, r, n, 1) for r, c, n in wall_runs(m.walls)], "#59636f")
    boxes([(c + 0.2, r + 0.2, 0.6, 0.6) for r, c in m.tasks], "#d9b27c")
    # A cell is 2.6 inches over the map's width; marks keep their size in cells.
    cell = 2.6 * 72 / max(m.width, m.height) * mark_scale(m)
    for a, cells in enumerate(m.paths):
        shift, colour = 0.5 + offset(a, len(m.paths)), AGENT_COLOURS[a % len(AGENT_COLOURS)]
        ax.plot([c + shift for _, c in cells], [r + shift for r, _ in cells], color=colour, linewidth=0.16 * cell,
                solid_joinstyle="round", alpha=0.9)  # fmt: skip
        if m.subgoals[a]:  # what is empty and not clipped has no place, and the layout would fail on it
            ax.plot([c + 0.5 for _, c in m.subgoals[a]], [r + 0.5 for r, _ in m.subgoals[a]], linestyle="", marker="D",
                    markerfacecolor="none", markeredgecolor=colour, markersize=0.55 * cell,
                    markeredgewidth=0.09 * cell, clip_on=False)  # fmt: skip
        (r, c), (end_r, end_c) = cells[0], cells[-1]
        ax.plot(c + shift, r + shift, marker="o", clip_on=False, markersize=0.6 * cell, markerfacecolor="white",
                markeredgecolor=colour, markeredgewidth=0.12 * cell)  # fmt: skip
        ax.plot(end_c + shift, end_r + shift, marker="o", clip_on=False, markersize=0.7 * cell, color=colour)
