"""A language model that learns to write: its numbers, its gradients, its reference, its state and its files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import EchelonError
from echelon.llm import CausalTextModel, ModelStore, TextPrompt
from echelon.llm._loading import load_causal
from echelon.llm.policy import PolicyModel
from echelon.llm.token_policy import TokenPolicy, TokenSample
from tiny_model import make_tiny_model

PROMPTS = [
    TextPrompt("You guide robots.", "Where to?"),
    TextPrompt("", "Robot 3 is at the dock, robot 4 is not. Which one goes?"),
    TextPrompt("Be short.", "x"),
]
KEYS = [11, 12, 2**64 - 1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", words=160)


def load(tiny: Path, **changes: Any) -> TokenPolicy:
    chosen: dict[str, Any] = {"dtype": "float32", "device": "cpu", "rank": 4, "lr": 1e-2, **changes}
    return TokenPolicy.load(f"hf:{tiny}", **chosen)


@pytest.fixture(scope="module")
def samples(tiny: Path) -> list[TokenSample]:
    """Two replies to each prompt, sampled at temperature 0.7, of 1 to 9 tokens."""
    found = load(tiny).sample(PROMPTS, 2, temperature=0.7, max_tokens=9, keys=KEYS)
    last = found[-1]
    short = TokenSample(last.prompt_ids, last.reply_ids[:1], "", False, 1.3, last.logp[:1], last.behaviour_logp[:1])
    return [*found[:-1], short]


def weights_for(samples: list[TokenSample], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(len(s.reply_ids), 2)).astype(np.float32) for s in samples]


def naive(model: Any, sample: TokenSample) -> torch.Tensor:
    """(L, 2) by one whole pass of the whole model over one sample, with a gradient."""
    logits = model(input_ids=torch.tensor([[*sample.prompt_ids, *sample.reply_ids]])).logits[0]
    logits = logits[len(sample.prompt_ids) - 1 : -1] / (sample.temperature or 1.0)
    chosen = torch.distributions.Categorical(logits=logits)
    return torch.stack([chosen.log_prob(torch.tensor(sample.reply_ids)), chosen.entropy()], -1)


def perturb(policy: TokenPolicy, seed: int = 1) -> None:
    """Move what learns, so that no matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def gradients(policy: TokenPolicy, samples: list[TokenSample], grads: list[np.ndarray]) -> list[torch.Tensor]:
    policy.backward(samples, grads)
    found = []
    for p in policy.parameters():
        assert p.grad is not None
        found.append(p.grad.clone())
        p.grad = None
    return found


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_numbers_are_those_of_a_whole_pass(tiny: Path, samples: list[TokenSample], adapt: Any) -> None:
    policy: PolicyModel = load(tiny, adapt=adapt)
    plain = load_causal(f"hf:{tiny}", dtype="float32", device="cpu").model
    for got, held, sample in zip(policy.evaluate(samples), policy.reference(samples), samples, strict=True):
        assert got.dtype == np.float32
        assert got.shape == (len(sample.reply_ids), 2)
        np.testing.assert_allclose(got, naive(plain, sample).detach(), atol=2e-5)
        np.testing.assert_array_equal(got, held)


def test_logp_of_sampling_are_those_of_a_whole_pass(tiny: Path) -> None:
    policy = load(tiny)
    perturb(policy)
    for temperature in (0.0, 0.5, 1.0):
        for sample in policy.sample(PROMPTS, 2, temperature=temperature, max_tokens=6, keys=KEYS):
            [[*at_one]] = policy.evaluate([_with(sample, 1.0)])[0][None, :, 0]
            np.testing.assert_allclose(sample.logp, at_one, atol=2e-5)
            np.testing.assert_allclose(sample.behaviour_logp, policy.evaluate([sample])[0][:, 0], atol=2e-5)
            assert sample.temperature == temperature


