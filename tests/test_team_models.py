"""Teams of language models: adapters on one base, truncated sampling, features for critics, their state and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import EchelonError
from echelon.llm import TextPrompt
from echelon.llm._loading import load_causal
from echelon.llm.teams import load_team, load_team_state, num_held, save_team, saved_team, team_state
from echelon.llm.token_policy import TokenPolicy, TokenSample, _hashed, _likeliest
from tiny_model import make_tiny_model

PROMPTS = [TextPrompt("You write.", "A short text."), TextPrompt("", "And now a text that is somewhat longer?")]
KEYS = [3, 2**63 + 5]
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "rank": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", words=160)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another family, with another tokenizer, layout and width."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "other"
    letters = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True))}
    inside = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inside.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=48, n_layer=2, n_head=3, n_positions=128, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def team_of(tiny: Path, agents: int = 3, **changes: Any) -> list[TokenPolicy]:
    return load_team(f"hf:{tiny}", agents=agents, **{**SETTINGS, **changes})


def weights_for(samples: list[TokenSample], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(len(s.reply_ids), 2)).astype(np.float32) for s in samples]


def learn(policy: TokenPolicy, update: int) -> list[TokenSample]:
    """One update, of another sort each time."""
    samples = policy.sample(PROMPTS, 2, max_tokens=6, top_k=20 * (update % 2), keys=[update + key for key in (1, 9)])
    policy.backward(samples, weights_for(samples, update))
    policy.step()
    if update == 1:
        policy.anchor()
    return samples


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- adapters on one base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16", "checkpointing": True}, {"targets": ["q_proj", "down_proj"], "layers": 1}],
)
def test_adapters_on_one_base_are_as_alone_to_the_last_bit(tiny: Path, changes: dict[str, Any]) -> None:
    seeds = [0, 5, 5]
    alone = [TokenPolicy.load(f"hf:{tiny}", **{**SETTINGS, "seed": seed, **changes}) for seed in seeds]
    first = TokenPolicy.load(f"hf:{tiny}", **{**SETTINGS, "seed": seeds[0], **changes})
    team = [
        first,
        *(TokenPolicy.load(f"hf:{tiny}", **{**SETTINGS, "seed": s, **changes}, beside=first) for s in seeds[1:]),
    ]
    for update in range(3):
        # In turns, the last one twice as often: nobody may meet what another one has done.
        for i in (0, 1, 2, 2):
            said, expected = learn(team[i], update), learn(alone[i], update)
            assert [s.reply_ids for s in said] == [s.reply_ids for s in expected]
    samples = alone[0].sample(PROMPTS, 2, max_tokens=5, keys=KEYS)
    for policy, single in zip(team, alone, strict=True):
        assert same(policy.state_dict(), single.state_dict())
        for numbers in ("evaluate", "reference"):
            for got, want in zip(getattr(policy, numbers)(samples), getattr(single, numbers)(samples), strict=True):
                np.testing.assert_array_equal(got, want)
    assert not same(team[1].state_dict(), team[2].state_dict())


def test_gradients_of_one_never_reach_another(tiny: Path) -> None:
    team = team_of(tiny)
    model = team[0]._trainable.model
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    samples = [policy.sample(PROMPTS, 1, max_tokens=4, keys=KEYS) for policy in team]
    before = [policy.state_dict() for policy in team]
    team[1].backward(samples[1], weights_for(samples[1], 0))
    for i, policy in enumerate(team):
        assert any(p.grad is not None for p in policy.parameters()) == (i == 1)
    # Two may gather gradients at a time.
    team[2].backward(samples[2], weights_for(samples[2], 0))
    assert team[0].step() == 0.0
    assert team[1].step() > 0
    assert any(p.grad is not None for p in team[2].parameters())
    assert [same(policy.state_dict(), old) for policy, old in zip(team, before, strict=True)] == [False, False, True]
    assert [policy.updates for policy in team] == [1, 1, 0]
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert all(p.grad is None for name, p in model.named_parameters() if name in base)


def test_the_base_is_in_memory_once(tiny: Path) -> None:
    base = sum(p.numel() for p in load_causal(f"hf:{tiny}", dtype="float32", device="cpu").model.parameters())
    team = team_of(tiny)
    adapter = sum(p.numel() for p in team[0].parameters())
    assert [policy.num_held for policy in team] == [base + adapter] * 3
    assert num_held(team) == base + 3 * adapter
    team[1].anchor()
    assert num_held(team) == base + 4 * adapter
    assert len({policy._trainable.model for policy in team}) == 1
    assert num_held(team_of(tiny, share="separate")) == 3 * (base + adapter)
    same_one = team_of(tiny, share="weights")
    assert same_one[0] is same_one[1] is same_one[2]
    assert num_held(same_one) == base + adapter


def test_adapters_start_from_their_own_seeds_and_one_agent_is_a_plain_policy(tiny: Path) -> None:
    team, more = team_of(tiny), team_of(tiny, agents=4)
    starts = [torch.cat([p.flatten() for p in policy.parameters()]) for policy in team]
    assert not any(torch.equal(starts[i], starts[j]) for i in range(3) for j in range(i))
    assert all(same(a.state_dict(), b.state_dict()) for a, b in zip(team, more, strict=False))
    [one] = team_of(tiny, agents=1, seed=7)
    plain = TokenPolicy.load(f"hf:{tiny}", **SETTINGS, seed=7)
    assert same(one.state_dict(), plain.state_dict())
    assert one.name == plain.name
    assert not same(team_of(tiny, seed=1)[0].state_dict(), team[1].state_dict())


def test_adapters_go_on_learning_beside_each_other(tiny: Path, tmp_path: Path) -> None:
    """Two adapters of different shapes, and a fresh one beside them."""
    for name, changes in (("a", {"rank": 2, "layers": 1}), ("b", {"rank": 3, "targets": ["v_proj", "o_proj"]})):
        policy = TokenPolicy.load(f"hf:{tiny}", **{**SETTINGS, **changes})
        for update in range(2):
            learn(policy, update)
        policy.save(tmp_path / name)
    specs = [f"hf:{tmp_path / 'a'}", f"hf:{tmp_path / 'b'}", f"hf:{tiny}"]
    team = load_team(specs, agents=3, **SETTINGS)
    alone = [TokenPolicy.load(spec, **SETTINGS) for spec in specs[:2]]
    for update in range(2):
        for policy, single in zip(team, alone, strict=False):
            learn(policy, update), learn(single, update)
        learn(team[2], update)
    for policy, single in zip(team, alone, strict=False):
        assert same(policy.state_dict(), single.state_dict())
        policy.save(tmp_path / "one")
        single.save(tmp_path / "two")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    # A fresh one has all linear layers again, not what adapters are made of.
    for name, beside in (("one", team[0]), ("two", None)):
        TokenPolicy.load(specs[2], **SETTINGS, seed=3, beside=beside).save(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# --- teams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"share": "separate"}, {"share": "weights"}, {"share": "weights", "adapt": "full"}]
)
def test_a_resumed_team_is_an_uninterrupted_one(tiny: Path, changes: dict[str, Any]) -> None:
    through, first, second = team_of(tiny, **changes), team_of(tiny, **changes), team_of(tiny, **changes, seed=9)
    for update in range(3):
        for policy in through:
            learn(policy, update)
    for policy in first:
        learn(policy, 0)
    state = team_state(first)
    for policy in first:
        learn(policy, 1)  # what goes on after a checkpoint is not in it
    load_team_state(second, state)
    for update in (1, 2):
        for policy in second:
            learn(policy, update)
    assert same(team_state(through), team_state(second))
    shared = changes.get("share") == "weights"
    assert {name.partition(".")[0] for name in state} == ({"agent0"} if shared else {"agent0", "agent1", "agent2"})


def test_a_teams_state_that_does_not_fit_changes_nothing(tiny: Path) -> None:
    team = team_of(tiny, agents=2)
    for policy in team:
        learn(policy, 0)
    before = team_state(team)
    fits = team_state(team_of(tiny, agents=2, seed=4))
    cut = {name: x for name, x in fits.items() if not (name.startswith("agent1") and "layers.1.mlp" in name)}
    for wrong in (team_state(team_of(tiny)), team_state(team_of(tiny, agents=2, share="weights")), {}, cut):
        with pytest.raises(EchelonError, match=r"does not fit|another size"):
            load_team_state(team, wrong)
        assert same(team_state(team), before)


@pytest.mark.parametrize("share", ["adapters", "weights", "separate"])
def test_a_saved_team_loads_again(tiny: Path, tmp_path: Path, share: Any) -> None:
    team = team_of(tiny, agents=2, share=share)
    for update, policy in zip((0, 2), team, strict=True):
        learn(policy, update)
    save_team(team, tmp_path / "team")
    save_team(team, tmp_path / "team")  # replaces it
    folders = ["agent0", "agent0" if share == "weights" else "agent1"]
    assert sorted(path.name for path in (tmp_path / "team").iterdir()) == sorted({*folders, "team.json"})
    specs, told = saved_team(tmp_path / "team")
    assert (specs, told) == ([f"hf:{tmp_path / 'team' / name}" for name in folders], share)
    again = load_team(specs, agents=2, share=told, **SETTINGS)
    samples = team[0].sample(PROMPTS, 2, max_tokens=5, keys=KEYS)
    for policy, old in zip(again, team, strict=True):
        for numbers in (policy.evaluate(samples), policy.reference(samples)):
            for got, want in zip(numbers, old.evaluate(samples), strict=True):
                np.testing.assert_array_equal(got, want)
    learnt = sum(p.numel() for p in team[0].parameters())
    assert num_held(again) == num_held(team) + learnt * len(set(folders))  # adapters are their own references now


def test_agents_of_different_families(tiny: Path, other: Path, tmp_path: Path) -> None:
    team = load_team([f"hf:{tiny}", f"hf:{other}"], agents=2, share="separate", **SETTINGS)
    said = [policy.sample(PROMPTS, 2, max_tokens=6, keys=KEYS) for policy in team]
    assert said[0][0].prompt_ids != said[1][0].prompt_ids
    for policy, samples in zip(team, said, strict=True):
        policy.backward(samples, weights_for(samples, 0))
        assert policy.step() > 0
    assert [policy.features(said[i], replies=True).shape for i, policy in enumerate(team)] == [(4, 64), (4, 48)]
    save_team(team, tmp_path / "team")
    specs, share = saved_team(tmp_path / "team")
    again = load_team(specs, agents=2, share=share, **SETTINGS)
    for policy, old, samples in zip(again, team, said, strict=True):
        np.testing.assert_array_equal(policy.evaluate(samples)[0], old.evaluate(samples)[0])
    # Each has its own end, and its own limit.
    long = [TextPrompt("", "far " * 32)]
    assert team[0].sample(long, 1, max_tokens=3, keys=[0])
    told = rf"prompt of \d+ tokens leaves no room for a reply in the 128 of model hf:{other} \(agent 1\)"
    with pytest.raises(EchelonError, match=told):
        team[1].sample(long, 1, keys=[0])


def test_teams_that_can_not_be(tiny: Path, other: Path, tmp_path: Path) -> None:
    specs = [f"hf:{tiny}", f"hf:{other}"]
    TokenPolicy.load(specs[1], **SETTINGS).save(tmp_path / "adapter")
    for given_, changes, told in (
        (specs[0], {"agents": 0}, "agents is 0"),
        (specs, {"agents": 3}, "2 models for 3 agents"),
        ([], {"agents": 2}, "0 models for 2 agents"),
        (specs, {"agents": 2}, "is not on the base of"),
        ([specs[0], f"hf:{tmp_path / 'adapter'}"], {"agents": 2}, "is not on the base of"),
        (specs, {"agents": 2, "share": "weights"}, "share weights have one model"),
        (specs[0], {"agents": 2, "adapt": "full"}, "needs adapt 'lora'"),
        (specs[0], {"agents": 2, "share": "all"}, "unknown share 'all'"),
    ):
        with pytest.raises(EchelonError, match=told) as caught:
            load_team(given_, **{**SETTINGS, **changes})
        assert "\n" not in str(caught.value)
    full = TokenPolicy.load(specs[0], **SETTINGS, adapt="full")
    with pytest.raises(EchelonError, match="can't share the weights"):
        TokenPolicy.load(specs[0], **SETTINGS, beside=full)
    # An adapter that is damaged does no harm to the one beside it.
    policy = TokenPolicy.load(specs[0], **SETTINGS)
    before = policy.sample(PROMPTS, 1, max_tokens=3, keys=KEYS)
    policy.save(tmp_path / "cut")
    settings_ = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    (tmp_path / "cut" / "adapter_config.json").write_text(json.dumps({**settings_, "r": 3}))
    with pytest.raises(EchelonError, match="LoRA does not fit"):
        TokenPolicy.load(f"hf:{tmp_path / 'cut'}", **SETTINGS, beside=policy)
    assert learn(policy, 0)
    beside = TokenPolicy.load(specs[0], **SETTINGS, beside=policy)
    assert [s.reply_ids for s in beside.sample(PROMPTS, 1, max_tokens=3, keys=KEYS)] == [s.reply_ids for s in before]
    with pytest.raises(EchelonError, match="no team"):
        saved_team(tmp_path)
    for text, told in (
        ("{}", "is damaged"),
        ("[", "is damaged"),
        ('{"agents": ["agent0"], "share": "all"}', "unknown share"),
        ('{"agents": ["agent0"], "share": "weights"}', "no folder agent0"),
    ):
        (tmp_path / "team.json").write_text(text)
        with pytest.raises(EchelonError, match=told):
            saved_team(tmp_path)


# --- truncated sampling --------------------------------------------------------------------------------------------


def truncated(p: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """By the definition, one token at a time."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        order = [i for i in order if p[i] >= p[order[min(top_k, len(p)) - 1]]]
    kept: list[int] = []
    whole, mass = sum(p[i] for i in order), 0.0
    for i in order:
        if mass < top_p or p[i] == p[kept[-1]]:
            kept.append(i)
        mass += p[i] / whole
    q = np.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=200),
    top_k=st.integers(0, 220),
    top_p=st.integers(1, 20).map(lambda n: (n - 0.5) / 20) | st.just(1.0),
)
@settings(max_examples=150)
def test_what_is_kept_and_its_distribution(counts: list[int], top_k: int, top_p: float) -> None:
    # Powers of two of few sizes: many ties, and masses that float32 adds up nearly exactly.
    p = 2.0 ** -np.array(counts)
    p /= p.sum()
    rows = torch.from_numpy(np.log(np.stack([p, p[::-1]]))).float()
    found, tokens = _likeliest(rows, top_p, top_k)
    q = torch.zeros(rows.shape).scatter(1, tokens, found.exp()).numpy()
    expected = truncated(p, top_p, top_k)
    # A mass that meets top_p to the last bits may fall either way.
    edges = np.cumsum(-np.sort(-truncated(p, 1.0, top_k)))
    if np.abs(edges - top_p).min() > 1e-5 or top_p == 1:
        np.testing.assert_allclose(q[0], expected, atol=1e-5)
        np.testing.assert_allclose(q[1], expected[::-1], atol=1e-5)
    assert (q[0] > 0).sum() >= 1


