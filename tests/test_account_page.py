"""The page of a shaped run's account: what it says, what it refuses, and the page itself in a real browser."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from browser import complaints, emulate, open_page, requests
from echelon._files import atomic_write_json
from echelon.errors import EchelonError
from echelon.reports.account import write_account
from echelon.shaping import ShapingConfig, gate, score_lead, summarise, term_set

pytest_plugins = ("browser",)

Document = dict[str, Any]
BEST = 8.0
NAMES = ("approach", "pickup", "carry", "deliv", "spread", "traffic")

# ---------------------------------------------------------------- accounts made by hand


def config(mode: str, beta: float, *weights: float) -> Document:
    return ShapingConfig(mode, beta, dict(zip(NAMES, weights, strict=True))).to_json()


BALANCED = config("balanced_delivery", 0.3, 0.25, 0.15, 0.30, 0.15, 0.05, 0.10)
CARRY = config("carry_to_zone", 0.3, 0.10, 0.15, 0.50, 0.15, 0.0, 0.10)
STRONGER = config("balanced_delivery", 0.45, 0.25, 0.15, 0.30, 0.15, 0.05, 0.10)
SPREAD = config("spread_out", 0.3, 0.20, 0.15, 0.25, 0.10, 0.20, 0.10)
CALM = config("traffic_conservative", 0.2, 0.15, 0.10, 0.25, 0.10, 0.05, 0.35)


def curve(start: int, level: float, gain: float, seed: int = 0, points: int = 6) -> list[Document]:
    """Evaluations each 50k steps from `start` on; shares of the best return that grow from `level` by `gain`."""
    made = []
    for k in range(1, points + 1):
        share = min(1.0, max(0.0, level + gain * k / points + 0.012 * math.sin(3.1 * k + 40 * level)))
        share = min(1.0, max(0.0, share + 0.03 * math.sin(5 * seed) * k / points))
        made.append({"step": start + 50_000 * k, "tsr": round(share**1.6, 4), "task_return": round(BEST * share, 4)})
    return made


Tried = tuple[str, str, Document, float, str]  # id, type, configuration, gain, rationale


def stage(name: str, at: int, spent: int, current: Document | None, level: float, rounds: Sequence[Sequence[Tried]], *,
          control: float, reference: float | None = None, seeds: int = 1, broken: str = "") -> Document:  # fmt: skip
    """A stage as the trunk writes it: branches of each candidate, summaries, and the gate's own verdict."""
    branches: list[Document] = []

    def try_out(branch: str, number: int, shaping: Document | None, gain: float) -> None:
        for seed in range(seeds):
            lost = branch == broken
            branches.append({
                "name": branch, "round": number, "seed": seed, "run": f"work/runs/{name}-{branch}-{seed}",
                "config": shaping, "curve": curve(at, level, gain, seed, 2 if lost else 6),
                "problem": "its checkpoint is missing" if lost else None,
            })  # fmt: skip

    try_out("no change", 1, current, control)
    if reference is not None:
        try_out("reference", 1, BALANCED, reference)
    for number, tried in enumerate(rounds, 1):
        for key, _, changed, gain, _ in tried:
            try_out(key, number, changed, gain)
    curves = {b["name"]: [[p["task_return"] for p in o["curve"]] for o in branches if o["name"] == b["name"]]
              for b in branches}  # fmt: skip
    summaries = {key: summarise(values, best_return=BEST) for key, values in curves.items()}
    plain = {
        key: {n: getattr(s, n) for n in ("last_k", "auc", "final", "best", "std", "score", "spike_gap")}
        for key, s in summaries.items()
    }
    judged = {
        key: replace(s, problem="its checkpoint is missing") if key == broken else s
        for key, s in summaries.items() if key not in ("no change", "reference")
    }  # fmt: skip
    verdict = gate(summaries["no change"], judged, summaries.get("reference"))
    return {
        "name": name, "at": at, "spent": spent, "current": current,
        "evidence": {
            "curve": {"points": 8, "final": level, "best": level + 0.02, "last_k": level, "auc": level / 2,
                      "std": 0.0112, "spike_gap": 0.02, "slope": 0.0041, "zeros": 0.25, "first_success": 0.25,
                      "stage": "plateau"},
            "behaviour": {"episodes": 10, "steps": 93.4, "coverage": 0.2214, "idle": 0.3121, "backtrack": 0.2218,
                          "oscillation": 0.1104, "repeated": 0.4719, "goal_distance": 4.217, "near_steps": 0.3127,
                          "near_episodes": 0.9, "failed_near": 0.3333, "same_target": 0.4412, "target_entropy": 0.8211,
                          "target_switches": 0.0817, "bumped": 0.0421, "events": 3.1, "task_return": 2.9},
            "flags": ["low_coverage", "unstable_behavior"],
        },
        "card": {
            "analysis_summary": "Robots take packages up early but carry them slowly: returns stay near "
                                f"{level:.2f} of the best while many steps go back and forth.",
            "failure_modes": ["paths are repeated near the racks", "carried packages wait for a free zone"],
            "reward_design_needs": ["more weight on carrying", "keep traffic in view"],
            "initial_search_priors": ["beta 0.3 to 0.5", "carry 0.3 to 0.5"],
            "risky_directions": ["a weight of traffic above 0.4 makes teams stand still"],
            "objective_interpretation": "Deliver all packages; how they are carried is worth nothing by itself.",
        },
        "card_note": {"calls": [{"prompt": "You are the Critic.\nEvidence: {…}", "reply": '{"analysis_summary": "…"}',
                                 "seconds": 1.25}]},
        "rounds": [
            {"proposed": {
                "stage": "plateau", "policy": "moderate",
                "candidates": [{"id": key, "type": kind, "config": changed, "rationale": why}
                               for key, kind, changed, _, why in tried],
                "note": {"prompt": f"You are the Generator, round {number}.\nPropose {len(tried)} candidates.",
                         "reply": '{"stage_diagnosis": "plateau", …}', "repairs": 0}},
             "review": {"ranking": [key for key, *_ in tried], "recommended_candidate_id": tried[0][0],
                        "decision": "update", "confidence": 0.7, "metric_basis": ["last_k", "auc"],
                        "short_reason": f"{tried[0][0]} leads early and stays ahead.", "risk_notes": ["one seed only"]},
             "review_note": {"prompt": "Which branch is best?", "reply": "…"}}
            for number, tried in enumerate(rounds, 1)
        ],
        "branches": branches, "summaries": plain,
        "lead": {key: list(score_lead(curves["no change"], values, best_return=BEST, resamples=50))
                 for key, values in curves.items() if seeds > 1 and key != "no change"},
        "verdict": {"accepted": verdict.accepted, "winner": verdict.winner, "reasons": list(verdict.reasons),
                    "best": verdict.best, "rejected": dict(verdict.rejected), "scores": dict(verdict.scores)},
        "cost": 300_000 * len(branches),
    }  # fmt: skip


