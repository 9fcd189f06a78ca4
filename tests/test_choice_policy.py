"""A language model that learns to rate: numbers, gradients, reference, state, files, and what it doesn't do twice."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from echelon.errors import EchelonError
from echelon.llm import CausalChoiceModel, ChoicePolicy, ChoicePrompt, LearningChoice, PolicyConfig, TokenPolicy
from tiny_model import make_tiny_model

SHARED = "You rate what a robot could do next. A: good. B: bad."
QUESTIONS = [f"Package {i}, {i * i} steps away" + ", on the way" * (i % 4) + ". A or B?" for i in range(9)]
NUMBERS = [0.5, -2.0, 1.0, 0.0, 3.0, -0.25, 1.5, -1.0, 0.125]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", words=256)


def load(folder: Path, *, threads: int = 1, seed: int = 0, **changes: Any) -> ChoicePolicy:
    config = PolicyConfig(**{"layers": 1, "rank": 4, "alpha": 8, "lr": 1e-2, "warm_lr": 2e-2, **changes})
    return ChoicePolicy.load(f"hf:{folder}", SHARED, config, dtype="float32", device="cpu", threads=threads, seed=seed)


def grads_of(numbers: Sequence[float]) -> list[NDArray[np.float32]]:
    return [np.full((1, 1), x, np.float32) for x in numbers]


def naive(policy: ChoicePolicy, question: str) -> torch.Tensor:
    """The log-odds by one whole pass of the whole model over the whole prompt, with a gradient."""
    model, tokenizer = policy._trainable.model, policy._trainable.tokenizer
    messages = [{"role": "system", "content": SHARED}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    [[a], [b]] = tokenizer(["A", "B"], add_special_tokens=False)["input_ids"]
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits[a] - logits[b]


def perturb(policy: ChoicePolicy, seed: int = 1) -> None:
    """Move what learns, so that no matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    policy._forget_numbers()


def gradients(policy: ChoicePolicy, items: Sequence[str], numbers: Sequence[float]) -> list[torch.Tensor]:
    policy.backward(items, grads_of(numbers))
    found = []
    for p in policy.parameters():
        assert p.grad is not None
        found.append(p.grad.clone())
        p.grad = None
    return found


def update(policy: ChoicePolicy, items: Sequence[str]) -> None:
    """One step towards A for the first half of the items, towards B for the rest."""
    odds = policy.odds(items)
    good = np.arange(len(items)) < len(items) / 2
    policy.backward(items, grads_of(1 / (1 + np.exp(-odds)) - good))
    policy.step()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapt", "layers"), [("lora", 0), ("lora", 1), ("full", 0), ("full", 1)])
def test_odds_and_gradients_are_those_of_a_whole_pass(tiny: Path, adapt: str, layers: int) -> None:
    policy = load(tiny, adapt=adapt, layers=layers, micro_tokens=200)
    perturb(policy)
    wholes = torch.stack([naive(policy, question) for question in QUESTIONS])
    odds = policy.odds(QUESTIONS)
    assert odds.dtype == np.float32
    np.testing.assert_allclose(odds, wholes.detach(), atol=5e-5)
    assert np.ptp(odds) > 0.1  # the questions differ
    for number, own in zip(policy.evaluate(QUESTIONS), odds, strict=True):
        assert (number.shape, number.dtype, number[0, 0]) == ((1, 1), np.float32, own)
    expected = torch.autograd.grad((wholes * torch.tensor(NUMBERS)).sum(), policy.parameters())
    for own, other in zip(gradients(policy, QUESTIONS, NUMBERS), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@settings(max_examples=10)
@given(picks=st.lists(st.tuples(st.integers(0, 8), st.integers(-3, 3)), min_size=1, max_size=12))
def test_the_gradient_of_a_sum_is_the_sum_of_gradients(
    tiny: Path, single: tuple[ChoicePolicy, list[list[torch.Tensor]]], picks: list[tuple[int, int]]
) -> None:
    policy, alone = single
    found = gradients(policy, [QUESTIONS[i] for i, _ in picks], [float(x) for _, x in picks])
    for k, own in enumerate(found):
        expected = sum((x * alone[i][k] for i, x in picks), torch.zeros_like(own))
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3 * float(alone[0][k].abs().max()))


@pytest.fixture(scope="module")
def single(tiny: Path) -> tuple[ChoicePolicy, list[list[torch.Tensor]]]:
    """A policy, and the gradient of each question's number, each by itself."""
    policy = load(tiny)
    perturb(policy)
    return policy, [gradients(policy, [question], [1.0]) for question in QUESTIONS]


