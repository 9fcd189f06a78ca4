"""The writing task: its reward's levels against values worked out by hand, its files, its split."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import EchelonError
from echelon.tasks import Attempt, TaskSettings, build_task, task_name, tasks
from echelon.tasks.writing import (
    ARXIV,
    TLDR,
    TRANSITIONS,
    Band,
    WritingConfig,
    WritingSettings,
    WritingTask,
    writing_reward,
)


def words(count: int, letter: str, start: int = 0) -> str:
    """`count` different words of four characters: 5·count − 1 characters in all."""
    return " ".join(f"{letter}{i:03d}" for i in range(start, start + count))


def test_a_band_is_flat_inside_and_straight_on_its_sides() -> None:
    band = Band(1.1, 1.6, 3.2, 5.0)
    values = [1.0, 1.1, 1.35, 1.6, 2.0, 3.2, 4.1, 5.0, 5.1]
    assert [band(value) for value in values] == pytest.approx([0, 0, 0.5, 1, 1, 1, 0.5, 0, 0])
    assert [value in band for value in values] == [False, *[True] * 7, False]
    assert Band(1.3, 2.0, math.inf, math.inf)(1e9) == 1.0
    with pytest.raises(EchelonError, match="must ascend"):
        Band(2, 1, 3, 4)


def test_golden_rewards_level_by_level() -> None:
    ten, twenty = words(10, "a"), words(20, "b")
    # Level 1: 7 tokens are too few, 257 too many; 8 and 256 are not.
    assert writing_reward(words(7, "a"), twenty)[0] == 0.0
    assert writing_reward(ten, words(257, "b"))[0] == 0.0
    assert writing_reward("", "")[0] == 0.0
    assert writing_reward(words(100, "a"), words(256, "b"))[1]["length"] == 0.5
    # Level 2: 49 against 49 characters is a ratio of 1, outside; 49 against 259 is 5.29, outside.
    assert writing_reward(words(8, "a"), words(8, "b"))[0] == 0.5
    assert writing_reward(ten, words(52, "b"))[0] == 0.5
    # 49 to 99 characters, 10 to 20 words, none in common, no linking word: 0.5 + 1 + 0.5.
    reward, parts = writing_reward(ten, twenty)
    assert reward == pytest.approx(2.0)
    assert parts == {"length": 0.5, "ratio": 1.0, "unique": 0.5, "transitions": 0.0, "overlap": 0.0}
    # 13 words: 64 / 49 characters, on the lower side of both bands.
    ratio, unique = 64 / 49, 13 / 10
    assert writing_reward(ten, words(13, "b"))[0] == pytest.approx(
        0.5 + (ratio - 1.1) / 0.5 + 0.5 * (unique - 1.3) / 0.7
    )
    # 16 words: 79 / 49 = 1.61 characters, 1.6 words.
    assert writing_reward(ten, words(16, "b"))[0] == pytest.approx(0.5 + 1.0 + 0.5 * (1.6 - 1.3) / 0.7)
    # 40 words: 199 / 49 = 4.06 characters.
    assert writing_reward(ten, words(40, "b"))[0] == pytest.approx(0.5 + (5.0 - 199 / 49) / 1.8 + 0.5)
    # Level 3: the same ten words twice are no more words, and the levels end there.
    assert writing_reward(ten, f"{ten} {ten}")[1] == {
        "length": 0.5, "ratio": 1.0, "unique": 0.0, "transitions": 0.0, "overlap": 0.0
    }  # fmt: skip


def test_golden_rewards_of_the_last_level() -> None:
    ten = words(10, "a")
    # One word of 29 in common: 1/29 > 0.03, full marks.
    assert writing_reward(ten, words(19, "b") + " a000")[0] == pytest.approx(2.6)
    # One of 10 + 40 − 1 = 49: (1/49) / 0.03 of 0.6; 199 to 49 characters costs on level 2.
    expected = 0.5 + (5.0 - 199 / 49) / 1.8 + 0.5 + 0.6 * (1 / 49) / 0.03
    assert writing_reward(ten, words(39, "b") + " a000")[0] == pytest.approx(expected)
    # "also" is an addition: 0.4 of 0.4; with "but", a contrast, 0.45. Both are stop words and no overlap.
    assert writing_reward(ten, words(19, "b") + " also")[1]["transitions"] == pytest.approx(0.16)
    assert writing_reward(ten, words(18, "b") + " ALSO, but")[1]["transitions"] == pytest.approx(0.18)
    assert writing_reward(ten + " also", words(22, "b") + " also")[1]["overlap"] == 0.0
    # Part of a word links nothing.
    assert writing_reward(ten, words(19, "b") + " butter")[1]["transitions"] == 0.0


def test_the_most_that_can_be_earned() -> None:
    links = ". ".join(phrases[0] for phrases in TRANSITIONS.values())
    assert len(TRANSITIONS) == 13  # 0.4 + 12 · 0.05 = 1
    reward, parts = writing_reward(words(20, "a"), f"{links} {words(30, 'b')} a000 a001")
    assert parts["transitions"] == pytest.approx(0.4)
    assert reward == pytest.approx(3.0) == TLDR.best


def test_the_variant_for_abstracts() -> None:
    # 150 and 165 words: 749 and 824 characters, ratios of 1.10 each; the first 10 words of 305 in common.
    first, second = words(150, "a"), words(155, "b") + " " + words(10, "a")
    assert writing_reward(first, second, ARXIV)[0] == pytest.approx(0.5 + 1.0 + 0.5 + 0.6)
    assert writing_reward(words(100, "a"), second, ARXIV)[0] == 0.0
    # 150 to 210 words: 1049 / 749 = 1.4005 characters (1.3–1.5), 1.4 words (1.3–1.7).
    expected = 0.5 + (1.5 - 1049 / 749) / 0.2 + 0.5 * (1.7 - 1.4) / 0.4
    assert writing_reward(first, words(210, "b"), ARXIV)[0] == pytest.approx(expected)


@given(st.text(max_size=300), st.text(max_size=600), st.sampled_from([TLDR, ARXIV, WritingConfig(min_tokens=0)]))
@settings(max_examples=200)
def test_any_texts_have_a_reward_that_is_the_sum_of_its_parts(first: str, second: str, config: WritingConfig) -> None:
    reward, parts = writing_reward(first, second, config)
    assert 0.0 <= reward <= config.best + 1e-9
    assert reward == pytest.approx(sum(parts.values()))


def test_texts_without_a_word_stop_at_the_words() -> None:
    assert writing_reward("! " * 10, "? " * 20)[1] == {
        "length": 0.5, "ratio": 1.0, "unique": 0.0, "transitions": 0.0, "overlap": 0.0
    }  # fmt: skip


def test_the_set_that_comes_along() -> None:
    made = WritingTask()
    assert len(made.texts) == 48
    assert all(60 <= len(text.split()) <= 120 for text in made.texts)
    assert len(set(made.texts)) == 48
    train, held_out = made.items("train"), made.items("eval")
    assert (len(train), len(held_out)) == (36, 12)
    assert sorted([*train, *held_out]) == list(range(48))
    assert train.dtype == np.int64
    np.testing.assert_array_equal(held_out, [2, 9, 11, 12, 17, 20, 23, 32, 33, 36, 43, 45])
    assert list(WritingTask(WritingSettings(split_seed=1)).items("eval")) != list(held_out)


def test_each_agent_is_asked_for_its_own_and_told_after_a_turn() -> None:
    from echelon.tasks import Turn

    made = WritingTask()
    assert made.roles == ("summary", "elaboration")
    prompts = made.prompts(3, ())
    assert [made.texts[3] in prompt.text for prompt in prompts] == [True, True]
    assert prompts[0].text != prompts[1].text
    first, second = words(10, "a"), words(12, "b")
    scored = made.score([Attempt(3, (), (first, second))])[0]
    assert scored.reward == pytest.approx(0.5 + (59 / 49 - 1.1) / 0.5)
    assert scored.feedback == "The second text is 1.2 times as long as the first; aim for 1.6 to 3.2."
    again = made.prompts(3, (Turn((first, second), scored),))
    assert [first in prompt.text for prompt in again] == [True, False]
    assert [second in prompt.text for prompt in again] == [False, True]
    assert all(scored.feedback in prompt.text for prompt in again)
    short = made.score([Attempt(3, (), ("", ""))])[0]
    assert (short.reward, short.error, short.done) == (0.0, None, False)
    assert short.feedback == "The two texts have 0 and 0 words; each should have 8 to 256."


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffOne line\nand its next.\r\n\r\n  \r\nTwö.\n\n\n\nThree.\n".encode())
    assert WritingTask(WritingSettings(data=str(path))).texts == ["One line and its next.", "Twö.", "Three."]
    lines = tmp_path / "texts.jsonl"
    lines.write_text("\n".join(json.dumps({"abstract": f" text {i} "}) for i in range(4)) + "\n\n")
    made = WritingTask(WritingSettings(data=str(lines), field="abstract", preset="arxiv", eval_fraction=0.5))
    assert made.texts == [f"text {i}" for i in range(4)]
    assert made.roles == ("background", "method")
    assert len(made.items("eval")) == 2


def test_bad_files_and_settings_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    bad: list[tuple[bytes, str]] = [
        (b"", "is empty"),
        (b" \n\n \n", "is empty"),
        (b"\xff\xfe\xff", "is not UTF-8 text"),
        (b"only one", "has 1 item; at least 2"),
    ]
    for content, message in bad:
        path.write_bytes(content)
        with pytest.raises(EchelonError, match=message) as caught:
            WritingTask(WritingSettings(data=str(path)))
        assert "\n" not in str(caught.value)
    with pytest.raises(EchelonError, match="no text file at"):
        WritingTask(WritingSettings(data=str(tmp_path / "none.txt")))
    with pytest.raises(EchelonError, match="could not read text file"):
        WritingTask(WritingSettings(data=str(tmp_path)))
    lines = tmp_path / "texts.jsonl"
    for content, message in (
        ('{"text": 1}\n{"text": "a"}', r"text 1: no text in the field 'text' \(its fields: text\)"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: expected a JSON object, got list"),
    ):
        lines.write_text(content)
        with pytest.raises(EchelonError, match=message):
            WritingTask(WritingSettings(data=str(lines)))
    with pytest.raises(EchelonError, match="eval_fraction"):
        WritingTask(WritingSettings(eval_fraction=1.0))
    with pytest.raises(EchelonError, match="unknown split 'test'"):
        WritingTask().items("test")


def test_tasks_are_known_by_their_settings() -> None:
    assert tasks()["writing"] is WritingSettings
    assert task_name(WritingSettings()) == "writing"
    assert build_task(WritingSettings(preset="arxiv")).roles == ("background", "method")
    with pytest.raises(EchelonError, match="are the settings of no known task"):
        task_name(TaskSettings())
    with pytest.raises(EchelonError, match="unknown writing preset 'tl'"):
        WritingSettings(preset="tl")  # type: ignore[arg-type]
