"""One policy on several processors or GPUs: rank 0 runs the program, the others do a share of the model's work.

    torchrun --nproc-per-node 2 -m echelon train-planner ...

    policy = shared_policy(lambda: ChoicePolicy.load(...))   # behind this line there is the leader alone

or, piece by piece, for any `PolicyModel`:

    with distributed.joined():                        # does nothing without torchrun
        policy = TokenPolicy.load(...)                # a replica on every rank
        if not distributed.is_leader():
            distributed.serve(policy)                 # until the leader is done
        else:
            with ShardedPolicy(policy) as shared:     # a PolicyModel like `policy`
                ...

Items are split over the ranks, a question always to the same one, and gradients are added up over them before each step
(data parallelism), so all replicas stay equal, and the result is one process's up to the order of float sums. We don't
use torch's DistributedDataParallel: it wants one forward and backward pass of the same shape on every rank, and
learners here go through any number of micro-batches between two steps.

Commands and results travel between the ranks as pickles, over gloo. Whoever can reach the rendezvous port of torchrun
can make the ranks run code: keep it on one machine or inside a trusted network.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import hashlib
import math
import os
import signal
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from echelon.errors import EchelonError
from echelon.llm.choice import ChoicePrompt, ChoiceScores
from echelon.llm.policy import ChoicePolicy, LearningChoice, PolicyModel

__all__ = [
    "Replica",
    "ShardedChoicePolicy",
    "ShardedPolicy",
    "close",
    "cores",
    "init_from_env",
    "is_leader",
    "joined",
    "rank",
    "serve",
    "shared_policy",
    "world",
]

_FOREVER = datetime.timedelta(days=365)
_BUCKET = 1 << 24  # numbers of gradients that go through one all-reduce

_control: Any = None  # the group for commands; gloo, whatever the gradients travel over
_shared = False  # whether this process has given its policy to `shared_policy`


class Replica(PolicyModel, Protocol):
    """What can be shared out: a `PolicyModel` whose gradients can be reached."""

    def parameters(self) -> list[Tensor]:
        """What learns, in the same order on every rank."""
        ...

    def anchor(self) -> None:
        """From now on the reference is the model as it is now."""
        ...


# -- the group of processes --------------------------------------------------------------------


def init_from_env(*, timeout: float = 1800.0) -> bool:
    """Join the group that torchrun describes in the environment (RANK, WORLD_SIZE, …); nothing without it.

    With GPUs each process takes that of its LOCAL_RANK, and gradients travel over nccl, else over gloo.

    Args:
        timeout: seconds that the leader waits for another rank's share before it gives up. The others wait for the
            leader's next command as long as it lives.

    Returns:
        Whether there is more than one process.

    Raises:
        EchelonError: the processes don't find each other.
    """
    global _control
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return False
    if _control is not None:
        return True
    patience = datetime.timedelta(seconds=timeout)
    backend = "gloo"
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=patience)
        _control = dist.new_group(backend="gloo", timeout=patience if dist.get_rank() == 0 else _FOREVER)
    except (RuntimeError, ValueError) as error:
        raise EchelonError(f"the processes of torchrun did not come together: {_line(error)}") from error
    return True


def close() -> None:
    """Leave the group; nothing where there is none."""
    global _control
    if _control is not None:
        _control = None
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(*, timeout: float = 1800.0) -> Iterator[None]:
    """`init_from_env` and `close` around a block."""
    init_from_env(timeout=timeout)
    try:
        yield
    finally:
        close()


def world() -> int:
    """How many processes share the work; 1 without torchrun."""
    return dist.get_world_size() if _control is not None else 1


def rank() -> int:
    """This process's number; the leader is 0."""
    return dist.get_rank() if _control is not None else 0


def is_leader() -> bool:
    """Whether this process runs the program; the others `serve`."""
    return rank() == 0


def cores() -> int:
    """How many of this machine's processor cores this process should use: its part, where torchrun started several."""
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, (os.cpu_count() or 1) // max(1, int(beside) if beside.isdigit() else 1))


def shared_policy(load: Callable[[], ChoicePolicy], *, timeout: float = 1800.0) -> LearningChoice:
    """Load a policy that all processes of torchrun share; without torchrun it is simply loaded.

    To be called once in a program that all processes run up to here with the same arguments. The leader returns, and
    goes on alone; the others do their share of the model's work until the leader's program ends, and end with it. They
    leave Ctrl-C and SIGTERM to the leader, which may have a checkpoint to write.

    Args:
        load: loads this process's replica; called when the process has its GPU.
        timeout: as for `init_from_env`.

    Raises:
        EchelonError: what `load` raises; the processes don't find each other; a second policy; in a process that
            served, that the leader is gone.
        SystemExit: in a process that has served, when the leader is done.
    """
    global _shared
    if not init_from_env(timeout=timeout):
        return load()
    if _shared:
        raise EchelonError("the processes of torchrun share one policy: train one planner in a program")
    _shared = True
    atexit.register(close)
    if is_leader():
        policy = ShardedChoicePolicy(load())
        atexit.register(policy.close)  # the last one registered goes first
        return policy
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    serve(load())
    raise SystemExit(0)


