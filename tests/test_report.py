"""The report of a study: what it says, that hostile text stays text, its figures, and the page in a real browser."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import json
import os
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from browser import complaints, emulate, open_page, requests
from echelon.errors import EchelonError
from echelon.reports import charts, figures, measured, paths, study
from echelon.reports.charts import Axis, Figure, Plot, Series, exact_axis, linear_axis, log_axis, method_styles
from echelon.reports.study import render_report, write_report
from echelon.studies.analysis import analyse
from echelon.studies.presets import preset
from study_data import METHODS, synthetic_results
from test_replay_page import tiny, warehouse

pytest_plugins = ("browser",)

Document = dict[str, Any]
HOSTILE = ("</script><b>bold</b>", '"><img src=x onerror="window.hacked=1">', "a & <i> 'b' $x^2$ \x00\ud800")
SECTIONS = ["study", "claims", "tsr", "learning", "scaling", "paths", "collisions", "statistics", "runs", "reproduce"]


# ---------------------------------------------------------------- studies to report on


@pytest.fixture(scope="module")
def whole() -> tuple[Document, Document]:
    """Three methods (one that learns nothing), two sizes, a failed run and a pending one."""
    results = synthetic_results(
        methods=("l2m2", "flat-mappo", "classical"), sizes=(10, 20), seeds=(0, 1, 2), final_episodes=64,
        failed=(("flat-mappo", 20, 1),), pending=(("l2m2", 20, 2),),
    )  # fmt: skip
    return results, analyse(results)


def small(**options: Any) -> tuple[Document, Document]:
    settings: Document = {"sizes": (10,), "final_episodes": 16, "every": 500_000, "failed": (), "pending": ()}
    results = synthetic_results(**{**settings, **options})
    return results, analyse(results)


def hostile_study() -> tuple[Document, Document]:
    """Every string of a study that is anybody's to choose, chosen to do harm."""
    results, _ = small(methods=("l2m2", HOSTILE[1]), environments=(HOSTILE[0],), seeds=(0, 1))
    results["study"].update(name=HOSTILE[0], title=HOSTILE[2])
    results["machine"] = {"processor": HOSTILE[1], "system": HOSTILE[0], "versions": {HOSTILE[1]: HOSTILE[0]}}
    for k, run in enumerate(results["runs"]):
        run["id"] = f"{HOSTILE[k % 3]} {k}"
    results["runs"].append({**results["runs"][0], "id": "lost", "seed": 9, "status": "failed", "reason": HOSTILE[0]})
    analysis = analyse(results)
    analysis["claims"] = [
        {"id": HOSTILE[1], "claim": HOSTILE[0], "paper": HOSTILE[1], "ours": HOSTILE[2], "why": HOSTILE[0],
         "verdict": HOSTILE[1], "value": None, "runs": [results["runs"][0]["id"]]}
    ]  # fmt: skip
    return results, analysis


def replays_of(results: Document, folder: Path, **documents: Document) -> dict[str, Path]:
    """Recordings of the first seed's runs, by method name with `_` for `-`."""
    found = {}
    for run in results["runs"]:
        document = documents.get(run["method"].replace("-", "_"))
        if document is not None and run["seed"] == 0 and run["size"] == min(results["study"]["sizes"]):
            path = folder / f"{run['method']}.json"
            path.write_text(json.dumps(document), encoding="utf-8")
            found[run["id"]] = path
    return found


# ---------------------------------------------------------------- reading a page


