"""Teams of language models in training: what grows, what is learnt, and that nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echelon import cli_teams
from echelon.algorithms import MAREINFORCEConfig
from echelon.algorithms.teams import team_algorithms
from echelon.cli import main
from echelon.errors import EchelonError
from echelon.llm.teams import load_team, saved_team
from echelon.llm.token_policy import TokenPolicy
from echelon.tasks import FunctionTask, TeamTask
from echelon.teams.configs import TeamPolicyConfig, TeamRunConfig, read_team_toml, team_to_toml
from echelon.teams.rollouts import TeamRolloutConfig, grow, play
from echelon.teams.training import TeamProgress, TeamTrainer
from tiny_model import make_tiny_model

LETTERS = "abcdef"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"hf:{make_tiny_model(tmp_path_factory.mktemp('tiny') / 'model')}"


@pytest.fixture(scope="module")
def policies(model: str) -> list[TokenPolicy]:
    return load_team(model, agents=2)


def reward(first: list[str], second: list[str], batch_items: list[str]) -> list[dict[str, float]]:
    """How much of the item's letter both wrote."""
    return [
        {"first": a.count(item) / 4, "second": b.count(item) / 8, "short": -len(a) / 100}
        for a, b, item in zip(first, second, batch_items, strict=True)
    ]


def turn_over(prompt: str, agent_completions: list[str], num_agents: int, **histories: Any) -> list[str]:
    return [f"Once more: {prompt}"] * num_agents


def make_task(**settings: Any) -> TeamTask:
    given: dict[str, Any] = {"reward_func": reward, "external_transition": turn_over, "eval_dataset": list("xyz")}
    ask: Callable[[str], str] = lambda item: f"Write {item}."  # noqa: E731
    return FunctionTask(list(LETTERS), formatters=[ask, ask], **{**given, **settings})


def config(spec: str, **settings: Any) -> TeamRunConfig:
    given: dict[str, Any] = {
        "model": (spec,), "updates": 3, "batch": 2, "eval_every": 2, "eval_samples": 2, "checkpoint_every": 1,
        "threads": 1, "rollout": TeamRolloutConfig(group=3, turns=2, max_tokens=4, temperature=1.0),
        "policy": TeamPolicyConfig(rank=4, lr=1e-2),
    }  # fmt: skip
    return TeamRunConfig(**{**given, **settings})


def told(folder: Path) -> dict[str, Any]:
    """All that a run left, but how long it took."""
    names = ("metrics.jsonl", "evaluations.jsonl", "dialogues.jsonl", "config.toml")
    found: dict[str, Any] = {name: (folder / name).read_text() for name in names}
    for file in sorted((folder / "team").rglob("*")):
        if file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


# -- rollouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("joint", "count"), [("aligned", 3), ("cross", 9)])
def test_every_joint_action_is_scored_and_goes_on(policies: list[TokenPolicy], joint: Any, count: int) -> None:
    sampling = TeamRolloutConfig(group=3, turns=2, max_tokens=3, temperature=1.0)
    tree = grow(make_task(), policies, [0, 4], sampling, joint=joint, seed=1, stream=(5,))
    assert [root.item for root in tree.roots] == [0, 4]
    root = tree.roots[1]
    assert len(root.scored) == len(root.children) == count
    assert len(list(tree.scenes())) == 2 * (1 + count)
    for j, child in enumerate(root.children):
        assert child is not None
        said = [root.samples[agent][root.joint[j, agent]].text for agent in range(2)]
        assert child.path == (j,)
        assert child.history[0].completions == tuple(said) == root.completions(j)
        assert child.history[0].scored is root.scored[j]
        assert root.scored[j].reward == pytest.approx(sum(reward([said[0]], [said[1]], ["e"])[0].values()))
        assert child.prompts[0].text == "Once more: Write e."
        assert child.children == [None] * count
    if joint == "cross":
        assert {tuple(pair) for pair in root.joint.tolist()} == {(a, b) for a in range(3) for b in range(3)}
    (node, _) = tree.nodes(joint)
    assert node.rewards.shape == ((3,) if joint == "aligned" else (3, 3))
    assert node.rewards.reshape(-1).tolist() == [scored.reward for scored in tree.roots[0].scored]
    assert [child.turn for child in node.children if child is not None] == [1] * count


