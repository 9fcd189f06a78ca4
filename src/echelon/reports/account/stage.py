"""The section on a stage: what was known, what was proposed, each branch, the numbers, and the decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from echelon.reports.account.file import CONTROL, REFERENCE, Account, Branch, Round, Stage, says_rules
from echelon.reports.account.looks import Looks, by_measure, chart_svg, curve_of, mean_of
from echelon.reports.account.words import (
    RULES,
    branch_anchor,
    bullets,
    config_card,
    fate_of,
    notes,
    nothing,
    number_text,
    outcome_of,
    pill,
    said,
    straight,
    tree,
)
from echelon.reports.charts import Axis, Plot, Series, Style, exact_axis, swatch_svg
from echelon.reports.parts import Section, counted, data_table, decimal, esc, listed, quiet, step_count

__all__ = ["stage_section"]

_NUMBERS = (
    ("last_k", "last k", "mean of the last five evaluations"),
    ("auc", "AUC", "area under the curve: mean of all evaluations"),
    ("final", "final", "the last evaluation"),
    ("best", "best", "the best evaluation"),
    ("std", "std", "standard deviation of the last five evaluations; with also.rising without their rise"),
    ("spike_gap", "gap", "how far the last evaluations are below the best one; with also.rising only those after it"),
    ("score", "score", "0.45 last k + 0.35 AUC + 0.20 final - 0.10 std"),
)


def stage_section(account: Account, looks: Looks, k: int) -> Section:
    """Stage `k` in the order in which it went: evidence, rounds of candidates, numbers, decision."""
    stage = account.stages[k]
    section = Section(f"stage-{k}", f"{stage.name}: mainline at {step_count(stage.at)} steps")
    fate = outcome_of(account, stage)
    cost = (
        f"{counted(len(stage.branches), 'branch run')}, {stage.cost:,.0f} environment steps." if stage.branches else ""
    )
    section.body.append(
        f'<p class="outcome">{pill(fate.kind, fate.word)} '
        f"{said(listed(fate.reasons) if fate.kind == 'good' else '')} {quiet(cost)}</p>"
    )
    stood = f'<div class="box"><h3>Where the mainline stood</h3>{config_card(looks, stage.current)}</div>'
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
        section.body.append(f"<h3>{title} {quiet(straight('; '.join(filter(None, about))))}</h3>")
        names = [candidate.id for candidate in proposed.candidates]
        ruled = frozenset(names) if account.by_rules else round_.by_rules
        cards = "".join(
            _branch_card(account, looks, k, name, draw, rules=name in ruled) for name in names if name not in shown
        )
        section.body.append(
            f'<div class="branches">{cards}</div>' if names else nothing(proposed.note, "Nothing was proposed")
        )
        section.body.append(_beside(round_))
        section.body.append(notes(account, "Proposals", proposed.note))
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


def _beside(round_: Round) -> str:
    """What a round's note tells that no candidate's card shows."""
    parts = []
    if round_.unnamed:
        words = f"{round_.unnamed} candidates are by {RULES}; this account doesn't say which."
        parts.append(f'<p class="note">{esc(words)}</p>')
    left = round_.proposed.note.get("left_out")
    if isinstance(left, list) and left:
        parts.append(f'<div class="box"><h4>Left out, not tried</h4>{bullets(left)}</div>')
    return "".join(parts)


def _evidence(stage: Stage) -> str:
    if not stage.evidence:
        return f'<div class="box"><h3>Evidence</h3><p>{quiet("None was collected.")}</p></div>'
    flags = stage.evidence.get("flags")
    chips = "".join(f"<li>{said(str(f).replace('_', ' '))}</li>" for f in flags) if isinstance(flags, list) else ""
    parts = [f'<ul class="flags" aria-label="Flags">{chips}</ul>' if chips else f"<p>{quiet('No flag is raised.')}</p>"]
    for key, title in (("curve", "Curve of the task return"), ("behaviour", "Behaviour")):
        values = stage.evidence.get(key)
        if not isinstance(values, Mapping):
            continue
        rows = "".join(
            f"<div><dt>{said(str(name).replace('_', ' '))}</dt>"
            f"<dd>{said(decimal(value, 3) if isinstance(value, float) and math.isfinite(value) else value)}</dd></div>"
            for name, value in values.items()
        )
        parts.append(f'<h4>{title}</h4><dl class="mini">{rows}</dl>')
    return f'<div class="box"><h3>Evidence</h3>{"".join(parts)}</div>'


def _card(account: Account, stage: Stage) -> str:
    rules = account.by_rules or says_rules(stage.card_note)
    title = "Diagnosis by rules" if rules else "The critic's card"
    label = f" {pill('open', RULES)}" if rules else ""
    body = tree(stage.card) if stage.card else nothing(stage.card_note, "There is none")
    return f'<div class="box card"><h3>{title}{label}</h3>{body}{notes(account, "Diagnosis", stage.card_note)}</div>'


def _branch_axes(looks: Looks, stage: Stage) -> Callable[[str], str]:
    """A function that draws one branch against the control, on axes that all branches of the stage share."""
    points = [p for branch in stage.branches for p in branch.curve]
    control = stage.tried.get(CONTROL, [])

    def lines(name: str, branches: Sequence[Branch], style: Style, key: str) -> tuple[list[Series], list[Series]]:
        """(what is drawn as a curve, what is drawn thin)."""
        own = [s for b in branches if (s := curve_of(f"{name}, seed {b.seed}", style, b.curve, key))]
        if len(own) < 2:
            return [replace(s, name=name) for s in own], []
        mean = mean_of(f"{name}, mean of {len(own)} seeds", style, own)
        return [mean] if mean.x else [], own

    def draw(name: str) -> str:
        branches = stage.tried.get(name, [])
        if not any(branch.curve for branch in branches):
            return ""
        x = exact_axis("environment steps along the branch", max(p.step for p in points),
                       min(stage.at, *(p.step for p in points)))  # fmt: skip
        if math.isclose(x.low, x.high):
            return ""

        def chart(key: str, y: Axis) -> str:
            base_style = replace(looks.style(stage.current), dash="dash")
            drawn, faint = lines(CONTROL, control, base_style, key)
            if name != CONTROL:
                curves, thin = lines(name, branches, looks.style(branches[0].config), key)
                drawn, faint = drawn + curves, faint + thin
            told = [
                (x_, y_, f"{s.name}\nstep {step_count(x_)}: {y.label} {number_text(y_)}")
                for s in drawn
                for x_, y_ in zip(s.x, s.y, strict=True)
            ]
            return chart_svg(Plot(name, x, y, tuple(drawn)), faint=faint, told=told)

        legend = "" if name == CONTROL or not control else (
            f'<p class="key">{swatch_svg(looks.style(branches[0].config))}this branch '
            f"{swatch_svg(replace(looks.style(stage.current), dash='dash'))}{CONTROL}</p>"
        )  # fmt: skip
        return by_measure(points, chart) + legend

    return draw


def _branch_card(
    account: Account, looks: Looks, k: int, name: str, draw: Callable[[str], str], *, rules: bool = False
) -> str:
    stage = account.stages[k]
    candidate, branches = stage.proposed.get(name), stage.tried.get(name, [])
    fate = fate_of(stage, name)
    config = candidate.config if candidate else branches[0].config if branches else None
    about = [candidate.type] if candidate and candidate.type else []
    about += [f"{len(branches)} seeds"] if len(branches) > 1 else []
    kind = "won" if fate.kind == "good" else "control" if name in (CONTROL, REFERENCE) else ""
    summary = stage.summaries.get(name, {})
    numbers = "".join(
        f'<div title="{esc(words)}"><dt>{label}</dt><dd>{number_text(summary[key])}</dd></div>'
        for key, label, words in _NUMBERS if key != "spike_gap" and summary.get(key) is not None
    )  # fmt: skip
    if numbers:
        numbers = f'<dl class="mini five">{numbers}</dl>'
    ours, base = summary.get("score"), stage.summaries.get(CONTROL, {}).get("score")
    ahead = ""
    if ours is not None and base is not None and name != CONTROL:
        ahead = f'<p class="key">{quiet(f"score {ours - base:+.3f}".replace("-", "−") + f" against {CONTROL}")}</p>'
    reasons = bullets(fate.reasons, "why") if fate.reasons else ""
    rationale = (
        f'<p class="rationale"><b>Proposed because:</b> {said(candidate.rationale)}</p>'
        if candidate and candidate.rationale
        else ""
    )
    return (
        f'<article class="branch {kind}" id="{branch_anchor(k, name)}"><h4>{said(name)} '
        f"{quiet(straight(', '.join(about)).replace('_', ' '))}</h4>{pill(fate.kind, fate.word)}"
        f"{' ' + pill('open', RULES) if rules else ''}"
        f"{config_card(looks, config, stage.current, change=name not in (CONTROL, REFERENCE))}"
        f"{draw(name)}{numbers}{ahead}{rationale}{reasons}</article>"
    )


def _numbers(looks: Looks, stage: Stage, k: int) -> str:
    """All branches of a stage below each other, the control first, then by score."""
    names = sorted(
        stage.summaries,
        key=lambda n: (n != CONTROL, n != REFERENCE, -(stage.summaries[n].get("score") or -math.inf), n),
    )
    head = ["Branch", *(f'<abbr title="{esc(words)}">{label}</abbr>' for _, label, words in _NUMBERS)]
    head += ["lead, 95%"] if stage.lead else []
    rows = []
    for name in names:
        summary, fate = stage.summaries[name], fate_of(stage, name)
        branches, candidate = stage.tried.get(name, []), stage.proposed.get(name)
        config = branches[0].config if branches else candidate.config if candidate else None
        cells = "".join(f"<td>{number_text(summary.get(key))}</td>" for key, _, _ in _NUMBERS)
        if stage.lead:
            lead = stage.lead.get(name, [])
            told = f"{number_text(lead[0])} [{number_text(lead[1])}, {number_text(lead[2])}]" if len(lead) == 3 else "–"
            cells += f"<td>{esc(told)}</td>"
        rows.append(
            f'<tr class="{"won" if fate.kind == "good" else ""}"><th scope="row"><a class="method" '
            f'href="#{branch_anchor(k, name)}">{swatch_svg(looks.style(config))}{said(name)}</a></th>{cells}'
            f'<td class="fate {fate.kind}">{esc(fate.word)}</td></tr>'
        )
    return data_table([*head, "Gate"], "".join(rows), f"Numbers of {stage.name}", "square")


def _decision(account: Account, stage: Stage) -> str:
    """The gate's verdict, and beside it what the proposer would have advised."""
    verdict = stage.verdict
    parts = []
    if verdict is not None:
        fate = outcome_of(account, stage)
        kind = "holds" if verdict.accepted else "fails"
        title, how = "The gate", "Fixed rules on these numbers; no model has a say."
        if not stage.branches:
            title, how = "Decision", "No branch was run: there was nothing to judge by."
        reasons = bullets(verdict.reasons, kind) if verdict.reasons else ""
        out = "".join(f"<li>{said(name)}: {said(why)}</li>" for name, why in verdict.rejected.items())
        out = f'<h4>Not judged</h4><ul class="said">{out}</ul>' if out else ""
        parts.append(
            f'<div class="box gate"><h3>{title} {pill(fate.kind, fate.word)}</h3>{reasons}{out}'
            f'<p class="note">{how}</p></div>'
        )
    elif stage.branches:
        parts.append(f'<div class="box gate"><h3>The gate</h3><p>{quiet("No verdict yet.")}</p></div>')
    reviews = [(n, r) for n, r in enumerate(stage.rounds, 1) if r.review or r.review_note]
    if reviews:
        by = " by rules" if account.by_rules or all(says_rules(r.review_note) for _, r in reviews) else ""
        body = "".join(
            (f"<h4>Round {n}</h4>" if len(stage.rounds) > 1 else "")
            + (tree(r.review) if r.review else f"<p>{quiet('There is none.')}</p>")
            + notes(account, "Review", r.review_note)
            for n, r in reviews
        )
        parts.append(
            f'<div class="box advice"><h3>Review{by} {pill("open", "advisory")}</h3>{body}'
            '<p class="note">Advice only: it decides nothing.</p></div>'
        )
    return f'<div class="two-boxes">{"".join(parts)}</div>' if parts else ""
