"""What the sections of a study's report are made of: the data ready to be asked, and words and numbers as HTML.

Text from data is never trusted: every function here that takes text escapes it (`esc`), and what it returns is
HTML, unless its description says otherwise.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from echelon.reports.charts import (
    Figure,
    Forest,
    Panel,
    Plot,
    Style,
    clean,
    method_styles,
    panel_svg,
    short,
    swatch_svg,
)

__all__ = [
    "Document",
    "Section",
    "Study",
    "World",
    "byte_count",
    "cell_anchor",
    "counted",
    "data_table",
    "decimal",
    "duration",
    "esc",
    "foldable",
    "in_words",
    "linked",
    "listed",
    "method_label",
    "p_text",
    "quiet",
    "run_anchor",
    "run_links",
    "single_note",
    "slug",
    "step_count",
    "with_interval",
]


Document = Mapping[str, Any]
World = tuple[str, int, int]
"""Environment, map size, agents."""


class Study:
    """Results and analysis, by run and by cell (a method on a world)."""

    def __init__(self, results: Document, analysis: Document) -> None:
        self.about: Document = results.get("study") or {}
        self.machine: Document = results.get("machine") or {}
        self.analysis = analysis
        self.runs: list[Document] = list(results.get("runs") or [])
        self.by_id: dict[str, Document] = {str(run["id"]): run for run in self.runs}
        self.methods = list(dict.fromkeys([*self.about.get("methods", ()), *(run["method"] for run in self.runs)]))
        self.styles = method_styles(self.methods)
        self.worlds: list[World] = list(
            dict.fromkeys((run["environment"], run["size"], run["agents"]) for run in self.runs)
        )
        self.environments = list(dict.fromkeys(world[0] for world in self.worlds))
        self.sizes = sorted({world[1] for world in self.worlds})
        self.agents = sorted({world[2] for world in self.worlds})
        self.cells: dict[tuple[str, int, int, str], Document] = {
            (c["environment"], c["size"], c["agents"], c["method"]): c for c in analysis.get("cells") or []
        }
        self.of_cell: dict[tuple[str, int, int, str], list[Document]] = {}
        for run in self.runs:
            key = (run["environment"], run["size"], run["agents"], run["method"])
            self.of_cell.setdefault(key, []).append(run)

    def count(self, status: str) -> int:
        """How many runs are of that status."""
        return sum(run["status"] == status for run in self.runs)

    def finished(self, world: World, method: str) -> list[Document]:
        """A cell's finished runs."""
        return [run for run in self.of_cell.get((*world, method), []) if run["status"] == "finished"]

    def value(self, world: World, method: str, key: str) -> Any:
        """What the analysis says of a cell under `key`, None where it says nothing."""
        return self.cells.get((*world, method), {}).get(key)

    def learns(self, world: World, method: str) -> bool:
        """Whether a method has anything to train (unknown counts as yes)."""
        done = self.finished(world, method)
        return not done or any(run.get("learns", True) for run in done)

    def why(self, world: World, method: str) -> str:
        """Why a cell has fewer results than the study wants, or "" where it has them all."""
        runs = self.of_cell.get((*world, method), [])
        if not runs:
            return "not in this study"
        lost = [f"{n} {word}" for word in ("failed", "pending") if (n := sum(r["status"] == word for r in runs))]
        return ", ".join(lost)

    def label(self, world: World, *, whole: bool = False) -> str:
        """A world in words; what is the same in the whole study is left out unless `whole`."""
        environment, size, agents = world
        parts = [f"{environment} {size}×{size}" if whole or len(self.environments) > 1 else f"{size}×{size}"]
        if whole or len(self.agents) > 1:
            parts.append(counted(agents, "agent"))
        return ", ".join(parts)

    def rows(self) -> list[tuple[str, int, list[World]]]:
        """(environment, agents, its worlds by size): what shares a line over map sizes."""
        groups: dict[tuple[str, int], list[World]] = {}
        for world in self.worlds:
            groups.setdefault((world[0], world[2]), []).append(world)
        return [(e, a, sorted(worlds, key=lambda w: w[1])) for (e, a), worlds in groups.items()]

    def group_label(self, environment: str, agents: int) -> str:
        """What a line over map sizes has in common."""
        return f"{environment}, {counted(agents, 'agent')}"

    def legend(self, methods: Iterable[str]) -> tuple[tuple[str, Style], ...]:
        """These methods with their styles, in the study's order."""
        present = set(methods)
        return tuple((name, self.styles[name]) for name in self.methods if name in present)


# ---------------------------------------------------------------- words and numbers


def esc(value: object) -> str:
    """Text from anywhere as HTML."""
    return html.escape(clean(value))


def slug(text: str) -> str:
    """An id or a file's name of letters, digits, dots and dashes; different texts stay different."""
    return re.sub(r"[^A-Za-z0-9.-]", lambda match: f"_{ord(match.group()):x}_", text)


def run_anchor(run_id: str) -> str:
    """The anchor of a run's line in the table of runs."""
    return "run-" + slug(run_id)


def cell_anchor(world: World, method: str) -> str:
    """The anchor of a method's runs on a world in the table of runs."""
    return "cell-" + slug(f"{world[0]}-s{world[1]}-a{world[2]}-{method}")


def counted(count: int, what: str) -> str:
    """A number of things: 1 run, 2 runs (plain text)."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def listed(parts: Sequence[str]) -> str:
    """An enumeration: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def decimal(value: float, digits: int) -> str:
    """A number with that many digits, a true minus and never a negative zero (plain text)."""
    text = f"{value:,.{digits}f}"
    return "0" + text[2:] if text.startswith("-0") and not text.strip("-0.,") else text.replace("-", "−")


