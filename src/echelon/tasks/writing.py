"""The `writing` task: two agents write a short and a long text about the same source, side by side.

The reward is the gated one of MAGRPO's writing experiments (arXiv 2508.04652 and the code released with it), as in
`writing_reward`. The paper's lists of transition words and stop words are not in the description that we work from:
both lists here are our own, so the last level's value can differ from theirs for the same pair of texts. What counts
as a word is our choice too: a run of letters, digits and apostrophes, without case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from echelon.errors import EchelonError, unknown_name
from echelon.tasks._data import read_json_lines, read_text, shipped, split_items
from echelon.tasks.base import AgentPrompt, Attempt, Scored, TaskSettings, Turn

__all__ = ["ARXIV", "STOP_WORDS", "TLDR", "TRANSITIONS", "Band", "WritingConfig", "WritingTask", "writing_reward"]

Preset = Literal["tldr", "arxiv"]

# Thirteen categories, so that the score of 1 (0.4 for the first, 0.05 for each further) is within reach.
TRANSITIONS: dict[str, tuple[str, ...]] = {
    "addition": ("also", "in addition", "additionally", "moreover", "furthermore", "besides", "what is more"),
    "contrast": ("however", "but", "yet", "on the other hand", "in contrast", "nevertheless", "whereas", "instead"),
    "cause": ("because", "since", "owing to", "due to", "for this reason", "as a result of"),
    "effect": ("therefore", "thus", "hence", "consequently", "as a result", "accordingly", "so that"),
    "example": ("for example", "for instance", "such as", "to illustrate", "namely"),
    "order": ("first", "firstly", "second", "secondly", "third", "next", "finally", "lastly"),
    "time": ("then", "later", "afterwards", "meanwhile", "before", "until", "eventually", "while", "during"),
    "comparison": ("similarly", "likewise", "in the same way", "just as", "compared with", "equally"),
    "emphasis": ("indeed", "in fact", "above all", "especially", "particularly", "notably", "certainly"),
    "concession": ("although", "though", "even though", "despite", "in spite of", "admittedly", "granted"),
    "condition": ("if", "unless", "provided that", "in case", "otherwise", "whether"),
    "restatement": ("in other words", "that is", "to put it differently", "put simply", "more precisely"),
    "conclusion": ("in conclusion", "to conclude", "in short", "in summary", "overall", "to sum up", "on the whole"),
}

_STOP_WORDS = """
a about above after again against all also am an and any are aren't as at be because been before being below
between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each few
for from further had has have having he her here hers herself him himself his how however i if in into is isn't
it it's its itself just may me might more most must my myself no nor not now of off on once only or other our
ours ourselves out over own s same shall she should so some such t than that that's the their theirs them
themselves then there these they this those through to too under until up upon very was wasn't we were weren't
what when where which while who whom whose why will with within without won't would yet you your yours yourself
yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_PHRASES = {
    name: re.compile(r"\b(?:" + "|".join(re.escape(phrase) for phrase in phrases) + r")\b")
    for name, phrases in TRANSITIONS.items()
}


@dataclass(frozen=True)
class Band:
    """Full marks inside, none outside, straight lines between.

    Args:
        least, low, high, most: 0 marks at `least` and `most`, full marks from `low` to `high`; ascending. `high` and
            `most` may be infinite.
    """

    least: float
    low: float
    high: float
    most: float

    def __post_init__(self) -> None:
        if not self.least <= self.low <= self.high <= self.most:
            raise EchelonError(f"a band's four numbers must ascend, got {self}")

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __call__(self, value: float) -> float:
        """Marks from 0 to 1."""
        if value not in self:
            return 0.0
        if value < self.low:
            return (value - self.least) / (self.low - self.least)
        if value > self.high:
            return (self.most - value) / (self.most - self.high)
        return 1.0


@dataclass(frozen=True)
class WritingConfig:
    """The levels of `writing_reward`.

    Args:
        min_tokens, max_tokens: how long each text may be, in words between white space.
        length_points: for both texts being that long.
        length_ratio, ratio_points: of the second text's characters to the first's.
        unique_ratio, unique_points: of the second text's different words to the first's.
        transition_points: for linking words in the second text, as a share of the last level.
        jaccard_points, jaccard_cap: for words that both use, stop words apart: full marks from `jaccard_cap` on.
    """

    min_tokens: int = 8
    max_tokens: int = 256
    length_points: float = 0.5
    length_ratio: Band = Band(1.1, 1.6, 3.2, 5.0)
    ratio_points: float = 1.0
    unique_ratio: Band = Band(1.3, 2.0, math.inf, math.inf)
    unique_points: float = 0.5
    transition_points: float = 0.4
    jaccard_points: float = 0.6
    jaccard_cap: float = 0.03

    @property
    def best(self) -> float:
        """The most that a pair of texts can earn."""
        return (
            self.length_points
            + self.ratio_points
            + self.unique_points
            + self.transition_points
            + self.jaccard_points
        )  # fmt: skip


