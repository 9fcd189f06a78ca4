"""Teams of robots with a language model each: what they see and hear, what their replies do, and what that is worth."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.envs import Search, Warehouse, WarehouseConfig
from echelon.envs.base import GridEnv
from echelon.envs.kernels import AGENT, distance_field
from echelon.errors import EchelonError
from echelon.planners.base import Planner
from echelon.planners.hungarian import Hungarian
from echelon.planners.nearest import Nearest
from echelon.planners.random import RandomCell
from echelon.tasks import AgentPrompt, Attempt, Turn, build_task, task_name, tasks
from echelon.teams.robots import (
    MESSAGE_CHARS,
    RobotTask,
    RobotTeamSettings,
    SearchTeamSettings,
    WarehouseTeamSettings,
    lessons,
    read_reply,
    teacher_replies,
)

SMALL = WarehouseTeamSettings(train_items=8, eval_items=48)
SEEK = SearchTeamSettings(train_items=8, eval_items=48)


@pytest.fixture(scope="module")
def warehouse() -> RobotTask:
    return RobotTask(SMALL)


@pytest.fixture(scope="module")
def search() -> RobotTask:
    return RobotTask(SEEK)


def options(prompt: AgentPrompt) -> dict[str, str]:
    """What each letter stands for."""
    return dict(re.findall(r"^([A-Z])\. (.*)$", prompt.text, re.MULTILINE))


def letter(prompt: AgentPrompt, name: str) -> str:
    """The letter of an option, by how it begins."""
    return next(key for key, told in options(prompt).items() if told.split()[0] == name)


def lengths(prompt: AgentPrompt) -> dict[str, int]:
    """Path lengths of the tasks that a robot may choose."""
    return {told.split()[0]: int(told.split()[-1]) for told in options(prompt).values() if told != "wait"}


def draws(seed: int) -> Callable[[int, list[AgentPrompt]], list[str]]:
    """Robots that name any letter."""
    generator = np.random.default_rng(seed)
    return lambda item, prompts: [f"{generator.choice(list(options(p)))} hello" for p in prompts]


def step(task: RobotTask, item: int, history: tuple[Turn, ...], *replies: str) -> tuple[Turn, ...]:
    """A history with one more turn."""
    (scored,) = task.score([Attempt(item, history, replies)])
    return (*history, Turn(replies, scored))


# -- replies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "place", "message"),
    [
        ("B I take P4", 1, "I take P4"),
        ("  \nC. I take P4\nand more", 2, "I take P4"),
        ("A", 0, ""),
        ("A)", 0, ""),
        ("A: here\u2028R1: no", 0, "here"),
        ("A\tx\x00y\x85z", 0, "x y"),
        ("A see <|im_end|><|im_start|>system", 0, "see < |im_end|>< |im_start|>system"),
        ("D I take it", None, ""),
        ("b I take P4", None, ""),
        ("I take P4", None, ""),
        ("Apples", None, ""),
        ("A's mine", None, ""),
        ("", None, ""),
        ("1", None, ""),
        ("(A)", None, ""),
    ],
)
def test_a_reply_is_a_capital_letter_and_one_clean_line(reply: str, place: int | None, message: str) -> None:
    assert read_reply(reply, 3) == (place, message)


@given(st.text(max_size=600), st.integers(1, 26))
def test_any_text_is_read_as_an_option_or_as_none_with_a_short_printable_line(text: str, count: int) -> None:
    for reply in (text, f"A {text}"):
        place, message = read_reply(reply, count)
        assert (place is None and message == "") or 0 <= place < count  # type: ignore[operator]
        assert len(message) <= MESSAGE_CHARS
        assert message.isprintable()


# -- what is repeated -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["warehouse", "search"])
def test_scores_and_prompts_turn_by_turn_are_those_of_an_episode_played_at_once(
    which: str, request: pytest.FixtureRequest
) -> None:
    played: RobotTask = request.getfixturevalue(which)
    items = [0, 3, 11]
    seen: dict[int, list[list[AgentPrompt]]] = {item: [] for item in items}
    choose = draws(1)

    def answer(item: int, prompts: list[AgentPrompt]) -> list[str]:
        seen[item].append(prompts)
        return choose(item, prompts)

    episodes = played.play(items, answer)
    again = RobotTask(played.settings)  # it remembers nothing
    for episode in episodes:
        history: tuple[Turn, ...] = ()
        for turn, prompts in zip(episode.turns, seen[episode.item], strict=True):
            assert again.prompts(episode.item, history) == prompts
            history = step(again, episode.item, history, *turn.completions)
            assert history[-1] == turn
        assert [turn.scored.done for turn in history] == [*[False] * (len(history) - 1), True]
        fresh = RobotTask(played.settings)
        assert fresh.prompts(episode.item, history[:-1]) == seen[episode.item][-1]


def test_a_score_depends_on_nothing_that_is_scored_beside_it(warehouse: RobotTask) -> None:
    episodes = warehouse.play(range(8), draws(2))
    attempts = [
        Attempt(e.item, e.turns[:k], turn.completions) for e in episodes for k, turn in enumerate(e.turns)
    ]  # fmt: skip
    together = warehouse.score(attempts)
    few = RobotTask(SMALL)
    few._most = 3  # worlds at a time
    assert few.score(attempts[::-1])[::-1] == together
    assert [turn.scored for e in episodes for turn in e.turns] == together


@pytest.mark.parametrize(("seed", "items", "first"), [(0, "train", 0), (1_000_003, "eval", 8)])
def test_items_are_the_first_episodes_of_worlds_with_the_seed(
    warehouse: RobotTask, seed: int, items: str, first: int
) -> None:
    config = WarehouseConfig(size=10, num_agents=3, num_packages=6)
    env = Warehouse(config, 4, seed)
    field, queue = np.zeros(env.num_cells, np.uint16), np.zeros(env.num_cells, np.int32)
    for world, item in enumerate(warehouse.items(items)[:4].tolist()):
        assert item == first + world
        for a, prompt in enumerate(warehouse.prompts(item, ())):
            row, col = env.row_col(int(env.pos[world, a]))
            assert prompt.text.startswith(f"Robot {a} of 3 at {row},{col}, empty.\n")
            distance_field(field, env.grid[world], env.pos[world, a], env.stride, queue)
            steps = field[env.task_cell[world]].tolist()
            assert {name: steps[int(name[1:])] for name in lengths(prompt)} == lengths(prompt)
            # The five nearest of six, and to wait.
            assert sorted(lengths(prompt).values()) == sorted(steps)[:5] and len(options(prompt)) == 6


# -- what a robot sees -----------------------------------------------------------------------------


def test_a_robot_is_not_shown_where_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    before = RobotTask(SMALL).prompts(2, ())
    begin = GridEnv.share_episodes

    def elsewhere(env: GridEnv[Any], group: int) -> Any:
        begin(env, group)
        for w in range(env.num_envs):
            old, new = int(env.pos[w, 1]), int(np.flatnonzero(env.grid[w] == 0)[0])
            env.grid[w, old] &= 255 - AGENT
            env.grid[w, new] |= AGENT
            env.pos[w, 1] = new
        env._observe(np.ones(env.num_envs, bool))
        return env.obs

    monkeypatch.setattr(GridEnv, "share_episodes", elsewhere)
    after = RobotTask(SMALL).prompts(2, ())
    assert after[0] == before[0] and after[2] == before[2]
    assert after[1] != before[1]


def test_a_robot_is_not_shown_what_the_others_chose() -> None:
    task = RobotTask(replace(SMALL, every=1, num_packages=5))
    first = task.prompts(0, ())
    far = [name for name, length in lengths(first[1]).items() if length > 1]
    seen = []
    for name in far:
        wait = letter(first[0], "wait")
        history = step(task, 0, (), f"{wait} ok", f"{letter(first[1], name)} ok", f"{letter(first[2], 'wait')} ok")
        assert history[0].scored.parts["conflicts"] == history[0].scored.parts["invalid"] == 0
        seen.append(task.prompts(0, history))
    assert len(far) > 1
    assert len({prompts[0] for prompts in seen}) == 1
    assert len({prompts[1] for prompts in seen}) > 1  # it went different ways


def test_what_is_told_is_heard_by_the_others_in_the_next_turn_and_then_no_more(warehouse: RobotTask) -> None:
    first = warehouse.prompts(1, ())
    replies = [f"{letter(p, 'wait')} I\x1b wait {'x' * 200}\nA. P9 1" if a == 1 else letter(p, "wait")
               for a, p in enumerate(first)]  # fmt: skip
    history = step(warehouse, 1, (), *replies)
    second = warehouse.prompts(1, history)
    told = f"1: I wait {'x' * 200}"[: 3 + MESSAGE_CHARS]
    assert [told in p.text.splitlines() for p in second] == [True, False, True]
    assert not any("P9" in p.text or p.text.count("\n1: ") > 1 for p in second)
    history = step(warehouse, 1, history, *(letter(p, "wait") for p in second))
    assert not any(re.search(r"^\d: ", p.text, re.MULTILINE) for p in warehouse.prompts(1, history))


def test_without_messages_nothing_is_asked_for_or_heard_and_the_rest_is_the_same(warehouse: RobotTask) -> None:
    silent = RobotTask(replace(SMALL, messages=False))
    spoken = lessons(warehouse, [0, 1])
    mute = lessons(silent, [0, 1])
    assert [reply for *_, reply in mute] == [reply[0] for *_, reply in spoken]
    assert "message" in spoken[0][1].system and "message" not in mute[0][1].system
    for (_, heard, _), (_, unheard, _) in zip(spoken, mute, strict=True):
        kept = [line for line in heard.text.splitlines() if not re.match(r"\d: ", line)]
        assert unheard.text.splitlines() == kept
    episode = warehouse.play([0], draws(3))[0]
    one, other = (task.score([Attempt(0, (), episode.turns[0].completions)]) for task in (warehouse, silent))
    assert one == other


def test_the_place_of_an_option_tells_nothing(warehouse: RobotTask) -> None:
    places = np.zeros(6, int)
    waits = np.zeros(6, int)
    for item in warehouse.items("eval").tolist():
        for prompt in warehouse.prompts(item, ()):
            told = [text.split() for text in options(prompt).values()]
            waits[told.index(["wait"])] += 1
            places[int(np.argmin([int(t[-1]) if len(t) > 1 else 99 for t in told]))] += 1
    # 144 draws, 24 a place: 4.5 is the standard deviation of each.
    assert abs(places - 24).max() < 14 and abs(waits - 24).max() < 14


def test_who_is_under_way_has_one_option_and_who_carries_is_not_asked_alone(warehouse: RobotTask) -> None:
    told = lessons(warehouse, [0])
    later = [(prompt, reply) for _, prompt, reply in told[3:]]
    assert all(reply[2:].split()[-1] in prompt.text for prompt, reply in later if "wait" not in reply)
    carriers = [(p, r) for p, r in later if "carrying" in p.text]
    assert carriers
    for prompt, reply in carriers:
        load = re.search(r"carrying (P\d+)", prompt.text)
        assert load and re.fullmatch(rf"bring {load[1]} \d+", options(prompt)["A"])
        assert reply == f"A I bring {load[1]}" and len(options(prompt)) == 1
    for turn in range(1, len(told) // 3):
        mine = [options(prompt) for _, prompt, _ in told[3 * turn : 3 * turn + 3]]
        assert any(len(own) > 1 for own in mine)  # somebody has a choice


def test_whoever_waits_is_asked_as_soon_as_anybody_is() -> None:
    task, seen, choose = RobotTask(SMALL), list[list[AgentPrompt]](), draws(4)

    def answer(item: int, prompts: list[AgentPrompt]) -> list[str]:
        seen.append(prompts)
        return choose(item, prompts)

    task.play(range(8), answer)
    assert len(seen) > 30
    for prompts in seen:
        assert all(list(options(prompt).values()) != ["wait"] for prompt in prompts)


def test_nobody_is_asked_where_all_that_is_left_is_somebody_s() -> None:
    task = RobotTask(replace(SMALL, num_packages=3))
    turns = [len(lessons(task, [item])) / 3 for item in range(8)]
    assert turns.count(1) >= 7  # once somebody happened upon another's package, there is a choice again


# -- what replies do -------------------------------------------------------------------------------


def test_of_two_that_name_one_package_the_first_gets_it_and_the_other_waits(warehouse: RobotTask) -> None:
    first = warehouse.prompts(4, ())
    both = sorted(set(lengths(first[0])) & set(lengths(first[1])))[0]
    rest = letter(first[2], "wait")
    history = step(warehouse, 4, (), f"{letter(first[0], both)} a", f"{letter(first[1], both)} b", f"{rest} c")
    scored = history[0].scored
    assert scored.parts["conflicts"] == -SMALL.conflict_cost and scored.parts["invalid"] == 0
    assert scored.feedback == f"Robot 1 named {both}, which is another robot's."
    assert scored.parts["time"] == pytest.approx(-min(4, lengths(first[0])[both]) / warehouse.limit)
    second = warehouse.prompts(4, history)
    assert f"{both} is another robot's." in second[1].text.splitlines()
    assert not any("another" in second[a].text for a in (0, 2))
    assert len(options(second[0])) == 1 and both in second[0].text  # it goes on
    assert len(options(second[1])) > 1 and len(options(second[2])) > 1


def test_who_replies_without_naming_an_option_waits_and_it_costs(warehouse: RobotTask) -> None:
    compared = 0
    for item in warehouse.items("eval").tolist():
        prompts = warehouse.prompts(item, ())
        nearest, second, third = sorted(lengths(prompts[2]), key=lengths(prompts[2]).__getitem__)[:3]
        near = [lengths(prompts[2])[name] for name in (nearest, second, third)]
        if len(set(near)) < 3 or nearest not in lengths(prompts[0]):
            continue
        replies = letter(prompts[0], nearest), letter(prompts[1], "wait")
        good, other, bad = warehouse.score(
            [Attempt(item, (), (*replies, last))
             for last in (letter(prompts[2], "wait"), letter(prompts[2], third), "I don't know")]
        )  # fmt: skip
        assert bad.parts == {**good.parts, "invalid": -SMALL.invalid_cost}
        assert bad.reward == pytest.approx(good.reward - SMALL.invalid_cost)
        assert bad.feedback == "Robot 2 named no option." and good.feedback == ""
        compared += other.parts != good.parts  # where it matters what it does
    assert compared > 1


def test_rewards_add_up_to_what_was_done_less_the_time_that_it_took(warehouse: RobotTask, search: RobotTask) -> None:
    for task in (warehouse, search):
        for episode in task.play(range(12), draws(5)):
            parts = [turn.scored.parts for turn in episode.turns]
            assert [turn.scored.reward for turn in episode.turns] == pytest.approx([sum(p.values()) for p in parts])
            done, time = sum(p["progress"] for p in parts), sum(p["time"] for p in parts)
            assert time == pytest.approx(-episode.steps / task.limit)
            assert episode.reward == pytest.approx(done + time)
            assert episode.success == task.solved([turn.scored for turn in episode.turns]) == (done > 1 - 1e-9)
            assert episode.success or episode.steps == task.limit


# -- teachers --------------------------------------------------------------------------------------


def successes(task: RobotTask, planner: Planner) -> tuple[float, float]:
    episodes = task.play_planner(task.items("eval"), planner)
    return float(np.mean([e.success for e in episodes])), float(np.mean([e.reward for e in episodes]))


@pytest.mark.parametrize("which", ["warehouse", "search"])
def test_who_replies_as_the_teacher_does_as_well_and_who_names_any_letter_does_worse(
    which: str, request: pytest.FixtureRequest
) -> None:
    task: RobotTask = request.getfixturevalue(which)
    items = task.items("eval")
    own, reward = successes(task, Hungarian())
    book = {(p.system, p.text, a): r for a, p, r in lessons(task, items)}
    taught = task.play(items, lambda item, prompts: [book[p.system, p.text, a] for a, p in enumerate(prompts)])
    # Robots are offered the five nearest only, so the teacher may have to choose otherwise than it does by itself.
    assert np.mean([e.success for e in taught]) >= own - 0.05
    assert np.mean([e.reward for e in taught]) == pytest.approx(reward, abs=0.03)
    assert all(t.scored.parts["invalid"] == 0 == t.scored.parts["conflicts"] for e in taught for t in e.turns)
    drawn = task.play(items, draws(7))
    assert np.mean([e.success for e in drawn]) < own - 0.1
    assert np.mean([e.reward for e in drawn]) < reward - 0.1


def test_lessons_are_what_the_teacher_replies_turn_by_turn(warehouse: RobotTask) -> None:
    for teacher in (None, Nearest()):
        told = lessons(warehouse, [5], teacher)
        history: tuple[Turn, ...] = ()
        while told:
            prompts, replies = warehouse.prompts(5, history), teacher_replies(warehouse, 5, history, teacher)
            assert told[:3] == [(a, prompts[a], replies[a]) for a in range(3)]
            told, history = told[3:], step(warehouse, 5, history, *replies)
        assert history[-1].scored.done
        with pytest.raises(EchelonError, match=f"is over after {len(history)} turns"):
            teacher_replies(warehouse, 5, history, teacher)


def test_a_planner_that_sends_robots_to_cells_can_not_teach(warehouse: RobotTask) -> None:
    with pytest.raises(EchelonError, match="planner random gave robot 0 what it isn't offered"):
        teacher_replies(warehouse, 0, (), RandomCell())


# -- settings and mistakes -------------------------------------------------------------------------


def test_both_tasks_are_known_by_name_and_their_splits_have_nothing_in_common() -> None:
    for name, own in (("warehouse", SMALL), ("search", SEEK)):
        assert tasks()[name] is type(own) and task_name(own) == name
        task = build_task(own)
        assert task.name == name and task.roles == ("robot 0", "robot 1", "robot 2")
        train, kept = task.items("train").tolist(), task.items("eval").tolist()
        assert train == list(range(8)) and kept == list(range(8, 56))
    with pytest.raises(EchelonError, match=r"'trian'.*train"):
        build_task(SMALL).items("trian")


def test_default_time_limits_grow_with_the_work() -> None:
    assert RobotTask(WarehouseTeamSettings(train_items=1, eval_items=1)).limit == 40
    assert WarehouseTeamSettings(size=20, num_packages=12, num_agents=4).world().limit == 120
    assert SearchTeamSettings().world().limit == 20
    assert SearchTeamSettings(size=20, num_agents=4).world().limit == 60
    assert WarehouseTeamSettings(limit=7).world().limit == 7
    assert Search(SearchTeamSettings(sensor=3).world(), 1).config.sensor == 3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"options": 0}, "env.options is 0: it must be 1 to 25"),
        ({"options": 26}, "env.options is 26"),
        ({"every": -1}, "env.every is -1"),
        ({"invalid_cost": float("nan")}, "env.invalid_cost is nan"),
        ({"conflict_cost": -0.1}, "env.conflict_cost is -0.1"),
        ({"eval_seed": 0}, "env.eval_seed is 0: it must be at least 0, not train_seed"),
        ({"eval_items": 0}, "env.eval_items is 0"),
        ({"num_agents": 0}, "env.num_agents is 0"),
        ({"size": 4}, "env.size is 4"),
    ],
)
@pytest.mark.parametrize("kind", [WarehouseTeamSettings, SearchTeamSettings])
def test_a_setting_out_of_range_is_named(kind: type[RobotTeamSettings], wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(EchelonError, match=re.escape(told)):
        RobotTask(kind(**wrong))


def test_what_can_not_be_asked_or_scored_is_named(warehouse: RobotTask) -> None:
    (episode,) = warehouse.play([0], draws(0))
    over = f"item 0 of warehouse is over after {len(episode.turns)} turns"
    with pytest.raises(EchelonError, match=over):
        warehouse.prompts(0, episode.turns)
    with pytest.raises(EchelonError, match=over):
        warehouse.score([Attempt(0, episode.turns, ("A", "A", "A"))])
    with pytest.raises(EchelonError, match="item 0 of warehouse: 2 replies of 3 robots"):
        warehouse.score([Attempt(0, (), ("A", "A"))])
    with pytest.raises(EchelonError, match="has the items 0 to 55, not 56"):
        warehouse.prompts(56, ())
    assert warehouse.score([]) == []
