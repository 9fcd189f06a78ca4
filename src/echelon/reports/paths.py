"""The section of a study's report on where the agents went: path maps, and the recordings that they play."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from echelon.errors import EchelonError
from echelon.reports.charts import Figure, PathMap, panel_svg, path_map
from echelon.reports.parts import (
    Document,
    Section,
    Study,
    World,
    byte_count,
    counted,
    esc,
    in_words,
    method_label,
    run_anchor,
    slug,
)
from echelon.reports.replay import Replay, load_replay, replay_data

__all__ = ["Team", "packed", "paths", "recordings"]


# A recording is embedded whole up to this size (compressed, as text); a larger one only with its first episode.
_REPLAY_BYTES = 1 << 20
_ALL_REPLAYS_BYTES = 12 << 20


@dataclass
class _Recording:
    """A recording of one run: its map, and its data for the player (or why there are none)."""

    run: Document
    replay: Replay | None
    trouble: str
    data: str = ""
    whole: bool = True


@dataclass
class Team:
    """The recordings of one world: every method on the same seed."""

    world: World
    seed: int
    recordings: list[_Recording]


def recordings(study: Study, replays: Mapping[str, Path]) -> list[Team]:
    """For each world the recordings of the seed that most methods have, methods in the study's order."""
    teams, room = [], _ALL_REPLAYS_BYTES
    for world in study.worlds:
        by_seed: dict[int, list[Document]] = {}
        for method in study.methods:
            for run in study.of_cell.get((*world, method), []):
                if run["id"] in replays:
                    by_seed.setdefault(run["seed"], []).append(run)
        if not by_seed:
            continue
        seed = min(by_seed, key=lambda s: (-len(by_seed[s]), s))
        found = []
        for run in by_seed[seed]:
            path = replays[run["id"]]
            try:
                replay, trouble = _most_obstacles_first(load_replay(path)), ""
            except EchelonError as error:
                replay, trouble = None, str(error).replace(str(path), path.name)
            recording = _Recording(run, replay, trouble)
            if replay is not None:
                recording.data, recording.whole = _embedded(replay, min(room, _REPLAY_BYTES))
                room -= len(recording.data)
            found.append(recording)
        teams.append(Team(world, seed, found))
    return teams


def _most_obstacles_first(replay: Replay) -> Replay:
    """The same recording, the episode on the fullest map first: an open hall shows little of how a team finds ways."""
    episodes = sorted(replay.episodes, key=lambda episode: -"".join(episode.walls).count("#"))
    return replay.model_copy(update={"episodes": episodes})


def packed(text: str) -> str:
    # mtime 0: the same input gives the same bytes.
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 9, mtime=0)).decode("ascii")


def _embedded(replay: Replay, room: int) -> tuple[str, bool]:
    """A replay's data, compressed; where that is too much, its first episode without the planner's words."""
    data = packed(replay_data(replay))
    if len(data) <= room:
        return data, True
    first = replay.episodes[0]
    plans = [plan.model_copy(update={"prompt": None, "reply": None}) for plan in first.plans]
    less = replay.model_copy(update={"episodes": [first.model_copy(update={"plans": plans})]})
    data = packed(replay_data(less))
    return (data, False) if len(data) <= room else ("", False)


def paths(study: Study, teams: Sequence[Team]) -> Section:
    section = Section("paths", "Where the agents went")
    if not any(r.replay for team in teams for r in team.recordings):
        section.words("No episode of this study was recorded.")
    else:
        total = sum(len(r.data) for team in teams for r in team.recordings)
        count = sum(bool(r.data) for team in teams for r in team.recordings)
        section.words(
            "One episode, the same world for every method. Grey: walls; tan squares: tasks where they lay at first; "
            "pale blue: zones. Each agent has its colour: its way begins at the open circle and ends at the disc; "
            "diamonds are the subgoals that the planner gave it."
            f'<span class="screen"> A map plays its recording on a click ({counted(count, "recording")}, '
            f"{byte_count(total)} of this page).</span>"
        )
    for k, team in enumerate(teams):
        maps, cards = [], []
        for j, recording in enumerate(team.recordings):
            method = recording.run["method"]
            if recording.replay is None:
                cards.append(
                    f'<div class="panel"><h4>{method_label(study, method)}</h4>'
                    f'<p class="note">The recording can\'t be shown: {esc(recording.trouble)}</p></div>'
                )
                continue
            ending = _ending(recording.replay)
            if not _same_world(recording.replay, team.recordings):
                ending += " (in another world: not to be compared)"
            drawn = path_map(recording.replay, method, (ending,))
            maps.append(drawn)
            cards.append(_map_card(study, recording, drawn, f"{k}-{j}"))
        name = f"paths-{slug(team.world[0])}-{team.world[1]}-{team.world[2]}"
        title = f"{study.label(team.world, whole=True)}, seed {team.seed}"
        files_named = ""
        if maps:
            section.figures.append(Figure(name, f"Ways of the agents, {title}", tuple(maps)))
            files_named = f' <span class="file">figures/{name}.svg, .pdf</span>'
        body = (
            f'<figure id="fig-{name}"><figcaption><strong>{esc(title)}.</strong>{files_named}</figcaption>'
            f'<div class="panels maps{" large" if team.world[1] > 30 else ""}">{"".join(cards)}</div>'
            f'<div class="player" id="player-{k}" hidden></div></figure>'
        )
        section.body.append(body)
    return section


def _same_world(replay: Replay, among: Sequence[_Recording]) -> bool:
    """Whether the first episode was played where that of the first readable recording was."""
    first = next(r.replay for r in among if r.replay is not None)
    here, there = replay.episodes[0], first.episodes[0]
    return here.walls == there.walls and here.frames[0].agents == there.frames[0].agents


def _ending(replay: Replay) -> str:
    """How the recorded episode went, in words."""
    episode = replay.episodes[0]
    bumps = sum(frame.collisions for frame in episode.frames)
    ended = f"all done in {episode.steps} steps" if episode.success else f"not done after {episode.steps} steps"
    return f"{ended}, {counted(bumps, 'collision')}"


def _map_card(study: Study, recording: _Recording, drawn: PathMap, key: str) -> str:
    run = recording.run
    said = f"{run['method']} on {study.label((run['environment'], run['size'], run['agents']), whole=True)}"
    if recording.data:
        less = "" if recording.whole else ", first episode, without prompts"
        size = f'<span class="quiet">{byte_count(len(recording.data))}{less}</span>'
        play = (
            f'<button type="button" class="play" data-replay="replay-{key}" data-player="player-{key.split("-")[0]}" '
            f'data-title="{esc(said)}">▶ Play {size}</button>'
        )
    else:
        play = '<p class="note">Too large to be embedded: `echelon replay` plays its file.</p>'
    link = f'<a href="#{run_anchor(run["id"])}">run</a>'
    return (
        f'<div class="panel"><h4>{method_label(study, run["method"])}</h4>'
        f"{panel_svg(drawn, f'{said}. {in_words(drawn)}')}"
        f'<p class="note">{esc(drawn.notes[0])} ({link})</p>{play}</div>'
    )
