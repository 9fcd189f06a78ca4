"""Small networks with hand-written gradients, and the mathematics of masked categorical policies.

On a CPU the two-layer networks of multi-agent RL are bound by memory and by the overhead of autograd, not by
arithmetic. Here weights live in one flat float32 vector, activations are kept in the computing type (bfloat16
where the processor multiplies it fast), and forward and backward are a handful of matrix products each. Tests
hold every gradient against autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Literal, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.rng import uniform

__all__ = [
    "MLP",
    "Lanes",
    "Precision",
    "RecurrentMLP",
    "ValueNorm",
    "epsilon_greedy",
    "fast_bfloat16",
    "ppo_policy_gradient",
    "resolve_precision",
    "sample_actions",
]

T = TypeVar("T")
Precision = Literal["auto", "float32", "bfloat16"]


def fast_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16 (AVX-512 BF16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe)()) for probe in probes if hasattr(torch.cpu, probe))


def resolve_precision(precision: Precision) -> torch.dtype:
    """The type to compute in: "auto" is bfloat16 where the processor has it, else float32."""
    if precision == "auto":
        return torch.bfloat16 if fast_bfloat16() else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


class Lanes:
    """Runs the pieces of a batch side by side.

    A batch is always cut into the same pieces, whatever the number of threads, and their sums are added in
    order: threads change the speed, not one bit of the result. Each thread works alone on its piece, instead
    of all together on each product, so a busy core delays its own piece only: with OpenMP's barriers a second
    program on the machine made training 4 to 45 times slower, with lanes about twice (`docs/results/speed.md`).
    """

    COUNT = 4
    LEAST = 1024  # rows a piece: fewer aren't worth handing over

    def __init__(self, threads: int) -> None:
        """Work with `threads` threads, the calling one among them (more than `COUNT` bring nothing)."""
        self._helpers = min(threads, self.COUNT) - 1
        self._pool: ThreadPoolExecutor | None = None

    def cut(self, rows: int) -> list[slice]:
        """The pieces of a batch of `rows` rows, fewer if it is small."""
        count = max(1, min(self.COUNT, rows // self.LEAST))
        edges = [rows * k // count for k in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def run(self, work: Callable[[int, slice], T], pieces: list[slice]) -> list[T]:
        """`work(lane, piece)` for every piece; the results in order."""
        results: list[T | None] = [None] * len(pieces)
        todo = iter(range(len(pieces)))

        def labour() -> None:
            # next() on a range's iterator is atomic: whoever is free takes the next piece.
            for lane in todo:
                results[lane] = work(lane, pieces[lane])

        helpers = min(self._helpers, len(pieces) - 1)
        if helpers and self._pool is None:
            self._pool = ThreadPoolExecutor(helpers, "lane", initializer=torch.set_num_threads, initargs=(1,))
        waiting = [self._pool.submit(labour) for _ in range(helpers)] if self._pool is not None else []
        try:
            labour()
        finally:
            # Also after an error: nobody may still be writing into the lanes when the next batch comes.
            wait(waiting)
        for future in waiting:
            future.result()
        return cast(list[T], results)


class _Workspace:
    """One lane's activations and gradients, allocated once.

    Megabytes that are freshly mapped at each call cost more in page faults than the products themselves
    (measured: twice the time of a whole step).
    """

    def __init__(self, sizes: Sequence[int], rows: int, dtype: torch.dtype) -> None:
        self.rows = rows
        self.kept = [torch.empty(rows, n, dtype=dtype) for n in sizes[:-1]]
        self.grads = [torch.empty(rows, n, dtype=dtype) for n in sizes[:-1]]
        self.ones = torch.ones(1, rows, dtype=dtype)


class MLP:
    """Linear layers with ReLU between them, and their gradient, in one flat parameter.

    Attributes:
        flat: float32 parameter `(P,)`, all weights and biases; its `.grad` is allocated, and set by `collect`.
        dtype: the type that activations and products are computed in; gradients of weights are summed in float32.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        scale: NDArray[np.float32],
        *,
        last_gain: float,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        """Orthogonal initialisation, gain sqrt(2) inside, `last_gain` at the output, zero biases.

        Args:
            sizes: units a layer, input first.
            scale: float32 `(sizes[0],)`, multiplied into the input (folded into the first layer's weights).
            last_gain: gain of the last layer.
            dtype: float32 or bfloat16.
            generator: where the initial weights come from.
        """
        self.dtype = dtype
        self._sizes = list(sizes)
        self._shapes = [(n, m) for m, n in itertools.pairwise(sizes)]
        count = sum(n * m + n for n, m in self._shapes)
        self.flat = torch.nn.Parameter(torch.zeros(count), requires_grad=False)
        self.flat.grad = torch.zeros(count)
        self._scale = torch.from_numpy(scale)
        self.weights, self.biases = self._views(self.flat.data)
        self._lane_grads = torch.zeros(Lanes.COUNT, count)
        self._lane_views = [self._views(self._lane_grads[k]) for k in range(Lanes.COUNT)]
        self._spaces: list[_Workspace | None] = [None] * Lanes.COUNT
        for i, weight in enumerate(self.weights):
            gain = last_gain if i == len(self._shapes) - 1 else 2**0.5
            torch.nn.init.orthogonal_(weight, gain, generator=generator)

    def _views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        weights, biases, at = [], [], 0
        for n, m in self._shapes:
            weights.append(flat[at : at + n * m].view(n, m))
            biases.append(flat[at + n * m : at + n * m + n])
            at += n * m + n
        return weights, biases

    def parameters(self) -> list[torch.nn.Parameter]:
        """The one flat parameter."""
        return [self.flat]

    def _space(self, lane: int, rows: int) -> _Workspace:
        space = self._spaces[lane]
        if space is None or space.rows < rows:
            self._spaces[lane] = space = _Workspace(self._sizes, rows, self.dtype)
        return space

    @torch.no_grad()
    def forward(self, x: Tensor, lane: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and what `backward` needs.

        Args:
            x: `(B, sizes[0])`, any type that fits into `dtype` exactly (int8 does).
            lane: whose workspace is used; calls with different lanes may run side by side.

        Returns:
            float32 `(B, sizes[-1])`, and the layers' inputs, which the lane's next `forward` overwrites.
        """
        kept = [k[: len(x)] for k in self._space(lane, len(x)).kept]
        kept[0].copy_(x)
        for i, weight in enumerate(self.weights[:-1]):
            cast_weight = (weight * self._scale if i == 0 else weight).to(self.dtype)
            torch.addmm(self.biases[i].to(self.dtype), kept[i], cast_weight.t(), out=kept[i + 1]).relu_()
        last = self.weights[-1] * self._scale if len(self.weights) == 1 else self.weights[-1]
        out = torch.addmm(self.biases[-1].to(self.dtype), kept[-1], last.to(self.dtype).t())
        return out.float(), kept

    @torch.no_grad()
    def backward(self, kept: list[Tensor], grad: Tensor, lane: int = 0) -> None:
        """Add the gradient to the lane's sum.

        Args:
            kept: what the lane's last `forward` gave.
            grad: float32 `(B, sizes[-1])`, the loss's gradient in the outputs.
            lane: the lane of that `forward`.
        """
        g = grad.to(self.dtype)
        space = self._space(lane, len(g))
        ones = space.ones[:, : len(g)]
        weight_grads, bias_grads = self._lane_views[lane]
        for i in range(len(self.weights) - 1, -1, -1):
            weight_grad = torch.mm(g.t(), kept[i])
            bias_grads[i] += torch.mm(ones, g).view(-1)
            if i:
                weight_grads[i] += weight_grad
                g = torch.mm(g, self.weights[i].to(self.dtype), out=space.grads[i][: len(g)])
                torch.ops.aten.threshold_backward.grad_input(g, kept[i], 0, grad_input=g)
            else:
                weight_grads[i] += weight_grad.float() * self._scale

    @torch.no_grad()
    def collect(self) -> None:
        """Move the lanes' sums, added in order, into `flat.grad`, and begin new ones."""
        assert self.flat.grad is not None
        torch.sum(self._lane_grads, 0, out=self.flat.grad)
        self._lane_grads.zero_()


class RecurrentMLP(torch.nn.Module):
    """Linear, ReLU, GRU, linear, over sequences, with the hidden state reset where an episode begins.

    Uses autograd: the recurrence, not the overhead, sets its speed.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        scale: NDArray[np.float32],
        *,
        last_gain: float,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        """`sizes` is (inputs, hidden, outputs); the rest as `MLP`."""
        super().__init__()
        inputs, self.hidden, outputs = sizes[0], sizes[1], sizes[-1]
        self.dtype = dtype
        self._scale = torch.from_numpy(scale)
        self.first = torch.nn.Linear(inputs, self.hidden)
        self.gru = torch.nn.GRUCell(self.hidden, self.hidden)
        self.last = torch.nn.Linear(self.hidden, outputs)
        for module, gain in ((self.first, 2**0.5), (self.gru, 1.0), (self.last, last_gain)):
            for name, p in module.named_parameters():
                if "weight" in name:
                    torch.nn.init.orthogonal_(p, gain, generator=generator)
                else:
                    torch.nn.init.zeros_(p)

    def forward(self, x: Tensor, hidden: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs for a sequence, float32 `(T, B, outputs)`, and the last state, float32 `(B, hidden)`: `unroll`."""
        out, states = self.unroll(x, hidden, begins)
        return out, states[-1]

    def unroll(self, x: Tensor, hidden: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and states for a sequence.

        Args:
            x: `(T, B, inputs)`.
            hidden: float32 `(B, hidden)`, the state before the first step.
            begins: bool `(T, B)`, where a new episode begins (the state is zeroed before the step).

        Returns:
            float32 `(T, B, outputs)` and the state after each step, float32 `(T, B, hidden)`.
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            features = torch.relu(self.first(x.float() * self._scale))
            states = []
            for t in range(x.shape[0]):
                hidden = self.gru(features[t], hidden * (~begins[t]).unsqueeze(-1)).float()
                states.append(hidden)
            kept = torch.stack(states)
            return self.last(kept).float(), kept


class ValueNorm:
    """Running mean and variance of value targets, with bias correction (PopArt's statistics, as MAPPO uses).

    Attributes:
        stats: float64 `(3,)`: decayed mean, decayed mean of squares, decayed weight.
    """

    def __init__(self, decay: float = 0.99) -> None:
        """`decay`: how much of the statistics one update keeps."""
        self.decay = decay
        self.stats = torch.zeros(3, dtype=torch.float64)

    def update(self, targets: NDArray[np.float32]) -> None:
        """Take in a batch of unnormalised targets."""
        new = torch.tensor([targets.mean(dtype=np.float64), np.square(targets, dtype=np.float64).mean(), 1.0])
        self.stats.mul_(self.decay).add_(new, alpha=1 - self.decay)

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation (at least 0.01); 0 and 1 before the first update."""
        mean, square, weight = self.stats.tolist()
        if weight == 0:
            return 0.0, 1.0
        mean, square = mean / weight, square / weight
        return mean, max(square - mean * mean, 1e-4) ** 0.5


@numba.njit(cache=True)
def sample_actions(logits, mask, keys, counters, greedy, actions, logp):  # type: ignore[no-untyped-def]
    """Draw one legal action a row from the softmax of its unmasked logits, by inverse distribution.

    World w's draws depend on (keys[w], counters[w]) alone; `counters` moves on by one.

    Args:
        logits: float32 `(W, A, actions)`; mask: uint8, the same shape, with at least one 1 a row.
        keys, counters: uint64 `(W,)`.
        greedy: take the most probable action instead (of equals the first).
        actions: int8 `(W, A)`, written; logp: float32 `(W, A)`, written.
    """
    num = logits.shape[2]
    for w in range(logits.shape[0]):
        for a in range(logits.shape[1]):
            top = np.float32(-np.inf)
            best = 0
            for k in range(num):
                if mask[w, a, k] and logits[w, a, k] > top:
                    top, best = logits[w, a, k], k
            total = np.float32(0)
            for k in range(num):
                if mask[w, a, k]:
                    total += np.exp(logits[w, a, k] - top)
            if not greedy:
                left = np.float32(uniform(keys[w], counters[w] * np.uint64(64) + np.uint64(a))) * total
                for k in range(num):
                    if mask[w, a, k]:
                        best = k
                        left -= np.exp(logits[w, a, k] - top)
                        if left < 0:
                            break
            actions[w, a] = best
            logp[w, a] = logits[w, a, best] - top - np.log(total)
        counters[w] += np.uint64(1)


@numba.njit(cache=True)
def epsilon_greedy(values, mask, keys, counters, epsilon, actions):  # type: ignore[no-untyped-def]
    """The legal action of the greatest value in each row, or with probability `epsilon` any legal one.

    World w's draws depend on (keys[w], counters[w]) alone; `counters` moves on by one.

    Args:
        values: float32 `(W, A, actions)`; mask: uint8, the same shape, with at least one 1 a row.
        keys, counters: uint64 `(W,)`.
        epsilon: 0 (of equals the first) to 1 (each legal action is as probable as any other).
        actions: int8 `(W, A)`, written.
    """
    num = values.shape[2]
    for w in range(values.shape[0]):
        for a in range(values.shape[1]):
            best, legal = -1, 0
            for k in range(num):
                if mask[w, a, k]:
                    legal += 1
                    if best < 0 or values[w, a, k] > values[w, a, best]:
                        best = k
            u = uniform(keys[w], counters[w] * np.uint64(64) + np.uint64(a))
            if u < epsilon:
                # Given that it is below epsilon, the draw is uniform there: it says which one, too.
                left = min(int(u / epsilon * legal), legal - 1)
                for k in range(num):
                    if mask[w, a, k]:
                        best = k
                        if left == 0:
                            break
                        left -= 1
            actions[w, a] = best
        counters[w] += np.uint64(1)


@numba.njit(cache=True, error_model="numpy", nogil=True)
def ppo_policy_gradient(logits, mask, actions, old_logp, advantages, clip, entropy_weight, grad):  # type: ignore[no-untyped-def]
    """The gradient in the logits of `-mean(min(ρA, clip(ρ, 1±ε) A)) - entropy_weight * mean(entropy)`.

    PPO's clipped surrogate (Schulman et al. 2017, Eq. 7; L2M2's Eq. 2) in closed form for masked softmax
    policies; masked actions get no gradient.

    Args:
        logits: float32 `(B, actions)`; mask: uint8, the same shape.
        actions: int8 `(B,)`; old_logp, advantages: float32 `(B,)`.
        clip: ε; entropy_weight: at least 0.
        grad: float32, as `logits`, written.

    Returns:
        policy loss, mean entropy, mean approximate KL (Schulman's k3), share of clipped rows; float64.
    """
    rows, num = logits.shape
    p: NDArray[np.float32] = np.empty(num, np.float32)
    loss, entropy_sum, kl_sum, clipped = 0.0, 0.0, 0.0, 0
    inv = np.float32(1.0 / rows)
    for i in range(rows):
        top = np.float32(-np.inf)
        for k in range(num):
            if mask[i, k] and logits[i, k] > top:
                top = logits[i, k]
        total = np.float32(0)
        for k in range(num):
            p[k] = np.exp(logits[i, k] - top) if mask[i, k] else np.float32(0)
            total += p[k]
        log_total = np.log(total)
        entropy = np.float32(0.0)
        for k in range(num):
            p[k] /= total
            if p[k] > 0:
                entropy -= p[k] * (logits[i, k] - top - log_total)
        act = actions[i]
        change = logits[i, act] - top - log_total - old_logp[i]
        ratio = np.exp(change)
        a = advantages[i]
        bounded = min(max(ratio, np.float32(1 - clip)), np.float32(1 + clip))
        active = ratio * a <= bounded * a
        clipped += not active
        loss -= min(ratio * a, bounded * a)
        entropy_sum += float(entropy)
        kl_sum += ratio - 1 - change
        push = -ratio * a * inv if active else np.float32(0)
        for k in range(num):
            if mask[i, k]:
                log_p = logits[i, k] - top - log_total
                own = np.float32(1) if k == act else np.float32(0)
                grad[i, k] = push * (own - p[k]) + np.float32(entropy_weight) * p[k] * (log_p + entropy) * inv
            else:
                grad[i, k] = 0
    return loss / rows, entropy_sum / rows, kl_sum / rows, clipped / rows