def _with(sample: TokenSample, temperature: float) -> TokenSample:
    return TokenSample(
        sample.prompt_ids, sample.reply_ids, sample.text, sample.ended, temperature, sample.logp, sample.behaviour_logp
    )


def test_micro_batches_change_nothing(tiny: Path, samples: list[TokenSample]) -> None:
    whole, single = load(tiny, micro_tokens=100_000), load(tiny, micro_tokens=1)
    for policy in (whole, single):
        perturb(policy)
    for one, other in zip(whole.evaluate(samples), single.evaluate(samples), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    grads = weights_for(samples)
    for one, other in zip(gradients(whole, samples, grads), gradients(single, samples, grads), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings_", [{}, {"layers": 1, "targets": ["q_proj", "down_proj"]}, {"adapt": "full"}])
def test_gradients_are_autograds(
    tiny: Path, samples: list[TokenSample], settings_: dict[str, Any], checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # A few rows of logits at a time, as with long replies.
    monkeypatch.setattr("echelon.llm.token_policy._HEAD_ROWS", 4)
    policy = load(tiny, micro_tokens=120, checkpointing=checkpointing, **settings_)
    perturb(policy)
    grads = weights_for(samples)
    loss = torch.stack(
        [
            (naive(policy._trainable.model, sample) * torch.from_numpy(grad)).sum()
            for sample, grad in zip(samples, grads, strict=True)
        ]
    ).sum()
    expected = torch.autograd.grad(loss, policy.parameters())
    assert max(float(g.abs().max()) for g in expected) > 0.1
    for got, want in zip(gradients(policy, samples, grads), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


def test_replies_to_one_prompt_compute_it_once(tiny: Path, samples: list[TokenSample]) -> None:
    assert len({s.prompt_ids for s in samples}) < len(samples)
    policy = load(tiny)
    perturb(policy)
    seen: list[int] = []
    part = policy._trainable.model.base_model.embed_tokens
    part.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.shape[0] * out.shape[1]))
    shared, spent = gradients(policy, samples, weights_for(samples)), sum(seen)
    seen.clear()
    policy._shares = False
    alone = gradients(policy, samples, weights_for(samples))
    assert spent < 0.7 * sum(seen)
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


def test_checkpointing_computes_layers_again_and_gives_the_same_bits(tiny: Path, samples: list[TokenSample]) -> None:
    calls = {}
    found = []
    for checkpointing in (False, True):
        policy = load(tiny, checkpointing=checkpointing)
        policy._shares = False  # it never does while layers are computed again
        perturb(policy)
        passes: list[int] = []
        part = policy._trainable.model.base_model.layers[0].self_attn
        part.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        found.append(gradients(policy, samples, weights_for(samples)))
        calls[checkpointing] = len(passes)
        # Generation keeps its cache all the same.
        assert policy.sample(PROMPTS[:1], 1, max_tokens=3, keys=[1])[0].reply_ids
    assert calls[True] == 2 * calls[False]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_sample_counts_as_often_as_it_is_given(tiny: Path, samples: list[TokenSample]) -> None:
    policy = load(tiny)
    grads = weights_for(samples)
    twice = gradients(policy, [*samples, samples[0]], [*grads, grads[0]])
    doubled = gradients(policy, samples, [2 * grads[0], *grads[1:]])
    for one, other in zip(twice, doubled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    policy.backward(samples, [np.zeros_like(g) for g in grads])
    assert all(p.grad is None for p in policy.parameters())
    with pytest.raises(ValueError, match="shape"):
        policy.backward(samples[:1], [grads[0][:, :1]])


def test_bfloat16_keeps_what_learns_in_float32(tiny: Path, samples: list[TokenSample]) -> None:
    grads = weights_for(samples)
    exact = torch.cat([g.flatten() for g in gradients(load(tiny), samples, grads)])
    for adapt in ("lora", "full"):
        policy = load(tiny, dtype="bfloat16", adapt=adapt)
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        for got, held in zip(policy.evaluate(samples), policy.reference(samples), strict=True):
            np.testing.assert_array_equal(got, held)
        found = torch.cat([g.flatten() for g in gradients(policy, samples, grads)])
        assert found.dtype == torch.float32
        if adapt == "lora":
            assert policy._trainable.model.dtype == torch.bfloat16
            assert float(torch.cosine_similarity(found, exact, dim=0)) > 0.97
        policy.backward(samples, grads)
        policy.step()
        assert {v.dtype for k, v in policy.state_dict().items() if k.startswith("adam.exp")} == {torch.float32}


# --- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_the_policy_moves_and_the_reference_stays(tiny: Path, samples: list[TokenSample], adapt: Any) -> None:
    policy = load(tiny, adapt=adapt)
    before = policy.evaluate(samples)
    for seed in range(2):
        policy.backward(samples, weights_for(samples, seed))
        assert policy.step() > 0
    assert policy.updates == 2
    after, held = policy.evaluate(samples), policy.reference(samples)
    for old, new, kept in zip(before, after, held, strict=True):
        np.testing.assert_array_equal(old, kept)
        assert np.abs(old - new).max() > 1e-3
    policy.anchor()
    for new, kept in zip(after, policy.reference(samples), strict=True):
        np.testing.assert_array_equal(new, kept)


def test_what_is_held_in_memory(tiny: Path) -> None:
    plain = load_causal(f"hf:{tiny}", dtype="float32", device="cpu").model
    base = sum(p.numel() for p in plain.parameters())
    policy = load(tiny)
    learns = sum(p.numel() for p in policy.parameters())
    assert learns < base / 4
    assert policy.num_held == base + learns  # one base, and no reference beside it
    assert load(tiny, adapt="full").num_held == 2 * base
    embeddings = plain.get_input_embeddings().weight.numel()
    frozen = load(tiny, adapt="full", freeze_embeddings=True)
    assert sum(p.numel() for p in frozen.parameters()) == base - embeddings
    assert frozen.num_held == 2 * base - embeddings


def test_the_norm_and_the_clip(tiny: Path, samples: list[TokenSample]) -> None:
    policy = load(tiny, max_grad_norm=0.5)
    assert policy.step() == 0.0
    grads = weights_for(samples)
    norm = float(torch.cat([g.flatten() for g in gradients(policy, samples, grads)]).norm())
    assert norm > 0.5
    policy.backward(samples, grads)
    assert policy.step() == pytest.approx(norm, rel=1e-5)
    # Adam's first moment is 0.1 of the gradient that it saw.
    moments = [v.flatten() for k, v in policy.state_dict().items() if k.startswith("adam.exp_avg.")]
    assert float(torch.cat(moments).norm()) == pytest.approx(0.05, rel=1e-3)
    assert all(p.grad is None for p in policy.parameters())


def test_a_gradient_that_is_not_finite_harms_nothing(tiny: Path, samples: list[TokenSample]) -> None:
    policy = load(tiny)
    before = policy.state_dict()
    policy.backward(samples[:1], [np.full((len(samples[0].reply_ids), 2), np.nan, np.float32)])
    with pytest.raises(EchelonError, match="diverged at update 0: lower lr"):
        policy.step()
    after = policy.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in policy.parameters())


def test_reinforce_makes_a_rewarded_token_likely(tiny: Path) -> None:
    policy = load(tiny, lr=2e-2)
    first = policy.sample(PROMPTS[:1], 64, max_tokens=1, keys=[100])
    said = [s.reply_ids[0] for s in first]
    wanted = sorted(set(said), key=lambda token: (said.count(token), token))[-3]  # not rare, and not the likeliest
    asked = next(s for s in first if s.reply_ids[0] == wanted)
    start = np.exp(policy.evaluate([asked])[0][0, 0])
    assert start < 0.2
    for update in range(10):
        tried = policy.sample(PROMPTS[:1], 64, max_tokens=1, keys=[update])
        reward = np.array([s.reply_ids[0] == wanted for s in tried], float)
        advantage = (reward - reward.mean()) / len(tried)
        policy.backward(tried, [np.array([[-a, 0]], np.float32) for a in advantage])
        policy.step()
    assert np.exp(policy.evaluate([asked])[0][0, 0]) > 0.8
    assert np.exp(policy.reference([asked])[0][0, 0]) == start


def test_imitation_of_a_written_reply(tiny: Path) -> None:
    policy = load(tiny, lr=2e-2)
    taught = policy.written(PROMPTS[0], "on the <|im_end|> dock")
    assert taught.ended
    assert np.isnan(taught.logp).all()
    assert policy._ends & set(taught.reply_ids[:-1]) == set()
    assert taught.reply_ids[-1] in policy._ends
    for _ in range(40):
        policy.backward([taught], [np.tile(np.array([[-1, 0]], np.float32), (len(taught.reply_ids), 1))])
        policy.step()
    [reply] = policy.sample(PROMPTS[:1], 1, temperature=0, max_tokens=40, keys=[0])
    assert reply.reply_ids == taught.reply_ids
    assert reply.ended
    assert reply.text == "on the <|im_end|> dock"


# --- sampling ------------------------------------------------------------------------------------------------------


@given(
    picked=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    rows=st.integers(1, 5),
    n=st.integers(1, 3),
    most=st.integers(1, 12),
)
@settings(max_examples=15)
def test_a_reply_depends_on_its_prompt_and_key_alone(
    sampler: TokenPolicy, picked: list[int], rows: int, n: int, most: int
) -> None:
    policy = sampler
    policy._rows = rows
    together = policy.sample([PROMPTS[i] for i in picked], n, max_tokens=most, keys=[KEYS[i] for i in picked])
    assert len(together) == n * len(picked)
    policy._rows = 1
    for at, i in enumerate(picked):
        alone = policy.sample([PROMPTS[i]], 3, max_tokens=12, keys=[KEYS[i]])
        for j in range(n):
            got, want = together[at * n + j], alone[j]
            assert got.reply_ids == want.reply_ids[:most]
            np.testing.assert_allclose(got.logp, want.logp[:most], atol=3e-5)
            assert got.ended == (got.reply_ids[-1] in policy._ends)


@pytest.fixture(scope="module")
def sampler(tiny: Path) -> TokenPolicy:
    policy = load(tiny)
    # So that replies end at different times.
    for sample in policy.sample(PROMPTS, 4, max_tokens=12, keys=KEYS):
        policy._ends |= {sample.reply_ids[len(sample.reply_ids) // 2]}
    return policy


def test_tokens_come_as_often_as_they_are_probable(tiny: Path) -> None:
    policy = load(tiny, sample_rows=2000)
    replies = policy.sample(PROMPTS[:1], 2000, temperature=0.5, max_tokens=1, keys=[5])
    assert len({s.reply_ids for s in replies}) > 20
    prompt = replies[0].prompt_ids
    with torch.no_grad():
        logits = policy._trainable.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    p = torch.softmax(logits / 0.5, -1).numpy()
    counts = np.bincount([s.reply_ids[0] for s in replies], minlength=len(p))
    often = p > 0.01
    assert often.sum() > 3
    error = (counts - 2000 * p)[often] / np.sqrt(2000 * p * (1 - p))[often]
    assert np.abs(error).max() < 4.0
    # Another key, and another place in the call, draw otherwise.
    other = policy.sample(PROMPTS[:1], 20, temperature=0.5, max_tokens=1, keys=[6])
    assert [s.reply_ids for s in other] != [s.reply_ids for s in replies[:20]]


def test_a_small_change_of_the_probabilities_turns_few_draws(tiny: Path) -> None:
    """With the same keys: two policies draw differently about as rarely as their distributions differ."""
    one, other = load(tiny, sample_rows=1000), load(tiny, sample_rows=1000)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.004 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    first, second = (p.sample(PROMPTS[:1], 1000, max_tokens=1, keys=[8]) for p in (one, other))
    prompt = torch.tensor([first[0].prompt_ids])
    with torch.no_grad():
        p, q = (torch.softmax(policy._trainable.model(input_ids=prompt).logits[0, -1], -1) for policy in (one, other))
    apart = float((p - q).abs().sum() / 2)
    assert 0.005 < apart < 0.1
    changed = np.mean([a.reply_ids != b.reply_ids for a, b in zip(first, second, strict=True)])
    bound = 2 * apart / (1 + apart)  # of Gumbel-max draws that share their noise
    assert 0 < changed < bound + 3 * np.sqrt(bound / 1000)


def test_greedy_is_the_text_models_reply(tiny: Path) -> None:
    text = CausalTextModel.load(f"hf:{tiny}", dtype="float32", device="cpu")
    expected = [r.text for r in text.generate([TextPrompt(p.system, p.text, max_tokens=12) for p in PROMPTS])]
    replies = load(tiny).sample(PROMPTS, 1, temperature=0, max_tokens=12, keys=KEYS)
    assert [s.text for s in replies] == expected


def test_bad_requests(tiny: Path) -> None:
    policy = load(tiny)
    for wrong in ({"n": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"max_tokens": 0}, {"keys": [1]}):
        with pytest.raises(ValueError, match=r"must be|keys"):
            policy.sample(PROMPTS, **{"n": 1, "keys": KEYS, **wrong})
    with pytest.raises(EchelonError, match="leaves no room for a reply in the 160"):
        policy.sample([TextPrompt("", "far " * 60)], 1, keys=[1])
    [long] = policy.sample([TextPrompt("", "x" * 100)], 1, max_tokens=1000, keys=[1])
    assert len(long.prompt_ids) + len(long.reply_ids) <= 160
    with pytest.raises(EchelonError, match="longer than the 160"):
        policy.written(PROMPTS[0], "far " * 60)
    for setting, told in (
        ({"rank": 0}, "rank is 0"), ({"lr": 0.0}, "lr is 0"), ({"adapt": "half"}, "unknown adapt"),
        ({"layers": -1}, "layers is -1"), ({"targets": ["no_such"]}, "LoRA does not fit"),
        ({"micro_tokens": 0}, "micro_tokens"),
    ):  # fmt: skip
        with pytest.raises(EchelonError, match=told) as caught:
            load(tiny, **setting)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert policy.sample([], 2, keys=[]) == []
    assert policy.evaluate([]) == []
    policy.backward([], [])


def test_a_sample_is_plain_data(samples: list[TokenSample]) -> None:
    again = pickle.loads(pickle.dumps(samples[0]))
    assert again.reply_ids == samples[0].reply_ids
    np.testing.assert_array_equal(again.logp, samples[0].logp)


# --- state and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings_", [{}, {"checkpointing": True, "dtype": "bfloat16"}, {"adapt": "full"}])
def test_resumed_is_uninterrupted_bit_for_bit(tiny: Path, settings_: dict[str, Any]) -> None:
    def learn(policy: TokenPolicy, updates: range) -> None:
        for update in updates:
            tried = policy.sample(PROMPTS, 2, max_tokens=6, keys=[update + k for k in range(3)])
            policy.backward(tried, weights_for(tried, update))
            policy.step()
            if update == 1:
                policy.anchor()

    through = load(tiny, **settings_)
    learn(through, range(5))
    first = load(tiny, **settings_)
    learn(first, range(3))
    state = first.state_dict()
    learn(first, range(3, 4))  # what goes on after a checkpoint is not in it
    second = load(tiny, seed=5, **settings_)
    second.load_state_dict(state)
    learn(second, range(3, 5))
    one, other = through.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert int(one["updates"]) == 5
    tried = through.sample(PROMPTS, 1, max_tokens=4, keys=KEYS)
    for a, b in zip(through.reference(tried), second.reference(tried), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_state_that_does_not_fit_changes_nothing(tiny: Path) -> None:
    policy = load(tiny)
    before = policy.state_dict()
    cut = {k: v for k, v in load(tiny, seed=3).state_dict().items() if "layers.1.mlp" not in k}
    for wrong in (load(tiny, rank=8).state_dict(), load(tiny, adapt="full").state_dict(), {}, cut):
        with pytest.raises(EchelonError, match="does not fit"):
            policy.load_state_dict(wrong)
    assert all(torch.equal(before[k], v) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("settings_", [{}, {"layers": 1, "targets": ["v_proj"]}, {"adapt": "full"}])
def test_what_was_saved_loads_as_a_model(
    tiny: Path, tmp_path: Path, samples: list[TokenSample], settings_: dict[str, Any]
) -> None:
    policy = load(tiny, **settings_)
    perturb(policy)
    policy.save(tmp_path / "learnt")
    policy.save(tmp_path / "learnt")  # replaces it
    assert [p.name for p in tmp_path.iterdir()] == ["learnt"]
    merged = load_causal(f"hf:{tmp_path / 'learnt'}", dtype="float32", device="cpu").model
    for got, sample in zip(policy.evaluate(samples), samples, strict=True):
        np.testing.assert_allclose(got, naive(merged, sample).detach(), atol=5e-5)
    if settings_.get("adapt") != "full":
        assert {p.name for p in (tmp_path / "learnt").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    # It goes on learning from there, as its own reference.
    again = TokenPolicy.load(f"hf:{tmp_path / 'learnt'}", dtype="float32", device="cpu", **settings_)
    for got, held, before in zip(
        again.evaluate(samples), again.reference(samples), policy.evaluate(samples), strict=True
    ):
        np.testing.assert_array_equal(got, held)
        np.testing.assert_array_equal(got, before)
    for saved, own in zip(again.parameters(), policy.parameters(), strict=True):
        assert torch.equal(saved, own)
    again.backward(samples, weights_for(samples))
    again.step()
    again.save(tmp_path / "more")
    merged = load_causal(f"hf:{tmp_path / 'more'}", dtype="float32", device="cpu").model
    np.testing.assert_allclose(again.evaluate(samples)[0], naive(merged, samples[0]).detach(), atol=5e-5)


def test_an_adapters_file_is_the_same_each_time_and_names_its_base(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store(ModelStore):
        def __init__(self) -> None:
            self.known = {"tiny-1": None}  # type: ignore[dict-item]

        def path(self, name: str) -> Path:
            return tiny

    policy = TokenPolicy.load("tiny-1", store=Store(), dtype="float32", device="cpu")
    policy.save(tmp_path / "a")
    TokenPolicy.load("tiny-1", store=Store(), dtype="float32", device="cpu").save(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-1"
    policy.save(tmp_path / "c", base=str(tiny))
    assert load_causal(f"hf:{tmp_path / 'c'}", dtype="float32").model.dtype == torch.float32
    monkeypatch.chdir(tiny.parent)
    TokenPolicy.load(f"hf:{tiny.name}", dtype="float32", device="cpu").save(tmp_path / "d")
    assert json.loads((tmp_path / "d" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)


def test_loading_leaves_the_programs_random_numbers_alone(tiny: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, same, other = load(tiny), load(tiny), load(tiny, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    first = [p.clone() for p in one.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(first, same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_a_gpu_agrees_with_the_processor(tiny: Path, samples: list[TokenSample], adapt: Any) -> None:
    here, there = load(tiny, adapt=adapt), load(tiny, adapt=adapt, device="cuda")
    for one, other in zip(here.evaluate(samples), there.evaluate(samples), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-2)
    grads = weights_for(samples)
    for one, other in zip(gradients(here, samples, grads), gradients(there, samples, grads), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=0.05, atol=0.05)
    there.backward(samples, grads)
    there.step()
    state = there.state_dict()
    there.load_state_dict(state)
    assert all(torch.equal(v, there.state_dict()[k]) for k, v in state.items())
