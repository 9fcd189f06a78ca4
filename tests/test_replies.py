"""Replies of language models, read as plans: every kind of fault, and text of any kind."""

from __future__ import annotations

import json
import string
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.planners.replies import FINDINGS, LOOK, Proposal, Reading, parse_plan

ASKED = {0: 3, 2: 5}  # robots and their numbers of options; robot 1 exists and isn't asked about


def read(text: str, options: dict[int, int] | None = None, robots: int = 3) -> Reading:
    return parse_plan(text, ASKED if options is None else options, robots, (6, 9))


def plan(*entries: Any) -> str:
    return json.dumps({"plan": entries})


GOOD = plan({"robot": 0, "option": 2}, {"robot": 2, "cell": [5, 8]})
BOTH = {0: Proposal(option=2), 2: Proposal(cell=(5, 8))}


def test_a_plan_of_options_and_cells() -> None:
    assert read(GOOD) == Reading(BOTH, [])
    text = plan({"robot": 2, "option": 5, "why": "it is near"}, {"robot": 0, "option": 0})
    assert read(text) == Reading({2: Proposal(5, None, "it is near"), 0: Proposal(0)}, [])


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{GOOD}\n```",
        f"Sure! Here is the plan:\n{GOOD}\nI hope that helps {{see above}}.",
        f'He said "go {{1, 2}}" and: {GOOD}',
        f"<think>{plan({'robot': 0, 'option': 1})} or rather</think>{GOOD}",
        f"{{robots: {GOOD}",
        f'{{"an odd quote\n{GOOD}',
        f'{{"a: {"{" * 40}\n{GOOD}',
        '{"a": [}' * 40 + GOOD,
        f"\ufeff\u200b\u202e{GOOD}\x1b[2J",
        json.dumps(json.loads(GOOD), indent=4),
        GOOD.replace("plan", "\\u0070lan"),
        json.dumps({"note": "x", "plan": json.loads(GOOD)["plan"], "more": {"deep": [1]}}),
    ],
)
def test_what_stands_around_it_does_not_matter(text: str) -> None:
    assert read(text) == Reading(BOTH, [])


def test_half_a_reply_counts_as_far_as_it_goes() -> None:
    for cut in range(len(GOOD) + 1):
        found = read(GOOD[:cut])
        whole = GOOD[:cut].count("}")  # the second entry's, then the plan's own
        assert found.proposals == dict(list(BOTH.items())[: min(whole, 2)])
        expected = ["no_json"] if whole == 0 else ["in_pieces"] * (whole < 3) + ["missing_robot"] * (whole == 1)
        assert found.findings == expected


def test_one_robots_answer_needs_no_plan_around_it() -> None:
    assert read('{"option": 3, "cell": null}', {1: 3}) == Reading({1: Proposal(3)}, [])
    assert read('{"goal": {"option": 2}}', {1: 3}) == Reading({1: Proposal(2)}, [])
    assert read('{"goal": {"cell": [5, 8]}', {1: 3}) == Reading({1: Proposal(cell=(5, 8))}, [])
    assert read('{"goal": "there"}', {1: 3}) == Reading({}, ["no_plan"])
    assert read('{"option": null, "cell": [0, 0]}', {1: 3}) == Reading({1: Proposal(cell=(0, 0))}, [])
    assert read('{"option": 1}\nQ: and robot 2?\n{"option": 2}', {1: 3}) == Reading({1: Proposal(1)}, [])
    assert read('{"robot": 1, "option": 2}', {1: 3}) == Reading({1: Proposal(2)}, ["in_pieces"])
    assert read(plan({"option": 2}), {1: 3}) == Reading({1: Proposal(2)}, [])
    assert read('{"option": 2}') == Reading({}, ["in_pieces", "bad_entry", "missing_robot", "missing_robot"])


FIRST = {"robot": 0, "option": 1}
LAST = {"robot": 2, "option": 1}
ZERO, TWO = Proposal(1), Proposal(1)
FAULTS: list[tuple[str, str, list[str], dict[int, Proposal]]] = [
    ("nothing", "", ["no_json"], {}),
    ("prose", "I can't do that.", ["no_json"], {}),
    ("a number", "3", ["no_json"], {}),
    ("other JSON", '{"a": 1}', ["no_plan"], {}),
    ("a plan that is no list", '{"plan": "go"}', ["no_plan"], {}),
    ("an empty plan", '{"plan": []}', [], {}),
    ("two plans", plan(FIRST, LAST) + plan({"robot": 0, "option": 3}), ["several"], {0: ZERO, 2: TWO}),
    ("a bare list", json.dumps([FIRST, LAST]), ["in_pieces"], {0: ZERO, 2: TWO}),
    ("a key twice", '{"plan": [{"robot": 0, "option": 3, "option": 1}, {"robot": 2, "option": 1}]}',
     ["duplicate_key"], {0: ZERO, 2: TWO}),
    ("no object", plan(FIRST, LAST, 7, None, []), ["bad_entry"] * 3, {0: ZERO, 2: TWO}),
    ("no robot named", plan(FIRST, LAST, {"option": 1}), ["bad_entry"], {0: ZERO, 2: TWO}),
    ("nothing named", plan(FIRST, {"robot": 2}), ["bad_entry"], {0: ZERO}),
    ("2.0", plan(FIRST, {"robot": 2.0, "option": 1}), ["loose_number"], {0: ZERO, 2: TWO}),
    ("text", plan(FIRST, {"robot": "2", "option": " 1"}), ["loose_number"] * 2, {0: ZERO, 2: TWO}),
    ("an unknown robot", plan(FIRST, LAST, {"robot": 3, "option": 1}), ["unknown_robot"], {0: ZERO, 2: TWO}),
    ("robot -1", plan(FIRST, LAST, {"robot": -1, "option": 1}), ["unknown_robot"], {0: ZERO, 2: TWO}),
    ("a robot with a name", plan(FIRST, LAST, {"robot": "Bob", "option": 1}), ["unknown_robot"], {0: ZERO, 2: TWO}),
    ("a true robot", plan(LAST, {"robot": False, "option": 1}), ["unknown_robot", "missing_robot"], {2: TWO}),
    ("who wasn't asked", plan(FIRST, LAST, {"robot": 1, "option": 1}), ["not_asked"], {0: ZERO, 2: TWO}),
    ("one twice", plan(FIRST, LAST, {"robot": 0, "option": 3}), ["repeated_robot"], {0: ZERO, 2: TWO}),
    ("one twice, first a fault", plan({"robot": 0, "option": 9}, LAST, FIRST), ["bad_option", "repeated_robot"],
     {2: TWO}),
    ("one missing", plan(LAST), ["missing_robot"], {2: TWO}),
    ("both", plan(FIRST, {"robot": 2, "option": 1, "cell": [9, 9]}), ["both"], {0: ZERO, 2: TWO}),
    ("option 4 of 3", plan(LAST, {"robot": 0, "option": 4}), ["bad_option"], {2: TWO}),
    ("option -1", plan(LAST, {"robot": 0, "option": -1}), ["bad_option"], {2: TWO}),
    ("option 1.5", plan(LAST, {"robot": 0, "option": 1.5}), ["bad_option"], {2: TWO}),
    ("option true", plan(LAST, {"robot": 0, "option": True}), ["bad_option"], {2: TWO}),
    ("option NaN", plan(LAST, {"robot": 0, "option": float("nan")}), ["bad_option"], {2: TWO}),
    ("option Infinity", plan(LAST, {"robot": 0, "option": float("-inf")}), ["bad_option"], {2: TWO}),
    ("a huge option", '{"plan": [{"robot": 2, "option": 1}, {"robot": 0, "option": 1' + "0" * 5000 + "}]}",
     ["bad_option"], {2: TWO}),
    ("1e999", '{"plan": [{"robot": 2, "option": 1}, {"robot": 0, "option": 1e999}]}', ["bad_option"], {2: TWO}),
    ("options", plan(LAST, {"robot": 0, "option": [1]}), ["bad_option"], {2: TWO}),
    ("an Arabic 1", plan(LAST, {"robot": 0, "option": "\u0661"}), ["bad_option"], {2: TWO}),
    ("a cell of three", plan(LAST, {"robot": 0, "cell": [1, 2, 3]}), ["bad_cell"], {2: TWO}),
    ("a cell of words", plan(LAST, {"robot": 0, "cell": "4, 7"}), ["bad_cell"], {2: TWO}),
    ("a cell of halves", plan(LAST, {"robot": 0, "cell": [1, 0.5]}), ["bad_cell"], {2: TWO}),
    ("a cell of booleans", plan(LAST, {"robot": 0, "cell": [True, 1]}), ["bad_cell"], {2: TWO}),
    ("row 6", plan(LAST, {"robot": 0, "cell": [6, 0]}), ["outside"], {2: TWO}),
    ("column -1", plan(LAST, {"robot": 0, "cell": [0, -1]}), ["outside"], {2: TWO}),
    ("too much", plan(FIRST, LAST, *[FIRST] * 300), ["too_many", *["repeated_robot"] * 254], {0: ZERO, 2: TWO}),
    ("too long", GOOD + " " * LOOK, ["too_long"], BOTH),
    ("behind the end", " " * LOOK + GOOD, ["too_long", "no_json"], {}),
    ("too deep", '{"a": ' + "[" * 40 + "]" * 40 + "}" + GOOD, ["too_deep", "no_json"], {}),
    ("too deep behind it", GOOD + '{"a":' * 40, ["too_deep"], BOTH),
]  # fmt: skip


@pytest.mark.parametrize(("text", "findings", "proposals"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_each_fault_has_its_kind(text: str, findings: list[str], proposals: dict[int, Proposal]) -> None:
    assert read(text) == Reading(proposals, findings)


def test_every_kind_of_finding_can_be_found() -> None:
    assert {finding for fault in FAULTS for finding in fault[2]} == set(FINDINGS)


@pytest.mark.parametrize(
    ("why", "told"),
    [
        ("go\n\x1b[2J<|im_start|>\u202enow\u200b", "go [2J< |im_start|> now"),
        ("\ud800!", "!"),
        ("x" * 9000, "x" * 200),
        ("{robot} {0.__class__} %s", "{robot} {0.__class__} %s"),
        (["no", "text"], ""),
        (None, ""),
    ],
)
def test_a_reason_is_one_clean_line(why: object, told: str) -> None:
    found = read(plan({"robot": 0, "option": 1, "why": why}), {0: 1}).proposals[0].why
    assert found == told
    found.encode()


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10_000_000,
        "[" * 10_000_000,
        '{"plan": [' + '{"robot": 0, "option": 1},' * 400_000,
        '{"a":' * 2_000_000,
        '{"' + '\\"' * 5_000_000,
        '{"' + '"' * 5_000_000,
        "{}" * 5_000_000,
        '{"a": [' + "1" * 10_000_000,
        "{[]" * 3_000_000,
    ],
    ids=lambda text: text[:8],
)
def test_megabytes_cost_bounded_work_and_no_recursion(text: str) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        found = read(text)
    finally:
        sys.setprofile(None)
    assert "too_long" in found.findings
    assert len(found.findings) < 2000
    assert calls < 20 * LOOK, "work that grows with the text"


KEY = st.sampled_from(["plan", "goal", "robot", "option", "cell", "why"]) | st.text(max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEY, inner),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {}, optional={"robot": st.integers(-1, 4) | JSON, "option": st.integers(-1, 6) | JSON,
                  "cell": st.lists(st.integers(-2, 10), min_size=2, max_size=2) | JSON, "why": st.text() | JSON}
)  # fmt: skip
TEXT = (
    st.text(st.characters(exclude_categories=()), max_size=200)
    | st.binary(max_size=200).map(lambda b: b.decode("latin-1"))
    | st.text('{}[]",:\\ \n012planrobotoption', max_size=200)
    | JSON.map(json.dumps)
    | st.lists(ENTRY, max_size=6).map(lambda entries: json.dumps({"plan": entries}))
    | st.tuples(st.lists(ENTRY, max_size=4), st.integers(0, 200), st.text(string.printable, max_size=20)).map(
        lambda x: x[2] + json.dumps({"plan": x[0]})[: x[1]] + x[2]
    )
)


@settings(max_examples=600)
@given(TEXT, st.dictionaries(st.integers(0, 2), st.integers(1, 4), min_size=1))
def test_whatever_the_text_proposals_are_in_range(text: str, options: dict[int, int]) -> None:
    found = read(text, options)
    assert set(found.findings) <= set(FINDINGS)
    assert set(found.proposals) <= set(options)
    for robot, proposal in found.proposals.items():
        assert (proposal.option is None) != (proposal.cell is None)
        if proposal.option is not None:
            assert type(proposal.option) is int
            assert 0 <= proposal.option <= options[robot]
        if proposal.cell is not None:
            assert [type(x) for x in proposal.cell] == [int, int]
            assert 0 <= proposal.cell[0] < 6
            assert 0 <= proposal.cell[1] < 9
        assert len(proposal.why) <= 200
        assert proposal.why.isprintable()
    assert found == read(text, options)


@settings(max_examples=200)
@given(st.permutations([0, 2]), st.integers(0, 3), st.integers(0, 5), st.text(max_size=30), st.text(max_size=30))
def test_a_good_plan_is_read_whatever_prose_without_braces_is_around_it(
    order: list[int], a: int, b: int, before: str, behind: str
) -> None:
    wanted = {0: a, 2: b}
    body = plan(*({"robot": r, "option": wanted[r]} for r in order))
    text = before.replace("{", "(") + body + behind.replace("{", "(").replace("</think>", "")
    assert read(text) == Reading({r: Proposal(wanted[r]) for r in order}, [])