def whole_account(*, seeds: int = 1) -> Document:
    """Three stages: a first shaping, a change that is refused, and a change that is accepted in the second round."""
    first = stage("C0", 400_000, 400_000, None, 0.10, [
        [("a", "balanced", BALANCED, 0.26, "Even weights over the whole task, as nothing is known yet."),
         ("b", "progress_shift", CARRY, 0.12, "Packages are taken up already; what lacks is carrying."),
         ("c", "conservative", CALM, 0.05, "Small steps first.")],
    ], control=0.06, seeds=seeds, broken="c")  # fmt: skip
    spent = 400_000 + first["cost"]
    second = stage("C1", 900_000, spent + 200_000, BALANCED, 0.42, [
        [("d", "beta_up", STRONGER, 0.11, "The signal is weak: a little more of it."),
         ("e", "recovery", CALM, -0.12, "Back to what was calm.")],
    ], control=0.10, seeds=seeds)  # fmt: skip
    later = second["spent"] + second["cost"]
    third = stage("C2", 1_400_000, later + 500_000, BALANCED, 0.55, [
        [("f", "progress_shift", CARRY, 0.13, "Deliveries are late: more weight on the way to the zone."),
         ("g", "beta_up", STRONGER, 0.02, "Again, since the curve is flat now.")],
        [("h", "allocation_rebalance", SPREAD, 0.24, "Robots crowd: spread them.")],
    ], control=0.05, reference=0.11, seeds=seeds)  # fmt: skip
    end = third["spent"] + third["cost"]
    line: list[Document] = []

    def go(start: int, stop: int, offset: int, low: float, high: float, run: str, name: str) -> None:
        for step in range(start + 50_000, stop + 1, 50_000):
            share = low + (high - low) * (step - start) / (stop - start) + 0.015 * math.sin(step / 31_000)
            share = max(0.0, share)
            line.append({"step": step, "spent": step + offset, "tsr": round(share**1.6, 4),
                         "task_return": round(BEST * share, 4), "segment": run, "config": name})  # fmt: skip

    go(0, 400_000, 0, 0.0, 0.10, "work/runs/trunk", "task reward")
    offset = spent - 700_000
    go(400_000, 700_000, offset, 0.10, 0.36, "work/runs/C0-a-0", "balanced_delivery")
    go(700_000, 900_000, offset, 0.36, 0.42, "work/runs/C0-a-0", "balanced_delivery")
    offset = later - 1_200_000
    go(900_000, 1_400_000, offset, 0.42, 0.55, "work/runs/C1-no change-0", "balanced_delivery")
    offset = end - 1_700_000
    go(1_400_000, 2_400_000, offset, 0.55, 0.93, "work/runs/C2-h-0", "spread_out")
    return {
        "format": 1, "method": "also", "base": "flat-mappo", "environment": "warehouse", "seed": 3,
        "steps": 12_000_000, "proposer": "smollm2-1.7b", "best_return": BEST,
        "vocabulary": term_set("warehouse").vocabulary(), "stages": [first, second, third], "mainline": line,
        "segments": [
            {"run": "work/runs/trunk", "from": 0, "to": 400_000, "config": None, "why": "first, on the task reward"},
            {"run": "work/runs/C0-a-0", "from": 400_000, "to": 900_000, "config": BALANCED, "why": "C0: a won"},
            {"run": "work/runs/C1-no change-0", "from": 900_000, "to": 1_400_000, "config": BALANCED,
             "why": "C1: no change"},
            {"run": "work/runs/C2-h-0", "from": 1_400_000, "to": 2_400_000, "config": SPREAD, "why": "C2: h won"},
        ],
        "final": {"config": SPREAD, "tsr": 0.884, "task_return": 7.41, "steps": 2_400_000, "spent": line[-1]["spent"]},
    }  # fmt: skip


