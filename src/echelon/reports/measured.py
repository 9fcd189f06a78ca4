"""The sections of a study's report on what was measured: success rates, learning, speed and cost, collisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from echelon.evaluation.convergence import kaplan_meier
from echelon.reports.charts import TSR_AXIS, Axis, Figure, Panel, Plot, Series, Style, exact_axis, positive_axis
from echelon.reports.parts import (
    Document,
    Section,
    Study,
    World,
    data_table,
    decimal,
    duration,
    esc,
    foldable,
    linked,
    method_label,
    p_text,
    quiet,
    single_note,
    step_count,
    with_interval,
)
from echelon.studies.analysis import model_part, planner_ms

__all__ = ["collisions", "learning", "speed_and_cost", "success_rates"]


# ---------------------------------------------------------------- success rates


def success_rates(study: Study) -> Section:
    section = Section("tsr", "Task success rate")
    final = (study.about.get("protocol") or {}).get("final_episodes", "?")
    section.words(
        f"The share of episodes in which all tasks were finished, over {esc(final)} episodes a run. The large number "
        "is the policy at the end of training, the small one below it the best policy that training met "
        "(chosen by its evaluations, judged on other worlds). The bar shows the value and its interval from 0 to 1."
    )
    for environment, agents, worlds in study.rows():
        title = study.group_label(environment, agents)
        rows = []
        for method in study.methods:
            cells = "".join(_tsr_cell(study, world, method) for world in worlds)
            rows.append(f'<tr><th scope="row">{method_label(study, method)}</th>{cells}</tr>')
        head = ["Method", *(f"{world[1]}×{world[1]}" for world in worlds)]
        section.body.append(f"<h3>{esc(title)}</h3>")
        section.body.append(data_table(head, "".join(rows), f"Task success rate, {title}", "tsr"))
    panels, present = [], set()
    for environment, agents, worlds in study.rows():
        plot = _by_size(study, worlds, "tsr", study.group_label(environment, agents), lambda _: TSR_AXIS)
        if plot:
            panels.append(plot)
            present |= {s.name for s in plot.series}
    section.figure(
        Figure("tsr-by-size", "Task success rate against map size", tuple(panels), study.legend(present)),
        "The last policy, mean over runs with 95% intervals; points are moved a little sideways so that they don't "
        f"hide each other.{_hollow(panels)}",
    )
    section.body.append(_measures(study))
    return section


def _hollow(panels: Iterable[Panel]) -> str:
    single = any(any(s.single) for panel in panels if isinstance(panel, Plot) for s in panel.series)
    return " A hollow marker is a single run." if single else ""


def _tsr_cell(study: Study, world: World, method: str) -> str:
    tsr = study.value(world, method, "tsr")
    why = study.why(world, method)
    if not tsr:
        return f'<td class="missing">{esc(why or "no value")}</td>'
    best = study.value(world, method, "tsr_best")
    lines = [linked(with_interval(tsr), study, world, method), _bar(tsr, study.styles[method])]
    if best:
        lines.append(f'<span class="best">best {with_interval(best)}</span>')
    notes = " ".join(part for part in (single_note(study, world, method), esc(why)) if part)
    if notes:
        lines.append(f'<span class="quiet">{notes}</span>')
    return f"<td>{''.join(lines)}</td>"


def _bar(interval: Document, style: Style) -> str:
    """A value between 0 and 1 with its interval, as a small picture."""
    low, value, high = (
        100 * min(1.0, max(0.0, interval[key] if interval.get(key) is not None else interval["value"]))
        for key in ("low", "value", "high")
    )
    return (
        '<svg class="bar" viewBox="-4 0 158 12" width="158" height="12" aria-hidden="true">'
        '<path class="grid" d="M0 6H150M0 3V9M75 4V8M150 3V9"/>'
        f'<path class="range c{style.colour}" d="M{1.5 * low:.1f} 3H{1.5 * high:.1f}V9H{1.5 * low:.1f}z"/>'
        f'<circle class="mark c{style.colour}" cx="{1.5 * value:.1f}" cy="6" r="3.4"/></svg>'
    )


def _by_size(
    study: Study,
    worlds: Sequence[World],
    key: str,
    title: str,
    axis: Callable[[list[float]], Axis],
    of: Callable[[World, str], Document | None] | None = None,
) -> Plot | None:
    """One measure of every method against the map's size; None where no method has it."""

    def default(world: World, method: str) -> Document | None:
        value: Document | None = study.value(world, method, key)
        return value

    of = of or default
    series, notes = [], []
    for method in study.methods:
        measured = [(world, of(world, method)) for world in worlds]
        found = [(world, interval) for world, interval in measured if interval]
        # A method that was run but never has this measure (model calls, say) is not missing from the chart.
        if found or not any(study.finished(world, method) for world in worlds):
            notes += [
                f"{method} at {world[1]}×{world[1]}: {study.why(world, method)}"
                for world, interval in measured
                if not interval and not study.finished(world, method)
            ]
        if found:
            # A line must not lead over a size that was not measured.
            order = [k for k, (_, interval) in enumerate(measured) if interval]
            breaks = tuple(n for n in range(1, len(order)) if order[n] - order[n - 1] > 1)
            series.append(
                Series(
                    method,
                    study.styles[method],
                    tuple(float(world[1]) for world, _ in found),
                    tuple(i["value"] for _, i in found),
                    tuple(i["value"] if i.get("low") is None else i["low"] for _, i in found),
                    tuple(i["value"] if i.get("high") is None else i["high"] for _, i in found),
                    tuple(len(study.finished(world, method)) == 1 for world, _ in found),
                    breaks,
                )
            )
    if not series:
        return None
    sizes = [world[1] for world in worlds]
    low, high = (min(sizes), max(sizes)) if len(set(sizes)) > 1 else (sizes[0] - 1, sizes[0] + 1)
    x = Axis("map size", float(low), float(high), tuple((float(s), f"{s}×{s}") for s in sorted(set(sizes))))
    values = [v for s in series for v in (*s.y, *s.high)]
    return Plot(title, x, axis(values), tuple(series), bars=True, notes=("; ".join(notes),) if notes else ())