@pytest.mark.parametrize("micro_tokens", [1, 90, 4096])
def test_micro_batches_change_rounding_only(tiny: Path, micro_tokens: int) -> None:
    found = []
    for policy in (load(tiny), load(tiny, micro_tokens=micro_tokens)):
        perturb(policy)
        found.append((policy.odds(QUESTIONS), gradients(policy, QUESTIONS, NUMBERS)))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=2e-5)
    for own, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("layers", [0, 1])
def test_lanes_change_no_bit(tiny: Path, layers: int) -> None:
    one, three = (load(tiny, threads=threads, layers=layers, micro_tokens=90) for threads in (1, 3))
    for k in range(3):
        items = QUESTIONS[k:] + QUESTIONS[:2]
        update(one, items)
        update(three, items)
        np.testing.assert_array_equal(one.odds(QUESTIONS), three.odds(QUESTIONS))
    assert same(one.state_dict(), three.state_dict())


@pytest.mark.parametrize("layers", [0, 1])
def test_checkpointing_computes_layers_again_and_gives_the_same_gradient(tiny: Path, layers: int) -> None:
    found, passes = [], []
    for checkpointing in (False, True):
        policy = load(tiny, checkpointing=checkpointing, layers=layers, micro_tokens=150)
        perturb(policy)
        policy.odds(QUESTIONS)
        counts = watch(policy)
        found.append(gradients(policy, QUESTIONS, NUMBERS))
        passes.append(len(counts[1]))
    assert passes[1] == 2 * passes[0]
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_a_gradient_of_another_shape_is_refused(tiny: Path) -> None:
    policy = load(tiny)
    for items, grads in ((QUESTIONS[:2], grads_of([1.0])), (QUESTIONS[:1], [np.ones((2, 1), np.float32)])):
        with pytest.raises(ValueError, match="one number"):
            policy.backward(items, grads)


def test_numbers_that_are_not_finite_are_one_line(tiny: Path) -> None:
    policy = load(tiny)
    before = policy.state_dict()
    policy.backward(QUESTIONS, grads_of([math.nan] * 9))
    with pytest.raises(EchelonError, match="diverged at update 0"):
        policy.step()
    assert all(p.grad is None for p in policy.parameters())
    assert torch.equal(policy.state_dict()["updates"], before["updates"])
    with torch.no_grad():
        policy.parameters()[0].fill_(math.nan)
    with pytest.raises(EchelonError, match="not finite: lower policy"):
        policy.odds(QUESTIONS)


# --- what is kept ----------------------------------------------------------------------------------------------------


def watch(policy: ChoicePolicy) -> list[list[tuple[int, int]]]:
    """By layer the (rows, tokens) of each pass from now on."""
    layers = policy._trainable.model.base_model.layers
    found: list[list[tuple[int, int]]] = [[] for _ in layers]
    for own, layer in zip(found, layers, strict=True):
        layer.register_forward_pre_hook(lambda _, args, own=own: own.append(tuple(args[0].shape[:2])))
    return found


def tokens(passes: list[tuple[int, int]]) -> int:
    return sum(rows * length for rows, length in passes)


def test_nothing_is_computed_twice_between_steps(tiny: Path) -> None:
    policy = load(tiny, micro_tokens=10**4)
    prefix, lengths = len(policy._prefix), [len(ids) for ids in encoded(policy)]
    low, top = watch(policy)
    policy.odds(QUESTIONS[:5])
    padded = 5 * max(lengths[:5])
    # What all share goes through by itself; the lowest layer has met it when the model was loaded.
    assert (tokens(low), tokens(top)) == (padded, padded + prefix)
    policy.odds(QUESTIONS[4::-1] * 2)
    policy.evaluate(QUESTIONS[1:3])
    policy.score([ChoicePrompt(SHARED, "", ("x", "y"), tuple(QUESTIONS[:2]))])
    assert (tokens(low), tokens(top)) == (padded, padded + prefix)
    policy.odds(QUESTIONS[3:6])  # one of them is new
    assert (tokens(low), tokens(top)) == (padded + lengths[5], padded + prefix + lengths[5])

    for own in (low, top):
        own.clear()
    policy.reference(QUESTIONS[:2])
    policy.reference(QUESTIONS[1::-1])
    assert (tokens(low), tokens(top)) == (0, prefix + 2 * max(lengths[:2]))
    top.clear()
    policy.backward(QUESTIONS[:3], grads_of([1.0, 2.0, 3.0]))
    assert (tokens(low), tokens(top)) == (0, prefix + 3 * max(lengths[:3]))
    policy.step()
    top.clear()
    policy.odds(QUESTIONS[:2])  # after a step all is new but for what the frozen layers made of it
    assert (tokens(low), tokens(top)) == (0, prefix + 2 * max(lengths[:2]))
    policy.reference(QUESTIONS[:2])
    assert tokens(top) == prefix + 2 * max(lengths[:2])


