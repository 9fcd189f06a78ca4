"""A study's results in the formats of other tools: CSV, LaTeX tables, and the JSON layout of marl-eval.

All functions take the contents of results.json and analysis.json (format 1) as they are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from echelon._files import atomic_write_text

__all__ = ["latex_escape", "latex_tables", "marl_eval", "write_csv", "write_latex"]

Json = dict[str, Any]
RUN_COLUMNS = ("id", "environment", "size", "agents", "method", "seed", "steps", "status", "reason")
CELL_INTERVALS = ("tsr", "tsr_pooled", "tsr_best", "steps_to_finish", "makespan", "collisions", "auc")
CELL_NUMBERS = ("training_seconds", "steps_per_second", "model_calls", "model_seconds", "planner_ms_per_episode")
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "×": r"$\times$",
    "—": "---",
    "²": r"$^2$",
}


# CSV -------------------------------------------------------------------------------------------------------------


def write_csv(results: Json, analysis: Json, folder: Path) -> list[Path]:
    """Write `runs.csv` (one line a run, also of failed and pending ones) and `cells.csv` (one line a cell).

    A cell is one method at one environment, size and number of agents. Empty fields are values that aren't there.
    Lines end in a line feed.

    Returns:
        The two paths.

    Raises:
        EchelonError: the folder can't be written.
    """
    runs, cells = folder / "runs.csv", folder / "cells.csv"
    atomic_write_text(runs, _csv([_run_row(run) for run in results["runs"]]))
    atomic_write_text(cells, _csv([_cell_row(cell) for cell in analysis["cells"]]))
    return [runs, cells]


def _csv(rows: Sequence[Json]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _run_row(run: Json) -> Json:
    row = {name: run.get(name) for name in RUN_COLUMNS}
    for which in ("last", "best"):
        final = run.get(which)
        row[f"{which}_step"] = final["step"] if final else None
        row[f"{which}_episodes"] = final["episodes"] if final else None
        row[f"{which}_tsr"] = final["tsr"] if final else None
        row[f"{which}_makespan"] = _mean(final["steps"]) if final else None
        row[f"{which}_collisions"] = _mean(final["collisions"]) if final else None
        row[f"{which}_task_return"] = _mean(final["task_return"]) if final else None
    for name in ("training_seconds", "steps_per_second", "evaluation_seconds", "training_model_calls"):
        row[name] = run.get(name)
    return row


def _cell_row(cell: Json) -> Json:
    row = {name: cell[name] for name in ("environment", "size", "agents", "method")} | {"runs": len(cell["runs"])}
    for name in CELL_INTERVALS:
        for part in ("value", "low", "high"):
            row[name if part == "value" else f"{name}_{part}"] = cell[name][part] if cell[name] else None
    convergence = cell["convergence"]
    for part in ("value", "low", "high"):
        steps = convergence["steps"]
        row["convergence_steps" if part == "value" else f"convergence_steps_{part}"] = steps[part] if steps else None
    return row | {"converged_runs": convergence["converged"]} | {name: cell[name] for name in CELL_NUMBERS}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# LaTeX -----------------------------------------------------------------------------------------------------------


def write_latex(analysis: Json, folder: Path) -> list[Path]:
    """Write each of `latex_tables` as `<name>.tex`.

    Returns:
        The paths.

    Raises:
        EchelonError: the folder can't be written.
    """
    paths = []
    for name, table in latex_tables(analysis).items():
        atomic_write_text(folder / f"{name}.tex", table)
        paths.append(folder / f"{name}.tex")
    return paths


def latex_tables(analysis: Json) -> dict[str, str]:
    """Tables for `\\input` into a paper that loads booktabs: "success", "aggregates", "pairs" and "claims"."""
    methods = list(dict.fromkeys(cell["method"] for cell in analysis["cells"]))
    places: dict[tuple[Any, ...], dict[str, Json]] = {}
    for cell in analysis["cells"]:
        places.setdefault((cell["environment"], cell["size"], cell["agents"]), {})[cell["method"]] = cell
    success = [
        [place[0], f"{place[1]}×{place[1]}", str(place[2]), *(_percent(cells[m]["tsr"]) for m in methods)]
        for place, cells in places.items()
    ]
    aggregates = [
        [a["environment"], a["method"], *(_percent(a[k]) for k in ("iqm", "mean", "median", "optimality_gap"))]
        for a in analysis["aggregates"]
    ]
    pairs = [
        [test["environment"], f"{test['size']}×{test['size']}", str(test["agents"]), pair["a"], pair["b"],
         _percent(pair["difference"]), _number(pair["p_holm"], "{:.3f}", least=0.001),
         _number(pair["hedges_g"], "{:.2f}")]
        for test in analysis["tests"]
        for pair in test["pairs"]
    ]  # fmt: skip
    claims = [[c["claim"], c["paper"], c["ours"], c["verdict"]] for c in analysis["claims"]]
    return {
        "success": _table(["Environment", "Size", "Agents", *methods], success, "llr" + "r" * len(methods)),
        "aggregates": _table(
            ["Environment", "Method", "IQM", "Mean", "Median", "Optimality gap"], aggregates, "llrrrr"
        ),
        "pairs": _table(
            ["Environment", "Size", "Agents", "a", "b", "Difference", "p (Holm)", "Hedges' g"], pairs, "llrllrrr"
        ),
        "claims": _table(["Claim", "Paper", "Ours", "Verdict"], claims, "p{50mm}lp{50mm}l"),
    }


def latex_escape(text: str) -> str:
    """Text with LaTeX's special characters made plain."""
    return "".join(_SPECIAL.get(c, c) for c in text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], columns: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(latex_escape, cells)) + r" \\"

    body = [line(row) for row in rows]
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(head), r"\midrule"]
    return "\n".join([*top, *body, r"\bottomrule", r"\end{tabular}", ""])