def test_flat_distributions_are_sorted_as_far_as_is_needed() -> None:
    logp = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)).mul(0.1).log_softmax(-1)
    for top_p, top_k, count in ((0.9, 0, None), (0.5, 2000, None), (1.0, 500, 500)):
        found, tokens = _likeliest(logp, top_p, top_k)
        q = torch.zeros(logp.shape).scatter(1, tokens, found.exp()).numpy()
        for row in range(2):
            np.testing.assert_allclose(q[row], truncated(logp[row].exp().double().numpy(), top_p, top_k), atol=1e-6)
        assert count is None or (q > 0).sum() == 2 * count


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 3), (0.8, 12)])
def test_truncated_tokens_come_as_often_as_they_are_probable(tiny: Path, top_p: float, top_k: int) -> None:
    policy = TokenPolicy.load(f"hf:{tiny}", **SETTINGS, sample_rows=3000)
    replies = policy.sample(PROMPTS[:1], 3000, temperature=0.7, top_p=top_p, top_k=top_k, max_tokens=1, keys=[5])
    with torch.no_grad():
        logits = policy._trainable.model(input_ids=torch.tensor([replies[0].prompt_ids])).logits[0, -1]
    p = torch.softmax(logits / 0.7, -1).double().numpy()
    q = truncated(p, top_p, top_k)
    assert 2 < (q > 0).sum() < len(p) / 2
    said = np.array([s.reply_ids[0] for s in replies])
    counts = np.bincount(said, minlength=len(p))
    assert not counts[q == 0].any()
    assert np.abs((counts - 3000 * q)[q > 0] / np.sqrt(3000 * q * (1 - q))[q > 0]).max() < 4.0
    # What acted knows of the truncation; what is learnt from does not.
    np.testing.assert_allclose([s.behaviour_logp[0] for s in replies], np.log(q[said]), atol=1e-4)
    np.testing.assert_allclose([e[0, 0] for e in policy.evaluate(replies[:50])], np.log(p[said[:50]]), atol=1e-4)
    np.testing.assert_allclose([s.logp[0] for s in replies], logits.log_softmax(-1)[said], atol=1e-4)