def put(folder: Path, account: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / "account.json", account)
    return folder


def page_of(folder: Path, account: object) -> str:
    return write_account(put(folder, account)).read_text(encoding="utf-8")


# ---------------------------------------------------------------- what goes in


def test_the_helper_is_the_story_that_the_tests_tell() -> None:
    verdicts = [s["verdict"] for s in whole_account()["stages"]]
    assert [v["winner"] for v in verdicts] == ["a", None, "h"]
    assert [v["best"] for v in verdicts] == ["a", "d", "h"]
    assert verdicts[0]["rejected"] == {"c": "its checkpoint is missing"}


def test_no_account_a_damaged_and_a_newer_one_are_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "account.json"
    good = whole_account()

    def refused(why: str) -> None:
        with pytest.raises(EchelonError, match=why) as told:
            write_account(tmp_path)
        assert "\n" not in str(told.value)
        assert "account.json" in str(told.value)
        assert not (tmp_path / "account.html").exists()

    refused("^no account of a shaped run at ")
    file.write_text('{"format": 1, "stages": [')
    refused("is damaged")
    file.write_text("[" * 100_000)
    refused("is damaged")
    file.write_bytes(b"\xff\xfe\x00")
    refused("is damaged")
    for no_format in ("[]", "{}", '{"format": true}', '{"format": "1"}'):
        file.write_text(no_format)
        refused("is damaged: it has no format$")
    file.write_text(json.dumps(good | {"format": 2}))
    refused("of format 2, this Echelon reads format 1: use a newer Echelon$")
    file.write_text(json.dumps(good | {"stages": [{"name": "C0", "at": "soon", "spent": 0}]}))
    refused(r"is damaged: stages\.0\.at: ")
    for endless in (float("nan"), float("inf")):
        file.write_text(json.dumps(good | {"steps": endless}))
        refused(r"is damaged: steps: ")
    file.unlink()
    file.mkdir()
    refused("account.json: ")


