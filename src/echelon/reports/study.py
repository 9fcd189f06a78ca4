"""The report of a study: one HTML file that needs nothing else, and its figures as SVG and PDF.

`write_report` takes a study's collected results and their analysis (docs: files) and says them in the order in
which a reader asks: what was run, do the paper's claims hold, how good is each method, how fast does it learn,
what does it cost, what does it look like, how sure is all that, what went wrong, how to do it again. Every number
leads to the runs it comes from.

Text from data (names, reasons, recordings) is never trusted: it is escaped wherever it stands, and the page's
content security policy lets no script run but its own and the replay page's, each named by its hash. The same
input gives the same bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

from echelon._files import atomic_write_bytes, atomic_write_text
from echelon.errors import EchelonError
from echelon.methods import method as method_called
from echelon.methods import methods as known_methods
from echelon.reports.charts import Figure
from echelon.reports.figures import figure_pdf, figure_svg
from echelon.reports.measured import collisions, learning, speed_and_cost, success_rates
from echelon.reports.parts import (
    Document,
    Section,
    Study,
    World,
    cell_anchor,
    counted,
    data_table,
    decimal,
    duration,
    esc,
    foldable,
    linked,
    listed,
    method_label,
    run_anchor,
    run_links,
    slug,
    step_count,
)
from echelon.reports.paths import Team, packed, paths, recordings
from echelon.reports.replay import replay_shell
from echelon.reports.significance import significance
from echelon.studies.analysis import model_part
from echelon.studies.presets import presets

__all__ = ["render_report", "write_report"]


TUNING = (
    "QMIX with VDN, and MAPPO, whose settings the hierarchical methods share, had 16 training runs each to choose "
    "their settings by, all with a flat team in the warehouse of 20×20 with 4 agents; IPPO takes MAPPO's. Every trial "
    "is in docs/results/tuning.md of Echelon's repository."
)
_FEW = 5  # runs; fewer make wide intervals

VERDICTS = {
    "reproduced": ("good", '<path d="M4.5 8.5l2.5 2.5 4.5-5.5"/>'),
    "not reproduced": ("bad", '<path d="M5 5l6 6M11 5l-6 6"/>'),
    "inconclusive": ("open", '<path d="M4 9q2-3 4-1t4-1"/>'),
}


def write_report(
    folder: Path,
    results: Document,
    analysis: Document,
    *,
    replays: Mapping[str, Path] | None = None,
    accounts: Mapping[str, str] | None = None,
    tuning: str = TUNING,
) -> Path:
    """Write `folder/report.html`, and its figures as `folder/figures/<name>.svg` and `.pdf`.

    Everything is made before the first file is written, and each file appears whole or not at all.

    Args:
        folder: the study's folder.
        results: a study's results (format 1), finished or not.
        analysis: what `studies.analysis.analyse` made of them.
        replays: recorded episodes by run id (`echelon-replay` documents). One that can't be read is named on
            the page with the reason.
        accounts: pages of what was diagnosed, tried and promoted in a run, by its id: addresses as seen from `folder`.
        tuning: how the baselines were tuned, a paragraph of plain text.

    Returns:
        The path of the page.

    Raises:
        EchelonError: another format, a replay of an unknown run, or the files can't be written.
    """
    page, figures = _make(results, analysis, replays or {}, accounts or {}, tuning)
    drawings: dict[str, bytes] = {}
    for figure in figures:
        drawings[f"{figure.name}.svg"] = figure_svg(figure)
        drawings[f"{figure.name}.pdf"] = figure_pdf(figure)
    for name, drawing in drawings.items():
        atomic_write_bytes(folder / "figures" / name, drawing)
    path = folder / "report.html"
    atomic_write_text(path, page)
    return path


def render_report(
    results: Document, analysis: Document, *, replays: Mapping[str, Path] | None = None, tuning: str = TUNING
) -> str:
    """The page of `write_report` as text, without its figures as files.

    Raises:
        EchelonError: another format, or a replay of an unknown run.
    """
    return _make(results, analysis, replays or {}, {}, tuning)[0]


def _make(
    results: Document, analysis: Document, replays: Mapping[str, Path], accounts: Mapping[str, str], tuning: str
) -> tuple[str, list[Figure]]:
    for what, document in (("results", results), ("analysis", analysis)):
        if document.get("format") != 1:
            raise EchelonError(f"the study's {what} are of format {document.get('format')!r}; this Echelon reads 1")
    study = Study(results, analysis)
    unknown = sorted(set(replays) - set(study.by_id))
    if unknown:
        raise EchelonError(f"a replay is of the run {unknown[0]!r}, which this study doesn't have")
    teams = recordings(study, replays)
    sections = [
        _overview(study),
        _claims(study),
        success_rates(study),
        learning(study),
        speed_and_cost(study),
        paths(study, teams),
        collisions(study),
        significance(study),
        _runs(study, accounts),
        _reproduce(study, tuning),
    ]
    return _page(study, sections, teams), [figure for section in sections for figure in section.figures]


# ---------------------------------------------------------------- what was run


def _overview(study: Study) -> Section:
    about, section = study.about, Section("study", "What was run")
    protocol = about.get("protocol") or {}
    seeds = list(about.get("seeds") or sorted({run["seed"] for run in study.runs}))
    done, failed, pending = (study.count(word) for word in ("finished", "failed", "pending"))
    every = f"every {step_count(protocol.get('every') or 0)} steps over {esc(protocol.get('episodes', '?'))} episodes"
    final = f"at the end over {esc(protocol.get('final_episodes', '?'))}"
    facts = [
        ("Methods", listed([esc(m) for m in study.methods])),
        ("Environments", listed([esc(e) for e in study.environments])),
        ("Map sizes", listed([f"{esc(s)}×{esc(s)}" for s in study.sizes])),
        ("Agents", listed([esc(a) for a in study.agents])),
        ("Seeds", f"{len(seeds)} ({esc(', '.join(map(str, seeds)))})"),
        ("Training", f"{esc(step_count(about.get('steps') or 0))} environment steps a run"),
        ("Evaluation", f"{every}, {final}, in worlds that training never sees"),
    ]
    machine = study.machine
    if machine:
        versions = ", ".join(f"{name} {version}" for name, version in sorted((machine.get("versions") or {}).items()))
        cores = machine.get("cores")
        parts = [machine.get("processor"), f"{cores} cores" if cores else None, machine.get("system")]
        facts.append(("Machine", esc(", ".join(str(part) for part in parts if part))))
        facts.append(("Versions", esc(versions)))
    counts = "".join(
        f'<li class="{kind}"><b>{number}</b> {word}</li>'
        for number, word, kind in (
            (done, "finished", "good"), (failed, "failed", "bad" if failed else ""), (pending, "pending", ""),
        )
    )  # fmt: skip
    section.body.append(f'<ul class="counts" aria-label="Runs">{counts}</ul>')
    section.body.append(_in_short(study))
    items = "".join(f"<div><dt>{term}</dt><dd>{words}</dd></div>" for term, words in facts if words)
    section.body.append(f'<dl class="facts">{items}</dl>')
    section.body += [*_settings(study), *_differing(study)]
    if not done:
        section.words("<strong>No run is finished yet.</strong> The tables below say what is waited for.")
    section.body.append(
        '<aside class="box"><h3>How to read this page</h3><p><strong>TSR</strong> (task success rate) is the share '
        "of episodes in which the team finished <em>all</em> its tasks before the time limit: 0 is never, 1 is "
        "always. A number such as <b>0.93</b> <span class='ci'>[0.90, 0.95]</span> is what was measured, and "
        "behind it the 95% interval: values that the measurement is compatible with. Where two intervals overlap "
        "widely, the difference may be chance. Every number leads to the runs it was made of.</p></aside>"
    )
    return section


def _settings(study: Study) -> list[str]:
    """What the study sets otherwise than Echelon does, as a table."""
    whose = [("every run", _table(study, "run"))]
    whose += [(f"runs in {name}", table) for name, table in _table(study, "env").items()]
    whose += [(f"runs of {name}", table) for name, table in _table(study, "method").items()]
    rows = "".join(
        f'<tr><th scope="row">{esc(who)}</th><td><code>{esc(key)}</code></td><td>{esc(value)}</td></tr>'
        for who, table in whose
        for key, value in _leaves(table)
    )
    if not rows:
        return ["<p>All settings are Echelon's own.</p>"] if "settings" in study.about else []
    table = data_table(["Whose", "Setting", "Value"], rows, "Settings of this study")
    return ["<h3>What this study sets otherwise than Echelon does</h3>" + table]


def _leaves(table: object, name: str = "") -> list[tuple[str, str]]:
    """A table's values by their dotted names."""
    if isinstance(table, Mapping):
        return [leaf for key, value in table.items() for leaf in _leaves(value, f"{name}.{key}" if name else str(key))]
    return [(name, json.dumps(table, ensure_ascii=False))]