# -- the leader --------------------------------------------------------------------------------


class ShardedPolicy:
    """A policy whose work all ranks share; itself a `PolicyModel`. In a single process it is the policy alone.

    An error on any rank is raised here, as one line, once all have answered; the others go on waiting for commands.
    A rank that dies or doesn't answer in time is an error too, and the group is then broken: end the program.

    Attributes:
        policy: this rank's replica, to save, say.
    """

    def __init__(self, policy: Replica) -> None:
        """Take the lead, and give all replicas the leader's state. The others must be in `serve`.

        Raises:
            EchelonError: another rank's replica is of another kind, or it failed.
        """
        if not is_leader():
            raise EchelonError("only rank 0 leads: the others call serve(policy)")
        self.policy = policy
        self._serving = world() > 1
        if self._serving:
            state = {name: tensor.cpu() for name, tensor in policy.state_dict().items()}
            self._ask("load_state_dict", [(state,)] * world())

    def evaluate(self, items: Sequence[Any]) -> list[NDArray[np.float32]]:
        """As the policy's own, each rank some of the items."""
        return self._numbers("evaluate", items)

    def reference(self, items: Sequence[Any]) -> list[NDArray[np.float32]]:
        """As the policy's own."""
        return self._numbers("reference", items)

    def sample(
        self, prompts: Sequence[Any], n: int, *, keys: Sequence[int] | NDArray[Any], **settings: Any
    ) -> list[Any]:
        """As `TokenPolicy.sample`, each rank some of the prompts."""
        parts = [(prompts[r :: world()], n) for r in range(world())]
        named = {name: [value] * world() for name, value in settings.items()}
        answers = self._ask("sample", parts, keys=[keys[r :: world()] for r in range(world())], **named)
        found: list[Any] = [None] * (len(prompts) * n)
        for r, replies in enumerate(answers):
            for i, reply in enumerate(replies):
                found[(r + i // n * world()) * n + i % n] = reply
        return found

    def backward(self, items: Sequence[Any], grads: Sequence[NDArray[np.float32]]) -> None:
        """As the policy's own; each rank keeps the gradients of its items until `step`."""
        if len(items) != len(grads):
            raise ValueError(f"{len(items)} items and {len(grads)} gradients")
        self._ask("backward", [([items[i] for i in p], [grads[i] for i in p]) for p in _places(items)])

    def step(self) -> float:
        """Add up the ranks' gradients, then one step on each.

        Raises:
            EchelonError: as the policy's own; the replicas have come apart.
        """
        norms = self._ask("step", [()] * world())
        if not all(math.isclose(norm, norms[0], rel_tol=1e-3) for norm in norms):
            raise EchelonError(f"the processes' gradients differ after they were added up: {norms}")
        return float(norms[0])

    def parameters(self) -> list[Tensor]:
        """Those of this rank's replica."""
        return self.policy.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The leader's own, and as `rank1.…` what another rank has otherwise, such as the questions that it met.

        A single process leaves the latter out when it loads such a state, and so do fewer ranks.
        """
        state = self.policy.state_dict()
        if world() > 1:
            known = {name: _digest(tensor) for name, tensor in state.items()}
            for r, others in enumerate(self._ask("state_dict", [(known,)] * world())):
                state |= {f"rank{r}.{name}": tensor for name, tensor in others.items() if r}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As the policy's own, on every rank."""
        shares = []
        for r in range(world()):
            own, others = f"rank{r}.", [name for name in state if name.startswith("rank")]
            share = {name: tensor.cpu() for name, tensor in state.items() if name not in others}
            shares.append((share | {n.removeprefix(own): state[n].cpu() for n in others if n.startswith(own)},))
        self._ask("load_state_dict", shares)

    def anchor(self) -> None:
        """As the policy's own, on every rank."""
        self._ask("anchor", [()] * world())

    def close(self) -> None:
        """Let the other ranks return from `serve`."""
        if self._serving:
            self._serving = False
            for other in range(1, world()):
                with contextlib.suppress(RuntimeError):  # it is gone already
                    _send(("stop", (), {}), other)

    def __enter__(self) -> ShardedPolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _numbers(self, method: str, items: Sequence[Any]) -> list[Any]:
        found: list[Any] = [None] * len(items)
        places = _places(items)
        for own, part in zip(places, self._ask(method, [([items[i] for i in p],) for p in places]), strict=True):
            for i, numbers in zip(own, part, strict=True):
                found[i] = numbers
        return found

    def _ask(self, method: str, shares: Sequence[tuple[Any, ...]], **settings: Sequence[Any]) -> list[Any]:
        """Have every rank call `method` with its share of arguments and of `settings`; their results by rank."""
        if len(shares) > 1 and not self._serving:
            raise EchelonError("the other processes no longer serve: this policy was closed, or one of them failed")
        calls = [(method, share, {k: v[r] for k, v in settings.items()}) for r, share in enumerate(shares)]
        # Whatever ends this before all have answered leaves answers behind that nobody could tell apart.
        serving, self._serving = self._serving, False
        try:
            for other, call in enumerate(calls[1:], 1):
                _send(call, other)
        except RuntimeError as error:
            raise EchelonError(f"a process is gone ({_line(error)})") from error
        results, first = [], None
        try:
            results.append(_do(self.policy, *calls[0]))
        except Exception as error:
            first = error
        for other in range(1, len(calls)):
            try:
                good, value = _receive(other)
            except RuntimeError as error:
                raise EchelonError(f"process {other} died or did not answer to {method} ({_line(error)})") from error
            if good:
                results.append(value)
            elif first is None:
                line, trace = value
                first = EchelonError(f"process {other} failed in {method}: {line}")
                first.add_note(trace)
        self._serving = serving
        if first is not None:
            raise first
        return results


class ShardedChoicePolicy(ShardedPolicy):
    """A `ChoicePolicy` whose work all ranks share: whoever plans with it or trains it needn't know."""

    policy: ChoicePolicy

    def __init__(self, policy: ChoicePolicy) -> None:
        """As `ShardedPolicy`."""
        super().__init__(policy)

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.policy.name

    @property
    def updates(self) -> int:
        """Optimiser steps taken."""
        return self.policy.updates

    def odds(self, items: Sequence[str]) -> NDArray[np.float32]:
        """As `ChoicePolicy.odds`."""
        return np.array(self._numbers("odds", items), np.float32)

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        """As `ChoicePolicy.score`."""
        return self.policy.rate(prompts, self.odds)

    def spent(self) -> dict[str, float]:
        """What all were asked together by `score`; `seconds` are the leader's."""
        return self.policy.spent()

    def warm_up(self, update: int, updates: int) -> None:
        """As `ChoicePolicy.warm_up`, on every rank."""
        self._ask("warm_up", [(update, updates)] * world())

    def save(self, folder: Path, files: Mapping[str, str] | None = None, *, base: str | None = None) -> None:
        """As `ChoicePolicy.save`, by the leader."""
        self.policy.save(folder, files, base=base)


def _places(items: Sequence[Any]) -> list[list[int]]:
    """The items' places by rank: a question's rank is its own, so that it finds there what it left; else by turns."""
    found: list[list[int]] = [[] for _ in range(world())]
    for i, item in enumerate(items):
        key = zlib.crc32(item.encode("utf-8", "surrogatepass")) if isinstance(item, str) else i
        found[key % len(found)].append(i)
    return found


def _digest(tensor: Tensor) -> bytes:
    own = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(own.tobytes() + str(tensor.shape).encode(), digest_size=16).digest()


# -- the others --------------------------------------------------------------------------------


def serve(policy: Replica) -> None:
    """Do this rank's share of the leader's work until the leader is closed.

    What goes wrong with a share is told to the leader, which raises it; this rank goes on.

    Raises:
        EchelonError: the leader is gone.
    """
    while True:
        try:
            method, args, keywords = _receive(0)
        except RuntimeError as error:
            raise EchelonError(f"process {rank()}: the leader is gone ({_line(error)})") from error
        if method == "stop":
            return
        answer: tuple[bool, Any]
        try:
            answer = (True, _do(policy, method, args, keywords))
        except Exception as error:
            line = str(error) if isinstance(error, EchelonError) else _line(error)
            answer = (False, (line, "".join(traceback.format_exception(error))))
        try:
            _send(answer, 0)
        except RuntimeError as error:
            raise EchelonError(f"process {rank()}: the leader is gone ({_line(error)})") from error


def _do(policy: Replica, method: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    if method == "step":
        return _reduce_and_step(policy)
    if method == "state_dict":  # what the leader doesn't have
        return (
            {} if is_leader() else {n: x.cpu() for n, x in policy.state_dict().items() if args[0].get(n) != _digest(x)}
        )
    return getattr(policy, method)(*args, **keywords)


def _reduce_and_step(policy: Replica) -> float:
    """Make every rank's gradients the sum of all, then step."""
    params = policy.parameters()
    if world() > 1 and params:
        # A parameter that no rank has a gradient for is left alone, as it would be in one process.
        some = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device=params[0].device)
        dist.all_reduce(some, dist.ReduceOp.MAX)
        touched = [p for p, has in zip(params, some.tolist(), strict=True) if has]
        for p in touched:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        bucket: list[Tensor] = []
        for i, p in enumerate(touched):
            assert p.grad is not None
            bucket.append(p.grad)
            if i == len(touched) - 1 or sum(g.numel() for g in bucket) >= _BUCKET:
                flat = torch.cat([g.reshape(-1) for g in bucket])
                dist.all_reduce(flat)
                for g, total in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                    g.copy_(total.view_as(g))
                bucket = []
    return policy.step()


def _send(message: Any, other: int) -> None:
    dist.send_object_list([message], dst=other, group=_control, device=torch.device("cpu"))


def _receive(other: int) -> Any:
    box = [None]
    dist.recv_object_list(box, src=other, group=_control, device=torch.device("cpu"))
    return box[0]


def _line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}"