def test_the_same_account_gives_the_same_bytes(tmp_path: Path) -> None:
    assert page_of(tmp_path / "a", whole_account()) == page_of(tmp_path / "b", whole_account())


def test_colours_go_with_configurations(tmp_path: Path) -> None:
    """The winner's colour in its branch is that of the mainline after it; the control has the mainline's before it."""
    page = page_of(tmp_path, whole_account())
    legend = page.split('aria-label="Configurations"')[1].split("</ul>")[0]
    colours = re.findall(r'line (c\d)".*?</svg>([^<]+)</li>', legend)
    assert [name for _, name in colours] == ["task reward", "balanced_delivery · β 0.30", "spread_out · β 0.30"]
    of_task, of_balanced, of_spread = (colour for colour, _ in colours)
    assert len({of_task, of_balanced, of_spread}) == 3

    def drawn(branch: str) -> list[str]:
        card = page.split(f'id="{branch}"')[1].split("</article>")[0]
        return re.findall(r'<path class="line (c\d)"', card.split('class="m-tsr"')[1].split("</svg>")[0])

    assert drawn("branch-0-a") == [of_task, of_balanced]
    assert drawn("branch-2-h") == [of_balanced, of_spread]


def test_several_seeds_are_thin_lines_and_their_mean(tmp_path: Path) -> None:
    account = whole_account(seeds=3)
    page = page_of(tmp_path, account)
    card = page.split('id="branch-0-a"')[1].split("</article>")[0]
    chart = card.split('class="m-return"')[1]
    assert chart.count('class="line seed ') == 6  # three of the control, three of the branch
    at = account["stages"][0]["at"] + 50_000
    own = [p["task_return"] for b in account["stages"][0]["branches"] if b["name"] == "a" for p in b["curve"]
           if p["step"] == at]  # fmt: skip
    assert f"a, mean of 3 seeds\nstep 450k: task return {sum(own) / 3:.3f}" in chart
    low, high = account["stages"][0]["lead"]["a"][1:]
    assert f"[{low:.3f}, {high:.3f}]".replace("-", "−") in page
    # A seed that is behind: the mean is where all have been measured.
    del account["stages"][0]["branches"][4]["curve"][3:]
    card = page_of(tmp_path, account).split('id="branch-0-a"')[1].split("</article>")[0]
    assert "a, mean of 3 seeds\nstep 550k" in card
    assert "a, mean of 3 seeds\nstep 600k" not in card


TEXTS = st.text(st.characters(codec="utf-16", exclude_categories=()), max_size=40)


VALUES = st.none() | st.booleans() | st.floats() | st.integers() | TEXTS
JSON = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)


@given(JSON, TEXTS)
@settings(max_examples=40)
def test_any_json_in_notes_and_any_text_in_names_makes_a_page(tmp_path_factory: Any, note: Any, name: str) -> None:
    account = whole_account()
    one = account["stages"][0]
    one["card_note"] = one["card"] = one["evidence"] = {"x": note, name: note, "flags": note, "curve": {name: note}}
    one["rounds"][0]["review"] = {"y": note}
    one["branches"][1]["name"] = one["rounds"][0]["proposed"]["candidates"][0]["id"] = name
    one["verdict"]["best"] = one["verdict"]["winner"] = name
    folder = tmp_path_factory.mktemp("any")
    (folder / "account.json").write_text(json.dumps(account))
    page = write_account(folder).read_text(encoding="utf-8")
    assert page.endswith("</html>\n")
    assert "<script" not in page


RULES = "rules, no model"