def _percent(interval: Json | None) -> str:
    if interval is None:
        return "—"
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _number(value: float | None, pattern: str, least: float | None = None) -> str:
    if value is None:
        return "—"
    return f"< {least}" if least is not None and value < least else pattern.format(value)


# marl-eval -------------------------------------------------------------------------------------------------------


def marl_eval(results: Json, *, balanced: bool = True) -> Json:
    """Results in the JSON layout that marl-eval reads (Gorsane et al. 2022).

    environment -> task -> algorithm -> "seed_N" -> "step_i" {"step_count", metric: [mean]}, and at last
    "absolute_metrics" {metric: [mean]}, which is of the best policy met in training, as that protocol has it.
    Metrics: `win_rate` (the task success rate), `return` and `collisions`, each a mean over an evaluation's episodes.
    A task is a map size and number of agents ("s20-a4"). Methods that learn nothing are the same at every step, so
    that their one evaluation stands at all of them.

    Args:
        results: content of results.json.
        balanced: that tool needs the same algorithms, seeds and steps everywhere. True: in each environment, keep
            methods with a finished run of every task, of them the seeds that all have finished, and evaluations that
            all had. Those come after whole rollouts, a little later than asked for and not equally late for all
            methods; here they stand at the steps that were asked for. False: every finished run as it is.
    """
    every = results["study"]["protocol"]["every"]
    document: Json = {}
    for environment in dict.fromkeys(run["environment"] for run in results["runs"]):
        runs = [r for r in results["runs"] if r["environment"] == environment and r["status"] == "finished"]
        runs = _balance(runs) if balanced else runs
        if balanced:
            runs = [r | {"evaluations": [_as_asked(e, r["steps"], every) for e in r["evaluations"]]} for r in runs]
        learnt = [{e["step"] for e in r["evaluations"]} for r in runs if r["learns"]]
        steps = sorted(set.intersection(*learnt)) if learnt else []
        for run in runs:
            task = document.setdefault(environment, {}).setdefault(_task(run), {})
            task.setdefault(run["method"], {})[f"seed_{run['seed']}"] = _marl_eval_run(run, steps if balanced else None)
    return document


def _as_asked(evaluation: Json, steps: int, every: int) -> Json:
    """An evaluation at the step that it was due at."""
    return evaluation | {"step": steps if evaluation["step"] >= steps else evaluation["step"] // every * every}


def _task(run: Json) -> str:
    return f"s{run['size']}-a{run['agents']}"


def _balance(runs: list[Json]) -> list[Json]:
    tasks = {_task(r) for r in runs}
    done = {(_task(r), r["method"], r["seed"]) for r in runs}
    methods = {r["method"] for r in runs}
    methods = {m for m in methods if all(any(d[:2] == (task, m) for d in done) for task in tasks)}
    seeds = {r["seed"] for r in runs}
    seeds = {s for s in seeds if all((task, m, s) in done for task in tasks for m in methods)}
    return [r for r in runs if r["method"] in methods and r["seed"] in seeds]


def _marl_eval_run(run: Json, steps: list[int] | None) -> Json:
    by_step = {e["step"]: e for e in run["evaluations"]}
    if steps and not run["learns"]:
        by_step = dict.fromkeys(steps, run["evaluations"][0])
    written: Json = {
        f"step_{i}": {
            "step_count": step,
            "win_rate": [by_step[step]["tsr"]],
            "return": [by_step[step]["task_return"]],
            "collisions": [by_step[step]["collisions"]],
        }
        for i, step in enumerate(steps or sorted(by_step))
    }
    best = run["best"]
    written["absolute_metrics"] = {
        "win_rate": [best["tsr"]],
        "return": [_mean(best["task_return"])],
        "collisions": [_mean(best["collisions"])],
    }
    return written