def _measures(study: Study) -> str:
    """Everything measured in the last evaluation, one line a method and world."""
    head = [
        "Method", "Runs", "TSR, all episodes pooled", "Steps to finish", "Makespan", "Collisions an episode",
    ]  # fmt: skip
    groups = []
    for world in study.worlds:
        rows = []
        for method in study.methods:
            cell, why = study.cells.get((*world, method)), study.why(world, method)
            if not cell or not cell.get("tsr"):
                rows.append(
                    f'<tr><th scope="row">{method_label(study, method)}</th>'
                    f'<td colspan="5" class="missing">{esc(why or "no value")}</td></tr>'
                )
                continue
            numbers = "".join(
                "<td>"
                + (
                    linked(with_interval(cell[key], digits), study, world, method)
                    if cell.get(key)
                    else quiet("never finished" if key == "steps_to_finish" else "–")
                )
                + "</td>"
                for key, digits in (("tsr_pooled", 3), ("steps_to_finish", 1), ("makespan", 1), ("collisions", 2))
            )
            runs = f"{len(study.finished(world, method))}" + (f" ({esc(why)})" if why else "")
            rows.append(f'<tr><th scope="row">{method_label(study, method)}</th><td>{runs}</td>{numbers}</tr>')
        title = f'<tr class="group"><th colspan="6" scope="rowgroup">{esc(study.label(world, whole=True))}</th></tr>'
        groups.append(f"<tbody>{title}{''.join(rows)}</tbody>")
    return foldable(
        "All measures: pooled success rate, steps to finish, makespan, collisions",
        "<p>Steps to finish are of the episodes that succeeded; the makespan counts a failed episode as the time "
        "limit. Last policy, mean over runs with 95% intervals.</p>"
        + data_table(head, "".join(groups), "All measures"),
        open=len(study.worlds) <= 4,
    )


