"""The L2M2 experiment in three sizes: a taste, an hour, and the paper's own matrix."""

from __future__ import annotations

from typing import Any

from echelon.errors import unknown_name
from echelon.evaluation.protocol import Protocol
from echelon.studies.spec import Study

__all__ = ["preset", "presets"]

# As in the results under docs/results: the untouched model plans, while executors learn in an eighth of the worlds.
_SETTINGS: dict[str, dict[str, Any]] = {"run": {"model": "smollm2-135m"}, "method": {"l2m2": {"llm_share": 0.125}}}
METHODS = ("l2m2", "rule-goals", "flat-mappo", "qmix", "llm-only", "random-goals", "classical")

_PRESETS = {
    study.name: study
    for study in (
        Study(
            name="quick",
            title="A taste of the L2M2 experiment: two sizes, two seeds, short training",
            methods=METHODS,
            sizes=(10, 20),
            seeds=(0, 1),
            steps=400_000,
            protocol=Protocol(every=20_000, episodes=32, final_episodes=100),
            settings=_SETTINGS,
        ),
        Study(
            name="medium",
            title="The L2M2 experiment in an hour: three sizes, three seeds, 2 million steps",
            methods=METHODS,
            sizes=(10, 20, 50),
            seeds=(0, 1, 2),
            steps=2_000_000,
            protocol=Protocol(every=100_000, episodes=32, final_episodes=320),
            settings=_SETTINGS,
        ),
        # 5 sizes x 2 teams x 5 seeds x 164 episodes: the paper's 8,200 evaluation episodes, for each method.
        Study(
            name="paper",
            title="The L2M2 experiment as the paper has it: five sizes, two teams, five seeds, 5 million steps",
            methods=METHODS,
            sizes=(10, 20, 30, 40, 50),
            agents=(4, 8),
            seeds=(0, 1, 2, 3, 4),
            steps=5_000_000,
            protocol=Protocol(every=250_000, episodes=32, final_episodes=164),
            settings=_SETTINGS,
        ),
    )
}


def presets() -> dict[str, Study]:
    """All presets by name."""
    return dict(_PRESETS)


def preset(name: str) -> Study:
    """The preset of that name.

    Raises:
        EchelonError: there is none.
    """
    if name not in _PRESETS:
        raise unknown_name("preset", name, _PRESETS)
    return _PRESETS[name]
