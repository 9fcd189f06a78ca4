"""The sections on the run as a whole: what it came to, its mainline, what happened, and its segments."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

from echelon.reports.account.file import CONTROL, REFERENCE, Account, Segment
from echelon.reports.account.looks import Looks, by_measure, chart_svg, thinned
from echelon.reports.account.words import RULES, branch_anchor, fate_of, number_text, outcome_of, pill, said
from echelon.reports.charts import Axis, Plot, Series, exact_axis, swatch_svg
from echelon.reports.parts import Section, counted, data_table, esc, foldable, quiet, step_count

__all__ = ["details_section", "run_head", "run_section"]


def run_head(account: Account) -> str:
    """What a reader wants before all else: whose run it is, how it ended, and what it cost."""
    final, branches = account.final, account.in_branches
    judged = [stage for stage in account.stages if stage.verdict is not None]
    accepted = sum(stage.verdict.accepted for stage in judged if stage.verdict)
    best = f" of {account.best_return:g}" if account.best_return else ""
    budget = f" of {step_count(account.steps)}" if account.steps else ""
    share = f" ({100 * branches / account.spent:.0f}%)" if account.spent and branches else ""
    counts = [
        (number_text(final.tsr) if final else "–", "final TSR"),
        (number_text(final.task_return, 2) if final else "–", f"final task return{best}"),
        (step_count(account.spent), f"environment steps{budget}"),
        (step_count(branches), f"of them in branches{share}"),
    ]  # fmt: skip
    if judged:
        counts.append((f"{accepted} of {len(judged)}", "changes accepted" if len(judged) != 1 else "change accepted"))
    who, made = said(account.proposer or "none"), account.made_by_rules
    if account.by_rules:
        who += f" {pill('open', RULES)}"
    elif made[0]:
        who += f" {pill('open', f'{made[0]} of {made[1]} candidates by {RULES}')}"
    facts = [("Method", said(account.method)), ("Base", said(account.base or "–")),
             ("Environment", said(account.environment or "–")),
             ("Seed", esc("–" if account.seed is None else account.seed)), ("Proposer", who)]  # fmt: skip
    notes = [] if final else ["This run is not finished: what is here is what there is so far."]
    notes += [f"Note: {said(note)}." for note in account.notes]
    return (
        f'<dl class="facts">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts)}</dl>'
        + "".join(f'<p class="unfinished">{note}</p>' for note in notes)
        + f'<ul class="counts">{"".join(f"<li><b>{esc(n)}</b> {esc(words)}</li>" for n, words in counts)}</ul>'
    )


def run_section(account: Account, looks: Looks) -> Section:
    """The mainline over all steps spent, and beside it what happened in words."""
    section = Section("run", "The run")
    if account.line:
        shown = dict(looks.at(point) for point in account.line)
        legend = "".join(f"<li>{swatch_svg(style)}{said(name)}</li>" for name, style in shown.items())
        chart = by_measure(account.line, partial(_mainline, account, looks), best=account.best_return or 0.0)
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


def _mainline(account: Account, looks: Looks, key: str, y: Axis) -> str:
    points = thinned([(p, v) for p in account.line if (v := getattr(p, key)) is not None])
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
         f"TSR {number_text(p.tsr)}, task return {number_text(p.task_return, 2)}{best}")
        for p, v in points
    ]  # fmt: skip
    joints = [((a[-1][0].spent, a[-1][1]), (b[0][0].spent, b[0][1])) for a, b in pairwise(parts)]
    bands = [
        (stage.spent, stage.spent + stage.cost, stage.name, f"{stage.name} at mainline step {step_count(stage.at)}: "
         f"{counted(len(stage.branches), 'branch run')}, {step_count(stage.cost)} steps; "
         f"{outcome_of(account, stage).word}")
        for stage in account.stages if stage.cost > 0
    ]  # fmt: skip
    x = exact_axis("environment steps spent, all branches counted", account.spent)
    return chart_svg(Plot("the mainline", x, y, series), bands=bands, joints=joints, told=told)


def _overview(account: Account, looks: Looks) -> str:
    """The tree in short: the mainline downwards, at each stage what branched off."""
    first = account.segments[0].config if account.segments else None
    if not account.segments and account.stages:
        first = account.stages[0].current
    items = [f"<li><p><b>Start</b> {said(looks.name(first))}</p></li>"]
    skipped = sorted(account.skipped, key=lambda one: one.spent, reverse=True)

    def pass_over(until: float) -> None:
        while skipped and skipped[-1].spent <= until:
            one = skipped.pop()
            items.append(
                f"<li><p><b>{said(one.name)}</b> at {step_count(one.at)} {pill('open', 'skipped')}</p>"
                f"<p>{said(one.why)}</p></li>"
            )

    for k, stage in enumerate(account.stages):
        pass_over(stage.spent)
        fate = outcome_of(account, stage)
        leaves = []
        for name in [*(n for n in (CONTROL, REFERENCE) if n in stage.tried), *stage.proposed]:
            own = fate_of(stage, name)
            kind = "won" if own.kind == "good" else "control" if name in (CONTROL, REFERENCE) else ""
            mark = "✓ " if kind == "won" else ""
            title = said("; ".join((own.word, *own.reasons)))
            leaves.append(
                f'<li><a class="{kind}" href="#{branch_anchor(k, name)}" title="{title}">{mark}{said(name)}</a></li>'
            )
        why = "".join(f"<p>{said(reason)}</p>" for reason in fate.reasons)
        items.append(
            f'<li class="{fate.kind}"><p><b><a href="#stage-{k}">{said(stage.name)}</a></b> at '
            f"{step_count(stage.at)} {pill(fate.kind, fate.word)}</p>{why}"
            + (f'<ul class="leaves" aria-label="Branches">{"".join(leaves)}</ul>' if leaves else "")
            + "</li>"
        )
    pass_over(math.inf)
    if account.final:
        last = account.segments[-1].config if account.segments else None
        final = account.final
        items.append(
            f"<li><p><b>End</b> at {step_count(final.steps or 0)}, on {said(looks.name(last))}: TSR "
            f"{number_text(final.tsr)}, task return {number_text(final.task_return, 2)}</p></li>"
        )
    else:
        items.append(f"<li><p>{quiet('under way …')}</p></li>")
    return f'<ol class="tree">{"".join(items)}</ol>'


def details_section(account: Account, looks: Looks) -> Section | None:
    """What few readers want, folded away; None where there is nothing of it."""
    section = Section("details", "Details")
    if account.segments:
        rows = "".join(
            f'<tr><th scope="row" class="id">{said(s.run)}</th><td>{_span(s)}</td><td><span class="method">'
            f"{swatch_svg(looks.style(s.config))}{said(looks.name(s.config))}</span></td><td>{said(s.why)}</td></tr>"
            for s in account.segments
        )
        table = data_table(
            ["Run", "Mainline steps", "Configuration", "Why"], rows, "Segments of the mainline", "all-runs"
        )
        section.body.append(foldable(f"Segments of the mainline ({len(account.segments)})", table))
    if account.vocabulary:
        section.body.append(foldable("What the terms and modes mean", f"<pre>{said(account.vocabulary)}</pre>"))
    return section if section.body else None


def _span(segment: Segment) -> str:
    start, end = (step_count(v) if v is not None else "…" for v in (segment.start, segment.to))
    return esc(f"{start} to {end}")
