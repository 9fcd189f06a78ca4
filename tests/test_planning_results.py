"""What docs/results/planning.md says is what was measured, and what was measured is what was wanted."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE, FIGURES = ROOT / "docs/results/planning.md", ROOT / "docs/results/planning.json"


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "planning_cost.py"))


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return loaded


def test_every_table_of_the_page_is_that_of_the_figures(tool: dict[str, Any], result: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = dict(re.findall(r"<!-- (.*?) -->\n(.*?)\n<!-- end -->", text, re.DOTALL))
    assert shown == tool["tables"](result) and len(shown) == 8
    assert text.count("<!-- end -->") == len(shown)


def test_the_page_says_how_it_was_measured(result: dict[str, Any]) -> None:
    assert f"$ OMP_NUM_THREADS=1 {result['command']}\n" in PAGE.read_text(encoding="utf-8")
    assert result["cores"] == 2 and set(result["versions"]) == {"echelon", "python", "torch", "numpy"}


def test_what_was_wanted_was_measured(tool: dict[str, Any], result: dict[str, Any]) -> None:
    assert {int(worlds) for worlds in result["speed"]} >= {64} and min(map(int, result["speed"])) >= 64
    made = tool["claims"](result)
    # Three ways to plan for each number of worlds, their success, the naive cost, the replay.
    assert len(made) == 3 * len(result["speed"]) + 3 + 2
    assert [claim for claim, _, holds in made if not holds] == []


def test_ratios_and_differences_follow_from_what_was_recorded(result: dict[str, Any]) -> None:
    """By another way than the tool's: from the turns and the runs themselves."""
    for found in result["speed"].values():
        rate = {name: sum(t["steps"] for t in r["turns"]) / sum(t["seconds"] for t in r["turns"])
                for name, r in found.items()}  # fmt: skip
        for name, r in found.items():
            assert r["pooled_ratio"] == pytest.approx(rate[name] / rate["hungarian"])
            assert r["ratio"]["min"] <= r["ratio"]["median"] <= r["ratio"]["max"]
            assert len(r["turns"]) == result["settings"]["turns"]
        assert found["hungarian"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    for r in result["success"].values():
        differences = [run["own"]["tsr"] - run["model"]["tsr"] for run in r["runs"]]
        assert r["tsr_difference"]["value"] == pytest.approx(sum(differences) / len(differences))
        assert [run["seed"] for run in r["runs"]] == list(range(result["settings"]["seeds"]))


def test_the_rated_prompt_is_the_same_function_either_way(result: dict[str, Any]) -> None:
    assert {run["own"]["tsr"] - run["model"]["tsr"] for run in result["success"]["rated"]["runs"]} == {0}
    assert {run["own"]["makespan"] - run["model"]["makespan"] for run in result["success"]["rated"]["runs"]} == {0}


def test_tables_are_put_between_their_marks_and_nowhere_else(tool: dict[str, Any], tmp_path: Path) -> None:
    cache = {"steps": 1000, "asked": 75, "decisions": 100, "spared": 0.25}
    told = {"replay": {
        "metrics_equal": True, "weights_equal": False, "steps": 2048, "subgoals": 90, "late_plans": 7,
        "outdated_plans": 2, "record_bytes_per_million": 3.14e6, "told_bytes_per_million": 0.0,
    }}  # fmt: skip
    assert tool["cache_table"](cache).splitlines()[-1] == "| 1,000 | 100 | 75 | 25.0% |"
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- Replay -->\nold\n<!-- end -->\nb\n<!-- Success -->\nkept\n<!-- end -->\n", "utf-8")
    for _ in range(2):
        tool["write_page"](page, told)
        text = page.read_text("utf-8")
        assert text == f"a\n<!-- Replay -->\n{tool['replay_table'](told['replay'])}\n<!-- end -->\nb\n" + (
            "<!-- Success -->\nkept\n<!-- end -->\n"
        )
    assert "| weights the same | no |" in text and "| record, MB a million steps | 3.1 |" in text


def test_a_claim_that_fails_says_so(tool: dict[str, Any], result: dict[str, Any]) -> None:
    worse = json.loads(json.dumps(result))
    worse["speed"]["64"]["rated"]["pooled_ratio"] = 0.79
    worse["success"]["letters, student, free"]["tsr_difference"]["value"] = -0.021
    worse["replay"]["weights_equal"] = False
    failed = [claim for claim, _, holds in tool["claims"](worse) if not holds]
    assert (
        len(failed) == 3 and failed[0].startswith("rated, 64 worlds") and failed[1].startswith("letters, student, free")
    )
    assert tool["claims_table"](tool["claims"](worse)).count("**fails**") == 3
