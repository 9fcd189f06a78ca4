"""Forward passes that share a prefix and give each prompt the bits that it has alone."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal, TypeVar, cast

import torch

from echelon.llm._optional import require

__all__ = ["Batching", "Lanes", "PrefixScorer", "PrefixStates"]

Batching = Literal["checked", "alone", "free"]
Work = TypeVar("Work")
Result = TypeVar("Result")

_BUCKET = 4  # prompts are padded to a multiple of this many tokens, so that they meet in few shapes


class Lanes:
    """Runs forward passes side by side, each in a thread of its own.

    The processor's threads are shared out among the lanes and not gathered for each product: passes of a few
    hundred tokens hold little for two threads to share, and OpenMP's barriers wait for whatever else the machine
    does. A pass has the same number of threads whether it is the only one or one of many, so company does not
    change its bits.

    Args:
        threads: of the processor, at least 1; None takes as many as torch has in the calling thread at the time.
        most: at most so many passes at a time; 1 on a GPU.
    """

    def __init__(self, threads: int | None, most: int = 4) -> None:
        self._threads, self._most = threads, most

    @property
    def count(self) -> int:
        """How many passes run at a time."""
        return max(1, min(self._total, self._most))

    @property
    def _total(self) -> int:
        return self._threads or torch.get_num_threads()

    @contextlib.contextmanager
    def share(self) -> Iterator[int]:
        """Give the calling thread what one lane has inside the block; says how many lanes there are."""
        before, count = torch.get_num_threads(), self.count
        torch.set_num_threads(max(1, self._total // count))
        try:
            yield count
        finally:
            # Always, also where it seems the same: what a helper sets is what threads made later start with.
            torch.set_num_threads(before)

    @staticmethod
    def run(work: Callable[[Work], Result], items: Sequence[Work], count: int) -> list[Result]:
        """`work(item)` for every item, `count` at a time, inside `share`; the results in order."""
        results: list[Result | None] = [None] * len(items)
        todo = iter(range(len(items)))
        threads = torch.get_num_threads()

        def labour() -> None:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                # next() on a range's iterator is atomic: whoever is free takes the next item.
                try:
                    for index in todo:
                        results[index] = work(items[index])
                finally:
                    for _ in todo:  # after an error or Ctrl-C nobody begins another item
                        pass

        if (helpers := min(count, len(items)) - 1) < 1:
            labour()
            return cast("list[Result]", results)
        # Made anew for each call: a tenth of a millisecond, and no idle thread that a fork would lose.
        with ThreadPoolExecutor(helpers, "llm") as pool:
            waiting = [pool.submit(labour) for _ in range(helpers)]
            try:
                labour()
            finally:
                wait(waiting)
            for future in waiting:
                future.result()
        return cast("list[Result]", results)


class PrefixStates:
    """Keys and values of prefixes that many prompts share, computed once each.

    Args:
        body: the model without its output layer, in evaluation mode.
        slots: how many prefixes are kept, the least recently used leave first.
    """

    def __init__(self, body: torch.nn.Module, *, slots: int = 8) -> None:
        self._body, self._slots = body, slots
        self._cache_class = require("transformers.cache_utils")
        self._kept: OrderedDict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()
        self.device = next(body.parameters()).device
        # Sliding windows and recurrent states can't be prolonged from a view of keys and values.
        layers = self._cache_class.DynamicCache(config=body.config).layers
        self.can_share = bool(layers) and all(type(layer) is self._cache_class.DynamicLayer for layer in layers)

    def prepare(self, prefix: tuple[int, ...]) -> None:
        """Have `prefix` (may be empty) ready, so that `cache` only reads and lanes may call it."""
        if not prefix:
            return
        if prefix in self._kept:
            self._kept.move_to_end(prefix)
            return
        cache = self._cache_class.DynamicCache(config=self._body.config)
        self._body(input_ids=torch.tensor([prefix], device=self.device), past_key_values=cache, use_cache=True)
        self._kept[prefix] = [(layer.keys, layer.values) for layer in cache.layers]
        if len(self._kept) > self._slots:
            self._kept.popitem(last=False)

    def cache(self, prefix: tuple[int, ...], rows: int) -> Any:
        """A transformers cache that holds a prepared prefix for `rows` sequences."""
        cache = self._cache_class.DynamicCache(config=self._body.config)
        if prefix:
            for layer, (keys, values) in zip(cache.layers, self._kept[prefix], strict=True):
                layer.lazy_initialization(keys, values)
                # A view: one copy of the prefix serves all rows until a layer puts its own keys behind it.
                layer.keys = keys.expand(rows, -1, -1, -1)
                layer.values = values.expand(rows, -1, -1, -1)
        return cache


class PrefixScorer:
    """The last hidden state of prompts, with the keys and values of their common prefix computed once.

    A prompt's result is **defined** as the one that it has alone: a forward pass of one row, padded on the
    right to a multiple of 4 tokens, behind its prefix, in one lane. That depends on the prompt and on nothing
    else. Batches are an optimisation that must not change it. With `batching="checked"` the first batch of each
    shape (prefix length, rows, padded length) is also computed row by row; the shape is used from then on
    only if every bit agreed. The order of the sums in a kernel depends on the shape and not on the numbers,
    so one agreement speaks for all batches of that shape, and one disagreement shows in nearly every row.

    Args:
        body: the model without its output layer, in evaluation mode.
        states: the prefixes of that body.
        batch_tokens: at most this many tokens in a pass, rows × padded length (a single longer prompt
            still goes through, alone).
        batching: "checked" as above; "alone" never batches; "free" batches unchecked.
        share_prefix: whether keys and values are shared at all.
    """

    def __init__(
        self,
        body: torch.nn.Module,
        states: PrefixStates,
        *,
        batch_tokens: int,
        batching: Batching = "checked",
        share_prefix: bool = True,
    ) -> None:
        self._body, self._states, self._batch_tokens, self._batching = body, states, batch_tokens, batching
        self._share = share_prefix and states.can_share
        self._trusted: dict[tuple[int, int, int], bool] = {}

    @property
    def shapes(self) -> dict[tuple[int, int, int], bool]:
        """Whether batches of each shape (prefix tokens, rows, padded tokens) seen so far agreed bit for bit."""
        return dict(self._trusted)

    def last_hidden(self, prefix: tuple[int, ...], rows: Sequence[Sequence[int]], lanes: int = 1) -> torch.Tensor:
        """The hidden state at the last token of each `prefix + row`, behind the final norm.

        Args:
            prefix: tokens that all rows share; may be empty.
            rows: the tokens that follow, at least one each.
            lanes: passes that run side by side, see `Lanes.share`.

        Returns:
            Shape (len(rows), hidden_size), in the model's dtype, on the processor.
        """
        if not self._share:
            prefix, rows = (), [[*prefix, *row] for row in rows]
        self._states.prepare(prefix)
        batches = self._cut([len(row) for row in rows], lanes)
        # The first batch of a new shape is checked before the others of that shape, else each lane would check it.
        new: dict[tuple[int, int, int], int] = {}
        for at, (length, part) in enumerate(batches):
            if (shape := (len(prefix), len(part), length)) not in self._trusted:
                new.setdefault(shape, at)
        found: list[torch.Tensor] = [torch.empty(0)] * len(rows)

        def work(batch: tuple[int, list[int]]) -> None:
            length, part = batch
            for index, hidden in zip(part, self._batch(prefix, [rows[i] for i in part], length), strict=True):
                found[index] = hidden

        first = set(new.values())
        Lanes.run(work, [batches[at] for at in sorted(first)], lanes)
        Lanes.run(work, [batch for at, batch in enumerate(batches) if at not in first], lanes)
        return torch.stack(found).cpu()

    def _cut(self, lengths: Sequence[int], lanes: int) -> list[tuple[int, list[int]]]:
        """(padded length, indices of the rows) of each pass."""
        buckets: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            buckets.setdefault(-(-length // _BUCKET) * _BUCKET, []).append(index)
        batches = []
        for length, indices in sorted(buckets.items()):
            start = 0
            most = max(1, min(self._batch_tokens // length, -(-len(indices) // lanes)))
            while start < len(indices):
                # Powers of two: few shapes to check, and no row is computed for nothing.
                part = indices[start : start + (1 << (min(most, len(indices) - start).bit_length() - 1))]
                batches.append((length, part))
                start += len(part)
        return batches

    def _batch(self, prefix: tuple[int, ...], rows: list[Sequence[int]], length: int) -> torch.Tensor:
        if len(rows) == 1 or self._batching == "free":
            return self._forward(prefix, rows, length)
        together, trusted = None, False
        shape = (len(prefix), len(rows), length)
        if self._batching == "checked":
            trusted = self._trusted.get(shape, True)
            if trusted:
                together = self._forward(prefix, rows, length)
                if shape in self._trusted:
                    return together
        alone = torch.cat([self._forward(prefix, [row], length) for row in rows])
        if together is not None:
            self._trusted[shape] = torch.equal(together, alone)
        return alone

    def _forward(self, prefix: tuple[int, ...], rows: list[Sequence[int]], length: int) -> torch.Tensor:
        # Right padding needs no mask: attention is causal, and no real token comes after the padding.
        tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=self._states.device)
        cache = self._states.cache(prefix, len(rows))
        hidden = self._body(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
        last = [len(row) - 1 for row in rows]
        picked: torch.Tensor = hidden[list(range(len(rows))), last]
        return picked
