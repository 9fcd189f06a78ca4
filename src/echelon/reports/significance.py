"""The section of a study's report on how sure its results are: tests in words first, then their numbers."""

from __future__ import annotations

from echelon.reports.charts import TSR_AXIS, Axis, Figure, Forest, Plot, Row, Series
from echelon.reports.parts import (
    Document,
    Section,
    Study,
    counted,
    data_table,
    decimal,
    esc,
    foldable,
    linked,
    listed,
    method_label,
    p_text,
    run_links,
    with_interval,
)

__all__ = ["significance"]


def significance(study: Study) -> Section:
    section = Section("statistics", "How sure is this?")
    tests = study.analysis.get("tests") or []
    if any(test.get("pairs") for test in tests):
        section.words(
            "In the tables below a row's method is compared with a column's: the difference of their success rates in "
            "points. ▲ (ahead) and ▼ (behind) are differences that chance hardly explains, after correction for the "
            "number of comparisons in this study; ≈ is one that chance could explain, ? one that so few "
            "runs can't test."
        )
    for test in tests:
        world = (test["environment"], test["size"], test["agents"])
        words = list(test.get("words") or [])
        # The sentences on pairs stand last, one a pair; the table says them shorter.
        split = max(0, len(words) - len(test.get("pairs") or []))
        first, pairs = words[:split] or [test.get("reason") or "No test."], words[split:]
        text = " ".join(map(str, first))
        listing = f'<ul class="said">{"".join(f"<li>{esc(words)}</li>" for words in pairs)}</ul>'
        body = (
            _who_beats_whom(study, test)
            + (foldable("Every comparison in words", listing) if pairs else "")
            + foldable("The test, its assumptions and every pair in numbers", _test_numbers(study, test))
        )
        label = study.label(world, whole=True)
        if len(tests) > 4:  # a page of matrices helps nobody: the first sentence tells which to open
            section.body.append(foldable(f"{label}: {first[0]}", f"<p>{esc(text)}</p>{body}"))
        else:
            section.body.append(f"<h3>{esc(label)}</h3><p>{esc(text)}</p>{body}")
    _aggregates(study, section)
    if not section.body:
        section.words("No method has two finished runs yet, so there is nothing to compare.")
    return section


def _who_beats_whom(study: Study, test: Document) -> str:
    """Every pair of methods as a square table: by how many points, and whether by more than chance."""
    world = (test["environment"], test["size"], test["agents"])
    pairs: dict[tuple[str, str], tuple[float, bool, str, str]] = {}
    for pair in test.get("pairs") or []:
        if pair.get("difference"):
            points, sure = 100 * pair["difference"]["value"], bool(pair.get("significant"))
            why = "more than chance explains" if sure else pair.get("reason") or "chance could explain it"
            rest = (sure, "?" if pair.get("reason") else "≈", why)
            pairs[pair["a"], pair["b"]], pairs[pair["b"], pair["a"]] = (points, *rest), (-points, *rest)
    methods = [m for m in study.methods if any(m in pair for pair in pairs)]
    if not methods:
        return ""

    def cell(a: str, b: str) -> str:
        if a == b or (a, b) not in pairs:
            return "<td></td>"
        points, sure, open_sign, why = pairs[a, b]
        sign, kind = ("▲", "good") if sure and points > 0 else ("▼", "bad") if sure else (open_sign, "even")
        title, plus = esc(f"{a} against {b}: {why}"), "+" if points > 0 else ""
        return f'<td class="{kind}" title="{title}">{sign} {plus}{decimal(points, 1)}</td>'

    rows = "".join(
        f'<tr><th scope="row">{linked(method_label(study, a), study, world, a)}</th>'
        f"{''.join(cell(a, b) for b in methods)}</tr>"
        for a in methods
    )
    head = ["TSR, points", *(linked(f"− {esc(b)}", study, world, b) for b in methods)]
    return data_table(head, rows, f"Differences of success rate, {study.label(world, whole=True)}", "square")


def _test_numbers(study: Study, test: Document) -> str:
    names = {
        "anova": "one-way ANOVA", "welch": "Welch's ANOVA", "tukey": "Tukey's HSD", "games-howell": "Games and Howell",
    }  # fmt: skip
    parts = [f"<p>{esc(test.get('reason') or '')}</p>"] if test.get("reason") else []
    if test.get("test"):
        degrees = ", ".join(decimal(d, 0 if float(d).is_integer() else 1) for d in test.get("df") or [])
        statistic = test.get("statistic")
        effect = test.get("eta_squared")
        parts.append(
            f"<p>{esc(names.get(test['test'], test['test']))}: F({degrees}) = "
            f"{'–' if statistic is None else decimal(statistic, 2)}, p {_equals(test.get('p'))}"
            + (f", η² = {effect:.3f} (the share of the runs' variation that the method explains)" if effect else "")
            + ".</p>"
        )
    checks = [f"{c['method']} {p_text(c.get('p'))}" for c in test.get("normality") or []]
    equal = test.get("equal_variances") or {}
    if checks or equal:
        parts.append(
            "<p>Assumptions (a small p speaks against them): "
            + (f"normal within methods (Shapiro and Wilk), p: {esc(', '.join(checks))}" if checks else "")
            + ("; " if checks and equal else "")
            + (f"equal variances (Levene), p {_equals(equal.get('p'))}" if equal else "")
            + ".</p>"
        )
    rows = "".join(
        f"<tr><td>{esc(pair['a'])} − {esc(pair['b'])}</td>"
        f"<td>{with_interval(pair['difference']) if pair.get('difference') else '–'}</td>"
        f"<td>{p_text(pair.get('p'))}</td><td>{p_text(pair.get('p_holm'))}</td>"
        f"<td>{'–' if pair.get('hedges_g') is None else decimal(pair['hedges_g'], 2)}</td>"
        f"<td>{'<b>yes</b>' if pair.get('significant') else 'no'}</td></tr>"
        for pair in test.get("pairs") or []
    )
    if rows:
        head = ["Difference of TSR", "Value", "p", "p (Holm, whole study)", "Hedges' g", "Significant"]
        title = names.get(test.get("posthoc") or "", "Pairs")
        parts.append(f"<p>Every pair of methods ({esc(title)}):</p>" + data_table(head, rows, title))
    world = (test["environment"], test["size"], test["agents"])
    ids = [run["id"] for m in test.get("methods") or [] for run in study.finished(world, m)]
    parts.append(run_links(study, ids))
    return "".join(parts)