def test_draws_depend_on_the_seed_and_on_nobody_beside(policies: list[TokenPolicy]) -> None:
    def said(items: list[int], seed: int = 1) -> list[tuple[str, ...]]:
        sampling = TeamRolloutConfig(group=2, max_tokens=4, temperature=1.0)
        tree = grow(make_task(), policies, items, sampling, seed=seed, stream=(5,))
        return [root.completions(j) for root in tree.roots for j in range(2)]

    first = said([0, 1])
    assert said([0, 1]) == first
    assert said([0]) == first[:2]
    assert said([0, 1], seed=2) != first
    assert first[0][0] != first[0][1]  # the same prompt to both


def test_a_history_that_is_good_enough_has_no_next_turn(policies: list[TokenPolicy]) -> None:
    sampling = TeamRolloutConfig(group=2, turns=2, max_tokens=2, early_stop=-0.2)
    good = grow(make_task(reward_func=lambda a, b, batch_items: [0.0] * len(a)), policies, [0], sampling, seed=0,
                stream=(1,))  # fmt: skip
    assert good.roots[0].children == [None, None]
    bad = grow(make_task(reward_func=lambda a, b, batch_items: [-1.0] * len(a)), policies, [0], sampling, seed=0,
               stream=(1,))  # fmt: skip
    assert None not in bad.roots[0].children


def test_paths_that_part_once_are_compared_turn_by_turn(policies: list[TokenPolicy]) -> None:
    sampling = TeamRolloutConfig(group=3, turns=3, max_tokens=3, temperature=1.0, branch="first")
    game = play(make_task(), policies, [0, 1], 3, sampling, seed=0, stream=(1,))
    assert [path[0].item for path in game.episodes] == [0] * 3 + [1] * 3
    assert all(len(path) == 3 for path in game.episodes)
    nodes = game.nodes(3, discount=0.5)
    assert [node.turn for node in nodes] == [0, 1, 2] * 2
    rewards = np.array([[scene.scored[0].reward for scene in path] for path in game.episodes[:3]])
    np.testing.assert_allclose(nodes[0].rewards, rewards @ [1, 0.5, 0.25])
    np.testing.assert_allclose(nodes[1].rewards, rewards[:, 1:] @ [1, 0.5])
    np.testing.assert_allclose(game.returns(0.5)[:3], nodes[0].rewards)
    assert nodes[1].samples[1][2] is game.episodes[2][1].samples[1][0]
    game.episodes[1] = game.episodes[1][:2]  # one that ended sooner
    last = game.nodes(3, discount=1.0)[2]
    assert (last.rewards[1], last.samples[0][1].reply_ids) == (0.0, ())
    assert last.samples[0][1].prompt_ids == game.episodes[1][1].samples[0][0].prompt_ids


def test_a_prompt_without_room_is_named_or_left_out(model: str) -> None:
    folder = Path(model.removeprefix("hf:")).parent / "short"
    short = load_team(f"hf:{make_tiny_model(folder, words=64)}", agents=2)
    long = FunctionTask(["a", "b" * 100], reward, [lambda item: item] * 2)
    sampling = TeamRolloutConfig(group=2, max_tokens=2)
    with pytest.raises(EchelonError, match=r"item 1 of .*, turn 1: the prompt of agent 0 .* tokens too long for"):
        grow(long, short, [0, 1], sampling, seed=0, stream=(1,))
    left = grow(long, short, [0, 1], dataclasses.replace(sampling, too_long="skip"), seed=0, stream=(1,))
    assert [root.item for root in left.roots] == [0]
    assert [item for item, _ in left.skipped] == [1]


