"""The distilled planner's network: what it sees of an agent's open candidates, its answer and its learning.

A question is one agent with its open candidates. Each candidate goes through a linear layer and ReLU; the mean and
the greatest of these over the agent's candidates say among what it stands; a second layer and ReLU of both give its
logit, and the softmax over the open candidates the answer (the permutation-equivariant form of Zaheer et al. 2017,
"Deep sets"). Features say nothing of task ids, absolute cells, the size of the map or the batch, so that what was
learnt in one world holds in another.

Everything is a loop over questions in one kernel each: at these sizes (some dozen questions of at most some dozen
candidates) a call into a tensor library costs more than its arithmetic, and a question's answer then depends on that
question alone, to the last bit, whatever is asked beside it and however many threads there are. Tests hold the
gradient against autograd.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import SubgoalKind
from echelon.envs.kernels import UNREACHABLE
from echelon.rng import below
from echelon.subgoals import PlanRequest

__all__ = ["RAW", "Network", "list_open", "open_counts", "questions"]

RAW = 5
"""What is kept of a candidate, int16: kind, path length, straight way in rows and in columns, robots nearer to it."""

_KINDS = len(SubgoalKind)
_TOOL, _UNREACHABLE = int(SubgoalKind.TOOL), int(UNREACHABLE)
_LENGTHS = 64  # path lengths that have weights of their own: a model that reads numbers may like 13 and not 14
_SCALARS = 18
_LOG = np.log1p(np.arange(1024)).astype(np.float32)
_NEAR = np.exp(-np.arange(1024) / 6).astype(np.float32)
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's usual ones
# Only sums may be reordered and fused, which a compiled kernel does the same way each time; NaN stays NaN.
_FAST = {"contract", "reassoc"}


class Network:
    """Weights, their gradient step (Adam, Kingma and Ba 2015) and the answer to questions.

    Attributes:
        hidden: units of each hidden layer.
        flat: float32 `(P,)`, all weights; first, second: float32 `(P,)`, Adam's moments.
        updates: gradient steps made.
    """

    def __init__(self, hidden: int, seed: int) -> None:
        """He's initialisation; what only a few questions ever touch, and the last layer, begins at 0.

        Args:
            hidden: units of each hidden layer.
            seed: decides the initial weights.
        """
        self.hidden, self.updates = hidden, 0
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0xD15,)))
        H = hidden
        parts = [
            rng.normal(0, (2 / (_SCALARS + 1)) ** 0.5, (_KINDS, H)),
            np.zeros((_LENGTHS, H)),
            rng.normal(0, (2 / (_SCALARS + 1)) ** 0.5, (_SCALARS, H)),
            np.zeros(H),
            *(rng.normal(0, (2 / (3 * H)) ** 0.5, (H, H)) for _ in range(3)),
            np.zeros(H),
            np.zeros(H),
        ]
        self.flat = np.concatenate([p.ravel() for p in parts]).astype(np.float32)
        self.first, self.second = np.zeros_like(self.flat), np.zeros_like(self.flat)
        self._grad = np.zeros_like(self.flat)

    def predict(self, raw: NDArray[np.int16], count: NDArray[np.int64]) -> NDArray[np.float32]:
        """The probability of each candidate.

        Args:
            raw: int16 `(q, C, RAW)`, what `questions` gave.
            count: int64 `(q,)`, how many of the candidates are there.

        Returns:
            float32 `(q, C)`, 0 from `count` on.
        """
        out = np.zeros(raw.shape[:2], np.float32)
        _predict(raw, count, self.flat, self.hidden, out)
        return out

    def decide(self, request: PlanRequest, who: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `Student.decide`."""
        assert request.distance is not None
        probability = np.zeros(request.candidates.kind.shape, np.float32)
        confidence = np.zeros(who.shape, np.float32)
        _decide(who, _arrays(request), self.flat, self.hidden, probability, confidence)
        return probability, confidence

    def gradient(
        self,
        raw: NDArray[np.int16],
        count: NDArray[np.int64],
        target: NDArray[np.float32],
        picks: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """The gradient of the mean cross-entropy against `target` over the questions `picks`, float32 `(P,)`.

        Args:
            raw, count: as `predict`.
            target: float32 `(q, C)`, probabilities that add up to 1.
            picks: int64 `(b,)`, which of the questions; one may come more than once.
        """
        self._grad[:] = 0
        _gradient(raw, count, target, picks, self.flat, self.hidden, self._grad)
        return self._grad

    def step(
        self,
        raw: NDArray[np.int16],
        count: NDArray[np.int64],
        target: NDArray[np.float32],
        filled: int,
        batch: int,
        rate: float,
        key: np.uint64,
    ) -> None:
        """One step of Adam on `batch` of the first `filled` questions, drawn by `key` and the number of the step."""
        picks = _draw(key, self.updates * batch, filled, batch)
        self.gradient(raw, count, target, picks)
        self.updates += 1
        _adam(self.flat, self._grad, self.first, self.second, self.updates, rate)


def questions(
    request: PlanRequest, who: NDArray[np.bool_], probability: NDArray[np.float32]
) -> tuple[NDArray[np.int16], NDArray[np.int64], NDArray[np.float32]]:
    """The questions of the agents `who` (bool `(n, A)`), q of them, in order of rows and agents.

    Args:
        request: what the planner is asked, with path lengths.
        who: the agents.
        probability: float32 `(n, A, C)`, anything that is wanted in the candidates' new order.

    Returns:
        What is kept of the open candidates, int16 `(q, C, RAW)`, the nearest first; how many there are, int64 `(q,)`;
        and their `probability`, float32 `(q, C)`.

    Raises:
        ValueError: `probability` isn't one of these candidates.
    """
    if probability.shape != request.candidates.kind.shape:
        raise ValueError(f"probabilities {probability.shape} of candidates {request.candidates.kind.shape}")
    asked = int(np.count_nonzero(who))
    width = request.candidates.kind.shape[2]
    raw = np.zeros((asked, width, RAW), np.int16)
    count, target = np.zeros(asked, np.int64), np.zeros((asked, width), np.float32)
    _questions(who, _arrays(request), probability, raw, count, target)
    return raw, count, target


def open_counts(request: PlanRequest, who: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many open candidates each of the agents `who` has, int64 `(n, A)`; 0 for the others."""
    counts = np.zeros(who.shape, np.int64)
    _open_counts(who, _arrays(request), counts)
    return counts


def _arrays(request: PlanRequest) -> tuple[NDArray[np.generic] | int | None, ...]:
    c = request.candidates
    base = request.cell_index(0, 0)
    return (
        c.kind, c.cell, c.task, request.distance, request.refused, request.taken, request.pos, base,
        request.cell_index(1, 0) - base,
    )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def list_open(kind, task, distance, refused, taken, order):  # type: ignore[no-untyped-def]
    """Write one agent's open candidates into `order` (int64 `(C,)`), in their order, and give their number.

    Open is what is there, reachable, not refused before, and nobody is busy with. Tools are open only if there is
    nothing else, as for `LLMPlanner`: robots would go from rack to rack.
    """
    count, others = 0, 0
    for c in range(kind.shape[0]):
        usable = kind[c] > 0 and distance[c] != _UNREACHABLE and not refused[c]
        if usable and task[c] >= 0:
            usable = not taken[task[c]]
        if usable:
            order[count] = c
            count += 1
            others += kind[c] != _TOOL
    if others == 0 or others == count:
        return count
    kept = 0
    for k in range(count):
        if kind[order[k]] != _TOOL:
            order[kept] = order[k]
            kept += 1
    return kept


@numba.njit(cache=True, nogil=True)
def _open_counts(who, arrays, counts):  # type: ignore[no-untyped-def]
    kind, _, task, distance, refused, taken, _, _, _ = arrays
    order = np.empty(kind.shape[2], np.int64)
    for i in range(who.shape[0]):
        for a in range(who.shape[1]):
            if who[i, a]:
                counts[i, a] = list_open(kind[i, a], task[i, a], distance[i, a], refused[i, a], taken[i], order)


@numba.njit(cache=True, nogil=True)
def _question(i, a, arrays, raw, order, keys):  # type: ignore[no-untyped-def]
    """Write the open candidates of agent `a` of row `i` into `raw`, and which they are into `order`; their number."""
    all_kinds, all_cells, all_tasks, all_distances, refused, taken, pos, base, stride = arrays
    kind, cell, task, distance = all_kinds[i, a], all_cells[i, a], all_tasks[i, a], all_distances[i, a]
    count = list_open(kind, task, distance, refused[i, a], taken[i], order)
    keys[:count] = 0
    for b in range(all_kinds.shape[1]):
        if b == a:
            continue
        kind2, cell2, task2, distance2 = all_kinds[i, b], all_cells[i, b], all_tasks[i, b], all_distances[i, b]
        for k in range(count):
            c = order[k]
            # The same candidate mostly has the same place with every robot. Who needs no subgoal has no distances.
            same = c
            if cell2[c] != cell[c] or task2[c] != task[c] or kind2[c] != kind[c]:
                same = -1
                for e in range(kind2.shape[0]):
                    if cell2[e] == cell[c] and task2[e] == task[c] and kind2[e] == kind[c]:
                        same = e
                        break
            if same >= 0 and distance2[same] < distance[c]:
                keys[k] += 1
    row = (int(pos[i, a]) - base) // stride
    col = int(pos[i, a]) - base - row * stride
    for k in range(count):
        c = order[k]
        down = (int(cell[c]) - base) // stride
        right = int(cell[c]) - base - down * stride - col
        # The nearest first, and a total order behind it: sums then don't depend on the order that was asked in.
        key = min(int(distance[c]), 32767) << 44 | int(kind[c]) << 40 | min(keys[k], 127) << 32
        key |= (down - row + 32768) << 16 | (right + 32768)
        at = k
        while at > 0 and keys[at - 1] > key:
            keys[at], order[at] = keys[at - 1], order[at - 1]
            at -= 1
        keys[at], order[at] = key, c
    for k in range(count):
        key = keys[k]
        raw[k, 0] = (key >> 40) & 15
        raw[k, 1] = key >> 44
        raw[k, 2] = ((key >> 16) & 65535) - 32768
        raw[k, 3] = (key & 65535) - 32768
        raw[k, 4] = (key >> 32) & 127
    return count


@numba.njit(cache=True, nogil=True)
def _questions(who, arrays, probability, raw, count, target):  # type: ignore[no-untyped-def]
    order, keys = np.empty(raw.shape[1], np.int64), np.empty(raw.shape[1], np.int64)
    q = 0
    for i in range(who.shape[0]):
        for a in range(who.shape[1]):
            if who[i, a]:
                count[q] = _question(i, a, arrays, raw[q], order, keys)
                for k in range(count[q]):
                    target[q, k] = probability[i, a, order[k]]
                q += 1


@numba.njit(cache=True, nogil=True)
def _scalars(raw, count, x):  # type: ignore[no-untyped-def]
    """The numbers that say what a candidate is like, about 0 to 1 each, float32 `(count, _SCALARS)`; `raw` sorted."""
    rank = 0
    for k in range(count):
        length = int(raw[k, 1])
        if k and raw[k, 1] != raw[k - 1, 1]:
            rank = k
        gap = length - int(raw[0, 1])
        down, right, nearer = int(raw[k, 2]), int(raw[k, 3]), int(raw[k, 4])
        x[k, 0] = min(length, 256) * np.float32(1 / 32)
        x[k, 1] = _LOG[min(length, 1023)] * np.float32(0.25)
        x[k, 2] = np.float32(1) / np.float32(1 + length)
        x[k, 3] = _NEAR[min(length, 1023)]
        x[k, 4] = min(rank, 16) * np.float32(1 / 8)
        x[k, 5] = np.float32(1) / np.float32(1 + rank)
        x[k, 6] = rank == 0
        x[k, 7] = min(gap, 128) * np.float32(1 / 16)
        x[k, 8] = _LOG[min(gap, 1023)] * np.float32(1 / 3)
        x[k, 9] = min(abs(down), 128) * np.float32(1 / 16)
        x[k, 10] = min(abs(right), 128) * np.float32(1 / 16)
        x[k, 11] = np.sign(down)
        x[k, 12] = np.sign(right)
        x[k, 13] = max(-128, min(length - abs(down) - abs(right), 128)) * np.float32(1 / 16)
        x[k, 14] = min(nearer, 8) * np.float32(1 / 4)
        x[k, 15] = nearer == 0
        x[k, 16] = np.float32(1) / np.float32(count)
        x[k, 17] = min(count, 32) * np.float32(1 / 16)


@numba.njit(cache=True, nogil=True)
def _views(flat, H):  # type: ignore[no-untyped-def]
    """Weights by kind, by length, by scalar, bias; second layer, of the mean, of the greatest, bias; last layer."""
    at = (_KINDS + _LENGTHS + _SCALARS) * H
    square = at + H
    last = square + 3 * H * H
    return (
        flat[: _KINDS * H].reshape((_KINDS, H)),
        flat[_KINDS * H : (_KINDS + _LENGTHS) * H].reshape((_LENGTHS, H)),
        flat[(_KINDS + _LENGTHS) * H : at].reshape((_SCALARS, H)),
        flat[at:square],
        flat[square : square + H * H].reshape((H, H)),
        flat[square + H * H : square + 2 * H * H].reshape((H, H)),
        flat[square + 2 * H * H : last].reshape((H, H)),
        flat[last : last + H],
        flat[last + H :],
    )


@numba.njit(cache=True, nogil=True)
def _scratch(width, H):  # type: ignore[no-untyped-def]
    """Room for one question: scalars, first layer, second layer, mean, greatest, where it is greatest, context."""
    return (
        np.empty((width, _SCALARS), np.float32),
        np.empty((width, H), np.float32),
        np.empty((width, H), np.float32),
        np.empty(H, np.float32),
        np.empty(H, np.float32),
        np.empty(H, np.int64),
        np.empty(H, np.float32),
    )


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _add_product(x, weights, out):  # type: ignore[no-untyped-def]
    """out += x @ weights, four rows at a time; what is 0 (half of a ReLU's output) costs nothing."""
    a, b, c, n = 0, 0, 0, 0
    for s in range(x.shape[0]):
        if x[s] == 0:
            continue
        if n < 3:
            a, b, c, n = b, c, s, n + 1
            continue
        for j in range(out.shape[0]):
            out[j] += (x[a] * weights[a, j] + x[b] * weights[b, j]) + (x[c] * weights[c, j] + x[s] * weights[s, j])
        n = 0
    if n > 0:
        for j in range(out.shape[0]):
            out[j] += x[c] * weights[c, j]
    if n > 1:
        for j in range(out.shape[0]):
            out[j] += x[b] * weights[b, j]
    if n > 2:
        for j in range(out.shape[0]):
            out[j] += x[a] * weights[a, j]


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _forward(raw, count, views, scratch, out):  # type: ignore[no-untyped-def]
    """Write the probabilities of one question's candidates into `out`; `scratch` then holds what led to them."""
    kinds, lengths, scalars, bias, second, of_mean, of_peak, bias2, last = views
    x, h, z, mean, peak, where, context = scratch
    H = bias.shape[0]
    _scalars(raw, count, x)
    for k in range(count):
        kind, length = kinds[raw[k, 0]], lengths[min(np.int64(raw[k, 1]), _LENGTHS - 1)]
        first = h[k]
        for j in range(H):
            first[j] = bias[j] + kind[j] + length[j]
        _add_product(x[k], scalars, first)
        for j in range(H):
            first[j] = max(first[j], np.float32(0))
    for j in range(H):
        mean[j], peak[j], where[j] = h[0, j], h[0, j], 0
    for k in range(1, count):
        for j in range(H):
            mean[j] += h[k, j]
            if h[k, j] > peak[j]:
                peak[j], where[j] = h[k, j], k
    share = np.float32(1) / np.float32(count)
    for j in range(H):
        mean[j] *= share
        context[j] = bias2[j]
    _add_product(mean, of_mean, context)
    _add_product(peak, of_peak, context)
    top = np.float32(-np.inf)
    for k in range(count):
        layer = z[k]
        for j in range(H):
            layer[j] = context[j]
        _add_product(h[k], second, layer)
        logit = np.float32(0)
        for j in range(H):
            layer[j] = max(layer[j], np.float32(0))
            logit += layer[j] * last[j]
        out[k] = logit
        top = max(top, logit)
    total = np.float32(0)
    for k in range(count):
        out[k] = np.exp(out[k] - top)
        total += out[k]
    for k in range(count):
        out[k] /= total


@numba.njit(cache=True, nogil=True)
def _predict(raw, count, flat, H, out):  # type: ignore[no-untyped-def]
    views, scratch = _views(flat, H), _scratch(raw.shape[1], H)
    for q in range(raw.shape[0]):
        if count[q]:
            _forward(raw[q], count[q], views, scratch, out[q])


@numba.njit(cache=True, nogil=True)
def _decide(who, arrays, flat, H, probability, confidence):  # type: ignore[no-untyped-def]
    width = probability.shape[2]
    views, scratch = _views(flat, H), _scratch(width, H)
    order, keys = np.empty(width, np.int64), np.empty(width, np.int64)
    raw, out = np.empty((width, RAW), np.int16), np.empty(width, np.float32)
    for i in range(who.shape[0]):
        for a in range(who.shape[1]):
            if not who[i, a]:
                continue
            count = _question(i, a, arrays, raw, order, keys)
            if count == 1:
                probability[i, a, order[0]] = confidence[i, a] = 1
            elif count > 1:
                _forward(raw, count, views, scratch, out)
                best, next_best = np.float32(0), np.float32(0)
                for k in range(count):
                    probability[i, a, order[k]] = out[k]
                    next_best = max(next_best, min(best, out[k]))
                    best = max(best, out[k])
                confidence[i, a] = best / (best + next_best)


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _gradient(raw, count, target, picks, flat, H, grad):  # type: ignore[no-untyped-def]
    width = raw.shape[1]
    views, scratch = _views(flat, H), _scratch(width, H)
    _, _, _, _, second, of_mean, of_peak, _, last = views
    g_kinds, g_lengths, g_scalars, g_bias, g_second, g_mean, g_peak, g_bias2, g_last = _views(grad, H)
    x, h, z, mean, peak, where, _ = scratch
    out, back = np.empty(width, np.float32), np.empty((width, H), np.float32)
    d_context, d_mean, d_peak = np.empty(H, np.float32), np.empty(H, np.float32), np.empty(H, np.float32)
    share = np.float32(1) / np.float32(picks.shape[0])
    for q in picks:
        n = count[q]
        _forward(raw[q], n, views, scratch, out)
        d_context[:] = 0
        for k in range(n):
            d = (out[k] - target[q, k]) * share  # softmax and cross-entropy together
            layer, d_layer = z[k], back[k]
            for j in range(H):
                g_last[j] += d * layer[j]
                d_layer[j] = d * last[j] if layer[j] > 0 else np.float32(0)
                d_context[j] += d_layer[j]
        for j in range(H):
            g_bias2[j] += d_context[j]
        _add_outer(mean, d_context, g_mean)
        _add_outer(peak, d_context, g_peak)
        n_share = np.float32(1) / np.float32(n)
        for j in range(H):
            d_mean[j] = _dot(of_mean[j], d_context) * n_share
            d_peak[j] = _dot(of_peak[j], d_context)
        for k in range(n):
            _add_outer(h[k], back[k], g_second)
            kind, length = g_kinds[raw[q, k, 0]], g_lengths[min(np.int64(raw[q, k, 1]), _LENGTHS - 1)]
            d_first = z[k]  # no longer needed as what it was
            for j in range(H):
                d_first[j] = 0
                if h[k, j] > 0:
                    d_first[j] = _dot(second[j], back[k]) + d_mean[j]
                    if where[j] == k:
                        d_first[j] += d_peak[j]
            for j in range(H):
                g_bias[j] += d_first[j]
                kind[j] += d_first[j]
                length[j] += d_first[j]
            _add_outer(x[k], d_first, g_scalars)


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _dot(x, y):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _add_outer(x, y, out):  # type: ignore[no-untyped-def]
    for s in range(x.shape[0]):
        if x[s] != 0:
            value, row = x[s], out[s]
            for j in range(y.shape[0]):
                row[j] += value * y[j]


@numba.njit(cache=True, nogil=True)
def _draw(key, start, filled, batch):  # type: ignore[no-untyped-def]
    picks = np.empty(batch, np.int64)
    for k in range(batch):
        picks[k] = below(key, np.uint64(start + k), filled)
    return picks


@numba.njit(cache=True, nogil=True)
def _adam(flat, grad, first, second, t, rate):  # type: ignore[no-untyped-def]
    one, two = np.float32(1 - _BETA1), np.float32(1 - _BETA2)
    size = np.float32(rate / (1 - _BETA1**t))
    scale = np.float32(1 / (1 - _BETA2**t))
    for p in range(flat.shape[0]):
        first[p] += one * (grad[p] - first[p])
        second[p] += two * (grad[p] * grad[p] - second[p])
        flat[p] -= size * first[p] / (np.sqrt(second[p] * scale) + np.float32(_EPSILON))