def _differing(study: Study) -> list[str]:
    """On which processors and with which versions runs were made, where that is not the same for all."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in study.runs:
        told = {**(run.get("versions") or {}), "processor": run.get("processor"), "precision": run.get("precision")}
        for what, value in told.items():
            if value is not None:
                found.setdefault(what, {}).setdefault(str(value), []).append(run["id"])
    items = "".join(
        f"<li>{esc(what)} {esc(value)}: {run_links(study, runs)}</li>"
        for what, values in sorted(found.items())
        if len(values) > 1
        for value, runs in values.items()
    )
    if not items:
        return []
    return [
        "<h3>Not all runs were made alike</h3><p>They differ in what follows; numbers may differ by it, above all "
        f"times.</p><ul class='plain'>{items}</ul>"
    ]


def _in_short(study: Study) -> str:
    """The result on the largest map of each environment, in a sentence."""
    sentences = []
    for environment in study.environments:
        measured = [
            (world, [(t["value"], m) for m in study.methods if (t := study.value(world, m, "tsr"))])
            for world in study.worlds
            if world[0] == environment
        ]
        found = [(world, rates) for world, rates in measured if rates]
        if not found:
            continue
        world, rates = max(found, key=lambda f: f[0][1:])
        ranked = sorted(rates, key=lambda rate: -rate[0])
        said = listed(
            [
                f"{linked(f'<b>{_whole(value)}%</b>', study, world, method)} of episodes with {esc(method)}"
                if k == 0
                else f"{linked(f'<b>{_whole(value)}%</b>', study, world, method)} with {esc(method)}"
                for k, (value, method) in enumerate(ranked)
            ]
        )
        where = esc(study.label(world, whole=True))
        sentences.append(f"On the largest map measured ({where}) the team finishes all its tasks in {said}.")
    return f'<p class="lead">{" ".join(sentences)}</p>' if sentences else ""


def _whole(share: float) -> str:
    """A share in percent; what is nearly none or all isn't rounded to that."""
    percent = f"{100 * share:.0f}"
    return f"{100 * share:.1f}" if percent in ("0", "100") and 0 < share < 1 else percent