def test_the_prefix_goes_through_once_however_many_parts_there_are(tiny: Path) -> None:
    policy = load(tiny, micro_tokens=1)
    policy.odds(QUESTIONS)
    prefix = len(policy._prefix)
    _, top = watch(policy)
    policy.backward(QUESTIONS, grads_of(NUMBERS))
    assert len(top) == 1 + len(QUESTIONS)
    assert top.count((1, prefix)) == 1


def encoded(policy: ChoicePolicy) -> list[list[int]]:
    policy._encode(QUESTIONS)
    return [policy._ids[question] for question in QUESTIONS]


def test_what_is_kept_has_a_limit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(policy: ChoicePolicy) -> None:
        for k in range(4):
            update(policy, QUESTIONS[2 * k : 2 * k + 3])

    free, bound = load(tiny), load(tiny)
    run(free)
    monkeypatch.setattr("echelon.llm.policy._KEPT", 4 * 64 * 200)  # 200 tokens
    run(bound)
    assert set(free._base) == set(QUESTIONS)
    assert {QUESTIONS[8]} <= set(bound._base) < set(QUESTIONS)
    np.testing.assert_allclose(free.odds(QUESTIONS), bound.odds(QUESTIONS), atol=1e-3)
    again = load(tiny, seed=5)
    again.load_state_dict(bound.state_dict())
    run(bound)
    run(again)
    assert same(bound.state_dict(), again.state_dict())


# --- learning --------------------------------------------------------------------------------------------------------


def test_it_learns_what_it_is_told(tiny: Path) -> None:
    policy = load(tiny)
    for _ in range(30):
        update(policy, QUESTIONS)
    odds = policy.odds(QUESTIONS)
    assert (odds[:5] > 1).all()
    assert (odds[5:] < -1).all()
    assert policy.updates == 30


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_the_reference_stays_until_it_is_anchored(tiny: Path, adapt: str) -> None:
    policy = load(tiny, adapt=adapt)
    first = policy.odds(QUESTIONS)
    np.testing.assert_allclose(np.concatenate(policy.reference(QUESTIONS))[:, 0], first, atol=2e-5)
    for k in range(3):
        update(policy, QUESTIONS)
        held = np.concatenate(policy.reference([*QUESTIONS, f"New {k}?"]))[:9, 0]
        np.testing.assert_allclose(held, first, atol=2e-5)
    moved = policy.odds(QUESTIONS)
    assert np.abs(moved - first).max() > 0.1
    policy.anchor()
    np.testing.assert_array_equal(np.concatenate(policy.reference(QUESTIONS))[:, 0], moved)
    update(policy, QUESTIONS)
    # Also of what was never asked before the anchor, or is asked anew.
    policy._anchored.clear()
    np.testing.assert_allclose(np.concatenate(policy.reference(QUESTIONS))[:, 0], moved, atol=2e-5)
    assert np.abs(policy.odds(QUESTIONS) - moved).max() > 0.01