def _equals(p: float | None) -> str:
    return "unknown" if p is None else "&lt; 0.001" if p < 0.001 else f"= {p:.3f}"


def _aggregates(study: Study, section: Section) -> None:
    groups: dict[str, list[Document]] = {}
    for entry in study.analysis.get("aggregates") or []:
        if entry.get("iqm") and entry["method"] in study.styles:
            groups.setdefault(entry["environment"], []).append(entry)
    if not groups:
        return
    common = {c["environment"]: c for c in study.analysis.get("common") or []}
    section.body.append("<h3>Over map sizes</h3>")
    for environment, c in common.items():
        places = listed([f"{p['size']}×{p['size']} with {counted(p['agents'], 'agent')}" for p in c["places"]])
        if places:
            left_out = " ".join(["", *c["words"]])
            section.words(
                esc(f"{environment}: over {places}, where each of these methods has finished runs.{left_out}")
            )
    forests = [
        Forest(
            environment,
            Axis("interquartile mean of TSR", 0.0, 1.0, TSR_AXIS.ticks),
            tuple(
                Row(
                    entry["method"], study.styles[entry["method"]], entry["iqm"]["value"],
                    entry["iqm"]["low"], entry["iqm"]["high"],
                )
                for entry in entries
            ),
        )
        for environment, entries in groups.items()
    ]  # fmt: skip
    section.figure(
        Figure("aggregates", "One number a method", tuple(forests)),
        "The interquartile mean leaves out the best and the worst quarter of the runs, so that a lucky or broken run "
        "doesn't decide it. 95% intervals by stratified bootstrap over runs.",
    )
    rows = "".join(
        f'<tr><td>{esc(environment)}</td><th scope="row">{method_label(study, entry["method"])}</th>'
        + "".join(
            f"<td>{with_interval(entry[key]) if entry.get(key) else '–'}</td>"
            for key in ("iqm", "mean", "median", "optimality_gap")
        )
        + f"<td>{run_links(study, entry.get('runs') or [])}</td></tr>"
        for environment, entries in groups.items()
        for entry in entries
    )
    head = ["Environment", "Method", "Interquartile mean", "Mean", "Median", "Optimality gap", "Runs"]
    section.body.append(foldable("All aggregates", data_table(head, rows, "Aggregates")))
    profiles, present = [], set()
    for profile in study.analysis.get("profiles") or []:
        series = tuple(
            Series(m, study.styles[m], tuple(map(float, profile["taus"])), tuple(p["value"]),
                   tuple(p.get("low") or ()), tuple(p.get("high") or ()))
            for m in study.methods if (p := profile["methods"].get(m)) and p.get("value")
        )  # fmt: skip
        if series:
            y = Axis("share of runs above τ", 0.0, 1.0, TSR_AXIS.ticks)
            profiles.append(Plot(profile["environment"], Axis("TSR τ", 0.0, 1.0, TSR_AXIS.ticks), y, series))
            present |= {s.name for s in series}
    section.figure(
        Figure("profiles", "Performance profiles", tuple(profiles), study.legend(present)),
        "How many of a method's runs reach at least a success rate of τ: a line above another one everywhere is "
        "better whatever rate is asked for.",
    )
    better: dict[str, list[Document]] = {}
    for entry in study.analysis.get("improvement") or []:
        if entry.get("probability") and entry["a"] in study.styles:
            better.setdefault(entry["environment"], []).append(entry)
    section.figure(
        Figure(
            "improvement",
            "Probability of improvement",
            tuple(
                Forest(
                    environment,
                    Axis("P(first > second)", 0.0, 1.0, TSR_AXIS.ticks),
                    tuple(
                        Row(
                            f"{entry['a']} > {entry['b']}", study.styles[entry["a"]], entry["probability"]["value"],
                            entry["probability"]["low"], entry["probability"]["high"],
                        )
                        for entry in entries
                    ),
                    reference=0.5,
                )
                for environment, entries in better.items()
            ),
        ),
        "How likely a run of the first method beats one of the second in the same place (ties count half), over the "
        "places where both have runs. At the dashed line neither does. 95% intervals by stratified bootstrap.",
    )  # fmt: skip
    rows = "".join(
        f"<tr><td>{esc(environment)}</td><td>{esc(entry['a'])} &gt; {esc(entry['b'])}</td>"
        f"<td>{with_interval(entry['probability'])}</td><td>{run_links(study, entry.get('runs') or [])}</td></tr>"
        for environment, entries in better.items()
        for entry in entries
    )
    if rows:
        head = ["Environment", "First > second", "Probability", "Runs"]
        section.body.append(foldable("All probabilities of improvement", data_table(head, rows, "Improvement")))