# ---------------------------------------------------------------- claims


def _claims(study: Study) -> Section:
    section = Section("claims", "Does the paper hold?")
    # A claim without runs is of methods or sizes that this study doesn't have, or hasn't finished.
    claims = [claim for claim in study.analysis.get("claims") or [] if claim.get("runs")]
    if not claims:
        section.words(
            "No run that the paper's claims speak of is finished yet."
            if study.count("pending")
            else "This study was not asked about the paper's claims."
        )
        return section
    tally = [f"{n} {word}" for word in VERDICTS if (n := sum(c.get("verdict") == word for c in claims))]
    fewest = min((n for world, method in _cells(study) if (n := len(study.finished(world, method)))), default=0)
    section.words(
        f"{counted(len(claims), 'claim').capitalize()}: {esc(listed(tally))}. A claim is reproduced if our whole 95% "
        "interval satisfies it, not reproduced if the whole interval contradicts it, and else inconclusive. Intervals "
        "here are Student's or Welch's over runs, wider than those of the tables below, and keep to their 95% also "
        "with few runs."
        + (
            f" With as few as {fewest} runs of a method in one place much stays open, and a failure that none of them "
            "had is in no interval."
            if 1 < fewest <= _FEW
            else ""
        )
    )
    shares = _model_shares(study)
    if shares:
        section.words(
            "Whose planner is it? " + " ".join(f"{esc(f'{m}: {words}.')}" for m, words in shares.items())
            + " The model that is asked unless a study names another, SmolLM2, mostly picks what is nearest by a habit "
            "and not by judgement (measured, with controls, in docs/planners.md of Echelon's repository). What such a "
            "method gains over flat teams is then the gain of subgoals, not of a language model's thought."
        )  # fmt: skip
    rows = "".join(map(partial(_claim_row, study), claims))
    head = "".join(
        f'<th role="columnheader" scope="col">{word}</th>' for word in ("Claim", "Paper", "Here", "Verdict", "Why")
    )
    section.body.append(
        f'<table class="claims" role="table" aria-label="Claims"><thead role="rowgroup"><tr role="row">{head}</tr>'
        f'</thead><tbody role="rowgroup">{rows}</tbody></table>'
    )
    return section