# -- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(team_algorithms()))
def test_every_method_trains_and_resumed_is_uninterrupted(method: str, model: str, tmp_path: Path) -> None:
    whole = config(model, method=method)
    assert TeamTrainer(whole, tmp_path / "whole", task=make_task()).run()
    TeamTrainer(whole, tmp_path / "parts", task=make_task())
    for _ in range(20):
        trainer = TeamTrainer.resume(tmp_path / "parts", task=make_task())
        if trainer.run(should_stop=lambda: True):
            break
    expected = told(tmp_path / "whole")
    assert told(tmp_path / "parts") == expected
    lines = [json.loads(line) for line in expected["metrics.jsonl"].splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert [json.loads(line)["update"] for line in expected["evaluations.jsonl"].splitlines()] == [0, 2, 3]
    assert any(line["grad_norm_0"] > 0 for line in lines)
    specs, share = saved_team(tmp_path / "whole" / "team")
    assert (len(specs), share) == (2, "adapters")


def test_a_team_learns_what_it_is_rewarded_for(model: str, tmp_path: Path) -> None:
    def score(first: list[str], second: list[str], batch_items: list[str]) -> list[float]:
        return [
            (a[:1].islower() and a[:1].isascii()) + float(b[:1].isupper()) for a, b in zip(first, second, strict=True)
        ]

    task = make_task(reward_func=score, external_transition=None)
    run = config(
        model, updates=40, batch=6, eval_every=40, policy=TeamPolicyConfig(rank=8, lr=2e-2),
        rollout=TeamRolloutConfig(group=8, max_tokens=1, temperature=1.0),
    )  # fmt: skip
    trainer = TeamTrainer(run, tmp_path / "run", task=task)
    assert trainer.run()
    before, after = (json.loads(x) for x in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
    assert before["return"] < 0.8
    assert after["return"] > 1.8


@pytest.mark.parametrize("share", ["weights", "separate"])
def test_agents_share_what_they_are_told_to(share: Any, model: str, tmp_path: Path) -> None:
    models = (model,) if share == "weights" else (model, model)
    trainer = TeamTrainer(config(model, share=share, updates=1, model=models), tmp_path / "run", task=make_task())
    assert (trainer.policies[0] is trainer.policies[1]) == (share == "weights")
    assert trainer.run()
    assert len(list((tmp_path / "run" / "team").glob("agent*"))) == (1 if share == "weights" else 2)


def test_each_item_comes_once_before_any_comes_again(model: str, tmp_path: Path) -> None:
    trainer = TeamTrainer(config(model, batch=4), tmp_path / "run", task=make_task())
    order = [item for update in range(6) for item in trainer.items(update)]
    assert [sorted(order[k : k + 6]) for k in range(0, 24, 6)] == [list(range(6))] * 4
    assert order[:6] != order[6:12]


def test_a_config_comes_back_from_its_file(model: str, tmp_path: Path) -> None:
    run = config(model, method="iac", share="separate", model=(model, model))
    (tmp_path / "config.toml").write_text(team_to_toml(run))
    assert read_team_toml(tmp_path / "config.toml") == run


# -- what goes wrong -----------------------------------------------------------------------------------


def test_a_bad_reward_stops_the_run_and_names_the_sample(model: str, tmp_path: Path) -> None:
    def broken(first: list[str], second: list[str], batch_items: list[str]) -> list[float]:
        return [float("nan") if item in "cd" else 1.0 for item in batch_items]

    trainer = TeamTrainer(config(model, eval_every=0), tmp_path / "run", task=make_task(reward_func=broken))
    with pytest.raises(EchelonError, match=r"item \d, completions .* the reward is nan"):
        trainer.run()
    # The same run goes on from its last checkpoint once the function is mended.
    trainer = TeamTrainer.resume(tmp_path / "run", task=make_task())
    assert trainer.run()


def test_a_bad_reward_can_be_lived_with(model: str, tmp_path: Path) -> None:
    def broken(first: list[str], second: list[str], batch_items: list[str]) -> list[float]:
        if "c" in batch_items:
            raise ZeroDivisionError("division by zero")
        return [1.0] * len(first)

    notes: list[str] = []
    task = make_task(reward_func=broken, on_error="skip")
    assert TeamTrainer(config(model), tmp_path / "run", task=task).run(lambda p: notes.extend(p.notes))
    assert any("division by zero" in note for note in notes)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["errors"] for line in lines) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magrpo", "--env", "writin"], "unknown environment of a team of language models 'writin'"),
        (["--method", "magrpo", "--env", "writng"], "known are coding, search, warehouse, writing\n"),
        (["--method", "magrpo", "--env", "own"], "unknown environment of a team of language models 'own'"),
        (["--method", "magrpo", "--rollout.grup", "2"], "did you mean --rollout.group?"),
        (["--method", "magrpo", "--rollout.group", "0"], "rollout.group is 0: it must be at least 1"),
        (
            ["--method", "magrpo", "--rollout.group", "1"],
            "mode mean compares an agent's replies: there must be at least 2",
        ),
        (
            ["--method", "ma-vdn", "--rollout.group", "1"],
            "critic q compares an agent's replies: there must be at least 2",
        ),
        (["--method", "magrpo", "--algorithm.discount", "2"], "algorithm.discount is 2.0: it must be 0 to 1"),
        (["--method", "magrpo", "--updates", "0"], "updates is 0: it must be at least 1"),
        (["--env", "writing", "--env.data", "none.txt"], "none.txt"),
        (["--env", "writing", "--method", "magrop"], "did you mean 'magrpo'"),
    ],
)
def test_bad_flags_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    assert main(["train", *arguments, "--model", model, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_one_reply_a_prompt_is_enough_for_what_compares_none() -> None:
    one = TeamRolloutConfig(group=1)
    for method in ("mareinforce", "iac", "maac"):
        assert TeamRunConfig(method=method, rollout=one).rollout.group == 1
    with pytest.raises(EchelonError, match="mode raw compares"):
        TeamRunConfig(method="mareinforce", rollout=one, algorithm=MAREINFORCEConfig(normalize=True))


@pytest.mark.parametrize("settings", [{}, {"eval_every": 0, "checkpoint_every": 1}])
def test_a_run_whose_checkpoints_are_gone_keeps_its_logs(model: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Resuming would begin it again over its logs: nothing is changed until they are moved away."""
    run, whole = tmp_path / "run", config(model, **settings)
    assert TeamTrainer(whole, run, task=make_task()).run()
    made = told(run)
    shutil.rmtree(run / "checkpoints")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(EchelonError, match=r"the checkpoints of .* are gone.* move its logs \(\*\.jsonl\) away"):
        TeamTrainer.resume(run, task=make_task())
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    for log in run.glob("*.jsonl"):
        log.rename(tmp_path / log.name)
    assert TeamTrainer.resume(run, task=make_task()).run()
    assert told(run) == made


def test_a_run_killed_just_before_its_first_checkpoint_begins_again(model: str, tmp_path: Path) -> None:
    whole, run = config(model, eval_every=0, checkpoint_every=1), tmp_path / "run"
    assert TeamTrainer(whole, tmp_path / "whole", task=make_task()).run()
    TeamTrainer(whole, run, task=make_task())
    first = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (run / "metrics.jsonl").write_text(first)
    assert TeamTrainer.resume(run, task=make_task()).run()
    assert told(run) == told(tmp_path / "whole")


def test_a_progress_line_says_only_what_there_is() -> None:
    first = TeamProgress(0, 1, {}, {"return": -6.8}, {})
    assert cli_teams._words(first) == "updates, evaluated -6.800"
    later = TeamProgress(1, 1, {"reward": 0.5}, None, {"sample": 0.75, "learn": 0.25})
    assert cli_teams._words(later) == "updates, reward 0.500 [sample 75% learn 25%]"


def test_a_killed_run_goes_on_as_if_nothing_had_been(model: str, tmp_path: Path) -> None:
    flags = [
        "train", "--method", "magrpo", "--env", "writing", "--model", model, "--updates", "4", "--batch", "1",
        "--rollout.group", "2", "--rollout.max-tokens", "3", "--checkpoint-every", "1", "--eval-every", "3",
        "--eval-items", "1", "--eval-samples", "1", "--threads", "1",
    ]  # fmt: skip
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "echelon", *flags, "--out", str(tmp_path / "killed")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 240
            while not list((tmp_path / "killed" / "checkpoints").glob("step-*")):
                assert time.monotonic() < until
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
    assert main(["train", "--resume", str(tmp_path / "killed")]) == 0
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
    assert main(["evaluate", str(tmp_path / "killed"), "--items", "1", "--samples", "2"]) == 0
    assert json.loads((tmp_path / "killed" / "evaluation.json").read_text())["episodes"] == 2
    assert main(["train", "--resume", str(tmp_path / "killed"), "--batch", "2"]) == 2
    page = tmp_path / "killed" / "dialogues.html"
    page.unlink()
    assert main(["replay", str(tmp_path / "killed")]) == 0
    assert page.is_file()