# ---------------------------------------------------------------- learning


def learning(study: Study) -> Section:
    section = Section("learning", "Learning and convergence")
    panels, present = [], set()
    for world in study.worlds:
        plot = _curves(study, world)
        if plot:
            panels.append(plot)
            present |= {s.name for s in plot.series}
    section.figure(
        Figure("learning-curves", "Success rate over training", tuple(panels), study.legend(present)),
        "Mean over runs; the band is the 95% interval over runs (none where there is a single run). A method that "
        "learns nothing is a level line at its final success rate.",
    )
    _convergence(study, section)
    _efficiency(study, section)
    if not section.body:
        section.words("No finished run yet, so there is nothing to show.")
    return section


def _curves(study: Study, world: World) -> Plot | None:
    horizon = float(max((run.get("steps") or 0 for run in study.runs), default=0)) or 1.0
    # Whole rollouts: runs go on a little further than they were asked to, very short ones much further.
    reached = float(max((e["step"] for run in study.runs for e in run.get("evaluations") or ()), default=0))
    horizon = reached if reached > 1.05 * horizon else horizon
    series, notes = [], []
    for method in study.methods:
        curve, tsr = study.value(world, method, "curve"), study.value(world, method, "tsr")
        single = (len(study.finished(world, method)) == 1,)
        style, why = study.styles[method], study.why(world, method)
        if curve and len(curve["steps"]) > 1:
            points = [k for k, value in enumerate(curve["value"]) if value is not None]
            low, high = curve.get("low") or [], curve.get("high") or []
            banded = bool(low) and all(low[k] is not None and high[k] is not None for k in points) and not single[0]
            series.append(
                Series(
                    method,
                    style,
                    tuple(float(curve["steps"][k]) for k in points),
                    tuple(curve["value"][k] for k in points),
                    tuple(low[k] for k in points) if banded else (),
                    tuple(high[k] for k in points) if banded else (),
                    single * len(points),
                )
            )
        elif tsr:
            level, x = (tsr["value"],) * 2, (0.0, horizon)
            low, high = ((), ()) if tsr.get("low") is None else ((tsr["low"],) * 2, (tsr["high"],) * 2)
            series.append(Series(method, style, x, level, low, high, single * 2, flat=True))
        if why:
            notes.append(f"{method}: {why}")
    if not series:
        return None
    note = ("; ".join(notes),) if notes else ()
    return Plot(study.label(world), exact_axis("environment steps", horizon), TSR_AXIS, tuple(series), notes=note)