def _cells(study: Study) -> list[tuple[World, str]]:
    return [(world, method) for world in study.worlds for method in study.methods]


def _model_shares(study: Study) -> dict[str, str]:
    """By method what part of the training worlds its language model planned, in words, where the study says it."""
    every, said = _table(study, "run"), {}
    for name, own in _table(study, "method").items():
        table = {**every, **own} if isinstance(own, Mapping) else every
        share = table.get("llm_share")
        if isinstance(share, int | float) and name in study.methods:
            known = method_called(name).cheap_planner if name in known_methods() else ""
            others = table.get("cheap_planner") or known
            said[name] = f"its language model planned {100 * share:.3g}% of the training worlds" + (
                f", “{others}” the others" if share < 1 and others else ""
            )
    return said


def _table(study: Study, name: str) -> Document:
    """One of the tables of settings in a study's file; empty where results don't keep them."""
    table = (study.about.get("settings") or {}).get(name)
    return table if isinstance(table, Mapping) else {}


def _claim_row(study: Study, claim: Document) -> str:
    runs = claim.get("runs") or []
    made_by = {study.by_id[i]["method"] for i in runs if i in study.by_id}
    shares = "".join(
        f'<div class="quiet">{esc(f"{m}: {words}")}</div>' for m, words in _model_shares(study).items() if m in made_by
    )
    return (
        f'<tr role="row" id="claim-{slug(str(claim.get("id", "")))}">'
        f'<th role="rowheader" scope="row">{esc(claim.get("claim", ""))}{shares}</th>'
        f'<td role="cell" data-label="Paper">{esc(claim.get("paper") or "–")}</td>'
        f'<td role="cell" data-label="Here" class="ours"><div>{esc(claim.get("ours") or "–")}</div></td>'
        f'<td role="cell" data-label="Verdict">{_verdict(str(claim.get("verdict")))}</td>'
        f'<td role="cell" data-label="Why"><div>{esc(claim.get("why") or "")}{run_links(study, runs) if runs else ""}'
        "</div></td></tr>"
    )


def _verdict(word: str) -> str:
    kind, icon = VERDICTS.get(word, VERDICTS["inconclusive"])
    return (
        f'<span class="verdict {kind}"><svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">'
        f'<circle cx="8" cy="8" r="7"/>{icon}</svg>{esc(word)}</span>'
    )


# ---------------------------------------------------------------- runs


def _runs(study: Study, accounts: Mapping[str, str]) -> Section:
    section = Section("runs", "All runs")
    for status, title in (("failed", "Failed runs"), ("pending", "Pending runs")):
        found = [run for run in study.runs if run["status"] == status]
        if not found:
            continue
        items = "".join(
            f'<li><a href="#{run_anchor(run["id"])}">{esc(run["id"])}</a>'
            + (f": {esc(run.get('reason') or 'no reason was kept')}" if status == "failed" else "")
            + "</li>"
            for run in found
        )
        words = (
            "They are in no mean and no test above; each place they would have stood in says so."
            if status == "failed"
            else "They have not been run yet; the study goes on where it stopped."
        )
        body = f"<p>{words}</p><ul class='plain'>{items}</ul>"
        section.body.append(foldable(f"{title} ({len(found)})", body, open=len(found) <= 12))
    if not study.runs:
        section.words("This study has no runs.")
        return section
    section.body.append(
        '<div class="filters" hidden><label>Show <input type="search" id="filter" placeholder="a method, a size, an '
        'id …"></label><label>Status <select id="status"><option value="">all</option><option>finished</option>'
        '<option>failed</option><option>pending</option></select></label><output id="shown"></output></div>'
    )
    head = [
        "Run", "Seed", "Status", "TSR, last", "TSR, best", "Makespan", "Collisions", "Steps/s", "Training",
        "Model calls",
    ]  # fmt: skip
    groups = []
    for world in study.worlds:
        for method in study.methods:
            runs = study.of_cell.get((*world, method))
            if not runs:
                continue
            title = f"{method_label(study, method)} {esc(study.label(world, whole=True))}"
            rows = "".join(_run_row(run, accounts.get(run["id"])) for run in runs)
            groups.append(
                f'<tbody id="{cell_anchor(world, method)}"><tr class="group">'
                f'<th colspan="{len(head)}" scope="rowgroup">{title}</th></tr>{rows}</tbody>'
            )
    section.body.append(data_table(head, "".join(groups), "All runs", "all-runs"))
    return section


