"""A language model that learns to write: sampled replies, and the log-probability of each of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.errors import EchelonError
from echelon.llm._chat import ChatEncoder
from echelon.llm._loading import Device, Dtype
from echelon.llm._optional import require
from echelon.llm._trainable import Adapt, Trainable
from echelon.llm.store import ModelStore
from echelon.rng import uniform

__all__ = ["Adapt", "TokenPolicy", "TokenPrompt", "TokenSample"]

_HEAD_ROWS = 256  # tokens whose logits over the whole vocabulary are held at a time
_LIKELY = 64  # tokens that are sorted first where only the likeliest may be drawn


class TokenPrompt(Protocol):
    """What a reply is asked for with: a `TextPrompt`, or anything that has its two texts."""

    @property
    def system(self) -> str:
        """The system message; may be empty."""
        ...

    @property
    def text(self) -> str:
        """The user's message."""
        ...


@dataclass(frozen=True, eq=False)
class TokenSample:
    """A reply as tokens, and what the policy that wrote it thought of them. Plain data: it can be sent and stored.

    Args:
        prompt_ids: tokens of the whole prompt, up to and with the generation prompt.
        reply_ids: tokens of the reply, L of them; the last one is the end of the turn if `ended`.
        text: the reply without control tokens, untrusted.
        ended: whether the reply ended by itself; else it was cut off.
        temperature: at which it was sampled; 0: the most probable token each time.
        logp: log-probabilities of the tokens at temperature 1 when they were sampled, float32 (L,).
        behaviour_logp: the same under the distribution that they were drawn from: at `temperature`, and among the
            tokens that `top_k` and `top_p` left; at temperature 0, where that is no distribution, the same as `logp`.
    """

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    text: str
    ended: bool
    temperature: float
    logp: NDArray[np.float32]
    behaviour_logp: NDArray[np.float32]