def note_of(account: Document, k: int = 0) -> Document:
    note: Document = account["stages"][k]["rounds"][0]["proposed"]["note"]
    return note


def ruled(page: str) -> set[str]:
    """The branches of the first stage whose cards say that rules made them."""
    cards = re.findall(r'<article class="branch [a-z]*" id="branch-0-([a-z-]+)">(.*?)</article>', page, re.S)
    return {name for name, card in cards if RULES in card}


def test_what_rules_made_in_a_models_place_says_so(tmp_path: Path) -> None:
    account = whole_account()
    assert RULES not in page_of(tmp_path, account)
    note_of(account)["filled"] = ["b", "c", "gone"]
    page = page_of(tmp_path, account)
    assert ruled(page) == {"b", "c"}
    assert f"2 of 8 candidates by {RULES}" in page.split("</header>")[0]
    # Older accounts have a number: the last ones.
    note_of(account)["filled"] = 2
    assert ruled(page_of(tmp_path, account)) == {"b", "c"}
    note_of(account)["filled"] = 3
    assert ruled(page_of(tmp_path, account)) == {"a", "b", "c"}
    note_of(account)["filled"] = 0
    assert RULES not in page_of(tmp_path, account)
    # With some left out nobody knows which are left.
    note_of(account).update(filled=2, left_out=["d: only 3 are tried"])
    page = page_of(tmp_path, account)
    assert ruled(page) == set() and f"2 candidates are by {RULES}; this account doesn" in page


@pytest.mark.parametrize("filled", [True, None, -1, "b", {"b": 1}, [["b"], 7], 1.5, 10**9])
def test_a_strange_note_makes_a_page(tmp_path: Path, filled: object) -> None:
    account = whole_account()
    note_of(account).update(filled=filled, left_out=filled, rules=filled, exhausted=filled)
    assert page_of(tmp_path, account).endswith("</html>\n")


def test_what_was_left_out_and_a_record_that_ended_are_told(tmp_path: Path) -> None:
    account = whole_account()
    note_of(account)["left_out"] = ["z: only 3 are tried", "<i>: the same as candidate a"]
    second = account["stages"][1]
    second |= {"card": None, "card_note": {"exhausted": "the record holds 1 of the Critic's cards"}}
    second["rounds"][0]["proposed"] |= {"candidates": [], "note": {"exhausted": "the record holds 1 rounds of <b>"}}
    page = page_of(tmp_path, account)
    first, then = page.split('id="stage-0"')[1].split('id="stage-1"')
    assert "Left out, not tried" in first and "<li>z: only 3 are tried</li><li>&lt;i&gt;: the same as" in first
    assert "There is none: the record holds 1 of the Critic" in then
    assert "Nothing was proposed: the record holds 1 rounds of &lt;b&gt;." in then


def test_a_record_of_rules_is_by_rules_and_one_diagnosis_by_rules_is_one(tmp_path: Path) -> None:
    account = whole_account() | {"proposer": "recorded:runs/other"}
    account["stages"][1]["card_note"] = account["stages"][0]["rounds"][0]["review_note"] = {"rules": True}
    page = page_of(tmp_path, account)
    assert page.count("<h3>Diagnosis by rules") == page.count("<h3>Review by rules") == 1
    assert page.count("<h3>The critic") == 2
    for one in account["stages"]:
        one["card_note"] = {"rules": True, "flags": []}
        for turn in one["rounds"]:
            turn["proposed"]["note"], turn["review_note"] = {"rules": True}, {"rules": True}
    page = page_of(tmp_path, account)
    main = page.split("<main", 1)[1]
    assert "recorded:runs/other" in page and RULES in page.split("</header>")[0]
    assert ruled(page) == {"a", "b", "c"} and "critic" not in main.lower()


def test_a_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    account = whole_account()
    account["stages"][0]["card_note"] = {"reply": "x" * 100_000}
    page = page_of(tmp_path, account)
    assert "100,000 characters in all" in page
    assert "x" * 20_001 not in page


# ---------------------------------------------------------------- the page in a browser