def _run_row(run: Document, account: str | None) -> str:
    more = f' <a href="{esc(account)}">account</a>' if account else ""
    start = (
        f'<tr id="{run_anchor(run["id"])}" data-status="{esc(run["status"])}"><th scope="row" class="id">'
        f'{esc(run["id"])}{more}</th><td>{esc(run["seed"])}</td><td><span class="status {esc(run["status"])}">'
        f"{esc(run['status'])}</span></td>"
    )
    if run["status"] != "finished":
        reason = run.get("reason") or ("not run yet" if run["status"] == "pending" else "no reason was kept")
        return f'{start}<td colspan="7" class="missing">{esc(reason)}</td></tr>'
    last, best = run.get("last") or {}, run.get("best") or {}

    def mean(key: str) -> str:
        values = last.get(key) or []
        return decimal(math.fsum(values) / len(values), 2) if values else "–"

    learns = run.get("learns", True)
    cells = (
        decimal(last["tsr"], 3) if last.get("tsr") is not None else "–",
        (decimal(best["tsr"], 3) + (f" at {step_count(best.get('step') or 0)}" if learns else ""))
        if best.get("tsr") is not None
        else "–",
        mean("steps"),
        mean("collisions"),
        decimal(run.get("steps_per_second") or 0, 0) if learns else "–",
        duration(run.get("training_seconds")) if learns else "–",
        decimal(model_part(run), 0),
    )
    return start + "".join(f"<td>{esc(cell)}</td>" for cell in cells) + "</tr>"


# ---------------------------------------------------------------- how to reproduce