TLDR = WritingConfig()
"""A summary and an elaboration about twice as long."""
ARXIV = WritingConfig(
    min_tokens=128,
    max_tokens=256,
    length_ratio=Band(0.8, 1.0, 1.3, 1.5),
    unique_ratio=Band(0.5, 0.7, 1.3, 1.7),
)
"""Two paragraphs of about the same length (background; method)."""

_PRESETS: dict[str, WritingConfig] = {"tldr": TLDR, "arxiv": ARXIV}
_PARTS = ("length", "ratio", "unique", "transitions", "overlap")


def _words(text: str) -> set[str]:
    return {word.replace("’", "'") for word in _WORD.findall(text.lower())}


def writing_reward(first: str, second: str, config: WritingConfig = TLDR) -> tuple[float, dict[str, float]]:
    """What a pair of texts is worth: levels, each open only when the one before was reached.

    1. Both texts are `min_tokens` to `max_tokens` long: `length_points`, else nothing.
    2. The ratio of their lengths in characters (second to first) lies in the outer band: up to `ratio_points`, else
       stop.
    3. The ratio of their numbers of different words lies in the outer band: up to `unique_points`, else stop.
    4. `transition_points` times the score of linking words in the second text (0.4 for one category of `TRANSITIONS`,
       0.05 for each further, 1 at most), and `jaccard_points · min(J, jaccard_cap) / jaccard_cap` with J the Jaccard
       index of both texts' different words without stop words.

    With `TLDR`, at most 3.0 (arXiv 2508.04652's released code, TLDR; `ARXIV`: its variant for abstracts).

    Args:
        first: the shorter text; second: the longer one; white space around them doesn't count.
        config: the levels.

    Returns:
        The reward, and what it is the sum of: "length", "ratio", "unique", "transitions", "overlap".
    """
    parts = dict.fromkeys(_PARTS, 0.0)
    first, second = first.strip(), second.strip()
    if not all(config.min_tokens <= len(text.split()) <= config.max_tokens for text in (first, second)):
        return 0.0, parts
    parts["length"] = config.length_points
    ratio = len(second) / max(len(first), 1)
    if ratio in config.length_ratio:
        parts["ratio"] = config.ratio_points * config.length_ratio(ratio)
        own, other = _words(first), _words(second)
        unique = len(other) / len(own) if own else -1.0  # a text without a word has no ratio: stop
        if unique in config.unique_ratio:
            parts["unique"] = config.unique_points * config.unique_ratio(unique)
            lower = " ".join(second.lower().split())
            categories = sum(bool(pattern.search(lower)) for pattern in _PHRASES.values())
            linking = min(0.4 + 0.05 * (categories - 1), 1.0) if categories else 0.0
            parts["transitions"] = config.transition_points * linking
            own, other = own - STOP_WORDS, other - STOP_WORDS
            jaccard = len(own & other) / max(len(own | other), 1)
            parts["overlap"] = config.jaccard_points * min(jaccard, config.jaccard_cap) / config.jaccard_cap
    return math.fsum(parts.values()), parts


_SYSTEM = "You are one of two writers who work on the same text at the same time. Answer with your text alone."
_ASKS: dict[str, tuple[str, str]] = {
    "tldr": (
        "Write a concise summary of this text in two or three sentences.",
        "Write a detailed version of the main points of this text, about twice as long as a short summary. Use many "
        "different words, and linking words such as 'however', 'for example' and 'therefore'.",
    ),
    "arxiv": (
        "This is the abstract of a paper. Write one paragraph of about 150 words on the background and motivation.",
        "This is the abstract of a paper. Write one paragraph of about 170 words on the method and what follows from "
        "it, in the same words for the same things, with linking words such as 'therefore' and 'in addition'.",
    ),
}
_ROLES: dict[str, tuple[str, str]] = {"tldr": ("summary", "elaboration"), "arxiv": ("background", "method")}


