"""From a question to tokens: the model's own chat template, and the tokens that its answer can start with."""

from __future__ import annotations

import datetime
import functools
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from echelon.errors import EchelonError
from echelon.llm.prompts import LETTERS

__all__ = ["ChatEncoder"]

_PROBES = ("A", "7", "zq x", "The robot")


class ChatEncoder:
    """Writes questions in a model's chat format.

    The answer starts right behind the template's generation prompt, so an option's token is what the
    tokenizer makes of its letter **there**: behind a line break (`<|im_start|>assistant\\n`) it is "A", not
    " A". SmolLM2 gives "A" about 9 nats more than " A" at that place.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        name: the model's name, for errors.

    Raises:
        EchelonError: no chat template.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise EchelonError(f"model {name} has no chat template: use an instruct or chat model")
        self._tokenizer, self._name = tokenizer, name
        # Text from outside must not become a control token. In C, not in a loop: prompts are many.
        added = {str(token) for token in tokenizer.get_added_vocab()} | set(tokenizer.all_special_tokens)
        marks = sorted((re.escape(t) for t in added if len(t) > 1), key=lambda t: (-len(t), t))
        self._marks = re.compile("|".join(marks)) if marks else None
        self._prefixes: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._system = self._takes_system()

    def encode(self, shared: str, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each whole prompt, up to and with the generation prompt."""
        rendered = [self._render(shared, text) for text in texts]
        ids: list[list[int]] = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def prefix(self, shared: str, ids: Sequence[int] = ()) -> tuple[int, ...]:
        """The tokens with which every prompt of this `shared` begins, whatever text follows.

        Taken as the common beginning of a few whole prompts, because the tokens at the seam depend on
        both sides of it.

        Args:
            shared: the shared part.
            ids: if not empty, one whole prompt of it. A text may change the tokens at the seam: then that
                prompt has no prefix, and the result is empty.
        """
        if shared not in self._prefixes:
            rows = self.encode(shared, _PROBES)
            length = 0
            for column in zip(*rows, strict=False):
                if len(set(column)) > 1:
                    break
                length += 1
            self._prefixes[shared] = tuple(rows[0][:length])
            if len(self._prefixes) > 64:
                self._prefixes.popitem(last=False)
        prefix = self._prefixes[shared]
        fits = not ids or (len(ids) > len(prefix) and tuple(ids[: len(prefix)]) == prefix)
        return prefix if fits else ()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without control tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's own, and the control token that the template puts behind one."""
        ids = {int(self._tokenizer.eos_token_id)} if self._tokenizer.eos_token_id is not None else set()
        turn = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "zqxj"}]
        try:
            text: str = self._tokenizer.apply_chat_template(turn, tokenize=False)
        except Exception:  # the template's own words of refusal, of whatever class
            return frozenset(ids)
        after = self._marks.match(text.rpartition("zqxj")[2].lstrip()) if self._marks else None
        if after is not None:
            ids.add(int(self._tokenizer.convert_tokens_to_ids(after.group())))
        return frozenset(ids)

    @functools.cached_property
    def letter_ids(self) -> list[int]:
        """The tokens of the letters A to Z as an answer's first.

        Raises:
            EchelonError: a letter that is not one token there.
        """
        start = self._render("Answer.", "Which?")
        texts = [start, *(start + letter for letter in LETTERS)]
        head, *rest = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [int(row[-1]) for row in rest]
        if any(row[:-1] != head for row in rest) or len(set(ids)) != len(ids):
            raise EchelonError(
                f"model {self._name} can't answer with a letter: behind its generation prompt the letters "
                "A to Z are not one token each"
            )
        return ids

    def _plain(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no tokens
        if self._marks is None:
            return text
        return self._marks.sub(lambda found: f"{found.group()[0]} {found.group()[1:]}", text)

    def _render(self, shared: str, text: str) -> str:
        shared, text = self._plain(shared), self._plain(text)
        if shared and self._system:
            messages = [{"role": "system", "content": shared}, {"role": "user", "content": text}]
        else:
            whole = f"{shared}\n\n{text}" if shared else text
            messages = [{"role": "user", "content": whole}]
        rendered: str = self._tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            # Templates that think first, or write today's date, would make the answer's place and the
            # scores depend on more than the prompt.
            enable_thinking=False,
            strftime_now=datetime.datetime(2025, 1, 1).strftime,
        )
        return rendered

    def _takes_system(self) -> bool:
        """Whether the template writes a system message; some refuse it, some drop it."""
        self._system = True
        try:
            return "zqxj" in self._render("zqxj", "Which?")
        except Exception:  # the template's own words of refusal, of whatever class
            return False