class TokenPolicy:
    """A transformers model whose replies are sampled and can be learnt from: a `PolicyModel` over `TokenSample`s.

    **Its numbers** are, by token of a reply, the log-probability and the entropy (nats) of the distribution at the
    sample's own temperature (at 1 if that is 0). So what learns is the distribution that acts: a ratio to
    `behaviour_logp` begins at 1, and REINFORCE is unbiased at any temperature. (TRL and verl do the same; our choice.)
    `behaviour_logp` comes out of generation with a cache of keys and values, whose last bits differ from a whole
    pass's. Measured with SmolLM2 on one processor: up to 1.1e-5 in float32, in bfloat16 from 0 to 0.28, by the batch.
    So take the old log-probabilities of a ratio from `evaluate` before the first step, not from the sample.

    **With `top_k` or `top_p`** this is no longer so. Tokens are then drawn from q = π / Z over those that are kept, Z
    being what π gives them together, and `evaluate` still gives π: of what acts, only `behaviour_logp` knows. The
    gradient of log q is that of log π less that of log Z, so REINFORCE with `evaluate`'s numbers is biased: it rewards
    the kept tokens against those that were cut off, as well as among themselves. π / q of a token is Z, from `top_p`
    (without `top_k`) to 1, so a ratio to `behaviour_logp` begins below 1, a reply's by the product over its tokens;
    against old numbers from `evaluate` it begins at 1, and what was cut off is then simply never tried. Published
    recipes sample truncated and learn so all the same; who wants the unbiased gradient leaves both off, the defaults.

    What learns is float32; see `_trainable.Trainable` for LoRA, full weights and the reference. There is no dropout.
    All of it repeats bit for bit with the same calls on one machine. The last bits of a number depend on what else is
    in its batch; the seeds of a reply don't.
    """

    def __init__(self, trainable: Trainable, name: str, *, micro_tokens: int = 512, sample_rows: int = 32) -> None:
        """Wrap a model that learns; `load` explains the settings.

        Raises:
            EchelonError: no chat template, or an output layer that does more than multiply.
        """
        if micro_tokens < 1 or sample_rows < 1:
            raise EchelonError("micro_tokens and sample_rows must be at least 1")
        self.name = name
        self._trainable = trainable
        self._chat = ChatEncoder(trainable.tokenizer, name)
        self._micro_tokens, self._rows = micro_tokens, sample_rows
        model = trainable.model
        self._cache_class = require("transformers.cache_utils").DynamicCache
        # Layers that are computed again keep no keys and values, so that a prompt can't be computed once for many.
        self._shares = not trainable.checkpointing
        self._context = int(getattr(model.config, "max_position_embeddings", 0) or 0)
        ends = model.generation_config.eos_token_id
        more = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._ends = self._chat.end_ids | {int(token) for token in more}
        self._end = self._turn_end()
        self._check_head()

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        store: ModelStore | None = None,
        dtype: Dtype = "auto",
        device: Device = "auto",
        adapt: Adapt = "lora",
        layers: int = 0,
        rank: int = 16,
        alpha: float = 32,
        targets: Sequence[str] | None = None,
        freeze_embeddings: bool = False,
        lr: float = 1e-4,
        max_grad_norm: float = 1.0,
        micro_tokens: int = 512,
        sample_rows: int = 32,
        checkpointing: bool = False,
        seed: int = 0,
        beside: TokenPolicy | None = None,
    ) -> TokenPolicy:
        """Load a model from the store, a folder or the hub, and make it learn. All defaults are our choice.

        Args:
            spec: as for `CausalChoiceModel.load`. If it is a LoRA adapter and `adapt` is "lora", that adapter goes on
                learning, with its own rank, alpha and layers; the reference is the adapter as it was.
            store: where fetched models are; the default store if None.
            dtype: what products are computed in; "auto" is bfloat16 where the device computes in it, else float32.
            device: "auto" is a GPU where torch finds one, else the processor.
            adapt: "lora": matrices beside the weights learn, the reference costs nothing; "full": the weights learn.
            layers: how many of the top layers learn; 0: all of them (and, of full weights, all the rest).
            rank, alpha: LoRA's: the matrices' product is multiplied by alpha / rank.
            targets: names of the layers that LoRA is put beside (`q_proj`, …); None: all linear ones but the output.
            freeze_embeddings: of full weights, leave the embeddings and the output layer as they are.
            lr: AdamW's step size; for full weights 1e-5 is a place to start.
            max_grad_norm: gradients are scaled down to this norm.
            micro_tokens: at most so many tokens (rows × length) in a pass; a longer sample goes alone. It changes
                memory and speed, not results (but for rounding).
            sample_rows: at most so many replies are written at a time; with 1 a reply's bits are its own.
            checkpointing: compute layers again in the backward pass instead of keeping what they need: less memory, a
                third more time, the same gradients.
            seed: of LoRA's first matrices, at least 0.
            beside: a policy whose frozen base this one uses too, with an adapter of its own; what `spec` names, that
                base or an adapter on it, is then not loaded again, and dtype and device are that policy's. To the last
                bit it is the policy that it would be alone. Both are used by one thread at a time.

        Raises:
            EchelonError: an unknown, absent or damaged model, a missing library, no GPU, a model that can't learn or
                write, a setting out of its range, another base than `beside` has.
        """
        trainable = Trainable.load(
            spec, store=store, dtype=dtype, device=device, adapt=adapt, layers=layers, rank=rank, alpha=alpha,
            targets=targets, freeze_embeddings=freeze_embeddings, lr=lr, max_grad_norm=max_grad_norm,
            checkpointing=checkpointing, seed=seed, beside=None if beside is None else beside._trainable,
        )  # fmt: skip
        return cls(trainable, spec, micro_tokens=micro_tokens, sample_rows=sample_rows)

    # -- writing -------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[TokenPrompt],
        n: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_tokens: int = 256,
        keys: Sequence[int] | NDArray[np.uint64],
    ) -> list[TokenSample]:
        """Write `n` replies to each prompt.

        Reply j to a prompt with key k is drawn by the numbers of Philox(k, j) alone, one for each token of the
        vocabulary at each step (Gumbel-max), whatever else is asked in the call. A probability's last bits do depend
        on the batch, and can turn a draw, and with it the rest of the reply. Measured with SmolLM2, 8 replies of up to
        24 tokens in batches of 2 and 8 against alone: none in float32, in bfloat16 10 draws of about 280.
        `sample_rows=1` excludes it.

        Truncation draws from fewer tokens, and learning is then from another distribution than acts: see the class.
        Of a truncated draw only the tokens that are left have numbers, hashed from their ids and one of Philox(k, j).

        Args:
            prompts: what to reply to.
            n: replies to each, at least 1; the prompt is computed once for all of them.
            temperature: logits are divided by it; 0 takes the most probable token, whatever is kept.
            top_p: keep the fewest of the most probable tokens that have at least this probability together, at this
                temperature and among the `top_k`; above 0, 1 keeps all.
            top_k: keep so many of the most probable tokens; 0 keeps all. Here and for `top_p`, tokens that are exactly
                as probable as the last one kept are kept too.
            max_tokens: the longest reply, its end included; less where the model's context ends.
            keys: one 64-bit key a prompt, see `echelon.rng.spawn_keys`.

        Returns:
            Replies 0 to n - 1 of the first prompt, then those of the second, and so on.

        Raises:
            EchelonError: a prompt that leaves no room for a reply; the model's numbers are not finite.
            ValueError: n, temperature, top_p, top_k, max_tokens or the number of keys.
        """
        if n < 1 or max_tokens < 1 or not temperature >= 0:
            raise ValueError(f"n {n} and max_tokens {max_tokens} must be at least 1, temperature {temperature} 0")
        if not 0 < top_p <= 1 or top_k < 0:
            raise ValueError(f"top_p {top_p} must be above 0 and at most 1, top_k {top_k} must be at least 0")
        if len(keys) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(keys)} keys")
        ids = [self._encode(prompt) for prompt in prompts]
        draws: list[tuple[np.random.Generator, int]] = []
        for prompt, key in zip(ids, keys, strict=True):
            most = min(max_tokens, self._context - len(prompt)) if self._context else max_tokens
            for j in range(n):
                philox = np.random.Philox(key=np.array([int(key), j], np.uint64))
                draws.append((np.random.Generator(philox), most))
        # Neighbours in length go through together, all replies to a prompt side by side.
        order = sorted(range(len(draws)), key=lambda row: (len(ids[row // n]), row))
        written: list[TokenSample | None] = [None] * len(draws)
        for start in range(0, len(order), self._rows):
            rows = order[start : start + self._rows]
            of = [ids[row // n] for row in rows]
            found = self._write(of, [draws[row] for row in rows], temperature, top_p, top_k)
            for row, sample in zip(rows, found, strict=True):
                written[row] = sample
        return [sample for sample in written if sample is not None]

    def room(self, prompt: TokenPrompt) -> int:
        """How many tokens a reply to this prompt may have: 10^6 without a limit; 0 or less: so many lack."""
        length = len(self._chat.encode(prompt.system, [prompt.text])[0])
        return self._context - length if self._context else 10**6

    def written(self, prompt: TokenPrompt, text: str, *, temperature: float = 1.0) -> TokenSample:
        """A reply that somebody else wrote, ended, as something to learn from (imitation); its `logp` are NaN.

        Raises:
            EchelonError: prompt and reply together are longer than the model's context.
        """
        prompt_ids = self._encode(prompt)
        # Control tokens that stand in the text as text are taken to pieces.
        reply = self._trainable.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = (*reply, self._end)
        if self._context and len(prompt_ids) + len(ids) > self._context:
            raise EchelonError(f"prompt and reply are longer than the {self._context} tokens that {self.name} takes")
        unknown = np.full(len(ids), np.nan, np.float32)
        return TokenSample(prompt_ids, ids, text, True, temperature, unknown, unknown)

    # -- numbers and gradients -----------------------------------------------------------------

    def evaluate(self, samples: Sequence[TokenSample]) -> list[NDArray[np.float32]]:
        """By sample the log-probability and the entropy of each token of its reply, float32 (L, 2).

        Raises:
            EchelonError: the model's numbers are not finite.
        """
        return self._evaluate(samples, reference=False)

    def reference(self, samples: Sequence[TokenSample]) -> list[NDArray[np.float32]]:
        """What `evaluate` would give with the model as it was when learning began, or at the last `anchor`."""
        return self._evaluate(samples, reference=True)

    def anchor(self) -> None:
        """From now on the reference is the model as it is now; costs a copy of what learns."""
        self._trainable.anchor()

    def features(self, samples: Sequence[TokenSample], *, replies: bool) -> NDArray[np.float32]:
        """What the reference makes of a text as a whole, for others to learn from (a critic, say).

        That is its last hidden state, behind the final norm, at the last token of the prompt or of the reply. A text
        that comes several times, as the prompt of many replies does, goes through once. The numbers don't move while
        the policy learns, until `anchor`. Nothing is kept between calls; in the last bits they depend on what else is
        in the call.

        Args:
            samples: n of them.
            replies: prompt and reply as they stand, or the prompt alone.

        Returns:
            float32 (n, `width`).

        Raises:
            EchelonError: the model's numbers are not finite.
        """
        texts = [(*s.prompt_ids, *s.reply_ids) if replies else s.prompt_ids for s in samples]
        index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        rows = list(index)
        found = np.zeros((len(rows), self.width), np.float32)
        with self._trainable.running(reference=True) as model:
            for batch in self._packed({i: len(row) for row, i in index.items()}):
                hidden = model.base_model(input_ids=self._padded([rows[i] for i in batch]), use_cache=False)
                last = self._tensor(np.array([len(rows[i]) - 1 for i in batch]))
                picked = hidden.last_hidden_state[torch.arange(len(batch), device=last.device), last]
                found[batch] = picked.float().cpu().numpy()
        if not np.isfinite(found).all():
            raise EchelonError(f"model {self.name} gave numbers that are not finite: its weights may be damaged")
        return found[[index[text] for text in texts]]

    def backward(self, samples: Sequence[TokenSample], grads: Sequence[NDArray[np.float32]]) -> None:
        """Add the gradient of the sum of `grads` times `evaluate`'s numbers to the parameters' gradients.

        Args:
            samples: each as often as wanted.
            grads: by sample float32 (L, 2), as `evaluate`'s numbers.

        Raises:
            ValueError: a gradient of another shape.
        """
        for sample, grad in zip(samples, grads, strict=True):
            if np.shape(grad) != (len(sample.reply_ids), 2):
                raise ValueError(f"a gradient of shape {np.shape(grad)} for {len(sample.reply_ids)} tokens")
        # Where nothing is asked there is nothing to add.
        wanted = [i for i, grad in enumerate(grads) if np.any(grad)]
        for batch in self._batches([samples[i] for i in wanted]):
            members = [wanted[i] for i in batch]
            grad = np.concatenate([np.asarray(grads[i], np.float32) for i in members])
            with self._trainable.running(grad=True) as model:
                hidden, ids, heat = self._hidden(model, [samples[i] for i in members])
            # The output layer by itself, some rows at a time: logits are a hundred times larger than what they
            # are made of.
            pieces = [piece.requires_grad_() for piece in _split(hidden.detach())]
            rows = zip(pieces, _split(ids), _split(heat), _split(self._tensor(grad)), strict=True)
            for piece, own_ids, own_heat, own_grad in rows:
                with self._trainable.running(grad=True) as model:
                    numbers = _numbers(model, piece, own_ids, own_heat)
                torch.autograd.backward(numbers, own_grad)
            torch.autograd.backward(hidden, torch.cat([piece.grad for piece in pieces if piece.grad is not None]))

    def step(self) -> float:
        """Clip the gradients, take one step of AdamW, clear them; their norm before clipping.

        Raises:
            EchelonError: the gradients are not finite; the weights are as they were.
        """
        return self._trainable.step()

    def parameters(self) -> list[Tensor]:
        """What learns, in a fixed order."""
        return list(self._trainable.named.values())

    # -- state and files -----------------------------------------------------------------------

    @property
    def updates(self) -> int:
        """Optimiser steps taken."""
        return self._trainable.updates

    @property
    def width(self) -> int:
        """How many numbers a hidden state has."""
        return int(self._trainable.model.get_output_embeddings().weight.shape[1])

    @property
    def num_held(self) -> int:
        """How many numbers are kept as weights, the reference's copy included where it has one."""
        return self._trainable.num_held

    def held(self) -> dict[int, int]:
        """The sizes of what `num_held` counts, by place in memory: to count once what policies share."""
        return self._trainable.held()

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides what is learnt next, as copies; gradients between two steps are not in it."""
        return self._trainable.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            EchelonError: it is of another model or of other settings.
        """
        self._trainable.load_state_dict(state)

    def save(self, folder: Path, *, base: str | None = None) -> None:
        """Write a LoRA adapter in PEFT's format, or the whole model, whole or not at all, fit for `hf:<folder>`.

        Args:
            folder: what stands there is replaced.
            base: what the adapter calls its base model; default: what was loaded.
        """
        self._trainable.save(folder, base=base)

    # -- inside --------------------------------------------------------------------------------

    def _encode(self, prompt: TokenPrompt) -> tuple[int, ...]:
        ids = tuple(self._chat.encode(prompt.system, [prompt.text])[0])
        if self._context and len(ids) >= self._context:
            raise EchelonError(
                f"a prompt of {len(ids)} tokens leaves no room for a reply in the {self._context} of model {self.name}"
            )
        return ids

    def _write(
        self, prompts: Sequence[tuple[int, ...]], draws: Sequence[tuple[np.random.Generator, int]], temperature: float,
        top_p: float, top_k: int,
    ) -> list[TokenSample]:  # fmt: skip
        """A reply to each prompt; equal ones stand side by side."""
        device, count, longest = self._trainable.device, len(prompts), max(most for _, most in draws)
        ids = torch.zeros(count, longest, dtype=torch.long, device=device)
        logp = torch.zeros(2, count, longest, device=device)
        lengths, going = [0] * count, list(range(count))  # 0: not ended
        with self._trainable.running() as model:
            cache, state, seen, place = self._prefill(model, prompts)
            head, at = model.get_output_embeddings(), torch.arange(count, device=device)
            for t in range(longest):
                logits = head(state).float()
                if not bool(logits.sum().isfinite()):  # to ask each takes as long as all else that is done with them
                    raise EchelonError(f"model {self.name} gave numbers that are not finite: its weights are damaged")
                plain = logits.log_softmax(-1)
                warm = plain if temperature in (0, 1) else (logits / temperature).log_softmax(-1)
                if temperature > 0 and (top_k or top_p < 1):
                    token, acted = self._draw_kept(warm, [draws[row][0] for row in going], top_p, top_k)
                else:
                    if temperature == 0:
                        token = plain.argmax(-1)
                    else:
                        # Gumbel's trick, as a race of exponential times. Not the inverse of the cumulated distribution,
                        # which a change of the last bits moves by more than most of its 50,000 steps are wide.
                        drawn = np.empty(warm.shape)
                        for slot, row in enumerate(going):
                            draws[row][0].random(out=drawn[slot])
                        token = (warm - self._tensor(drawn).float().neg().log1p().neg().log()).argmax(-1)
                    acted = warm.gather(-1, token[:, None])[:, 0]
                ids[at, t] = token
                logp[:, at, t] = torch.stack([plain.gather(-1, token[:, None])[:, 0], acted])
                alive = []
                for slot, (row, own) in enumerate(zip(going, token.tolist(), strict=True)):
                    if not lengths[row] and (own in self._ends or t + 1 == draws[row][1]):
                        lengths[row] = t + 1
                    if not lengths[row]:
                        alive.append(slot)
                if not alive:
                    break
                if len(alive) <= len(going) // 2:  # else rows that have ended go on, unheard
                    keep = torch.tensor(alive, device=device)
                    going = [going[slot] for slot in alive]
                    token, seen, place, at = token[keep], seen[keep], place[keep], at[keep]
                    cache.batch_select_indices(keep)
                place = place + 1
                seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
                state = model.base_model(
                    input_ids=token[:, None], attention_mask=seen, position_ids=place[:, None], past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]  # fmt: skip
        found = []
        rows = zip(prompts, lengths, ids.tolist(), *logp.cpu().numpy(), strict=True)
        for prompt, length, own_ids, plain_logp, warm_logp in rows:
            reply = tuple(own_ids[:length])
            text = self._chat.decode([token for token in reply if token not in self._ends])
            plain_own, warm_own = plain_logp[:length].copy(), warm_logp[:length].copy()
            found.append(TokenSample(prompt, reply, text, reply[-1] in self._ends, temperature, plain_own, warm_own))
        return found

    def _draw_kept(
        self, logp: Tensor, generators: Sequence[np.random.Generator], top_p: float, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """A token of each row's most probable ones, and its log-probability among them."""
        found, tokens = _likeliest(logp, top_p, top_k)
        # A token's number belongs to its id, not to its rank: two that change places don't change the draw.
        steps = np.array([generator.bit_generator.random_raw() for generator in generators], np.uint64)
        times = -np.log1p(-_hashed(steps, tokens.cpu().numpy()))
        winner = (found.double() - self._tensor(np.log(np.maximum(times, 1e-300)))).argmax(-1, keepdim=True)
        return tokens.gather(-1, winner)[:, 0], found.gather(-1, winner)[:, 0]

    def _prefill(self, model: Any, prompts: Sequence[tuple[int, ...]]) -> tuple[Any, Tensor, Tensor, Tensor]:
        """The cache, the last hidden state, what may be seen and the place of the last token, of each prompt."""
        device = self._trainable.device
        distinct = list(dict.fromkeys(prompts))
        longest = max(len(prompt) for prompt in distinct)
        # The rows end together, so that the next token of all is at the end; what fills them on the left is hidden.
        gaps = [longest - len(prompt) for prompt in distinct]
        tokens = torch.tensor([[*[0] * gap, *p] for gap, p in zip(gaps, distinct, strict=True)], device=device)
        gap = torch.tensor(gaps, device=device)[:, None]
        places = torch.arange(longest, device=device)[None] - gap
        seen = (places >= 0).long()
        cache = self._cache_class(config=model.config)
        state = model.base_model(
            input_ids=tokens, attention_mask=seen, position_ids=places.clamp(min=0), past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        index = {prompt: i for i, prompt in enumerate(distinct)}
        of = torch.tensor([index[prompt] for prompt in prompts], device=device)
        cache.batch_select_indices(of)
        return cache, state[of], seen[of], places[of, -1]

    def _evaluate(self, samples: Sequence[TokenSample], *, reference: bool) -> list[NDArray[np.float32]]:
        found: list[NDArray[np.float32]] = [np.zeros((0, 2), np.float32)] * len(samples)
        with self._trainable.running(reference=reference) as model:
            for batch in self._batches(samples):
                hidden, ids, heat = self._hidden(model, [samples[i] for i in batch])
                pieces = zip(_split(hidden), _split(ids), _split(heat), strict=True)
                numbers = torch.cat([_numbers(model, *piece) for piece in pieces]).cpu().numpy()
                if not np.isfinite(numbers).all():
                    raise EchelonError(f"model {self.name} gave numbers that are not finite: lower lr")
                ends = np.cumsum([len(samples[i].reply_ids) for i in batch])
                for i, own in zip(batch, np.split(numbers, ends[:-1]), strict=True):
                    found[i] = own
        return found

    def _batches(self, samples: Sequence[TokenSample]) -> Iterator[list[int]]:
        """Indices of the samples of each pass: replies to one prompt, and neighbours in length, together; empty
        replies are left out."""
        order = [i for i, sample in enumerate(samples) if sample.reply_ids]
        if not self._shares:
            yield from self._packed({i: len(samples[i].prompt_ids) + len(samples[i].reply_ids) - 1 for i in order})
            return
        order.sort(key=lambda i: (len(samples[i].prompt_ids), samples[i].prompt_ids, len(samples[i].reply_ids)))
        batch: list[int] = []
        prompts, longest = 0, 0
        for i in order:
            prompt, reply = samples[i].prompt_ids, len(samples[i].reply_ids)
            more = prompts + (not batch or samples[batch[-1]].prompt_ids != prompt)
            tokens = more * len(prompt) + (len(batch) + 1) * (max(longest, reply) - 1)
            # Prompts of one length: where rows are filled up on the left, some models' masks leave no finite number.
            if batch and (tokens > self._micro_tokens or len(samples[batch[-1]].prompt_ids) != len(prompt)):
                yield batch
                batch, more, longest = [], 1, 0
            batch.append(i)
            prompts, longest = more, max(longest, reply)
        if batch:
            yield batch

    def _packed(self, lengths: Mapping[int, int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in sorted(lengths, key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[i] > self._micro_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _hidden(self, model: Any, samples: Sequence[TokenSample]) -> tuple[Tensor, Tensor, Tensor]:
        """Of all tokens of the replies: the hidden state that each is drawn from, (N, H), its id and temperature.

        A prompt of several replies goes through once, for all of them: a group of G replies of L tokens to a prompt of
        P costs P + G L tokens, and not G (P + L).
        """
        lengths = np.array([len(s.reply_ids) for s in samples])
        # The last token is drawn, not read. Right padding needs no mask: attention is causal.
        if self._shares and len({s.prompt_ids for s in samples}) < len(samples):
            cache, state, seen, place = self._prefill(model, [s.prompt_ids for s in samples])
            hidden, first = state[:, None], np.zeros(len(samples), np.int64)
            if lengths.max() > 1:
                tokens = self._padded([s.reply_ids[:-1] for s in samples])
                later = model.base_model(
                    input_ids=tokens, attention_mask=torch.cat([seen, torch.ones_like(tokens)], 1),
                    position_ids=place[:, None] + 1 + torch.arange(tokens.shape[1], device=tokens.device),
                    past_key_values=cache, use_cache=True,
                ).last_hidden_state  # fmt: skip
                hidden = torch.cat([hidden, later], 1)
        else:
            rows = self._padded([[*s.prompt_ids, *s.reply_ids[:-1]] for s in samples])
            hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state
            first = np.array([len(s.prompt_ids) - 1 for s in samples])
        place_of = np.concatenate([start + np.arange(n) for start, n in zip(first, lengths, strict=True)])
        ids = np.concatenate([np.array(s.reply_ids, np.int64) for s in samples])
        heat = np.repeat(np.array([s.temperature or 1.0 for s in samples], np.float32), lengths)
        picked = hidden[self._tensor(np.repeat(np.arange(len(samples)), lengths)), self._tensor(place_of)]
        return picked, self._tensor(ids), self._tensor(heat)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(len(row) for row in rows)
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self._trainable.device)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._trainable.device)

    def _turn_end(self) -> int:
        """The token that the model itself would end a reply with, for replies that others wrote."""
        tokenizer = self._trainable.tokenizer
        after = self._chat.end_ids - {tokenizer.eos_token_id}
        ends = sorted(after or self._ends)
        if not ends:
            raise EchelonError(f"model {self.name} has no token that ends a reply")
        return int(ends[0])

    def _check_head(self) -> None:
        """Refuse a model whose output layer does more than multiply: its numbers would be wrong without a word."""
        ids = torch.tensor(self._chat.encode("Answer.", ["Which?"]), device=self._trainable.device)
        with self._trainable.running() as model:
            whole = model(input_ids=ids).logits[0, -1].float()
            ours = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state[0, -1]).float()
        if not bool(whole.isfinite().all()):
            raise EchelonError(f"model {self.name} gave numbers that are not finite: its weights may be damaged")
        if not torch.allclose(whole, ours, rtol=0.02, atol=0.02 * float(whole.abs().max())):
            raise EchelonError(f"model {self.name} has an output layer of a kind that Echelon does not know")


def _numbers(model: Any, hidden: Tensor, ids: Tensor, temperature: Tensor) -> Tensor:
    """Log-probability of each id and entropy of its distribution, float32 (N, 2)."""
    logits = model.get_output_embeddings()(hidden).float() / temperature[:, None]
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.stack([logp.gather(-1, ids[:, None])[:, 0], entropy], -1)


def _likeliest(logp: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens of each row that `TokenPolicy.sample` keeps: their log-probabilities among themselves
    (what is not kept has -inf) and their ids, (rows, c), the likeliest first. `logp` is normalised, (rows, words)."""
    words = logp.shape[1]
    count = min(words, max(_LIKELY, top_k + 1))  # to sort all words would take longer than the model's pass
    while True:
        found, tokens = logp.topk(count)
        kept = torch.ones_like(found, dtype=torch.bool)
        if top_k:
            kept = found >= found[:, min(top_k, count) - 1, None]
        if top_p < 1:
            p = (found.masked_fill(~kept, -torch.inf).log_softmax(-1) if top_k else found).exp()
            kept &= p.cumsum(-1) - p < top_p  # what the likelier ones have together is not enough
            kept |= found >= found.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        if count == words or not bool(kept[:, -1].any()):
            return found.masked_fill(~kept, -torch.inf).log_softmax(-1), tokens
        count = min(words, 8 * count)


@numba.njit(cache=True)
def _hashed(steps: NDArray[np.uint64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) of each token, (rows, c), by the row's key and the token's id alone."""
    found = np.empty(tokens.shape)
    for row in range(tokens.shape[0]):
        for i in range(tokens.shape[1]):
            found[row, i] = uniform(steps[row], np.uint64(tokens[row, i]))
    return found


def _split(tensor: Tensor) -> list[Tensor]:
    return [tensor[start : start + _HEAD_ROWS] for start in range(0, len(tensor), _HEAD_ROWS)]