def test_truncation_that_keeps_all_or_one(tiny: Path) -> None:
    policy = TokenPolicy.load(f"hf:{tiny}", **SETTINGS)
    ask: dict[str, Any] = {"n": 2, "temperature": 0.8, "max_tokens": 6, "keys": KEYS}
    plain = policy.sample(PROMPTS, **ask)
    off = policy.sample(PROMPTS, **ask, top_p=1.0, top_k=0)
    assert [s.reply_ids for s in off] == [s.reply_ids for s in plain]
    greedy = policy.sample(PROMPTS, **{**ask, "temperature": 0})
    for one in ({"top_k": 1}, {"top_p": 1e-6}):
        likeliest = policy.sample(PROMPTS, **ask, **one)
        assert [s.reply_ids for s in likeliest] == [s.reply_ids for s in greedy]
        assert all((s.behaviour_logp == 0).all() for s in likeliest)
    kept = policy.sample(PROMPTS, **{**ask, "temperature": 0}, top_k=3, top_p=0.5)
    for got, want in zip(kept, greedy, strict=True):
        assert got.reply_ids == want.reply_ids
        np.testing.assert_array_equal(got.behaviour_logp, want.logp)
    for s in policy.sample(PROMPTS, **ask, top_k=10**6):  # more than there are words
        np.testing.assert_allclose(s.behaviour_logp, policy.evaluate([s])[0][:, 0], atol=2e-5)
    for wrong in ({"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"top_k": -1}):
        with pytest.raises(ValueError, match="top_p"):
            policy.sample(PROMPTS, **ask, **wrong)


def test_a_truncated_reply_depends_on_its_prompt_and_key_alone(tiny: Path) -> None:
    together = TokenPolicy.load(f"hf:{tiny}", **SETTINGS)
    alone = TokenPolicy.load(f"hf:{tiny}", **SETTINGS, sample_rows=1)
    ask: dict[str, Any] = {"max_tokens": 9, "top_k": 30, "top_p": 0.95}
    want = [s for p, k in zip(PROMPTS, KEYS, strict=True) for s in alone.sample([p], 3, **ask, keys=[k])]
    got = together.sample(PROMPTS, 3, **ask, keys=KEYS)
    assert [s.reply_ids for s in got] == [s.reply_ids for s in want]
    assert len({s.reply_ids for s in got}) > 3


def test_a_kept_tokens_number_is_its_own() -> None:
    """Whatever its rank among those that are kept; and uniform."""
    steps = np.array([7, 2**64 - 1], np.uint64)
    tokens = np.tile(np.arange(20_000), (2, 1))
    numbers = _hashed(steps, tokens)
    np.testing.assert_array_equal(_hashed(steps, tokens[:, ::-1]), numbers[:, ::-1])
    for row in numbers:
        assert ((row >= 0) & (row < 1)).all()
        assert np.abs(np.sort(row) - (np.arange(20_000) + 0.5) / 20_000).max() < 1.63 / np.sqrt(20_000)  # 1 % level
    assert abs(np.corrcoef(numbers)[0, 1]) < 3 / np.sqrt(20_000)


# --- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_features_are_the_references_last_hidden_states(tiny: Path, adapt: Any) -> None:
    policy = TokenPolicy.load(f"hf:{tiny}", **SETTINGS, adapt=adapt)
    samples = policy.sample(PROMPTS, 3, max_tokens=7, keys=KEYS)
    plain = load_causal(f"hf:{tiny}", dtype="float32", device="cpu").model
    before = [policy.features(samples, replies=replies) for replies in (False, True)]
    for replies, found in zip((False, True), before, strict=True):
        assert found.shape == (6, policy.width) == (6, 64)
        assert found.dtype == np.float32
        for s, got in zip(samples, found, strict=True):
            ids = torch.tensor([[*s.prompt_ids, *(s.reply_ids if replies else ())]])
            with torch.no_grad():
                # The last of the hidden states that transformers gives is the one behind the norm.
                want = plain(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
            np.testing.assert_allclose(got, want, atol=3e-5)
    assert (before[0][0] == before[0][1]).all()  # one prompt, once
    assert not np.allclose(before[1][0], before[1][1], atol=1e-2)
    # They stay while the policy learns, and repeat.
    learn(policy, 0)
    for replies, found in zip((False, True), before, strict=True):
        np.testing.assert_array_equal(policy.features(samples, replies=replies), found)
    policy.anchor()
    assert not np.allclose(policy.features(samples, replies=True), before[1], atol=1e-3)
    assert policy.features([], replies=True).shape == (0, 64)
    assert all(p.grad is None for p in policy.parameters())


def test_features_pass_each_text_once_and_agents_on_one_base_agree(tiny: Path) -> None:
    team = team_of(tiny, agents=2, micro_tokens=100_000)
    samples = team[0].sample(PROMPTS, 4, max_tokens=5, keys=KEYS)
    passes: list[int] = []
    hook = (
        team[0]
        ._trainable.model.base_model.layers[0]
        .register_forward_pre_hook(lambda _module, args: passes.append(args[0].shape[0]))
    )
    first = team[0].features(samples, replies=False)
    hook.remove()
    assert passes == [2]
    learn(team[1], 0)
    np.testing.assert_array_equal(team[1].features(samples, replies=False), first)
    small = TokenPolicy.load(f"hf:{tiny}", **SETTINGS, micro_tokens=1)
    np.testing.assert_allclose(small.features(samples, replies=False), first, atol=3e-5)