def _convergence(study: Study, section: Section) -> None:
    survival = {(s["environment"], s["size"], s["agents"]): s for s in study.analysis.get("survival") or []}
    survival = {world: s for world, s in survival.items() if s.get("methods")}
    if not survival:
        return
    section.body.append("<h3>Convergence</h3>")
    section.words(
        "A run has converged at the first step after which its smoothed success rate stays close to its final level, "
        "if that level is above a floor. A run that never does counts with the whole of its training "
        "(it is censored there, never dropped), so a mean with such runs in it is a lower bound."
        + (
            f" Evaluations lie up to {step_count(grid)} steps apart, so a time is known no better than that; it is "
            "counted in the middle between two of them, and no interval is narrower."
            if (grid := max(s.get("grid") or 0 for s in survival.values()))
            else ""
        )
    )
    panels, present = [], set()
    for world in study.worlds:
        found = survival.get(world)
        if not found:
            continue
        horizon = float(found.get("horizon") or 1)
        series = []
        for entry in found["methods"]:
            if entry.get("times") and entry["method"] in study.styles:
                times, share = kaplan_meier(entry["times"], entry["converged"])
                x, y = (0.0, *map(float, times), horizon), (1.0, *map(float, share), float(share[-1]))
                series.append(Series(entry["method"], study.styles[entry["method"]], x, y))
        if series:
            axis = Axis("still learning", 0.0, 1.0, TSR_AXIS.ticks)
            x_axis = exact_axis("environment steps", horizon)
            panels.append(Plot(study.label(world), x_axis, axis, tuple(series), stairs=True))
            present |= {s.name for s in series}
    section.figure(
        Figure("survival", "Share of runs that have not converged yet", tuple(panels), study.legend(present)),
        "Kaplan and Meier's estimate; a line that falls early learns fast, a line that stays up never converged.",
    )
    rows = []
    for world, found in survival.items():
        for k, entry in enumerate(found["methods"]):
            method, mean = entry["method"], entry.get("restricted_mean")
            count = len(entry.get("converged") or [])
            place = (
                f'<th scope="rowgroup" rowspan="{len(found["methods"])}">{esc(study.label(world))}</th>'
                if k == 0
                else ""
            )
            value = linked(with_interval(mean, unit=step_count), study, world, method) if mean else quiet("no value")
            named = method_label(study, method) if method in study.styles else esc(method)
            rows.append(
                f'<tr>{place}<th scope="row">{named}</th><td>{value}</td>'
                f"<td>{sum(map(bool, entry.get('converged') or []))} of {count}</td></tr>"
            )
    head = ["World", "Method", "Mean convergence time (steps)", "Converged runs"]
    table = data_table(head, "".join(rows), "Convergence times", "grouped")
    section.body.append(foldable("Mean convergence times", table, open=len(survival) <= 4))
    logrank = "".join(
        f"<tr><td>{esc(study.label(world))}</td><td>{esc(t['a'])} and {esc(t['b'])}</td>"
        f"<td>{decimal(t['statistic'], 2) if t.get('statistic') is not None else '–'}</td>"
        f"<td>{p_text(t.get('p'))}</td><td>{p_text(t.get('p_holm'))}</td></tr>"
        for world, found in survival.items()
        for t in found.get("logrank") or []
    )
    if logrank:
        head = ["World", "Methods", "z", "p", "p (Holm)"]
        table = data_table(head, logrank, "Log-rank tests")
        section.body.append(foldable("Log-rank tests: do two methods converge at different times?", table))


def _efficiency(study: Study, section: Section) -> None:
    panels, present = [], set()
    for environment, agents, worlds in study.rows():

        def auc(world: World, method: str) -> Document | None:
            # A method that learns nothing has no learning curve to take an area of.
            value: Document | None = study.value(world, method, "auc")
            return value if study.learns(world, method) else None

        plot = _by_size(
            study, worlds, "auc", study.group_label(environment, agents),
            lambda _: Axis("area under the curve", 0.0, 1.0, TSR_AXIS.ticks), auc,
        )  # fmt: skip
        if plot:
            panels.append(plot)
            present |= {s.name for s in plot.series}
    section.figure(
        Figure("sample-efficiency", "Sample efficiency", tuple(panels), study.legend(present)),
        "The area under the learning curve, from 0 (never succeeded) to 1 (always, from the first step): one number "
        f"for how good a method is and how soon. 95% intervals over runs.{_hollow(panels)}",
    )


# ---------------------------------------------------------------- speed and cost


