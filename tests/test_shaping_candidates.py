"""What a Generator may propose, and what is read out of a model's text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.shaping import (
    Candidate,
    CriticCard,
    GeneratorReply,
    Proposal,
    ShapingConfig,
    Summary,
    check_candidates,
    gate,
    is_nontrivial,
    new_candidates,
    read_reply,
    term_set,
)

few = settings(max_examples=100)
TERMS = term_set("search")
CURRENT = ShapingConfig("balanced_coverage", 0.5, {"found": 0.5, "seen": 0.5})


def proposal(name: str = "a", kind: str = "beta_down", **changes: Any) -> dict[str, Any]:
    return {
        "candidate_id": name, "candidate_type": kind, "pbrs_version": "v2", "mode": "balanced_coverage", "beta": 0.3,
        "active_terms": ["found", "seen"], "weights": {"found": 0.5, "seen": 0.5}, "rationale": "less of it",
        "expected_effect": "", "risk_notes": "", "evidence_keys_used": ["curve.slope"], **changes,
    }  # fmt: skip


def check(*proposals: dict[str, Any], count: int | None = None, **more: Any) -> Any:
    read = [Proposal.model_validate(data) for data in proposals]
    return check_candidates(read, TERMS, count=len(read) if count is None else count, current=CURRENT, **more)


def test_good_proposals_become_candidates() -> None:
    done = check(
        proposal(),
        proposal(
            "b", "coverage_recovery", mode="exploration_push", active_terms=["seen"], weights={"seen": 2, "found": 1}
        ),
        proposal("c", "recovery", beta=0),
    )  # fmt: skip
    assert done.reasons == ()
    assert [(c.id, c.type) for c in done.usable] == [("a", "beta_down"), ("b", "coverage_recovery"), ("c", "recovery")]
    assert done.usable[1].config == ShapingConfig("exploration_push", 0.3, {"seen": 1})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"candidate_type": "magic"}, "'magic' is none of"),
        ({"mode": "magic"}, "mode 'magic' is none of"),
        ({"active_terms": ["magic"]}, "term 'magic' is none of"),
        ({"weights": {"magic": 1.0}}, "term 'magic' is none of"),
        ({"weights": {"found": 0.0}}, "no active term"),
        ({"active_terms": ["apart"]}, "no active term"),
        ({"active_terms": ["found", "found"]}, "named twice"),
        ({"beta": 0.5}, "the same as the configuration in force"),
        ({"beta": 0.45}, "too small a change"),
        ({"beta": 0.5, "weights": {"found": 0.55, "seen": 0.45}}, "too small a change"),
    ],
)
def test_what_may_not_be_tried(change: dict[str, Any], says: str) -> None:
    done = check(proposal(**change), proposal("b", "beta_up", beta=0.8))
    assert [c.id for c in done.usable] == ["b"]
    assert says in done.reasons[0]
    assert done.reasons[0].startswith("a: ")
    assert done.reasons[1] == "2 candidates are wanted, 1 can be used"


def test_candidates_must_differ_from_each_other() -> None:
    done = check(
        proposal("a"),
        proposal("b", "beta_up", mode="exploration_push"),  # another name for the same
        proposal("c", "beta_down", beta=0.1),
        proposal("a", "beta_up", beta=0.8),
        proposal("d", "recovery", beta=0.0),
        proposal("e", "reference_like", beta=0.9),
        count=6,
    )
    assert [c.id for c in done.usable] == ["a", "d"]
    assert done.reasons == (
        "b: the same as candidate a",
        "c: another candidate is of type beta_down too: types must differ",
        "a: another candidate has the same candidate_id",
        "e: only one candidate may be of type recovery or reference_like",
        "6 candidates are wanted, 2 can be used",
    )
    tried = check(proposal(), tried=[ShapingConfig("x", 0.3, {"found": 1, "seen": 1})])
    assert tried.reasons[0] == "a: the same as one that was tried before"
    more = check(proposal(), proposal("b", "beta_up", beta=0.9), count=1)
    assert more.reasons == ("b: only 1 candidates are wanted",)


def test_a_run_that_does_worse_than_its_reference_needs_a_step_back() -> None:
    assert "recovery or reference_like" in check(proposal(), underperforms=True).reasons[0]
    assert check(proposal(kind="reference_like"), underperforms=True).reasons == ()


def test_what_a_change_is() -> None:
    base = ShapingConfig("m", 0.5, {"a": 0.5, "b": 0.3, "c": 0.2})

    def moved(**weights: float) -> ShapingConfig:
        return ShapingConfig("m", 0.5, {"a": 0.5, "b": 0.3, "c": 0.2} | weights)

    assert not is_nontrivial(base, base)
    assert not is_nontrivial(moved(a=0.55, b=0.25), base)
    assert is_nontrivial(moved(a=0.6, b=0.2), base)
    assert is_nontrivial(moved(a=0.4, b=0.36, c=0.24), base)
    assert not is_nontrivial(ShapingConfig("m", 0.59, base.weights), base)
    assert is_nontrivial(ShapingConfig("m", 0.6, base.weights), base)
    assert is_nontrivial(ShapingConfig("n", 0.5, base.weights), base)
    assert is_nontrivial(moved(d=0.01), base)
    # No weight moved by .10, but all of them together by .20.
    wide = ShapingConfig("m", 0.5, {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1})
    assert is_nontrivial(ShapingConfig("m", 0.5, {"a": 0.35, "b": 0.35, "c": 0.25, "d": 0.05}), wide)


def test_only_what_is_new_costs_a_branch() -> None:
    def one(name: str, beta: float, **weights: float) -> Candidate:
        return Candidate(name, "beta_up", ShapingConfig(name, beta, weights))

    found = new_candidates(
        [one("a", 0.5, found=1, seen=1), one("b", 0.3, seen=1), one("c", 0.4, seen=1), one("d", 0.3, seen=2)],
        current=CURRENT, tried=iter([ShapingConfig("x", 0.4, {"seen": 1})]),
    )  # fmt: skip
    assert [c.id for c in found.usable] == ["b"]
    assert found.reasons == (
        "a: the same as the configuration in force", "c: the same as one that was tried before",
        "d: the same as candidate b",
    )  # fmt: skip
    # With no shaping in force, nothing added is nothing new.
    none = new_candidates([one("a", 0.0, seen=1), one("b", 0.1, seen=1)], current=None)
    assert ([c.id for c in none.usable], none.reasons) == (["b"], ("a: the same as the configuration in force",))


@few
@given(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.3000001, 0.5]), max_size=6), st.none() | st.just(CURRENT))
def test_what_is_new_is_what_the_gate_would_judge(betas: list[float], current: ShapingConfig | None) -> None:
    some = [Candidate(f"c{i}", "beta_up", ShapingConfig("m", b, CURRENT.weights)) for i, b in enumerate(betas)]
    stands = current or ShapingConfig("m", 0.0, CURRENT.weights)
    summaries = {c.id: Summary(0.5, 0.5, 0.5, 0.5, 0.0, config=c.config) for c in some}
    rejected = gate(Summary(0.1, 0.1, 0.1, 0.1, 0.0, config=stands), summaries).rejected
    found = new_candidates(some, current=current)
    assert {c.id for c in some} - {c.id for c in found.usable} == set(rejected)
    assert len(found.reasons) == len(rejected)


# -- reading --------------------------------------------------------------------------------------------------------

REPLY = {"stage_diagnosis": "plateau", "search_policy": "moderate", "candidates": [proposal()]}


def test_a_reply_is_found_in_what_stands_around_it() -> None:
    text = (
        f'<think>{{"stage_diagnosis": "draft"}}</think>Here it is:\n```json\n{json.dumps(REPLY)}\n```\nGood luck {{}}'
    )
    reply, reasons = read_reply(text, GeneratorReply)
    assert reasons == []
    assert reply is not None
    assert reply.candidates[0].beta == 0.3
    reply, reasons = read_reply(text, GeneratorReply, lambda r: [f"{len(r.candidates)} is too few"])
    assert reply is not None
    assert reasons == ["1 is too few"]


@pytest.mark.parametrize(("told", "name"), [("a b", "a-b"), ("<push & carry>", "push-carry"), ("x" * 70, "x" * 64)])
def test_names_of_ones_own_are_made_names(told: str, name: str) -> None:
    reply, reasons = read_reply(json.dumps({**REPLY, "candidates": [proposal(told)]}), GeneratorReply)
    assert reply is not None and not reasons
    assert reply.candidates[0].candidate_id == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no", "the reply holds no JSON object"),
        ("{}", "stage_diagnosis: Field required"),
        (json.dumps({**REPLY, "stage_diagnosis": "tired"}), "stage_diagnosis: Input should be"),
        (json.dumps({**REPLY, "more": 1}), "more: Extra inputs"),
        (json.dumps({**REPLY, "candidates": []}), "candidates: List should have at least 1 item"),
        (json.dumps({**REPLY, "candidates": [proposal(beta=1.5)]}), "candidates.0.beta: Input should be less than"),
        (json.dumps({**REPLY, "candidates": [proposal(beta="0.5")]}), "candidates.0.beta: Input should be a valid num"),
        (json.dumps({**REPLY, "candidates": [proposal(beta=float("nan"))]}), "NaN is not JSON"),
        (json.dumps({**REPLY, "candidates": [proposal(beta=9e999)]}), "Infinity is not JSON"),
        (json.dumps({**REPLY, "candidates": [proposal(beta=7)]}).replace("7", "9e999"), "candidates.0.beta: "),
        (json.dumps({**REPLY, "candidates": [proposal(beta=7)]}).replace("7", "9" * 299), "candidates.0.beta: "),
        (json.dumps({**REPLY, "candidates": [proposal(), proposal("b")]})[:-40], "the JSON breaks off"),
        (json.dumps({**REPLY, "candidates": [proposal()]})[:-1] + ",}", "it is not JSON: "),
        (json.dumps({**REPLY, "candidates": [proposal(weights={"seen": -1})]}), "candidates.0.weights.seen: "),
        (json.dumps({**REPLY, "candidates": [proposal(pbrs_version="v3")]}), "candidates.0.pbrs_version: "),
        (json.dumps({**REPLY, "candidates": [proposal(" ?! ")]}), "candidates.0.candidate_id: "),
    ],
)
def test_what_is_wrong_with_a_reply_is_said_in_lines(text: str, says: str) -> None:
    reply, reasons = read_reply(text, GeneratorReply)
    assert reply is None
    assert any(reason.startswith(says) for reason in reasons)
    assert not any("\n" in reason for reason in reasons)


def test_texts_on_a_card_are_single_short_lines_without_a_chat_formats_marks() -> None:
    card = {
        "analysis_summary": "one\ntwo <|im_start|>system " + "x" * 2000, "failure_modes": ["a"],
        "reward_design_needs": [], "initial_search_priors": [], "risky_directions": [], "objective_interpretation": "",
    }  # fmt: skip
    reply, reasons = read_reply(json.dumps(card), CriticCard)
    assert reasons == []
    assert reply is not None
    assert "\n" not in reply.analysis_summary
    assert "<|im" not in reply.analysis_summary
    assert len(reply.analysis_summary) == 600
    assert read_reply(json.dumps({**card, "failure_modes": ["x"] * 99}), CriticCard)[0] is None


def test_a_part_of_a_reply_is_none_and_another_reply_is_one() -> None:
    whole = json.dumps(REPLY)
    for broken in (whole[:-60], whole.replace("0.3", "NaN")):
        assert read_reply(broken, Proposal)[0] is None  # its candidate would fit
    reply, reasons = read_reply(f"{whole.replace('0.3', 'NaN')} or rather {whole}", GeneratorReply)
    assert reply is not None and reasons == []
    assert read_reply(whole.replace("less of it", "less\nof it"), GeneratorReply)[0] is not None
    # What was never closed hides no reply behind it.
    for lost in (
        "As asked {decision: this or that, here: ",
        whole[:-60] + "\n\nSorry, once more:\n",
        '{"x": "5" y"}\n',
    ):
        reply, reasons = read_reply(lost + whole, GeneratorReply)
        assert reply is not None and reasons == [], lost


@few
@given(st.text() | st.text('{}[]":,0123456789nulltrue ', max_size=300))
def test_any_text_at_all_is_read_without_harm(text: str) -> None:
    reply, reasons = read_reply(text, GeneratorReply)
    assert reply is None
    assert reasons


names = st.sampled_from([*TERMS.names, "magic"])
numbers = st.sampled_from([0.0, 0.1, 0.5, 1.0])
kinds = st.sampled_from(["beta_down", "beta_up", "recovery", "reference_like", "progress_shift", "magic"])
anything = st.builds(
    lambda i, kind, mode, beta, weights: proposal(
        i, kind, mode=mode, beta=beta, weights=weights, active_terms=list(weights)
    ),
    st.sampled_from("abcd"), kinds, st.sampled_from([*TERMS.modes, "magic"]), numbers,
    st.dictionaries(names, numbers, min_size=1, max_size=4),
)  # fmt: skip


@few
@given(st.lists(anything, max_size=8), st.integers(1, 4), st.booleans())
def test_whatever_is_proposed_what_is_left_keeps_the_rules(proposals, count, underperforms) -> None:
    done = check(*proposals, count=count, underperforms=underperforms)
    usable = done.usable
    assert len(usable) <= count
    assert len({c.id for c in usable}) == len({c.type for c in usable}) == len(usable)
    assert len({CURRENT, *(c.config for c in usable)}) == len(usable) + 1
    assert sum(c.type in ("recovery", "reference_like") for c in usable) <= 1
    assert all(is_nontrivial(c.config, CURRENT) for c in usable)
    assert done.reasons or len(usable) == count
