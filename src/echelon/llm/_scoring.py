"""Forward passes that share a prefix and give each prompt the bits that it has alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch

from echelon.llm._optional import require

__all__ = ["Batching", "PrefixScorer"]

Batching = Literal["checked", "alone", "free"]

_BUCKET = 8  # prompts are padded to a multiple of this many tokens, so that they meet in few shapes


class PrefixScorer:
    """The last hidden state of prompts, with the keys and values of their common prefix computed once.

    A prompt's result is **defined** as the one that it has alone: a forward pass of one row, padded on the
    right to a multiple of 8 tokens, behind its prefix. That depends on the prompt and on nothing else.
    Batches are an optimisation that must not change it. With `batching="checked"` the first batch of each
    shape (prefix length, rows, padded length) is also computed row by row; the shape is used from then on
    only if every bit agreed. The order of the sums in a kernel depends on the shape and not on the numbers,
    so one agreement speaks for all batches of that shape, and one disagreement shows in nearly every row.

    Args:
        body: the model without its output layer, in evaluation mode.
        batch_tokens: at most this many tokens in a pass, rows × padded length (a single longer prompt
            still goes through, alone).
        batching: "checked" as above; "alone" never batches; "free" batches unchecked.
        share_prefix: whether keys and values are shared at all.
        prefixes: how many prefixes are kept, the least recently used leave first.
    """

    def __init__(
        self,
        body: torch.nn.Module,
        *,
        batch_tokens: int,
        batching: Batching = "checked",
        share_prefix: bool = True,
        prefixes: int = 8,
    ) -> None:
        self._body, self._batch_tokens, self._batching = body, batch_tokens, batching
        self._cache_class = require("transformers.cache_utils")
        self._share, self._slots = share_prefix and self._can_share(), prefixes
        self._prefixes: OrderedDict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()
        self._trusted: dict[tuple[int, int, int], bool] = {}

    @property
    def shapes(self) -> dict[tuple[int, int, int], bool]:
        """Whether batches of each shape (prefix tokens, rows, padded tokens) seen so far agreed bit for bit."""
        return dict(self._trusted)

    def last_hidden(self, prefix: tuple[int, ...], rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """The hidden state at the last token of each `prefix + row`, behind the final norm.

        Args:
            prefix: tokens that all rows share; may be empty.
            rows: the tokens that follow, at least one each.

        Returns:
            Shape (len(rows), hidden_size), in the model's dtype.
        """
        if not self._share:
            prefix, rows = (), [[*prefix, *row] for row in rows]
        buckets: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            buckets.setdefault(-(-len(row) // _BUCKET) * _BUCKET, []).append(index)
        found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for length, indices in sorted(buckets.items()):
            start = 0
            while start < len(indices):
                # Powers of two: few shapes to check, and no row is computed for nothing.
                most = max(1, min(len(indices) - start, self._batch_tokens // length))
                part = indices[start : start + (1 << (most.bit_length() - 1))]
                for index, hidden in zip(part, self._batch(prefix, [rows[i] for i in part], length), strict=True):
                    found[index] = hidden
                start += len(part)
        return torch.stack(found)

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
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        cache = self._cache_class.DynamicCache(config=self._config)
        if prefix:
            for layer, (keys, values) in zip(cache.layers, self._keys_values(prefix), strict=True):
                layer.lazy_initialization(keys, values)
                # A view: one copy of the prefix serves all rows until a layer puts its own keys behind it.
                layer.keys = keys.expand(len(rows), -1, -1, -1)
                layer.values = values.expand(len(rows), -1, -1, -1)
        hidden = self._body(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in rows])
        picked: torch.Tensor = hidden[torch.arange(len(rows)), last]
        return picked

    def _keys_values(self, prefix: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if prefix in self._prefixes:
            self._prefixes.move_to_end(prefix)
            return self._prefixes[prefix]
        cache = self._cache_class.DynamicCache(config=self._config)
        self._body(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
        kept = self._prefixes[prefix] = [(layer.keys, layer.values) for layer in cache.layers]
        if len(self._prefixes) > self._slots:
            self._prefixes.popitem(last=False)
        return kept

    @property
    def _config(self) -> Any:
        return self._body.config

    def _can_share(self) -> bool:
        """Sliding windows and recurrent states can't be prolonged from a view of keys and values."""
        layers = self._cache_class.DynamicCache(config=self._config).layers
        return bool(layers) and all(type(layer) is self._cache_class.DynamicLayer for layer in layers)