browser_test = pytest.mark.usefixtures("browser")
Open = Callable[[object], Any]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Open:
    """Open the page of an account; it must ask for nothing and complain of nothing."""

    def opened(account: object) -> Any:
        open_page(browser, write_account(put(tmp_path, account)))
        assert complaints(browser) == []
        assert [r for r in requests(browser) if not r.startswith(("file:", "about:", "data:"))] == []
        return browser

    return opened


def text(page: Any, selector: str) -> str:
    return " ".join(page.find_element("css selector", selector).text.split())


def texts(page: Any, selector: str) -> list[str]:
    return [" ".join(element.text.split()) for element in page.find_elements("css selector", selector)]


@browser_test
def test_the_head_and_the_tree_tell_the_run(show: Open) -> None:
    account = whole_account()
    page = show(account)
    assert text(page, "h1") == "also over flat-mappo on warehouse"
    assert "Seed 3 Proposer smollm2-1.7b" in text(page, "header .facts")
    branches = sum(s["cost"] for s in account["stages"])
    spent = account["final"]["spent"]
    assert texts(page, "header .counts li") == [
        "0.884 final TSR", "7.41 final task return of 8", f"{spent / 1e6:.3g}M environment steps of 12M",
        f"{branches / 1e6:.3g}M of them in branches ({100 * branches / spent:.0f}%)", "2 of 3 changes accepted",
    ]  # fmt: skip
    nodes = texts(page, ".tree > li > p:first-child")
    assert nodes[0] == "Start task reward"
    assert nodes[1:4] == [
        "C0 at 400k ✓ a promoted", "C1 at 900k no change", "C2 at 1.4M ✓ h promoted",
    ]  # fmt: skip
    assert nodes[4] == "End at 2.4M, on spread_out · β 0.30: TSR 0.884, task return 7.41"
    assert texts(page, ".leaves a") == [
        "no change", "✓ a", "b", "c", "no change", "d", "e", "no change", "reference", "f", "g", "✓ h",
    ]  # fmt: skip
    # Each leaf leads to its branch.
    targets = page.execute_script(
        "return [...document.querySelectorAll('.leaves a')].map((a) => !!document.getElementById(a.hash.slice(1)))"
    )
    assert targets == [True] * 12
    assert texts(page, ".m-return .stage-name") == ["C0", "C1", "C2"]


@browser_test
def test_a_stage_shows_winner_reasons_and_advice(show: Open) -> None:
    account = whole_account()
    page = show(account)
    won = text(page, "#branch-0-a")
    assert "✓ promoted" in won
    assert "last_k is" in won
    assert "Even weights over the whole task" in won
    assert texts(page, ".branch.won h4") == ["a balanced", "h allocation rebalance"]
    assert "✕ not judged" in text(page, "#branch-0-c")
    assert "its checkpoint is missing" in text(page, "#branch-0-c")
    scores = account["stages"][0]["verdict"]["scores"]
    assert f"score {scores['b']:.4f}, a has {scores['a']:.4f}" in text(page, "#branch-0-b")
    reason = account["stages"][1]["verdict"]["reasons"][0]
    assert "✕ best, but refused" in text(page, "#branch-1-d")
    assert reason.removeprefix("d: ") in text(page, "#branch-1-d")
    assert text(page, "#stage-1 .gate").startswith(f"The gate no change {reason}")
    assert "Advice only: it decides nothing." in text(page, "#stage-1 .advice")
    assert "d leads early and stays ahead." in text(page, "#stage-1 .advice")
    assert texts(page, "#stage-1 .flags li") == ["low coverage", "unstable behavior"]
    assert "Robots take packages up early" in text(page, "#stage-1 .card")
    rows = texts(page, "#stage-0 .square tbody tr")
    summary = account["stages"][0]["summaries"]["a"]
    order = ("last_k", "auc", "final", "best", "std", "spike_gap", "score")
    assert rows[1] == "a " + " ".join(f"{summary[n]:.3f}" for n in order).replace("-", "−") + " ✓ promoted"
    assert [row.split()[0] for row in rows] == ["no", "a", "b", "c"]
    # All of a stage's charts have the same axes, and a branch is drawn against the control.
    labels = {
        tuple(texts(card, ".m-return .chart text")) for card in page.find_elements("css selector", "#stage-2 .branch")
    }
    assert len(labels) == 1
    assert "no change ends at" in page.find_element("css selector", "#branch-2-h svg.chart").get_attribute("aria-label")
    # Prompts and replies are folded away.
    assert "You are the Generator" not in text(page, "#stage-2")
    page.execute_script("document.querySelectorAll('#stage-2 details').forEach((d) => { d.open = true; })")
    assert "You are the Generator, round 2. Propose 1 candidates." in text(page, "#stage-2")


