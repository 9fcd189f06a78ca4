"""The text form of options: how a single model that plans and acts writes a turn, and which tokens learn from what.

HiPER (arXiv 2602.16165) lets a language model write three blocks a turn: `<switch>KEEP or SWITCH</switch>`, the
subgoal that it follows, and one action. Each level's advantage goes to the tokens that decided it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Reply", "read_reply", "token_advantages", "token_mask"]

Tag = Literal["switch", "subgoal", "action"]
TAGS: tuple[Tag, ...] = ("switch", "subgoal", "action")
_CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Reply:
    """What a model wrote in a turn.

    Attributes:
        switch: whether it said SWITCH; whatever else it said there, or nothing, is KEEP.
        subgoal: the subgoal as written, None if there is none.
        action: the action in lower case, None if there is none.
        valid: whether all three blocks are there, the first says KEEP or SWITCH, and nothing is Chinese.
        spans: by block, the first and the past-the-last character, its tags included; only those that are there.
    """

    switch: bool
    subgoal: str | None
    action: str | None
    valid: bool
    spans: dict[Tag, tuple[int, int]]


def read_reply(text: str) -> Reply:
    """Read a reply by HiPER's rules; of a block that comes twice, the first counts.

    Spaces around a block's text don't count, nor does the case of tags and of KEEP and SWITCH (our choice).
    """
    found = {tag: re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE) for tag in TAGS}
    said = {tag: match.group(1).strip() for tag, match in found.items() if match}
    decision = said.get("switch", "").upper()
    valid = len(said) == len(TAGS) and decision in ("KEEP", "SWITCH") and not _CHINESE.search(text)
    return Reply(
        decision == "SWITCH",
        said.get("subgoal") or None,
        said.get("action", "").lower() or None,
        valid,
        {tag: match.span() for tag, match in found.items() if match},
    )


def token_mask(offsets: ArrayLike, span: tuple[int, int] | None) -> NDArray[np.bool_]:
    """The tokens that have a character in a span.

    Args:
        offsets: int `(L, 2)`, the first and the past-the-last character of each token.
        span: likewise; None is nowhere.

    Returns:
        bool `(L,)`.
    """
    at = np.asarray(offsets, np.int64).reshape(-1, 2)
    if span is None:
        return np.zeros(len(at), bool)
    return (at[:, 0] < span[1]) & (at[:, 1] > span[0])


def token_advantages(
    adv_low: ArrayLike,
    adv_high: ArrayLike,
    adv_term: ArrayLike,
    boundary: ArrayLike,
    *,
    action: ArrayLike,
    subgoal: ArrayLike,
    switch: ArrayLike,
    response: ArrayLike,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Each level's advantage on the tokens that decided it (HiPER's assignment, as released).

    The low level's goes to the action's tokens, the high level's to the subgoal's tokens in boundary turns, the
    switch's to the switch's tokens. A reply without an action has the low level's on all its tokens, and there the
    terms add up.

    Args:
        adv_low, adv_high, adv_term: `(m,)`, a turn.
        boundary: bool `(m,)`, where a segment begins.
        action, subgoal, switch: bool `(m, L)`, the tokens of each block.
        response: bool `(m, L)`, the tokens of the whole reply (not: padding).

    Returns:
        float32 `(m, L)`, and bool `(m, L)`, the tokens that learn.
    """
    low, high, term = (np.asarray(x, np.float64)[:, None] for x in (adv_low, adv_high, adv_term))
    on_action, on_subgoal, on_switch, on_all = (np.asarray(x, bool) for x in (action, subgoal, switch, response))
    on_action = np.where(on_action.any(1, keepdims=True), on_action, on_all)
    on_subgoal = on_subgoal & np.asarray(boundary, bool)[:, None]
    total = low * on_action + high * on_subgoal + term * on_switch
    return total.astype(np.float32), on_action | on_subgoal | on_switch