def _reproduce(study: Study, tuning: str) -> Section:
    section = Section("reproduce", "How to reproduce this")
    name = str(study.about.get("name", ""))
    command = f"echelon reproduce --preset {name}" if _is_preset(study.about) else "echelon study study.toml"
    section.words("The same commands give the same runs: every seed is fixed and finished runs are not repeated.")
    section.body.append(
        f'<pre tabindex="0">pip install echelon-marl\n{esc(command)}        # trains and evaluates; goes on where it '
        f"stopped\n{esc(command)} --dry-run   # runs, steps and estimated hours first</pre>"
        "<p>The study's folder keeps <code>study.toml</code>, every run, <code>results.json</code> and "
        "<code>analysis.json</code>, from which this page is made.</p>"
    )
    section.body.append(f"<h3>How the baselines were tuned</h3><p>{esc(tuning)}</p>")
    settings = study.analysis.get("settings") or {}
    settled = settings.get("convergence") or (
        "the first step after which the smoothed success rate stays within a tolerance of its final level, if that "
        "level is above a floor"
    )
    drawn = (
        f" from {settings['resamples']:,} resamples (seed {settings.get('seed')})" if "resamples" in settings else ""
    )
    terms = [
        ("TSR", "task success rate: episodes in which all tasks were finished within the time limit, over all "
         "episodes. A cell's value is the mean over its runs. Its interval: of the percentile bootstrap's over "
         "runs and Wilson's over all their episodes the one that is wider, at each end."),
        ("Last and best policy", "the policy at the end of training, and the one whose evaluation during training was "
         "best. Both are judged once over the final episodes, in worlds that neither training nor that choice saw."),
        ("Verdicts on claims", "a rate's interval is Student's t over runs, a difference's Welch's t over the means of "
         "places (Satterthwaite's degrees of freedom), a ratio's the same of its logarithm; none is narrower than the "
         "chance of episodes makes it. In simulated studies of 3 runs a side these held the truth in 93% or more of "
         "cases (88% where rates crowd below 1), a bootstrap in 71% to 87%. What learns nothing is judged by its "
         "episodes (Wilson); one run of a method that learns decides nothing."),
        ("Steps to finish", "mean steps of the episodes that succeeded. Intervals over runs: Student's t."),
        ("Makespan", "mean steps of all episodes; one that failed counts as the time limit."),
        ("Collisions", "moves an episode that were blocked by another agent."),
        ("Mean convergence time (MCT)", f"{settled}. Runs that never converge are right-censored at the end of "
         "training: the mean is restricted to the training's length."),
        ("Sample efficiency", "area under the curve of evaluated TSR over training steps, divided by its length."),
        ("Interquartile mean (IQM)", "the mean of the middle half of the runs' values, places as strata. This and the "
         "other numbers over map sizes are of places in which all the methods shown have finished runs."),
        ("Optimality gap", "how far the runs are from a TSR of 1 on average; smaller is better."),
        ("Probability of improvement", "the chance that a run of one method beats a run of another one on the same "
         "world, ties counting half (Agarwal and others, 2021)."),
        ("Bootstrap", f"percentile intervals of 95%{drawn}, resampling runs within each map. From few runs they are "
         "too narrow: with 3 a cell they miss the truth about one time in four, not in twenty, and where all runs "
         "agree they have no width."),
        ("Tests", "one-way ANOVA with Tukey's HSD where its assumptions hold, else Welch's with Games and Howell's. "
         "Hedges' g is a difference in standard deviations of runs. Holm's correction is over all pairs of the study. "
         "Where neither method's runs differ, Fisher's exact test over episodes stands in if there are at least 5 runs "
         "of each or all episodes end alike; else there is no p-value."),
    ]  # fmt: skip
    items = "".join(f"<dt>{esc(term)}</dt><dd>{esc(words)}</dd>" for term, words in terms)
    section.body.append(f'<h3>What each number means</h3><dl class="terms">{items}</dl>')
    return section


def _is_preset(about: Document) -> bool:
    """Whether a study is a whole preset, not a part of one or one with other steps."""
    known = presets().get(str(about.get("name", "")))
    if known is None:
        return False
    asked = json.loads(json.dumps(dataclasses.asdict(known)))
    return all(asked.get(key) == value for key, value in about.items())


# ---------------------------------------------------------------- the page


def _page(study: Study, sections: Sequence[Section], teams: Sequence[Team]) -> str:
    template = files("echelon.reports").joinpath("study.html").read_text(encoding="utf-8")
    script = template.split("<script>", 1)[1].split("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    hashes = [digest]
    blocks: dict[str, str] = {}
    for k, team in enumerate(teams):
        blocks |= {f"replay-{k}-{j}": r.data for j, r in enumerate(team.recordings) if r.data}
    if blocks:
        # The player's page stands here once, however many recordings there are.
        before, after, replay_digest = replay_shell("Replay")
        hashes.append(replay_digest)
        blocks |= {"shell-before": packed(before), "shell-after": packed(after)}
    data = [f'<script type="text/plain" id="{key}">{text}</script>' for key, text in blocks.items()]
    name = str(study.about.get("name") or "study")
    title = str(study.about.get("title") or name)
    parts = {
        "SCRIPT_HASHES": " ".join(f"'sha256-{h}'" for h in hashes),
        "TITLE": esc(f"{title}: report"),
        "HEADING": esc(title),
        "NAME": esc(name),
        "CONTENTS": "".join(f'<li><a href="#{s.anchor}">{esc(s.title)}</a></li>' for s in sections),
        "BODY": "\n".join(
            f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title"><h2 id="{s.anchor}-title">{esc(s.title)}</h2>'
            f"{''.join(s.body)}</section>"
            for s in sections
        ),
        "DATA": "\n".join(data),
    }
    # In one pass, so that text from data which looks like a place isn't taken for one.
    return re.sub(r"__([A-Z_]+?)__", lambda match: parts[match.group(1)], template)