def test_steps_of_imitation_rise_and_fall(tiny: Path) -> None:
    policy = load(tiny)
    lr = []
    for k in (0, 4, 9, 50, 99, 100):
        policy.warm_up(k, 100)
        lr.append(policy._trainable.lr)
    assert lr == pytest.approx([0.002, 0.01 * 0.96, 0.02 * 0.91, 0.02 * 0.5, 0.02 * 0.05, 0.01])
    policy.warm_up(0, 0)
    assert policy._trainable.lr == 0.01
    # Adam's first step is the step size itself, wherever the gradient is not tiny.
    before = [p.detach().clone() for p in policy.parameters()]
    policy.warm_up(0, 10)
    policy.backward(QUESTIONS, grads_of(NUMBERS))
    policy.step()
    moved = max(float((p.detach() - own).abs().max()) for p, own in zip(policy.parameters(), before, strict=True))
    assert moved == pytest.approx(0.002, rel=1e-3)


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_resumed_is_uninterrupted(tiny: Path, adapt: str) -> None:
    """Bit for bit, whatever the company in which questions were met."""
    policy = load(tiny, adapt=adapt, micro_tokens=300)
    policy.odds(QUESTIONS[:1])
    policy.odds(QUESTIONS[2:5])
    update(policy, [QUESTIONS[3], QUESTIONS[7], QUESTIONS[0]])
    policy.reference([QUESTIONS[8], QUESTIONS[1]])
    policy.anchor()
    update(policy, QUESTIONS[4:8])
    policy.odds([QUESTIONS[6]])
    policy.reference([QUESTIONS[2]])
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    resumed = load(tiny, adapt=adapt, micro_tokens=300, seed=3)
    resumed.odds(QUESTIONS[::2])
    update(resumed, QUESTIONS[::2])
    resumed.load_state_dict(state)
    assert same(resumed.state_dict(), state)
    new = ["Charge, 1 step away. A or B?", "Wait. A or B?"]
    for one in (policy, resumed):
        one.warm_up(0, 0)
    for k in range(3):
        np.testing.assert_array_equal(policy.odds(QUESTIONS), resumed.odds(QUESTIONS))
        for ours, theirs in zip(policy.reference(QUESTIONS), resumed.reference(QUESTIONS), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for one in (policy, resumed):
            update(one, [*QUESTIONS[k : k + 4], *new])
    assert same(policy.state_dict(), resumed.state_dict())
    assert not torch.equal(policy.state_dict()["met"], state["met"])


def test_a_state_that_does_not_fit_changes_nothing(tiny: Path) -> None:
    policy = load(tiny)
    update(policy, QUESTIONS)
    before = policy.state_dict()
    other = load(tiny, rank=2).state_dict()
    lacking = {name: tensor for name, tensor in before.items() if name != "met"}
    damaged = {**before, "met": before["met"][:-3]}
    for state in (other, lacking, damaged):
        with pytest.raises(EchelonError, match="the saved state does not fit"):
            policy.load_state_dict(state)
        assert same(policy.state_dict(), before)


# --- files -----------------------------------------------------------------------------------------------------------

PROMPTS = [
    ChoicePrompt(SHARED, "Which?", ("first", "second", "third"), tuple(QUESTIONS[:3])),
    ChoicePrompt(SHARED, "Which?", ("first",), tuple(QUESTIONS[3:4])),
    ChoicePrompt(SHARED, QUESTIONS[4], ("good", "bad")),
]


def scores_agree(policy: ChoicePolicy, folder: Path) -> None:
    model = CausalChoiceModel.load(f"hf:{folder}", dtype="float32", device="cpu", threads=1)
    for ours, theirs in zip(policy.score(PROMPTS), model.score(PROMPTS), strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=5e-5)
        assert ours.prompt_tokens == theirs.prompt_tokens


@pytest.mark.parametrize(("adapt", "layers"), [("lora", 0), ("lora", 1), ("full", 1)])
def test_what_was_learnt_scores_the_same_when_it_is_loaded(tiny: Path, tmp_path: Path, adapt: str, layers: int) -> None:
    policy = load(tiny, adapt=adapt, layers=layers)
    scores_agree(policy, tiny)
    first = policy.odds(QUESTIONS)
    perturb(policy)
    policy.save(tmp_path / "saved", {"choose.txt": "Is it {option}?\n"})
    scores_agree(policy, tmp_path / "saved")
    assert np.abs(policy.odds(QUESTIONS) - first).max() > 0.05
    assert (tmp_path / "saved" / "choose.txt").read_text() == "Is it {option}?\n"
    assert not (tmp_path / "saved" / "README.md").exists()


def test_an_adapter_goes_on_learning(tiny: Path, tmp_path: Path) -> None:
    policy = load(tiny, layers=1, rank=3, alpha=12)
    for _ in range(4):
        update(policy, QUESTIONS)
    policy.save(tmp_path / "a")
    more = load(tmp_path / "a", layers=0, rank=8, alpha=1)  # the adapter's own go on
    assert [p.shape for p in more.parameters()] == [p.shape for p in policy.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(more.parameters(), policy.parameters(), strict=True))
    at_first = policy.odds(QUESTIONS)
    np.testing.assert_allclose(more.odds(QUESTIONS), at_first, atol=2e-5)
    update(more, QUESTIONS)
    assert np.abs(more.odds(QUESTIONS) - at_first).max() > 0.01
    np.testing.assert_allclose(np.concatenate(more.reference(QUESTIONS))[:, 0], at_first, atol=2e-5)
    assert more.name == f"hf:{tmp_path / 'a'}"
    more.save(tmp_path / "b")
    scores_agree(more, tmp_path / "b")
    named = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (named["base_model_name_or_path"], named["r"], named["lora_alpha"]) == (str(tiny.resolve()), 3, 12)
    assert named["layers_to_transform"] == [1]
    more.save(tmp_path / "c", base="smollm2-135m")
    named = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "smollm2-135m"


def test_an_adapter_of_more_than_layers_is_refused(tiny: Path, tmp_path: Path) -> None:
    TokenPolicy.load(f"hf:{tiny}", device="cpu", targets=["q_proj", "lm_head"]).save(tmp_path / "a")
    with pytest.raises(EchelonError, match="can't train to rate"):
        load(tmp_path / "a")


def test_only_the_wanted_layers_learn(tiny: Path) -> None:
    def layers(policy: ChoicePolicy) -> set[str]:
        return {part for name in policy._trainable.named for part in name.split(".") if part.isdigit()}

    one, both, many = load(tiny, layers=1), load(tiny, layers=0), load(tiny, layers=7)
    assert (layers(one), layers(both), layers(many)) == ({"1"}, {"0", "1"}, {"0", "1"})
    full = load(tiny, adapt="full", layers=0)
    assert layers(full) == {"0", "1"}
    assert not any("embed" in name or name.endswith("model.norm.weight") for name in full._trainable.named)


def test_third_parties_say_nothing(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for checkpointing in (False, True):
            policy = load(tiny, checkpointing=checkpointing)
            update(policy, QUESTIONS)
            policy.reference(QUESTIONS)
            policy.save(tmp_path / "a")
            update(load(tmp_path / "a"), QUESTIONS)
    assert capfd.readouterr() == ("", "")


# --- as a planner asks it --------------------------------------------------------------------------------------------


def test_scores_are_the_odds_made_probabilities(tiny: Path) -> None:
    policy: LearningChoice = load(tiny)
    assert isinstance(policy, LearningChoice)
    odds = np.concatenate(policy.evaluate(QUESTIONS))[:, 0].astype(np.float64)
    three, one, two = policy.score(PROMPTS)
    np.testing.assert_allclose(np.exp(three.logprobs), np.exp(odds[:3]) / np.exp(odds[:3]).sum(), rtol=1e-5)
    assert one.logprobs.tolist() == [0.0]
    np.testing.assert_allclose(np.exp(two.logprobs[0]), 1 / (1 + np.exp(-odds[4])), rtol=1e-5)
    assert not three.logprobs.flags.writeable
    assert three.logprobs.dtype == np.float32
    spent = policy.spent()
    asked = sum(s.prompt_tokens for s in (three, one, two))
    assert (spent["prompts"], spent["calls"], spent["prompt_tokens"]) == (3, 1, asked)
    policy.score(PROMPTS)  # known
    assert (policy.spent()["prompts"], policy.spent()["calls"], policy.spent()["prompt_tokens"]) == (6, 1, asked)
    assert policy.score([]) == []
    assert policy.evaluate([]) == []


@pytest.mark.parametrize(
    "prompt",
    [
        ChoicePrompt("Another system message.", "Which?", ("a", "b"), ("is it a?", "is it b?")),
        ChoicePrompt(SHARED, "Which?", ("a", "b", "c")),
        ChoicePrompt(SHARED, "Which?", ("a", "b", "c"), ("is it a?", "is it b?")),
    ],
)
def test_prompts_that_are_not_rated_are_refused(tiny: Path, prompt: ChoicePrompt) -> None:
    with pytest.raises(EchelonError, match="rates options one by one"):
        load(tiny).score([prompt])


@pytest.mark.parametrize(
    ("kind", "more", "told"),
    [
        ("GPT2", {"n_positions": 256}, "can't train to rate"),
        ("Mistral", {"sliding_window": 16}, "can't train to rate"),
        ("Granite", {"embedding_multiplier": 12.0}, "layers of a kind that Echelon can't train"),
        ("Cohere", {}, "layers of a kind that Echelon can't train"),
    ],
)
def test_models_of_another_build_are_refused(tiny: Path, tmp_path: Path, kind: str, more: Any, told: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        **size, num_key_value_heads=2, vocab_size=len(tokenizer), initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **more,
    )  # fmt: skip
    head = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        getattr(transformers, head)(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EchelonError, match=told):
        load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"layers": -1}, {"rank": 0}, {"alpha": 0}, {"lr": 0.0}, {"warm_lr": -1.0}, {"max_grad_norm": 0.0}, {"adapt": "x"}],
)
def test_settings_out_of_range_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(EchelonError, match=rf"policy\.{next(iter(change))}"):
        PolicyConfig(**change)