@dataclass(frozen=True)
class WritingSettings(TaskSettings):
    """Settings of the task `writing`."""

    data: str = ""
    """A text file with paragraphs between blank lines, or a .jsonl with one object a line; default: 48 short texts
    that come with Echelon."""
    field: str = "text"
    """Where a line of a .jsonl has its text."""
    preset: Preset = "tldr"
    """tldr: a summary and an elaboration; arxiv: background and method. Which prompts, roles and levels."""
    eval_fraction: float = 0.25
    """Share of the texts kept for evaluation."""
    split_seed: int = 0
    """Which ones those are."""
    max_chars: int = 4000
    """Of a source, how many characters the agents see."""

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            raise unknown_name("writing preset", self.preset, get_args(Preset))
        if self.max_chars < 1:
            raise EchelonError(f"env.max_chars is {self.max_chars}: it must be at least 1")


class WritingTask:
    """Two agents, each sees the source and not what the other writes; see `writing_reward`.

    Attributes:
        name: "writing".
        roles: ("summary", "elaboration"), or ("background", "method") with the preset "arxiv".
        texts: the sources, by item.
        settings: how it is set up; config: the levels of its reward.
    """

    name = "writing"
    roles: tuple[str, ...]

    def __init__(self, settings: WritingSettings | None = None, *, config: WritingConfig | None = None) -> None:
        """Read the sources.

        Args:
            settings: which texts, prompts and split.
            config: other levels than the preset's.

        Raises:
            EchelonError: the file can't be read, has no text or fewer than 2, or a setting is out of range.
        """
        self.settings = c = settings or WritingSettings()
        self.config = config or _PRESETS[c.preset]
        self.roles = _ROLES[c.preset]
        self.texts = _texts(Path(c.data) if c.data else None, c.field)
        self._split = split_items(len(self.texts), c.eval_fraction, c.split_seed, c.data or "the writing set")

    def items(self, split: str) -> NDArray[np.int64]:
        """See `TeamTask.items`."""
        if split not in self._split:
            raise unknown_name("split", split, self._split)
        return self._split[split]

    def prompts(self, item: int, history: Sequence[Turn]) -> list[AgentPrompt]:
        """See `TeamTask.prompts`. After a turn, each agent sees its own text and what was said about both."""
        source = self.texts[item][: self.settings.max_chars]
        prompts = []
        for agent, ask in enumerate(_ASKS[self.settings.preset]):
            text = f"{ask}\n\nText:\n{source}"
            if history:
                last = history[-1]
                text += f"\n\nYou wrote before:\n{last.completions[agent]}\n\n{last.scored.feedback}\nWrite it anew."
            prompts.append(AgentPrompt(_SYSTEM, text))
        return prompts

    def score(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """See `TeamTask.score`: `writing_reward` of the two texts, which any two strings have."""
        found = []
        for attempt in attempts:
            first, second = attempt.completions
            reward, parts = writing_reward(first, second, self.config)
            done = math.isclose(reward, self.config.best, abs_tol=1e-9)
            found.append(Scored(reward, parts, self._feedback(first, second, parts), done))
        return found

    def _feedback(self, first: str, second: str, parts: dict[str, float]) -> str:
        """What would have earned more, the first thing first."""
        config = self.config
        if not parts["length"]:
            lengths = " and ".join(str(len(text.split())) for text in (first, second))
            span = f"{config.min_tokens} to {config.max_tokens}"
            return f"The two texts have {lengths} words; each should have {span}."
        if parts["ratio"] < config.ratio_points:
            ratio = len(second.strip()) / max(len(first.strip()), 1)
            band = config.length_ratio
            return f"The second text is {ratio:.1f} times as long as the first; aim for {band.low:g} to {band.high:g}."
        if parts["unique"] < config.unique_points:
            ratio = len(_words(second)) / max(len(_words(first)), 1)
            band = config.unique_ratio
            aim = f"{band.low:g}" + ("" if math.isinf(band.high) else f" to {band.high:g}")
            return f"The second text has {ratio:.1f} times as many different words as the first; aim for {aim}."
        if parts["overlap"] < config.jaccard_points:
            return "The two texts have too few words in common: they should be about the same things."
        return "The second text should link its sentences with more kinds of linking words."


def _texts(path: Path | None, field: str) -> list[str]:
    if path is None:
        return [str(line["text"]) for line in read_json_lines(shipped("writing.jsonl"), "writing.jsonl")]
    content = read_text(path, "text file")
    if path.suffix == ".jsonl":
        texts = []
        for number, line in enumerate(read_json_lines(content, str(path)), 1):
            text = line.get(field)
            if not isinstance(text, str) or not text.strip():
                known = ", ".join(sorted(line)) or "none"
                raise EchelonError(f"{path}, text {number}: no text in the field {field!r} (its fields: {known})")
            texts.append(text.strip())
        return texts
    # Lines of one paragraph become one line; a paragraph ends at a blank one.
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", content) if part.strip()]