def with_interval(interval: Document, digits: int = 3, unit: Callable[[float], str] | None = None) -> str:
    """HTML of a value with its interval."""
    say = unit or (lambda x: decimal(x, digits))
    value, low, high = interval["value"], interval.get("low"), interval.get("high")
    if low is None or high is None:
        return f"<b>{esc(say(value))}</b>"
    return f'<b>{esc(say(value))}</b> <span class="ci">[{esc(say(low))}, {esc(say(high))}]</span>'


def p_text(p: float | None) -> str:
    """A p value (plain text)."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(value: float | None) -> str:
    """Seconds in a unit that fits (plain text)."""
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def step_count(value: float) -> str:
    """A number of environment steps, as 250k or 2M (plain text)."""
    return short(round(value))


def byte_count(count: int) -> str:
    """A size (plain text)."""
    return f"{max(1, round(count / 1000))} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def quiet(words: str) -> str:
    """Text in the tone of a remark."""
    return f'<span class="quiet">{esc(words)}</span>'


def data_table(head: Sequence[str], body: str, label: str, kind: str = "") -> str:
    """A table in its own box, which scrolls sideways where the screen is narrow. `head` is HTML."""
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(label)}"><table class="{kind}">'
        f"<thead><tr>{cells}</tr></thead>{body if '<tbody' in body else f'<tbody>{body}</tbody>'}</table></div>"
    )


def foldable(summary: str, body: str, *, open: bool = False) -> str:
    """`body` (HTML) behind a line that opens it; open in print."""
    return f"<details{' open' if open else ''}><summary>{esc(summary)}</summary>{body}</details>"


def method_label(study: Study, method: str) -> str:
    """A method's name with its line and marker."""
    return f'<span class="method">{swatch_svg(study.styles[method])}{esc(method)}</span>'


def linked(content: str, study: Study, world: World, method: str) -> str:
    """A number that leads to the runs it was made of."""
    runs = len(study.finished(world, method))
    title = f"{method} on {study.label(world, whole=True)}: {counted(runs, 'run')}"
    return f'<a class="num" href="#{cell_anchor(world, method)}" title="{esc(title)}">{content}</a>'


def single_note(study: Study, world: World, method: str) -> str:
    """A mark where a number rests on a single run."""
    if len(study.finished(world, method)) != 1:
        return ""
    return '<abbr title="a single run: the interval speaks of its episodes, not of other seeds">1 run</abbr>'


def run_links(study: Study, ids: Iterable[str]) -> str:
    """The runs behind a number: one line a cell, one link a seed."""
    cells: dict[tuple[World, str], list[Document]] = {}
    for run_id in ids:
        run = study.by_id.get(run_id)
        if run is not None:
            world = (run["environment"], run["size"], run["agents"])
            cells.setdefault((world, run["method"]), []).append(run)
    if not cells:
        return quiet("no runs")
    count = sum(map(len, cells.values()))
    items = "".join(
        f"<li>{esc(method)}, {esc(study.label(world))}: seed "
        + ", ".join(f'<a href="#{run_anchor(run["id"])}">{esc(run["seed"])}</a>' for run in runs)
        + "</li>"
        for (world, method), runs in cells.items()
    )
    return f'<details class="runs"><summary>{counted(count, "run")}</summary><ul>{items}</ul></details>'


@dataclass
class Section:
    """A section of the page: its anchor, its title and its HTML, and the figures it shows."""

    anchor: str
    title: str
    body: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def words(self, text: str) -> None:
        """A paragraph of HTML."""
        self.body.append(f"<p>{text}</p>")

    def figure(self, figure: Figure, caption: str, labels: Sequence[str] | None = None) -> None:
        """Show a figure and keep it for its files; one without anything to show is left out.

        Args:
            figure: what to show.
            caption: HTML below its title.
            labels: for each panel what it shows in words (default: from its data).
        """
        if not figure.panels:
            return
        self.figures.append(figure)
        legend = ""
        if figure.legend:
            items = "".join(f"<li>{swatch_svg(style)}{esc(name)}</li>" for name, style in figure.legend)
            legend = f'<ul class="legend" aria-label="Methods">{items}</ul>'
        labels = labels or [in_words(panel) for panel in figure.panels]
        panels = "".join(
            f'<div class="panel"><h4>{esc(panel.title)}</h4>{panel_svg(panel, label)}'
            + "".join(f'<p class="note">{esc(note)}</p>' for note in panel.notes)
            + "</div>"
            for panel, label in zip(figure.panels, labels, strict=True)
        )
        kind = {1: ' class="one"', 2: ' class="two"'}.get(len(figure.panels), "")
        self.body.append(
            f'<figure id="fig-{figure.name}"{kind}><figcaption><strong>{esc(figure.title)}.</strong> {caption} '
            f'<span class="file">figures/{figure.name}.svg, .pdf</span></figcaption>'
            f'{legend}<div class="panels">{panels}</div></figure>'
        )


def in_words(panel: Panel) -> str:
    """What a chart shows, for those who don't see it."""
    if isinstance(panel, Plot):
        said = "; ".join(f"{s.name} ends at {short(s.y[-1])}" for s in panel.series)
        return f"{panel.y.label} against {panel.x.label}, {panel.title}. {said}."
    if isinstance(panel, Forest):
        said = "; ".join(f"{r.label} {r.value:.2f}, from {r.low:.2f} to {r.high:.2f}" for r in panel.rows)
        return f"{panel.x.label}, {panel.title}. {said}."
    return f"Map of {panel.height} by {panel.width} cells with the ways of {counted(len(panel.paths), 'agent')}."