@browser_test
def test_the_switch_changes_the_measure_of_all_charts(show: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    page = show(whole_account())
    seen = """return ['return', 'tsr'].map((m) => [...document.querySelectorAll('.m-' + m)]
        .filter((e) => e.getClientRects().length).length)"""
    shown, hidden = page.execute_script(seen)
    assert (shown > 10, hidden) == (True, 0)
    assert "task return" in texts(page, ".overview .chart .name")  # what the gate judges by
    page.find_element("css selector", "label[for=show-tsr]").click()
    assert page.execute_script(seen) == [0, shown]
    assert "TSR" in texts(page, ".overview .chart .name")
    page.find_element("id", "show-tsr").send_keys(Keys.ARROW_LEFT)
    assert page.execute_script(seen) == [shown, 0]


@browser_test
def test_rules_are_labelled_as_rules(show: Open) -> None:
    page = show(whole_account() | {"proposer": "heuristic"})
    assert "Proposer heuristic rules, no model" in text(page, "header .facts")
    assert text(page, "#stage-0 .card h3") == "Diagnosis by rules rules, no model"
    assert text(page, "#stage-0 .advice h3") == "Review by rules advisory"
    assert "critic" not in text(page, "main").lower()


def under_way() -> Document:
    """Stopped in the middle of the last stage's branches."""
    account = whole_account()
    account["final"] = None
    last = account["stages"][2]
    last |= {"verdict": None, "summaries": {}, "lead": {}, "rounds": last["rounds"][:1]}
    last["branches"] = last["branches"][:3]
    last["branches"][2]["curve"] = []
    last["rounds"][0] |= {"review": None, "review_note": None}
    account["mainline"] = [p for p in account["mainline"] if p["step"] <= 1_400_000]
    account["segments"] = account["segments"][:3]
    return account


@browser_test
def test_a_run_under_way_shows_what_there_is(show: Open) -> None:
    page = show(under_way())
    assert "This run is not finished" in text(page, "header")
    assert texts(page, ".tree > li")[3].startswith("C2 at 1.4M undecided yet")
    assert texts(page, ".tree > li")[4] == "under way …"
    assert "not judged yet" in text(page, "#branch-2-f")
    assert "in no branch" in text(page, "#branch-2-g")
    assert text(page, "#stage-2 .gate") == "The gate No verdict yet."
    assert page.find_elements("css selector", "#branch-2-f svg.chart") == []


BARE: Document = {
    "format": 1, "method": "sparse", "base": "qmix", "environment": "search", "seed": 0, "steps": 1000,
    "proposer": "heuristic", "best_return": 1.0, "vocabulary": "", "stages": [], "mainline": [], "segments": [],
    "final": None,
}  # fmt: skip


@browser_test
@pytest.mark.parametrize("case", ["just begun", "fixed", "no branches", "only a stage", "one point"])
def test_methods_without_branches_and_beginnings_make_a_page(show: Open, case: str) -> None:
    account = copy.deepcopy(BARE)
    point = {"step": 500, "spent": 500, "tsr": 0.5, "task_return": 0.5, "segment": "r", "config": "carry_to_zone"}
    if case in ("fixed", "one point"):
        account |= {"mainline": [point], "segments": [{"run": "r", "from": 0, "to": None, "config": CARRY, "why": "x"}]}
    if case == "fixed":
        account["mainline"].append(point | {"step": 1000, "spent": 1000, "tsr": None})
        account["final"] = {"config": CARRY, "tsr": None, "task_return": 0.5, "steps": 1000, "spent": 1000}
    if case == "no branches":
        account = whole_account() | {"method": "also-no-branch"}
        for one in account["stages"]:
            one |= {"branches": [], "summaries": {}, "verdict": None, "cost": 0, "lead": {}}
    if case == "only a stage":
        account["stages"] = [{"name": "C0", "at": 0, "spent": 0, "current": None, "evidence": None, "card": None}]
    page = show(account)
    if case == "just begun":
        assert "The mainline has no evaluation yet." in text(page, "#run")
    if case in ("fixed", "one point"):
        assert "carry_to_zone · β 0.30" in texts(page, ".overview .legend li")
    if case == "no branches":
        assert texts(page, ".tree .verdict") == ["no branches were tried"] * 3
        assert "Even weights over the whole task" in text(page, "#branch-0-a")
        assert page.find_elements("css selector", ".stage-name") == []
    if case == "only a stage":
        assert "None was collected." in text(page, "#stage-0")
        assert "undecided yet" in text(page, "#stage-0 .outcome")


@browser_test
def test_hostile_text_is_shown_and_never_run(show: Open) -> None:
    attack = (
        "</script><script>window.hurt=1</script></style><img src=x onerror='window.hurt=2'>"
        '"onmouseover=alert(1) <!--\u2028&lt;\x00\x1b[31m\u202egnorw\u202c __BODY__ __STYLE__ ' + "W" * 300
    )
    account = whole_account()
    account |= {"method": attack, "environment": attack, "proposer": attack, "vocabulary": f"- carry: {attack}"}
    one = account["stages"][0]
    one["name"] = one["rounds"][0]["proposed"]["stage"] = attack
    one["card"] = {attack: attack, "list": [attack, {"deep": [attack]}]}
    one["card_note"] = {"calls": [{"prompt": attack, "reply": attack}]}
    one["rounds"][0]["review"]["short_reason"] = attack
    one["evidence"] = {"flags": [attack], "curve": {attack: attack}, "behaviour": attack}
    wild = {"id": attack, "type": attack, "rationale": attack,
            "config": {"mode": attack, "beta": 1e9, "weights": {attack: -3, "carry": 1e9}}}  # fmt: skip
    one["rounds"][0]["proposed"]["candidates"].append(wild)
    one["branches"].append(one["branches"][1] | {"name": attack, "config": wild["config"], "problem": attack})
    one["verdict"]["rejected"][attack] = attack
    one["verdict"]["reasons"].append(attack)
    one["summaries"][attack] = {"score": 0.5}
    account["segments"][0]["why"] = account["segments"][0]["run"] = attack
    account["mainline"][0] |= {"segment": "?", "config": attack}
    page = show(account)
    page.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.execute_script("return window.hurt") is None
    assert page.execute_script("return document.querySelectorAll('main img, script, [onmouseover]').length") == 0
    assert page.execute_script("return document.querySelectorAll('style').length") == 1
    assert "</script><script>window.hurt=1</script>" in text(page, "#stage-0 .card")
    assert "[U+202E]gnorw[U+202C] __BODY__ __STYLE__" in text(page, "#stage-0 .card")
    try:
        emulate(page, width=400, height=800)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 400
    finally:
        emulate(page)


@browser_test
def test_names_colours_and_narrow_screens(show: Open) -> None:
    page = show(whole_account(seeds=2))
    nameless = """return [...document.querySelectorAll('input, nav, svg[role=img], section, [role=region]')].filter(
        (e) => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length)).length"""
    assert page.execute_script(nameless) == 0
    assert page.execute_script(
        "const ids = [...document.querySelectorAll('[id]')].map((e) => e.id); return ids.length - new Set(ids).size"
    ) == 0  # fmt: skip
    back = "return getComputedStyle(document.body).backgroundColor"
    try:
        emulate(page, prefers_color_scheme="light")
        light = page.execute_script(back)
        emulate(page, prefers_color_scheme="dark")
        assert page.execute_script(back) != light
        emulate(page, width=360, height=760)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        emulate(page)
