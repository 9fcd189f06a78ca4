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
from echelon.llm import TextPrompt, distributed
from echelon.llm.distributed import ShardedPolicy
from echelon.llm.token_policy import TokenPolicy
from tiny_model import make_tiny_model

PROMPTS = [TextPrompt("You guide robots.", f"Where to, robot {i}?" + " And then?" * i) for i in range(5)]


class Line:
    """The smallest policy: an item x has the number w·x; gradient ascent of step 1 and momentum ½."""

    def __init__(self, w: float) -> None:
        self.w = torch.tensor([w, 2.0], dtype=torch.float64)
        self.speed = torch.zeros(2, dtype=torch.float64)
        self.unused = torch.zeros(1, dtype=torch.float64)
        self.seen: list[Any] = []

    def evaluate(self, items: Sequence[Any]) -> list[NDArray[np.float32]]:
        self.seen += items
        if "bad" in items:
            raise ValueError("a bad item\nin two lines")
        if "end" in items:
            os._exit(3)
        if "sleep" in items:
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


def line(case: str) -> None:
    """A leader's words, for the test to read."""
    print(f"[{case}]", flush=True)


def run(case: str, folder: Path) -> None:
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
                shared.backward([1, 2, 3], [np.full((1, 1), g, np.float32) for g in (1, 10, 100)])
                line(str(shared.step()))
                line(f"rank 0 saw {policy.seen} and ends at {policy.w.tolist()}")
            elif case == "errors":
                big = np.full((1, 1), 1e9, np.float32)
                for items in ([1, "bad"], ["bad", 1], [1, 2]):
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
                try:
                    shared.call("no_such_method")
                except AttributeError:
                    line("no such method")
                line(str([float(n[0, 0]) for n in shared.evaluate([0, 0, 1])]))
            else:
                for _ in range(2):
                    try:
                        shared.evaluate([1, case])
                    except EchelonError as error:
                        line(str(error))


# --- what is asked of them -------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "", **more}


def torchrun(case: str, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [*command, case, str(folder)], capture_output=True, text=True, timeout=120, env=environment(), check=False
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
        return ranks[asked].communicate(timeout=60)[0].splitlines()
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


def test_items_are_split_and_gradients_added_up(tmp_path: Path) -> None:
    said = torchrun("line", tmp_path)
    # w is the leader's, (0, 2). The gradients: (4, 1); none; (1 + 20 + 300, 111), beside half of (4, 1) once more.
    assert [text for text in said if "rank" not in text] == [
        "[2.0, 2.0, 2.0]",
        f"{float(torch.tensor([4.0, 1.0], dtype=torch.float64).norm())}",
        "0.0",
        f"{float(torch.tensor([321.0, 111.0], dtype=torch.float64).norm())}",
    ]
    assert "rank 0 saw [1, 3] and ends at [327.0, 114.5]" in said
    assert "rank 1 saw [2] and ends at [327.0, 114.5]" in said


def test_an_error_anywhere_is_one_line_and_the_work_goes_on(tmp_path: Path) -> None:
    said = torchrun("errors", tmp_path)
    assert said == [
        "EchelonError: process 1 failed in evaluate: ValueError: a bad item; 1 notes",
        "ValueError: a bad item; 0 notes",  # the leader's own, as without other processes
        "[2.0, 2.0]",
        "too large a gradient",
        "no such method",
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
                shared.evaluate(["bad"])
            with pytest.raises(ValueError, match="1 items and 0 gradients"):
                shared.backward([1], [])
            shared.load_state_dict({"w": torch.zeros(2), "speed": torch.zeros(2)})
            assert float(shared.reference([5])[0][0, 0]) == 0.0


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
