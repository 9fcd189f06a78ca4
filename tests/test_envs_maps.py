"""Maps from files: what is read, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from echelon.envs import check_env, environments, make
from echelon.envs.maps import read_map
from echelon.errors import EchelonError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "maps"


def map_text(rows, height=None, width=None):
    height = len(rows) if height is None else height
    width = len(rows[0]) if width is None else width
    return f"type octile\nheight {height}\nwidth {width}\nmap\n" + "\n".join(rows) + "\n"


@pytest.fixture
def movingai(tmp_path):
    """A MovingAI benchmark map where it is at hand, else one of the same kind."""
    path = SHARED / "random-32-32-20.map"
    if not path.exists():
        rng = np.random.default_rng(3)
        path = tmp_path / "random.map"
        path.write_text(map_text(["".join("@" if x else "." for x in rng.random(32) < 0.2) for _ in range(32)]))
    return path


def test_a_benchmark_map_is_read_cell_by_cell(movingai):
    rows = movingai.read_text().splitlines()[4:]
    found = read_map(movingai)
    assert (found.height, found.width) == (32, 32)
    assert [[c in "@T" for c in row] for row in rows] == found.walls.tolist()
    assert found.marks == {}


@pytest.mark.parametrize("name", sorted(environments()))
def test_worlds_play_on_a_benchmark_map(name, movingai):
    config = environments()[name](map=movingai, num_agents=6)
    assert check_env(name, config) == []
    env = make(name, config, num_envs=3)
    # What isn't joined to the largest region is wall.
    assert (env.walls(0) == env.walls(2)).all()
    assert (env.walls(0) | ~read_map(movingai).walls).all()


def test_a_path_may_be_text(movingai):
    assert make("warehouse", map=str(movingai)).width == 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "height N"),
        ("type octile\nheight x\nwidth 3\nmap\n...\n", "'height N'"),
        ("type octile\nheight 2\nmap\n..\n..\n", "'width N'"),
        ("type octile\nheight 2\nwidth 2\n..\n..\n", "no line 'map'"),
        ("type octile\nheight 1\nwidth 2\nmap\n..\n", "height is 1, must be 2 to 256"),
        ("type octile\nheight 2\nwidth 257\nmap\n..\n..\n", "width is 257"),
        (map_text(["..", ".."], height=3), "2 rows, but its header says height 3"),
        (map_text(["...", ".."]), "row 2 has 2 cells, its header says width 3"),
        (map_text(["..", ".x"]), "row 2, column 2: unknown cell 'x'"),
        (map_text(["A@P", ".@."]), "'P' at row 1, column 3 can't be reached from row 1, column 1"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path, text, words):
    path = tmp_path / "bad.map"
    path.write_text(text)
    with pytest.raises(EchelonError) as error:
        make("warehouse", map=path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(EchelonError, match="No such file"):
        read_map(tmp_path / "none.map")
    (tmp_path / "bytes.map").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EchelonError, match="not a text file"):
        read_map(tmp_path / "bytes.map")


def test_a_map_without_room(tmp_path):
    path = tmp_path / "small.map"
    path.write_text(map_text(["....", "....", "@@@@", "...."]))
    with pytest.raises(EchelonError, match="largest connected region has 8 cells, but 4 agents and 8 tasks need"):
        make("warehouse", map=path)


def test_marks_choose_the_region_that_is_played_in(tmp_path):
    path = tmp_path / "two.map"
    path.write_text(map_text(["...........", "...........", "@@@@@@@@@@@", ".A....P.Z.."]))
    env = make("warehouse", map=path, num_agents=1, num_packages=1, num_zones=1, view=1, num_envs=4)
    assert (env.pos == env.cell_index(3, 1)).all()
    assert (env.task_cell == env.cell_index(3, 6)).all()
    assert env.walls(0)[:3].all()
    assert not env.walls(0)[3].any()
