"""Two real processes that share a policy's work: one process's result, and an error instead of a wait for ever.

This file is also the program that they run: test_distributed.py CASE FOLDER.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from echelon.errors import EchelonError
from echelon.llm import ChoicePolicy, ChoicePrompt, LearningChoice, PolicyConfig, TextPrompt, TokenPolicy, distributed
from echelon.llm.distributed import ShardedChoicePolicy, ShardedPolicy, shared_policy
from tiny_model import make_tiny_model

PROMPTS = [TextPrompt("You guide robots.", f"Where to, robot {i}?" + " And then?" * i) for i in range(5)]
SHARED = "You rate what a robot could do next. A: good. B: bad."
QUESTIONS = [f"Package {i}, {i * i} steps away. A or B?" for i in range(12)]


class Line:
    """The smallest policy: an item x has the number w·x; gradient ascent of step 1 and momentum ½.

    Its items are no strings: they go to the processes by turns.
    """

    def __init__(self, w: float) -> None:
        self.w = torch.tensor([w, 2.0], dtype=torch.float64)
        self.speed = torch.zeros(2, dtype=torch.float64)
        self.unused = torch.zeros(1, dtype=torch.float64)
        self.seen: list[Any] = []

    def evaluate(self, items: Sequence[Any]) -> list[NDArray[np.float32]]:
        self.seen += items
        if b"bad" in items:
            raise ValueError("a bad item\nin two lines")
        if b"end" in items:
            os._exit(3)
        if b"sleep" in items:
            time.sleep(300)
        return [np.array([[self.w[0] * x + self.w[1]]], np.float32) for x in items]

    reference = evaluate

    def backward(self, items: Sequence[Any], grads: Sequence[NDArray[np.float32]]) -> None:
        for x, grad in zip(items, grads, strict=True):
            own = torch.tensor([float(x), 1.0], dtype=torch.float64) * float(grad[0, 0])
            self.w.grad = own if self.w.grad is None else self.w.grad + own

    def step(self) -> float:
        assert self.unused.grad is None
        if self.w.grad is None:
            return 0.0
        norm = float(self.w.grad.norm())
        if norm > 1e6:
            raise EchelonError("too large a gradient")
        self.speed = self.speed / 2 + self.w.grad
        self.w += self.speed
        self.w.grad = None
        return norm

    def parameters(self) -> list[torch.Tensor]:
        return [self.unused, self.w]

    def anchor(self) -> None:
        self.seen.append("anchor")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"w": self.w.clone(), "speed": self.speed.clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.w.copy_(state["w"])
        self.speed = state["speed"].clone()


# --- what the processes run ------------------------------------------------------------------------------------------


def learn(shared: Any) -> dict[str, torch.Tensor]:
    """Three updates of REINFORCE with a penalty for leaving the reference; the numbers on the way, and the state."""
    found: dict[str, torch.Tensor] = {}
    for update in range(3):
        tried = shared.sample(
            PROMPTS, 2, temperature=0.8, max_tokens=2 + update, keys=[10 * update + i for i in range(5)]
        )
        numbers, held = shared.evaluate(tried), shared.reference(tried)
        rewards = np.array([len(s.text) for s in tried], np.float32)
        rewards -= rewards.mean()
        grads = []
        for own, kept, reward in zip(numbers, held, rewards, strict=True):
            grad = np.zeros_like(own)
            grad[:, 0] = -reward / 10 + 0.1 * (own - kept)[:, 0]
            grad[:, 1] = -0.01
            grads.append(grad)
        shared.backward(tried[:7], grads[:7])
        shared.backward(tried[7:], grads[7:])
        norm = shared.step()
        found[f"{update}.norm"] = torch.tensor(norm)
        found[f"{update}.numbers"] = torch.from_numpy(np.concatenate(numbers))
        found[f"{update}.replies"] = torch.tensor([token for s in tried for token in s.reply_ids])
    return found | shared.state_dict()


def tokens(folder: Path, seed: int) -> TokenPolicy:
    """In float64: in float32 Adam makes 1e-4 of the last bits of small gradients, and would hide a small mistake."""
    policy = TokenPolicy.load(
        f"hf:{folder / 'tiny'}", dtype="float32", device="cpu", rank=4, lr=1e-2, seed=seed, sample_rows=1
    )
    policy._trainable.model.double()
    return policy


def choices(folder: Path, seed: int, dtype: torch.dtype = torch.float64) -> ChoicePolicy:
    """In float64 for the same reason."""
    config = PolicyConfig(layers=1, rank=4, lr=1e-2, micro_tokens=150)
    policy = ChoicePolicy.load(f"hf:{folder / 'tiny'}", SHARED, config, dtype="float32", device="cpu", seed=seed)
    policy._trainable.model.to(dtype)
    policy._base_prefix = None  # what the model made of it when it was loaded
    return policy


def rate(shared: LearningChoice, first: int, last: int) -> dict[str, torch.Tensor]:
    """Updates of imitation and reinforcement; the numbers on the way."""
    found: dict[str, torch.Tensor] = {}
    prompts = [ChoicePrompt(SHARED, "", ("x",) * 3, tuple(QUESTIONS[i : i + 3])) for i in range(0, 12, 3)]
    for update in range(first, last):
        shared.warm_up(update, 2)
        if update == 2:
            shared.anchor()
        asked = QUESTIONS[update : update + 7]
        numbers, held = shared.evaluate(asked), shared.reference(asked)
        grads = [0.3 * (own - kept) + (-1) ** i for i, (own, kept) in enumerate(zip(numbers, held, strict=True))]
        shared.backward(asked[:4], grads[:4])
        shared.backward(asked[4:], grads[4:])
        found[f"{update}.norm"] = torch.tensor(shared.step())
        found[f"{update}.numbers"] = torch.from_numpy(np.concatenate([*numbers, *held]))
        found[f"{update}.scores"] = torch.from_numpy(np.stack([s.logprobs for s in shared.score(prompts)]))
    return found


def state_of(policy: Any) -> dict[str, torch.Tensor]:
    """What must be the same however many processes there are."""
    return {k: v for k, v in policy.state_dict().items() if k != "met" and not k.startswith("rank")}


def line(case: str) -> None:
    """A leader's words, for the test to read."""
    print(f"[{case}]", flush=True)