class Page(html.parser.HTMLParser):
    """The page as its elements: (tag, attributes), its ids, its text; complains about elements left open."""

    VOID = frozenset({"meta", "link", "input", "path", "circle", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []
        self.ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def of(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def check(text: str) -> Page:
    """What holds of every report: one file, nothing from outside, ids unique, every link leads somewhere."""
    page = Page(text)
    assert [a["id"] for a in page.of("section")] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert all(link.startswith("#") and link[1:] in page.ids for link in links)
    assert not any({"src", "srcset", "data", "action", "style"} & set(a) for tag, a in page.elements if tag != "svg")
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert all(a.get("aria-label") for a in page.of("svg", role="img"))
    assert all(a.get("scope") for tag, a in page.elements if tag == "th")
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", page.words)
    return page


# ---------------------------------------------------------------- what it says


def test_every_section_every_run_and_every_number_leads_to_its_runs(whole: tuple[Document, Document]) -> None:
    results, analysis = whole
    page = check(render_report(results, analysis))
    for run in results["runs"]:
        assert f"run-{run['id'].replace('_', '')}" in page.ids
    for cell in analysis["cells"]:
        if cell["runs"]:
            anchor = f"cell-{cell['environment']}-s{cell['size']}-a{cell['agents']}-{cell['method']}"
            assert len(page.of("a", href=f"#{anchor}")) >= 5
    for claim in analysis["claims"]:
        assert (claim["claim"] in page.words) == bool(claim["runs"])
        assert claim["why"] in page.words or not claim["runs"]
        assert all(page.of("a", href=f"#run-{run_id}") for run_id in claim["runs"])
    assert "training diverged at step 666,666" in page.words


def test_numbers_stand_with_their_intervals(whole: tuple[Document, Document]) -> None:
    results, analysis = whole
    text = render_report(results, analysis)
    for cell in analysis["cells"]:
        for key, digits in (("tsr", 3), ("tsr_best", 3), ("makespan", 1), ("collisions", 2)):
            i = cell[key]
            interval = f"[{i['low']:.{digits}f}, {i['high']:.{digits}f}]"
            assert f'<b>{i["value"]:.{digits}f}</b> <span class="ci">{interval}</span>' in text


def test_verdicts_have_word_icon_and_colour(whole: tuple[Document, Document]) -> None:
    results, analysis = copy.deepcopy(whole)
    verdicts = ("reproduced", "not reproduced", "inconclusive")
    analysis["claims"] = [{**analysis["claims"][0], "id": v, "verdict": v} for v in verdicts]
    text = render_report(results, analysis)
    found = re.findall(r'<span class="verdict (\w+)"><svg[^>]*><circle[^>]*/>(<path d="[^"]+"/>)</svg>([\w ]+)<', text)
    assert [word for _, _, word in found] == list(verdicts)
    assert len({kind for kind, _, _ in found}) == len({icon for _, icon, _ in found}) == 3
    assert "1 reproduced, 1 not reproduced and 1 inconclusive" in Page(text).words


def test_what_is_missing_says_why(whole: tuple[Document, Document]) -> None:
    results, analysis = whole
    page = check(render_report(results, analysis))
    assert "flat-mappo: 1 failed" in page.words and "l2m2: 1 pending" in page.words
    assert "2 (1 failed)" in page.words and "learns nothing" in page.words
    results, analysis = small(methods=("l2m2", "qmix"), seeds=(0,), failed=(("qmix", 10, 0),))
    assert '<td class="missing">1 failed</td>' in render_report(results, analysis)


def test_a_single_run_is_marked_in_the_table_and_in_the_charts() -> None:
    results, analysis = small(methods=("l2m2",), seeds=(0,))
    text = render_report(results, analysis)
    check(text)
    assert ">1 run</abbr>" in text and "A hollow marker is a single run." in text
    assert 'class="mark c1 hollow"' in text and 'class="band' not in text
    several, analysis = small(methods=("l2m2",), seeds=(0, 1))
    text = render_report(several, analysis)
    assert "</abbr>" not in text and 'hollow"' not in text


@pytest.mark.parametrize(
    "options",
    [
        {
            "methods": ("l2m2", "qmix"),
            "seeds": (0, 1),
            "pending": [(m, 10, s) for m in ("l2m2", "qmix") for s in (0, 1)],
        },
        {"methods": ("l2m2",), "seeds": (0,), "failed": [("l2m2", 10, 0)]},
        {"methods": ("classical",), "seeds": (0,)},
        {"methods": ("l2m2", "classical"), "seeds": (0, 1), "pending": [("l2m2", 10, 0), ("l2m2", 10, 1)]},
        {"methods": ("l2m2", "a-new-method"), "environments": ("warehouse", "search"), "agents": (4, 8), "seeds": (0,)},
        {"methods": ()},
    ],
    ids=["all-pending", "all-failed", "one-run", "one-method-done", "many-worlds", "nothing"],
)
def test_a_study_that_is_empty_or_in_parts_has_a_report(tmp_path: Path, options: Document) -> None:
    results, analysis = small(**options)
    page = check(write_report(tmp_path, results, analysis).read_text(encoding="utf-8"))
    if not any(run["status"] == "finished" for run in results["runs"]):
        assert "No run is finished yet." in page.words
        assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html"]


def test_an_analysis_of_nothing_is_enough() -> None:
    results, _ = small(methods=("l2m2",), seeds=(0,))
    page = check(render_report(results, {"format": 1}))
    assert "not asked about the paper's claims" in page.words


def test_the_definitions_are_those_of_the_analysis(whole: tuple[Document, Document]) -> None:
    results, analysis = copy.deepcopy(whole)
    analysis["settings"] = {"convergence": "when it <stays>", "resamples": 1234, "seed": 5}
    words = Page(render_report(results, analysis)).words
    assert "when it <stays>" in words and "1,234 resamples (seed 5)" in words


def test_how_to_reproduce_names_the_preset_or_the_file() -> None:
    whole_preset = json.loads(json.dumps(dataclasses.asdict(preset("medium"))))
    for change, command in (
        ({}, "echelon reproduce --preset medium"),
        ({"name": "mine"}, "echelon study study.toml"),
        # A part of a preset, or one with other steps, isn't what the preset's name would run.
        ({"sizes": [20]}, "echelon study study.toml"),
        ({"steps": 1000}, "echelon study study.toml"),
    ):
        results, analysis = small(methods=("classical",), seeds=(0,))
        results["study"] = whole_preset | change
        page = Page(render_report(results, analysis, tuning="Forty trials <each>."))
        assert command in page.words and "Forty trials <each>." in page.words


def test_verdicts_from_few_runs_are_called_open() -> None:
    few, many = (
        Page(render_report(*small(methods=("l2m2", "flat-mappo"), seeds=tuple(range(n))))).words for n in (3, 6)
    )
    assert "With as few as 3 runs" in few and "Student's or Welch's over runs" in few
    assert "With as few" not in many


def test_claims_of_what_is_not_in_the_study_are_not_shown() -> None:
    results, analysis = small(methods=("flat-mappo", "qmix"), seeds=(0, 1))
    page = check(render_report(results, analysis))
    shown = {a["id"] for tag, a in page.elements if tag == "tr" and a.get("id", "").startswith("claim-")}
    assert shown == {"claim-qmix-large-maps"} and "1 claim: 1 inconclusive" in page.words
    page = check(render_report(*small(methods=("flat-ippo",), seeds=(0, 1))))
    assert "This study was not asked about the paper's claims." in page.words and page.of("table", role="table") == []
    pending = check(render_report(*small(methods=("l2m2",), seeds=(0,), pending=(("l2m2", 10, 0),))))
    assert "No run that the paper's claims speak of is finished yet." in pending.words


def test_settings_and_the_language_model_s_share_are_said() -> None:
    results, analysis = small(methods=("l2m2", "flat-mappo"), seeds=(0, 1))
    plain = check(render_report(results, analysis)).words
    assert "sets otherwise" not in plain and "language model planned" not in plain
    results["study"]["settings"] = {}
    assert "All settings are Echelon's own." in check(render_report(results, analysis)).words
    results["study"]["settings"] = {
        "run": {"algorithm": {"lr": 0.001}},
        "env": {"warehouse": {"layout": "<aisles>"}},
        "method": {"l2m2": {"llm_share": 0.125}},
    }
    text = render_report(results, analysis)
    words = check(text).words
    assert "every runalgorithm.lr0.001" in words and 'runs in warehouselayout"<aisles>"' in words
    share = "l2m2: its language model planned 12.5% of the training worlds, “nearest” the others"
    # Once for the section, and beside each claim that l2m2's runs decide.
    assert words.count(share) == 1 + sum(any("l2m2" in run for run in c["runs"]) for c in analysis["claims"]) == 4
    assert "by a habit and not by judgement" in words and "docs/planners.md" in words
    results["study"]["settings"]["method"]["l2m2"] = {"llm_share": 1.0}
    assert "planned 100% of the training worlds." in check(render_report(results, analysis)).words


def test_runs_that_were_not_made_alike_are_named() -> None:
    results, analysis = small(methods=("l2m2", "flat-mappo"), seeds=(0, 1))
    for run in results["runs"]:
        run |= {"versions": {"torch": "2.6.0", "numpy": "2.0"}, "processor": "one", "precision": "highest"}
    assert "Not all runs were made alike" not in check(render_report(results, analysis)).words
    results["runs"][1] |= {"versions": {"torch": "2.7.0", "numpy": "2.0"}, "processor": "<another>"}
    del results["runs"][2]["versions"]  # made by an older Echelon: unknown is no difference
    words = check(render_report(results, analysis)).words
    assert "torch 2.6.0: 2 runs" in words and "torch 2.7.0: 1 run" in words
    assert "processor <another>: 1 run" in words and "numpy 2.0:" not in words and "precision highest" not in words


def test_numbers_over_map_sizes_say_of_which_places_and_of_whom() -> None:
    results = synthetic_results(
        methods=("l2m2", "flat-mappo", "qmix"), sizes=(10, 20, 30), seeds=(0, 1), final_episodes=16, every=500_000,
        failed=(("qmix", 20, 0), ("qmix", 20, 1)), pending=(),
    )  # fmt: skip
    words = check(render_report(results, analyse(results))).words
    assert "over 10×10 with 4 agents and 30×30 with 4 agents, where each of these methods has finished runs." in words
    assert "20×20 with 4 agents is left out: qmix has no finished run there." in words


def test_a_difference_that_few_runs_cannot_test_has_no_verdict() -> None:
    results, _ = small(methods=("l2m2", "flat-mappo"), seeds=(0, 1))
    for run in results["runs"]:
        won = 12 if run["method"] == "l2m2" else 4
        run["last"] |= {"success": [1] * won + [0] * (16 - won), "tsr": won / 16}
    words = check(render_report(results, analyse(results))).words
    assert "? +50.0" in words and "▲ +" not in words and "there is no p-value" in words


def test_nearly_all_is_not_said_to_be_all() -> None:
    results, analysis = small(methods=("classical",), seeds=(0,))
    analysis["cells"][0]["tsr"]["value"] = 0.9969
    words = check(render_report(results, analysis)).words
    assert "99.7% of episodes with classical" in words and "100% of episodes" not in words


def test_one_run_has_no_interval_over_runs() -> None:
    results, analysis = small(methods=("l2m2",), seeds=(0,))
    assert analysis["cells"][0]["makespan"]["low"] is None
    text = render_report(results, analysis)
    assert f"<b>{analysis['cells'][0]['makespan']['value']:.1f}</b></a>" in text


@pytest.mark.parametrize("broken", [0, 1])
def test_another_format_and_an_unknown_run_are_one_clear_line(broken: int, tmp_path: Path) -> None:
    documents = list(small(methods=("classical",), seeds=(0,)))
    with pytest.raises(EchelonError, match="a replay is of the run 'x'"):
        write_report(tmp_path, *documents, replays={"x": tmp_path / "x.json"})
    documents[broken] = {**documents[broken], "format": 2}
    with pytest.raises(EchelonError, match="of format 2; this Echelon reads 1"):
        write_report(tmp_path, *documents)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_when_a_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "figure_pdf", lambda figure: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, *small(methods=("l2m2",), seeds=(0,)))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- hostile text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    results, analysis = hostile_study()
    recorded = tiny()
    recorded["title"] = recorded["episodes"][0]["plans"][0]["prompt"] = HOSTILE[0]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(recorded))
    report = write_report(tmp_path / "out", results, analysis, replays={results["runs"][0]["id"]: path})
    text = report.read_text(encoding="utf-8")
    page = check(text)
    assert page.of("img") == [] and page.of("i") == [] and "<b>bold" not in text
    assert HOSTILE[0] in page.words and HOSTILE[1] in page.words
    assert "a & <i> 'b' $x^2$ \ufffd\ufffd" in page.words
    for file in (tmp_path / "out" / "figures").glob("*.svg"):
        assert ET.parse(file).getroot().tag.endswith("svg")
        assert re.fullmatch(r"[A-Za-z0-9._-]+", file.name)


def test_text_that_looks_like_a_place_in_the_template_is_text() -> None:
    results, analysis = small(methods=("classical",), seeds=(0,))
    results["study"]["title"] = "__BODY__ __DATA__ __REPLAY_DATA__"
    assert Page(render_report(results, analysis)).words.count("__BODY__ __DATA__ __REPLAY_DATA__") == 2


# ---------------------------------------------------------------- the same bytes


def test_the_same_study_gives_the_same_bytes_in_any_process(whole: tuple[Document, Document], tmp_path: Path) -> None:
    results, analysis = whole
    recordings = replays_of(results, tmp_path, l2m2=tiny(), flat_mappo=tiny())
    write_report(tmp_path / "here", results, analysis, replays=recordings)
    (tmp_path / "study.json").write_text(json.dumps([results, analysis, {k: str(v) for k, v in recordings.items()}]))
    code = (
        "import json, sys; from pathlib import Path; from echelon.reports.study import write_report\n"
        "results, analysis, replays = json.loads(Path(sys.argv[1]).read_text())\n"
        "write_report(Path(sys.argv[2]), results, analysis, replays={k: Path(v) for k, v in replays.items()})"
    )
    # Another order of sets, another day's timezone, another user's plotting style.
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nlines.linewidth: 9\n")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "MATPLOTLIBRC": str(tmp_path)}
    arguments = [sys.executable, "-c", code, str(tmp_path / "study.json"), str(tmp_path / "there")]
    subprocess.run(arguments, check=True, env=environment)
    here = {p.relative_to(tmp_path / "here"): p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    there = {p.relative_to(tmp_path / "there"): p.read_bytes() for p in (tmp_path / "there").rglob("*") if p.is_file()}
    assert len(here) > 10 and here == there


# ---------------------------------------------------------------- figures as files


def test_each_figure_of_the_page_is_a_file_as_svg_and_pdf(whole: tuple[Document, Document], tmp_path: Path) -> None:
    results, analysis = whole
    recordings = replays_of(results, tmp_path, l2m2=tiny())
    page = Page(write_report(tmp_path / "out", results, analysis, replays=recordings).read_text(encoding="utf-8"))
    shown = {a["id"].removeprefix("fig-") for a in page.of("figure")}
    assert {"learning-curves", "tsr-by-size", "survival", "collisions", "improvement", "paths-warehouse-10-4"} <= shown
    files = {p.name for p in (tmp_path / "out" / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in shown for kind in ("svg", "pdf")}
    for file in (tmp_path / "out" / "figures").iterdir():
        data = file.read_bytes()
        if file.suffix == ".pdf":
            assert data.startswith(b"%PDF") and b"CreationDate" not in data
        else:
            assert ET.fromstring(data).tag.endswith("svg") and b"<dc:date>" not in data and b"<script" not in data


def test_a_dollar_in_a_name_is_no_mathematics() -> None:
    style = method_styles(["$\\frac$"])["$\\frac$"]
    series = Series("$\\frac$", style, (0.0, 1.0), (0.0, 1.0))
    axis = linear_axis("x", 1.0)
    figure = Figure("x", "$\\frac{$", (Plot("$\\frac$", axis, axis, (series,)),), (("$\\frac$", style),))
    assert figures.figure_svg(figure).startswith(b"<?xml")


def test_every_method_keeps_one_look_and_no_two_share_one() -> None:
    names = [
        *METHODS,
        "vdn",
        "flat-ippo",
        "l2m2-qmix",
        "direct-integration",
        "llm-untrained",
        "mine",
        "yours",
        "theirs",
    ]
    styles = method_styles(names)
    assert len(set(styles.values())) == len(names)
    # Not by colour alone: any two that share a colour differ in marker and in dash or marker.
    assert len({(s.marker, s.dash) for s in method_styles(METHODS).values()}) == len(METHODS)
    assert len({s.colour for s in method_styles(METHODS).values()}) == len(METHODS)
    # Nor are those that Echelon knows no style for, beside all that it knows one for.
    others = [f"own-{k}" for k in range(15)]
    styles = method_styles([*METHODS, "flat-ippo", "vdn", *others])
    assert len({(s.marker, s.dash) for s in styles.values()}) == len(styles)
    assert len({styles[name].colour for name in others[:7]}) >= 5
    assert len(set(method_styles([f"own-{k}" for k in range(260)]).values())) == 260
    assert method_styles(["qmix"])["qmix"] == method_styles(METHODS)["qmix"]


def test_the_page_has_the_colours_of_the_figures() -> None:
    template = (Path(study.__file__).parent / "study.html").read_text(encoding="utf-8")
    light = template.split("@media", 1)[0]
    for k, colour in enumerate(charts.COLOURS):
        assert f"--c{k}: {colour};" in light
    for k, colour in enumerate(charts.AGENT_COLOURS):
        assert f"--a{k}: {colour};" in light


@given(st.floats(1e-6, 1e9), st.floats(0, 1e6))
def test_an_axis_holds_what_it_shows(size: float, low: float) -> None:
    axis = linear_axis("x", low + size, low)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low <= low + slack and axis.high >= low + size - slack
    assert 2 <= len(axis.ticks) <= 8 and axis.part(axis.low) == 0 and axis.part(axis.high) == 1
    exact = exact_axis("x", low + size, low)
    assert len(exact.ticks) >= 2 and all(0 <= exact.part(at) <= 1 for at, _ in exact.ticks)
    assert (exact.low, exact.high) in {(low, low + size), (axis.low, axis.high)}
    logarithmic = log_axis("x", [size, size + low])
    assert logarithmic.low <= size * 1.001 and logarithmic.high >= (size + low) * 0.999
    assert len(logarithmic.ticks) >= 2 or logarithmic.high > logarithmic.low


def test_an_axis_of_steps_ends_where_they_end() -> None:
    axis = exact_axis("environment steps", 401_408.0)
    assert (axis.low, axis.high) == (0.0, 401_408.0)
    assert [word for _, word in axis.ticks] == ["0", "200k", "400k"]


def test_success_rates_are_drawn_from_zero_to_one(whole: tuple[Document, Document]) -> None:
    made: list[Plot] = []
    about = measured.Study(*whole)
    for section in (measured.success_rates(about), measured.learning(about)):
        made += [p for figure in section.figures for p in figure.panels if isinstance(p, Plot) and p.y.label == "TSR"]
    assert len(made) == 3
    for plot in made:
        assert (plot.y.low, plot.y.high, plot.y.log) == (0.0, 1.0, False)
        assert all(s.low and s.high for s in plot.series)


def test_a_line_does_not_lead_over_a_size_that_was_not_measured() -> None:
    results = synthetic_results(
        methods=("l2m2", "qmix"), sizes=(10, 20, 30), seeds=(0, 1), final_episodes=16, every=500_000, pending=(),
        failed=(("qmix", 20, 0), ("qmix", 20, 1)),
    )  # fmt: skip
    section = measured.success_rates(measured.Study(results, analyse(results)))
    plot = section.figures[0].panels[0]
    assert isinstance(plot, Plot) and plot.notes == ("qmix at 20×20: 2 failed",)
    assert [s.breaks for s in plot.series] == [(), (1,)]
    assert charts.stretches(plot.series[1]) == [(0, 1), (1, 2)]
    root = ET.fromstring(charts.panel_svg(plot, "label"))
    lines = [e for e in root if (e.get("class") or "").startswith("line")]
    assert len(lines) == 1 and lines[0].get("class") == "line c1 thin"
    assert b"<svg" in figures.figure_svg(section.figures[0])
    cost = measured.speed_and_cost(measured.Study(results, analyse(results)))
    assert [p.notes for f in cost.figures for p in f.panels if f.name == "model-calls"] == [()]


def test_runs_that_never_converge_hold_the_line_up() -> None:
    # Two of four at 10 and 30; one censored at 20 leaves two at risk at 30: 1 · 3/4 · 1/2.
    results, analysis = small(methods=("l2m2",), seeds=(0, 1, 2, 3))
    (place,) = analysis["survival"]
    place["horizon"] = 100
    for times, events, share in (
        ([10, 20, 30, 100], [True, False, True, False], {10: 0.75, 20: 0.75, 30: 0.375, 100: 0.375}),
        ([100] * 4, [False] * 4, {100: 1.0}),
    ):
        place["methods"][0] |= {"times": times, "converged": events}
        (plot,) = next(
            f for f in measured.learning(measured.Study(results, analysis)).figures if f.name == "survival"
        ).panels
        assert isinstance(plot, Plot) and plot.stairs
        series = plot.series[0]
        assert (series.x[0], series.y[0], series.x[-1]) == (0.0, 1.0, 100.0)
        assert dict(zip(series.x[1:], series.y[1:], strict=True)) == pytest.approx(share)


@pytest.mark.parametrize("count", [1, 7])
def test_figures_have_room_for_their_legends_and_notes(count: int) -> None:
    results = synthetic_results(
        methods=METHODS[:count], sizes=(10,), seeds=(0, 1), final_episodes=16, every=500_000, pending=(),
        failed=tuple((m, 10, 0) for m in METHODS[:count]),
    )  # fmt: skip
    about = measured.Study(results, analyse(results))
    made = [f for s in (measured.success_rates(about), measured.learning(about)) for f in s.figures]
    assert len(made) >= 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "constrained_layout not applied because axes sizes collapsed to zero"
        for figure in made:
            root = ET.fromstring(figures.figure_svg(figure))
            width, height = (float(root.attrib[k].removesuffix("pt")) for k in ("width", "height"))
            assert width < 450 and height < 450
            canvas = figures._draw(figure)
            canvas.draw_without_rendering()
            assert min(canvas.axes[0].get_position().size) > 0.35


def test_a_path_map_has_the_ways_and_the_subgoals() -> None:
    drawn = charts.path_map(charts_replay(tiny()), "l2m2")
    assert drawn.paths[0] == ((1, 1), (1, 2), (1, 3), (2, 3), (3, 3)) and drawn.subgoals == (((1, 3),), ())
    svg = charts.panel_svg(drawn, "a map")
    root = ET.fromstring(svg)
    ways = [e.get("d", "") for e in root if "way" in (e.get("class") or "")]
    # Two agents, each a little beside the cells' middles; a straight stretch is one line.
    assert ways == ["M1.43 1.43L3.43 1.43L3.43 3.43", "M3.57 3.57L1.57 3.57L1.57 2.57"]
    assert len([e for e in root if (e.get("class") or "").startswith(("start", "end"))]) == 4


def charts_replay(document: Document) -> Any:
    from echelon.reports.replay import parse_replay

    return parse_replay(document)


@pytest.mark.parametrize("marker", charts.MARKERS)
@pytest.mark.parametrize("kind", ["line", "bars", "stairs", "log"])
def test_every_marker_and_kind_of_plot_is_drawn_inside_its_picture(marker: str, kind: str) -> None:
    style = charts.Style(1, marker, "dots")
    y = Axis("y", 1.0, 100.0, ((1.0, "1"), (100.0, "100")), log=True) if kind == "log" else linear_axis("y", 100.0)
    series = Series("m", style, (0.0, 1.0, 2.0), (1.0, 10.0, 100.0), (1.0, 5.0, -50.0), (2.0, 20.0, 900.0))
    plot = Plot("p", linear_axis("x", 2.0), y, (series,), bars=kind == "bars", stairs=kind == "stairs")
    root = ET.fromstring(charts.panel_svg(plot, "label"))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    kinds = {"line", "band", "whisker", "grid"}
    absolute = [e.get("d", "") for e in root if kinds & set((e.get("class") or "").split())]
    numbers = [tuple(map(float, pair.split())) for d in absolute for pair in re.findall(r"[\d.-]+ [\d.-]+", d)]
    assert numbers and all(0 <= a <= width and 0 <= b <= height for a, b in numbers)


# ---------------------------------------------------------------- recordings


def test_recordings_are_embedded_once_and_the_player_once(whole: tuple[Document, Document], tmp_path: Path) -> None:
    results, analysis = whole
    recordings = replays_of(results, tmp_path, l2m2=tiny(), flat_mappo=tiny(), classical=tiny())
    text = render_report(results, analysis, replays=recordings)
    page = check(text)
    assert [a["id"] for a in page.of("script", type="text/plain")] == [
        "replay-0-0", "replay-0-1", "replay-0-2", "shell-before", "shell-after",
    ]  # fmt: skip
    assert "3 recordings" in page.words and page.words.count("all done in 4 steps, 1 collision") == 3
    assert len(page.of("svg", role="img")) > 10
    without = render_report(results, analysis)
    assert "No episode of this study was recorded." in Page(without).words and "text/plain" not in without


def test_a_recording_that_cant_be_read_or_compared_says_so(whole: tuple[Document, Document], tmp_path: Path) -> None:
    results, analysis = whole
    other = tiny()
    other["episodes"][0]["walls"] = ["#####", "#...#", "#...#", "#...#", "#####"]
    recordings = replays_of(results, tmp_path, l2m2=tiny(), flat_mappo=other, classical={"format": "?"})
    words = check(render_report(results, analysis, replays=recordings)).words
    assert "The recording can't be shown: classical.json: not a replay" in words and str(tmp_path) not in words
    assert words.count("in another world: not to be compared") == 1


def test_a_recording_too_large_is_cut_and_then_left_out(
    whole: tuple[Document, Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, analysis = whole
    recordings = replays_of(results, tmp_path, l2m2=warehouse(limit=60))
    whole_page = render_report(results, analysis, replays=recordings)
    size = len(re.findall(r'id="replay-0-0">([^<]*)<', whole_page)[0])
    monkeypatch.setattr(paths, "_REPLAY_BYTES", size - 1)
    cut = render_report(results, analysis, replays=recordings)
    assert len(re.findall(r'id="replay-0-0">([^<]*)<', cut)[0]) < size / 2
    assert "first episode, without prompts" in Page(cut).words
    monkeypatch.setattr(paths, "_REPLAY_BYTES", 100)
    none = Page(render_report(results, analysis, replays=recordings))
    assert "Too large to be embedded" in none.words and none.of("button") == []


# ---------------------------------------------------------------- in a real browser

browser_test = pytest.mark.browser
Open = Callable[..., Any]

FAINT = """
const linear = (v) => v <= 10 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
const lightness = (c) => {
  const [r, g, b] = c.slice(0, 3).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c;
  }
  return [255, 255, 255];
};
const faint = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.closest('script, [hidden]') || !e.getClientRects().length) continue;
  const style = getComputedStyle(e);
  const ink = lightness(parse(e instanceof SVGElement ? style.fill : style.color)), paper = lightness(behind(e));
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  if (ratio < 4.5) faint.push([e.className?.baseVal ?? e.className, e.textContent.slice(0, 30), ratio.toFixed(2)]);
}
return [document.querySelectorAll('body *').length, faint];
"""


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a study's report on a screen; its console was silent and it asked for nothing else."""

    def opened(results: Document, analysis: Document, replays: Any = None, fragment: str = "", **screen: Any) -> Any:
        path = tmp_path / "report.html"
        path.write_text(render_report(results, analysis, replays=replays or {}), encoding="utf-8")
        emulate(browser, **screen)
        open_page(browser, path, fragment)
        return browser

    yield opened
    emulate(browser)


def silent(browser: Any) -> None:
    assert complaints(browser) == []
    asked = [url for url in requests(browser) if not url.startswith(("file:", "data:", "about:"))]
    assert asked == []


@browser_test
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(show: Open, whole: tuple[Document, Document], theme: str) -> None:
    page = show(*whole, prefers_color_scheme=theme)
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    count, faint = page.execute_script(FAINT)
    assert count > 500 and faint == []
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 150) == (theme == "dark")
    silent(page)


@browser_test
@pytest.mark.parametrize("which", ["whole", "hostile", "many"])
def test_a_phone_has_no_sideways_scroll(show: Open, whole: tuple[Document, Document], which: str) -> None:
    documents = {
        "whole": lambda: whole,
        "hostile": hostile_study,
        "many": lambda: small(methods=("l2m2", "a" * 60), environments=("e" * 40,), agents=(4, 8), seeds=(0,)),
    }[which]()
    page = show(*documents, width=360, height=740, ratio=2)
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    wide = """return [document.documentElement.scrollWidth, innerWidth, [...document.querySelectorAll('main *')]
        .filter((e) => !e.closest('.scroll, pre, svg') && e.getBoundingClientRect().right > innerWidth + 0.5)
        .map((e) => e.tagName + '.' + e.className)]"""
    assert page.execute_script(wide) == [360, 360, []]
    sizes = """return [...document.querySelectorAll('.panel svg text')].map((e) =>
        parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"""
    assert min(page.execute_script(sizes)) > 9.5
    silent(page)


@browser_test
def test_hostile_text_does_nothing_in_the_browser(show: Open) -> None:
    page = show(*hostile_study())
    assert page.execute_script("return [window.hacked ?? null, document.querySelectorAll('img, main i').length]") == [
        None,
        0,
    ]
    assert page.execute_script("return document.querySelector('h1').textContent").startswith("a & <i> 'b'")
    silent(page)
    page.execute_script("document.body.insertAdjacentHTML('beforeend', '<svg onload=\"window.hacked=1\"></svg>')")
    assert page.execute_script("return window.hacked ?? null") is None


@browser_test
def test_print_is_white_opens_its_folds_and_leaves_the_players_out(
    show: Open, whole: tuple[Document, Document], tmp_path: Path
) -> None:
    results, analysis = whole
    page = show(results, analysis, replays_of(results, tmp_path, l2m2=tiny()), prefers_color_scheme="dark")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})
    shown = """return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility()).length"""
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.execute_script(shown, "nav, .filters, button, iframe") == 0
    assert page.execute_script(shown, ".map") == 1
    assert page.execute_script(FAINT)[1] == []
    folds = "return document.querySelectorAll('details:not([open])').length"
    closed = page.execute_script(folds)
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert closed > 0 and page.execute_script(folds) == 0
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert page.execute_script(folds) == closed
    pdf = page.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    assert len(pdf) > 20_000


@browser_test
def test_a_replay_opens_plays_and_closes(show: Open, whole: tuple[Document, Document], tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    results, analysis = whole
    recorded = replays_of(results, tmp_path, l2m2=tiny(), flat_mappo=warehouse(episodes=1))
    page = show(results, analysis, recorded)

    def until(script: str) -> None:
        WebDriverWait(page, 20, poll_frequency=0.05).until(lambda d: d.execute_script(script))

    buttons = page.find_elements("css selector", "button.play")
    assert len(buttons) == 2
    for button, title in zip(buttons, ("Tiny", "Four robots clear a warehouse"), strict=True):
        page.execute_script("arguments[0].click()", button)
        until(f"return document.querySelector('iframe')?.title.includes({json.dumps('Replay')}) ?? false")
        until("return arguments.length === 0 && document.querySelectorAll('iframe').length === 1")
        assert button.get_attribute("aria-pressed") == "true"
        page.switch_to.frame(page.find_element("css selector", "iframe"))
        until("return document.getElementById('app')?.dataset.ready === 'true'")
        assert page.execute_script("return document.getElementById('title').textContent") == title
        page.execute_script("document.getElementById('play').click()")
        until("return Number(document.getElementById('app').dataset.step) >= 2")
        page.switch_to.default_content()
    page.execute_script("document.querySelector('.close').click()")
    assert page.find_elements("css selector", "iframe") == []
    assert page.execute_script("return document.activeElement.className") == "play"
    silent(page)


@browser_test
def test_runs_are_filtered_and_a_link_finds_a_hidden_one(show: Open, whole: tuple[Document, Document]) -> None:
    results, _ = whole
    page = show(*whole)
    rows = "return [...document.querySelectorAll('.all-runs tbody:not([hidden]) tr[id]:not([hidden])')].length"
    assert page.execute_script(rows) == len(results["runs"])
    box = page.find_element("id", "filter")
    box.send_keys("l2m2 20×20")
    assert page.execute_script(rows) == 3 and page.find_element("id", "shown").text == "3 shown"
    page.execute_script("location.hash = arguments[0]", f"#run-{results['runs'][0]['id']}")
    box_is_empty = "return document.getElementById('filter').value === ''"
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 20).until(lambda d: d.execute_script(box_is_empty))
    assert page.execute_script(rows) == len(results["runs"])


@browser_test
def test_without_javascript_everything_but_the_players_is_there(
    show: Open, whole: tuple[Document, Document], tmp_path: Path
) -> None:
    results, analysis = whole
    page = show(results, analysis)
    try:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        page = show(results, analysis, replays_of(results, tmp_path, l2m2=tiny()))
        visible = [e for e in page.find_elements("css selector", "button, .filters") if e.is_displayed()]
        assert visible == [] and len(page.find_elements("css selector", "svg.chart")) > 8
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