def speed_and_cost(study: Study) -> Section:
    section = Section("scaling", "Speed and cost")

    def mean_and_ends(of: Callable[[Document], float | None]) -> Callable[[World, str], Document | None]:
        def found(world: World, method: str) -> Document | None:
            values = [value for run in study.finished(world, method) if (value := of(run))]
            if not values:
                return None
            return {"value": math.fsum(values) / len(values), "low": min(values), "high": max(values)}

        return found

    charts: list[tuple[str, str, str, Callable[[World, str], Document | None], str]] = [
        (
            "speed",
            "Training speed",
            "environment steps a second",
            mean_and_ends(lambda run: run.get("steps_per_second") if run.get("learns", True) else None),
            "Environment steps a second while training, the model's part included; bars go from the slowest to the "
            "fastest run. Methods that learn nothing have none.",
        ),
        (
            "model-calls",
            "Model calls of a run",
            "model calls",
            mean_and_ends(model_part),
            "How often a run asks the language model, in training and in its last evaluation; bars go from the "
            "smallest to the largest run. Methods that ask none are left out.",
        ),
        (
            "planner-cost",
            "Planner time of an episode",
            "ms an episode",
            mean_and_ends(planner_ms),
            "Time that planning takes in an episode of the last evaluation; bars go from the fastest to the slowest "
            "run.",
        ),
    ]
    start = len(section.body)
    for name, title, axis_label, of, caption in charts:
        panels, present = [], set()
        for environment, agents, worlds in study.rows():
            label = study.group_label(environment, agents)
            plot = _by_size(study, worlds, name, label, lambda values, a=axis_label: positive_axis(a, values), of)  # type: ignore[misc]
            if plot:
                panels.append(plot)
                present |= {s.name for s in plot.series}
        section.figure(Figure(name, title, tuple(panels), study.legend(present)), caption + _hollow(panels))
    if study.count("finished") and not any(figure.name == "model-calls" for figure in section.figures):
        section.words("No method of this study asked a language model.")
    elif all(len(figure.panels) == 1 for figure in section.figures):
        section.body[start:] = [f'<div class="side">{"".join(section.body[start:])}</div>']
    head = ["Method", "Steps a second", "Training time", "Model calls", "Model time", "Planner ms an episode"]
    groups = []
    for world in study.worlds:
        rows = []
        for method in study.methods:
            cell = study.cells.get((*world, method))
            if not cell or not study.finished(world, method):
                continue
            trained = study.learns(world, method)
            values = (
                decimal(cell["steps_per_second"], 0) if trained and cell.get("steps_per_second") else "learns nothing",
                duration(cell.get("training_seconds")) if trained else "–",
                decimal(cell.get("model_calls") or 0, 0),
                duration(cell.get("model_seconds") or 0),
                "–" if cell.get("planner_ms_per_episode") is None else decimal(cell["planner_ms_per_episode"], 2),
            )
            numbers = "".join(f"<td>{linked(esc(v), study, world, method)}</td>" for v in values)
            rows.append(f'<tr><th scope="row">{method_label(study, method)}</th>{numbers}</tr>')
        if rows:
            title_row = (
                f'<tr class="group"><th colspan="6" scope="rowgroup">{esc(study.label(world, whole=True))}</th></tr>'
            )
            groups.append(f"<tbody>{title_row}{''.join(rows)}</tbody>")
    if groups:
        table = data_table(head, "".join(groups), "Speed and planner cost")
        section.body.append(foldable("All numbers of speed and cost (means over runs)", table))
    if not section.body:
        section.words("No finished run yet, so there is nothing to show.")
    return section


# ---------------------------------------------------------------- collisions


def collisions(study: Study) -> Section:
    section = Section("collisions", "Collisions")
    panels, present = [], set()
    for environment, agents, worlds in study.rows():
        plot = _by_size(
            study, worlds, "collisions", study.group_label(environment, agents),
            lambda values: positive_axis("collisions an episode", values),
        )  # fmt: skip
        if plot:
            panels.append(plot)
            present |= {s.name for s in plot.series}
    if not panels:
        section.words("No finished run yet, so there is nothing to show.")
    section.figure(
        Figure("collisions", "Collisions against map size", tuple(panels), study.legend(present)),
        "Moves an episode that were blocked because two agents wanted one cell or each other's; mean over runs with "
        f"95% intervals (numbers: “All measures” above). Fewer is better, but a team that stands still never "
        f"collides: read it beside the success rate.{_hollow(panels)}",
    )
    return section