def program(folder: Path) -> None:
    """What a command does: all processes come as far as the policy, and one goes on."""
    shared = shared_policy(lambda: choices(folder, 0))
    assert isinstance(shared, LearningChoice)
    line(f"rank {distributed.rank()} goes on with {type(shared).__name__}")
    save_file(rate(shared, 0, 2) | state_of(shared), folder / "part.safetensors")
    state = shared.state_dict()
    save_file(state, folder / "state.safetensors")
    save_file(rate(shared, 2, 4), folder / "rest.safetensors")
    shared.load_state_dict(state)
    save_file(rate(shared, 2, 4), folder / "again.safetensors")
    shared.save(folder / "saved")
    try:
        shared_policy(lambda: choices(folder, 0))
    except EchelonError as error:
        line(str(error))


def run(case: str, folder: Path) -> None:
    if case == "program":
        program(folder)
        return
    with distributed.joined(timeout=2.0 if case == "sleep" else 60.0):
        first = distributed.is_leader()
        # Replicas that differ until the leader's state is given to all.
        policy: Any = tokens(folder, distributed.rank()) if case == "tokens" else Line(float(distributed.rank()))
        if not first:
            try:
                distributed.serve(policy)
            except EchelonError as error:
                line(str(error))
            if case == "line":
                line(f"rank 1 saw {policy.seen} and ends at {policy.w.tolist()}")
            return
        if case == "desert":
            ShardedPolicy(policy)
            os._exit(0)
        with ShardedPolicy(policy) as shared:
            if case == "tokens":
                save_file(learn(shared), folder / "two.safetensors")
            elif case == "line":
                line(str([float(n[0, 0]) for n in shared.evaluate([1, 2, 3])]))
                shared.backward([4], [np.ones((1, 1), np.float32)])  # nothing for rank 1
                line(str(shared.step()))
                line(str(shared.step()))  # no rank has a gradient
                shared.anchor()
                shared.backward([1, 2, 3], [np.full((1, 1), g, np.float32) for g in (1, 10, 100)])
                line(str(shared.step()))
                line(f"rank 0 saw {policy.seen} and ends at {policy.w.tolist()}")
            elif case == "errors":
                big = np.full((1, 1), 1e9, np.float32)
                for items in ([1, b"bad"], [b"bad", 1], [1, 2]):
                    try:
                        line(str([float(n[0, 0]) for n in shared.evaluate(items)]))
                    except (EchelonError, ValueError) as error:
                        notes = len(getattr(error, "__notes__", []))
                        line(f"{type(error).__name__}: {str(error).splitlines()[0]}; {notes} notes")
                shared.backward([1, 1], [big, big])
                try:
                    shared.step()
                except EchelonError as error:
                    line(str(error))
                line(str([float(n[0, 0]) for n in shared.evaluate([0, 0, 1])]))
            else:
                for _ in range(2):
                    try:
                        shared.evaluate([1, case.encode()])
                    except EchelonError as error:
                        line(str(error))


# --- what is asked of them -------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "", **more}


def torchrun(case: str, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [*command, case, str(folder)], capture_output=True, text=True, timeout=240, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [text[1:-1] for text in done.stdout.splitlines() if text.startswith("[") and text.endswith("]")]


def two(case: str, folder: Path, asked: int) -> list[str]:
    """Without torchrun, which would end one process when the other dies: what process `asked` says until it ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, case, str(folder)],
            env=environment(RANK=r, WORLD_SIZE="2", LOCAL_RANK=r, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in "01"
    ]
    try:
        return ranks[asked].communicate(timeout=240)[0].splitlines()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny", words=256)
    torchrun("tokens", tmp_path)
    found, expected = load_file(tmp_path / "two.safetensors"), learn(tokens(tmp_path, 0))
    assert found.keys() == expected.keys()
    moved = 0.0
    for key, value in expected.items():  # the norms too: Adam and clipping make the weights blind to a wrong scale
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
        if key.startswith("weight.") and "lora_B" in key:
            moved = max(moved, float(value.abs().max()))
    assert moved > 0.01  # it has learnt something


def test_a_command_that_two_processes_run_learns_what_one_learns(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny", words=256)
    said = torchrun("program", tmp_path)
    assert said == [
        "rank 0 goes on with ShardedChoicePolicy",
        "the processes of torchrun share one policy: train one planner in a program",
    ]
    alone = choices(tmp_path, 0)
    found, expected = load_file(tmp_path / "part.safetensors"), rate(alone, 0, 2) | state_of(alone)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    assert abs(float(expected["0.numbers"][0] - rate(alone, 2, 3)["2.numbers"][0])) > 0.01  # it has learnt something
    # Resumed by two it is bit for bit what was never stopped; one can go on with what two have left.
    rest, again = load_file(tmp_path / "rest.safetensors"), load_file(tmp_path / "again.safetensors")
    assert rest.keys() == again.keys()
    assert all(torch.equal(rest[key], again[key]) for key in rest)
    state = load_file(tmp_path / "state.safetensors")
    assert [key for key in state if key.startswith("rank")] == ["rank1.met"]
    alone.load_state_dict(state)
    for key, value in rate(alone, 2, 4).items():
        torch.testing.assert_close(rest[key], value, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_items_are_split_and_gradients_added_up(tmp_path: Path) -> None:
    said = torchrun("line", tmp_path)
    # w is the leader's, (0, 2). The gradients: (4, 1); none; (1 + 20 + 300, 111), beside half of (4, 1) once more.
    assert [text for text in said if "rank" not in text] == [
        "[2.0, 2.0, 2.0]",
        f"{float(torch.tensor([4.0, 1.0], dtype=torch.float64).norm())}",
        "0.0",
        f"{float(torch.tensor([321.0, 111.0], dtype=torch.float64).norm())}",
    ]
    assert "rank 0 saw [1, 3, 'anchor'] and ends at [327.0, 114.5]" in said
    assert "rank 1 saw [2, 'anchor'] and ends at [327.0, 114.5]" in said


def test_an_error_anywhere_is_one_line_and_the_work_goes_on(tmp_path: Path) -> None:
    said = torchrun("errors", tmp_path)
    assert said == [
        "EchelonError: process 1 failed in evaluate: ValueError: a bad item; 1 notes",
        "ValueError: a bad item; 0 notes",  # the leader's own, as without other processes
        "[2.0, 2.0]",
        "too large a gradient",
        "[2.0, 2.0, 2.0]",
    ]


@pytest.mark.parametrize("case", ["end", "sleep"])
def test_a_process_that_is_gone_or_silent_is_not_waited_for(tmp_path: Path, case: str) -> None:
    told, then = two(case, tmp_path, 0)
    assert told.startswith("[process 1 died or did not answer to evaluate (")
    assert then == "[the other processes no longer serve: this policy was closed, or one of them failed]"


def test_a_leader_that_is_gone_ends_the_others(tmp_path: Path) -> None:
    [told] = two("desert", tmp_path, 1)
    assert told.startswith("[process 1: the leader is gone (")


def test_alone_it_is_the_policy_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed.joined():
        assert not distributed.init_from_env()
        assert (distributed.world(), distributed.rank(), distributed.is_leader()) == (1, 0, True)
        policy = Line(1.0)
        with ShardedPolicy(policy) as shared:
            assert [float(n[0, 0]) for n in shared.evaluate([1, 2])] == [3.0, 4.0]
            shared.backward([1, 2], [np.ones((1, 1), np.float32)] * 2)
            assert shared.step() == pytest.approx(np.hypot(3, 2))
            assert shared.state_dict()["w"].tolist() == [4.0, 4.0]
            assert shared.parameters() is not policy.parameters()
            with pytest.raises(ValueError, match="a bad item"):
                shared.evaluate([b"bad"])
            with pytest.raises(ValueError, match="1 items and 0 gradients"):
                shared.backward([1], [])
            shared.load_state_dict({"w": torch.zeros(2), "speed": torch.zeros(2)})
            assert float(shared.reference([5])[0][0, 0]) == 0.0


def test_questions_keep_their_process_and_all_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 3)
    places = distributed._places(QUESTIONS)
    assert sorted(i for own in places for i in own) == list(range(12))
    assert all(places)
    turned = distributed._places(QUESTIONS[::-1])
    assert [{QUESTIONS[i] for i in own} for own in places] == [{QUESTIONS[11 - i] for i in own} for own in turned]
    assert distributed._places([7, 7, 7, 7]) == [[0, 3], [1], [2]]
    assert distributed._places([]) == [[], [], []]


def test_alone_a_shared_policy_is_what_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model(tmp_path / "tiny", words=256)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    policy = choices(tmp_path, 0, torch.float32)
    assert shared_policy(lambda: policy) is policy
    assert shared_policy(lambda: policy) is policy
    assert distributed.cores() == os.cpu_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert distributed.cores() == 1
    with ShardedChoicePolicy(policy) as shared:
        assert isinstance(shared, LearningChoice)
        assert (shared.name, shared.updates) == (policy.name, 0)
        np.testing.assert_array_equal(shared.odds(QUESTIONS), policy.odds(QUESTIONS))
        rate(shared, 0, 1)
        assert shared.updates == policy.updates == 1
        assert shared.spent() == policy.spent()
        assert shared.spent()["prompts"] == 4


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
