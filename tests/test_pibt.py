"""Priority inheritance with backtracking: no conflicts anywhere, everybody arrives where the theorem says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from echelon.envs import make
from echelon.errors import EchelonError
from echelon.executors import PIBTExecutor
from echelon.pibt import parking_fields, pibt_moves, pibt_scratch
from echelon.planners import make_rule_planner
from echelon.rng import mix, spawn_keys
from echelon.rollout import TeamWorlds
from echelon.subgoals import FEATURES, Outcome, SubgoalConfig

STAY, N, E, S, W = range(5)
Cells = set[int]


class Board:
    """One map with agents on it, stepped by the kernel; a cell is row · width + col of a map walled all round."""

    def __init__(self, rows: list[str]) -> None:
        width = len(rows[0]) + 2
        text = "#" * width + "".join(f"#{row}#" for row in rows) + "#" * width
        self.width, self.size = width, len(text)
        self.free: Cells = {i for i, c in enumerate(text) if c != "#"}
        self.offsets = np.array([0, -width, 1, width, -1], np.int32)
        self.letters = {c: i for i, c in enumerate(text) if c not in "#."}

    def legal(self, cell: int) -> list[bool]:
        return [int(cell + d) in self.free for d in self.offsets]

    def neighbours(self, cell: int) -> list[int]:
        return [int(cell + d) for d in self.offsets[1:] if cell + d in self.free]

    def field(self, goal: int, without: tuple[int, int] | None = None) -> NDArray[np.uint16]:
        """Path lengths to `goal`, on the map without one edge."""
        field = np.full(self.size, 65535, np.uint16)
        field[goal] = 0
        queue = deque([goal])
        while queue:
            cell = queue.popleft()
            for n in self.neighbours(cell):
                if field[n] == 65535 and {n, cell} != set(without or ()):
                    field[n] = field[cell] + 1
                    queue.append(n)
        return field

    def parking(self) -> NDArray[np.uint16]:
        """What `parking_fields` says of this map."""
        walls = np.array([[c not in self.free for c in range(self.size)]])
        fields = np.full((1, self.size), 99, np.uint16)
        parking_fields(np.ones(1, bool), walls, self.offsets, fields)
        return fields[0]

    def on_cycle(self, a: int, b: int) -> bool:
        """Whether the neighbours `a` and `b` lie on a common cycle: still joined without the edge between them."""
        return bool(self.field(a, without=(a, b))[b] != 65535)

    def bridgeless_part(self) -> Cells:
        """The largest set of cells in which every two neighbours lie on a common cycle."""
        edges = {c: [n for n in self.neighbours(c) if self.on_cycle(c, n)] for c in self.free}
        best: Cells = set()
        left = set(self.free)
        while left:
            part, stack = set[int](), [min(left)]
            while stack:
                cell = stack.pop()
                if cell not in part:
                    part.add(cell)
                    stack += edges[cell]
            left -= part
            best = max(best, part, key=len)
        return best


class Team:
    """Agents with fixed goals (None: nowhere to go) on a board, and their priorities."""

    def __init__(self, board: Board, starts: list[int], goals: list[int | None], seed: int = 0) -> None:
        self.board = board
        self.pos = np.array([starts], np.int32)
        self.busy = np.array([[g is not None for g in goals]])
        self.field = np.array([[board.field(g) if g is not None else np.zeros(board.size) for g in goals]], np.uint16)
        self.parking = board.parking()[None]
        self.waited = np.full(self.pos.shape, -1, np.int32)
        self.fresh = np.zeros(self.pos.shape, bool)
        self.keys, self.counters = spawn_keys(seed, (0,), 1), np.zeros(1, np.uint64)
        self.scratch = pibt_scratch(len(starts), board.size)

    def plan(self) -> NDArray[np.int8]:
        legal = np.array([[self.board.legal(int(c)) for c in self.pos[0]]])
        moves = np.full(self.pos.shape, 99, np.int8)
        pibt_moves(
            self.pos, legal, self.field, self.parking, self.busy, self.fresh, self.waited, self.board.offsets,
            self.keys, self.counters, moves, self.scratch,
        )  # fmt: skip
        return moves[0]

    def step(self) -> list[int]:
        """One step, held free of conflicts; the moves."""
        moves = self.plan()
        before = [int(c) for c in self.pos[0]]
        after = [int(c + self.board.offsets[k]) for c, k in zip(before, moves, strict=True)]
        assert set(after) <= self.board.free
        assert len(set(after)) == len(after)
        ways = {(b, a) for b, a in zip(before, after, strict=True) if a != b}
        assert not any((a, b) in ways for b, a in ways)
        self.pos[0] = after
        return [int(k) for k in moves]


def team_on(rows: list[str], goals: dict[str, str | None], **kwargs: Any) -> tuple[Board, Team]:
    """Agents at the capital letters of a map, in the goals' order, with the cells of other letters as goals."""
    board = Board(rows)
    starts = [board.letters[a] for a in goals]
    return board, Team(board, starts, [None if g is None else board.letters[g] for g in goals.values()], **kwargs)


def plain_pibt(team: Team) -> tuple[list[int], list[int]]:
    """The published pseudo-code, recursive, with the kernel's draws: moves and priorities; changes nothing."""
    board, pos = team.board, [int(c) for c in team.pos[0]]
    num = len(pos)
    fields = [team.field[0, a] if team.busy[0, a] else team.parking[0] for a in range(num)]
    waited = []
    for a in range(num):
        w, there = int(team.waited[0, a]), fields[a][pos[a]] == 0
        start = team.fresh[0, a] or w < 0 or (there and team.busy[0, a])
        waited.append(-1 if there and not team.busy[0, a] else 0 if start else w + 1)
    to: dict[int, int] = {}

    def liking(a: int, k: int) -> tuple[int, bool, bool, int]:
        v = pos[a] + int(board.offsets[k])
        bits = int(mix(team.keys[0], team.counters[0] + np.uint64(a)))
        idle = not team.busy[0, a]
        return int(fields[a][v]), idle and k > 0, k > 0 and v in pos, bits >> (10 * k) & 1023

    def pibt(a: int, parent: int | None) -> bool:
        for k in sorted(np.flatnonzero(board.legal(pos[a])), key=lambda k: liking(a, int(k))):
            v = pos[a] + int(board.offsets[k])
            if v in to.values() or (parent is not None and v == pos[parent]):
                continue
            to[a] = v
            b = pos.index(v) if v in pos else None
            if b is not None and b not in to and not pibt(b, a):
                continue
            return True
        to[a] = pos[a]
        return False

    turn = sorted(range(num), key=lambda a: -waited[a])
    for a in turn:
        if a not in to:
            pibt(a, None)
    first = turn[0]
    if fields[first][pos[first]] > 0 and fields[first][to[first]] >= fields[first][pos[first]]:
        waited[first] = -1
    return [int(np.flatnonzero(board.offsets == to[a] - pos[a])[0]) for a in range(num)], waited


@st.composite
def boards(draw: st.DrawFn, most: int = 7) -> Board:
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    walls = draw(st.lists(st.sampled_from("...#"), min_size=height * width, max_size=height * width))
    walls[draw(st.integers(0, height * width - 1))] = "."
    text = "".join(walls)
    return Board([text[r * width : (r + 1) * width] for r in range(height)])


@st.composite
def bridgeless_boards(draw: st.DrawFn) -> Board:
    """Maps on which every two neighbours lie on a common cycle."""
    board = draw(boards())
    part = board.bridgeless_part()
    assume(len(part) >= 4)
    board.free = part
    return board


# -- safety, on any map ---------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(boards(), st.data())
def test_never_a_conflict_and_as_the_pseudo_code(board, data):
    cells = sorted(board.free)
    starts = data.draw(st.permutations(cells))[: data.draw(st.integers(1, len(cells)))]
    # Goals of all kinds: shared, out of reach, under somebody's feet, none at all.
    goals = data.draw(st.lists(st.sampled_from([None, *cells]), min_size=len(starts), max_size=len(starts)))
    team = Team(board, starts, goals, data.draw(st.integers(0, 9)))
    for _ in range(12):
        team.fresh[0] = data.draw(st.lists(st.booleans(), min_size=len(starts), max_size=len(starts)))
        expected = plain_pibt(team)
        assert (team.step(), team.waited[0].tolist()) == expected


def test_the_same_worlds_the_same_moves_in_any_batch():
    rows = ["......", ".#..#.", "......", ".#..#.", "......"]
    board = Board(rows)
    cells = np.array(sorted(board.free))
    teams = []
    for i in range(4):
        rng = np.random.default_rng(i)
        starts, goals = rng.permutation(cells)[:9], rng.permutation(cells)[:9]
        teams.append((starts, goals))
    alone = []
    for i, (starts, goals) in enumerate(teams):
        team = Team(board, list(starts), list(goals))
        team.keys = spawn_keys(5, (0,), 4)[i : i + 1]
        alone.append([team.step() for _ in range(20)])
    together = Team(board, list(teams[0][0]), list(teams[0][1]))
    together.pos = np.array([starts for starts, _ in teams], np.int32)
    together.field = np.array([[board.field(g) for g in goals] for _, goals in teams])
    together.parking = np.repeat(together.parking, 4, 0)
    together.busy, together.fresh = np.ones((4, 9), bool), np.zeros((4, 9), bool)
    together.waited = np.full((4, 9), -1, np.int32)
    together.keys, together.counters = spawn_keys(5, (0,), 4), np.zeros(4, np.uint64)
    for t in range(20):
        legal = np.array([[board.legal(int(c)) for c in row] for row in together.pos])
        moves = np.zeros((4, 9), np.int8)
        pibt_moves(
            together.pos, legal, together.field, together.parking, together.busy, together.fresh, together.waited,
            board.offsets, together.keys, together.counters, moves, together.scratch,
        )  # fmt: skip
        assert moves.tolist() == [alone[i][t] for i in range(4)]
        together.pos += board.offsets[moves]


# -- by hand --------------------------------------------------------------------------------------------------------


def test_a_priority_is_inherited_down_the_line():
    # A pushes B and C ahead of itself, though both would rather stay.
    _, team = team_on(["ABC.g"], {"A": "g", "B": None, "C": None})
    assert team.step() == [E, E, E]
    assert team.step() == [E, E, E]
    assert team.step() == [STAY, STAY, STAY]  # C is at the end of the corridor


def test_who_is_refused_takes_the_next_best_way():
    # Both of A's ways lead through others. E is at its goal and goes first, so B can't leave, but D can.
    for seed in range(20):
        _, team = team_on(["AB#", "DE.", "..g"], {"E": "E", "A": "g", "B": None, "D": None}, seed=seed)
        assert team.step() == [STAY, S, STAY, S]
    # B is in a dead end and A nearest to where it stands: A must wait.
    _, team = team_on(["AB#", ".##"], {"A": "B", "B": None})
    assert team.step() == [STAY, STAY]


def test_a_full_ring_turns():
    board, team = team_on(["AB", "DC"], {"A": "B", "B": "C", "C": "D", "D": "A"})
    assert team.step() == [E, S, W, N]
    assert [int(c) for c in team.pos[0]] == [board.letters[x] for x in "BCDA"]


def test_who_has_nothing_to_do_stays_until_it_is_in_the_way():
    _, team = team_on(["A....", "..B.."], {"A": None, "B": None})
    assert [team.step() for _ in range(3)] == [[STAY, STAY]] * 3
    _, team = team_on(["AB.g", "...."], {"B": None, "A": "g"})
    moves = team.step()
    assert moves[0] != STAY
    assert moves[1] == E
    assert team.waited.tolist() == [[-1, 0]]


def test_of_equally_short_ways_the_free_one():
    _, team = team_on(["A.", "Bg"], {"A": "g", "B": None})
    for _ in range(20):
        assert team.plan().tolist() == [E, STAY]


def test_equal_priorities_lower_index_first_and_chance_between_ways():
    # Both want the cell between them: the first gets it.
    for names in ("AB", "BA"):
        board, team = team_on(["A.B"], dict.fromkeys(names))
        team.busy[:] = True
        team.field[:] = board.field(board.letters["A"] + 1)
        moves = team.step()
        assert [k != STAY for k in moves] == [True, False]
    _, team = team_on(["A.", ".g"], {"A": "g"})
    firsts = {int(team.plan()[0]) for _ in range(40)}
    assert firsts == {E, S}


def test_priorities_grow_until_the_goal_and_start_again_with_a_new_one():
    _, team = team_on(["A..g", "b..B"], {"A": "g", "B": "b"})
    seen = []
    for t in range(5):
        team.fresh[:] = [[False, t == 2]]
        team.step()
        seen.append(team.waited[0].tolist())
    assert seen == [[0, 0], [1, 1], [2, 0], [0, 0], [0, 0]]
    team.busy[0, 1] = False
    team.step()
    assert team.waited[0, 1] == -1


def test_ways_out_of_dead_ends():
    rows = [
        "...####",
        ".#.....",
        "...#.##",
        "####.##",
        "..#####",
    ]
    field = Board(rows).parking().reshape(7, 9)[1:-1, 1:-1]
    expected = [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 2, 3, 4],
        [0, 0, 0, 0, 3, 0, 0],
        [0, 0, 0, 0, 4, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    assert field.tolist() == expected


@settings(max_examples=100)
@given(boards())
def test_parking_is_as_near_as_breadth_first_search_says(board):
    core = set(board.free)
    while ends := {c for c in core if len(core.intersection(board.neighbours(c))) < 2}:
        core -= ends
    field = board.parking()
    for cell in range(board.size):
        lengths = board.field(cell)[sorted(core)] if cell in board.free else np.array([], np.uint16)
        nearest = lengths.min(initial=65535)
        assert field[cell] == (0 if nearest == 65535 else nearest)


def test_who_has_nothing_to_do_leaves_a_dead_end():
    # B stands where A wants to go, and A in B's way out. A, the first, can't come nearer, so it lets B go first.
    board, team = team_on(["..###", "...AB", "..###"], {"A": "B", "B": None})
    assert team.step() == [STAY, STAY]
    assert team.waited.tolist() == [[-1, 0]]
    assert team.step() == [W, W]
    for _ in range(14):
        team.step()
    assert team.pos[0, 0] == board.letters["B"]
    assert board.parking()[team.pos[0, 1]] == 0
    assert team.waited[0].tolist() == [0, -1]


# -- everybody arrives ----------------------------------------------------------------------------------------------


def arrive(board: Board, starts: list[int], goals: list[int], seed: int = 0) -> bool:
    """Whether each agent is at its goal at least once within the theorem's bound.

    The first comes nearer with every step and is last once it has arrived; so does the next: agents · diameter.
    """
    team = Team(board, starts, list(goals), seed)
    diameter = max(int(board.field(c)[sorted(board.free)].max()) for c in board.free)
    arrived = team.pos[0] == goals
    for _ in range(len(starts) * diameter):
        team.step()
        arrived |= team.pos[0] == goals
    return bool(arrived.all())


RING = ["......", ".####.", ".####.", "......"]
EIGHT = ["...##", ".#.##", ".....", "##.#.", "##..."]
SHELVES = [*["........", ".##..##."] * 3, "........"]
MAPS = {"ring": RING, "eight": EIGHT, "square": ["..", ".."], "open": ["....."] * 5, "shelves": SHELVES}


@pytest.mark.parametrize("rows", MAPS.values(), ids=MAPS)
def test_everybody_arrives_where_neighbours_share_a_cycle(rows):
    board = Board(rows)
    cells = sorted(board.free)
    assert board.bridgeless_part() == board.free
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for num in {1, len(cells) // 2, len(cells) - 1, len(cells)}:
            starts, goals = (rng.permutation(cells)[:num].tolist() for _ in range(2))
            assert arrive(board, starts, goals, seed)


@settings(max_examples=60)
@given(bridgeless_boards(), st.data())
def test_everybody_arrives_on_any_such_map(board, data):
    cells = sorted(board.free)
    num = data.draw(st.one_of(st.integers(1, len(cells)), st.just(len(cells) - 1)))
    starts = data.draw(st.permutations(cells))[:num]
    goals = data.draw(st.permutations(cells))[:num]
    assert arrive(board, starts, goals, data.draw(st.integers(0, 99)))


def test_no_promise_where_a_bridge_is():
    # Two that must pass each other in a corridor can't; the check of the maps above must see that it is one.
    board = Board(["A..B"])
    assert len(board.bridgeless_part()) == 1
    assert not arrive(board, [board.letters["A"], board.letters["B"]], [board.letters["B"], board.letters["A"]])
    lollipop = Board(["..#", "...", "..#"])
    assert len(lollipop.bridgeless_part()) == 6


# -- the executor, in the worlds ------------------------------------------------------------------------------------

WORLDS: dict[str, dict[str, Any]] = {
    "warehouse": {"size": 9, "num_agents": 6, "num_packages": 5, "num_zones": 1, "limit": 60},
    "search": {"size": 9, "num_agents": 6, "limit": 40},
    "repair": {"size": 9, "num_agents": 6, "limit": 60},
}


def worlds_of(world: str, num_envs: int, seed: int = 0, planner: str | None = "hungarian", **env: Any) -> TeamWorlds:
    settings = {**WORLDS[world], **env}
    batch = make(world, num_envs=num_envs, seed=seed, extra_features=FEATURES if planner else 0, **settings)
    planners = [(make_rule_planner(planner), np.ones(num_envs, bool))] if planner else []
    worlds = TeamWorlds(batch, planners, SubgoalConfig(), gamma=0.99, seed=seed)
    worlds.start()
    return worlds


def positions(worlds: TeamWorlds, executor: PIBTExecutor, steps: int) -> Iterator[NDArray[np.int32]]:
    """Where agents are after each step, held to be just where they wanted to go."""
    env = worlds.env
    for _ in range(steps):
        moves = executor.act(worlds)
        assert np.take_along_axis(worlds.mask, moves[..., None].astype(int), 2).all()
        planned = env.pos + env.offsets[moves]
        worlds.advance(moves)
        assert not env.collisions.any()
        assert not env.bumped.any()
        assert (env.pos == planned).all()
        worlds.settle()
        yield env.pos.copy()


@pytest.mark.parametrize("layout", ["shelves", "random", "open"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_worlds_do_just_what_was_planned(world, layout):
    for seed, planner in enumerate(("hungarian", "nearest", "random")):
        worlds = worlds_of(world, 6, seed, planner, layout=layout, density=0.3)
        assert len(list(positions(worlds, PIBTExecutor(worlds), 130))) == 130
        assert worlds.take_episodes().count > 6


@pytest.mark.parametrize("agents", [1, 20, 40])
def test_few_agents_and_crowds(agents):
    worlds = worlds_of("warehouse", 4, num_agents=agents, size=10, num_packages=2, layout="open")
    for _ in positions(worlds, PIBTExecutor(worlds), 120):
        pass
    episodes = worlds.take_episodes()
    assert episodes.success == episodes.count > 0


def test_robots_share_a_dead_end(tmp_path):
    # The zone lies at the end of a corridor: who has delivered must get out before the next can come in.
    rows = ["A.P.@@@@@@@@", "....@@@@@@@@", "A.P........Z", "....@@@@@@@@"]
    path = tmp_path / "dead-end.map"
    path.write_text("type octile\nheight 4\nwidth 12\nmap\n" + "\n".join(rows) + "\n")
    worlds = worlds_of("warehouse", 10, size=12, map=path, num_agents=2, num_packages=2, limit=200)
    for _ in positions(worlds, PIBTExecutor(worlds), 400):
        pass
    episodes = worlds.take_episodes()
    assert episodes.success == episodes.count > 20


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_does_not_depend_on_its_neighbours(world):
    many, one = worlds_of(world, 5), worlds_of(world, 1)
    few = positions(one, PIBTExecutor(one), 120)
    for crowd, alone in zip(positions(many, PIBTExecutor(many), 120), few, strict=True):
        assert (crowd[0] == alone[0]).all()


def test_priorities_in_the_worlds():
    worlds = worlds_of("warehouse", 8, num_agents=3, layout="open")
    executor, tracker = PIBTExecutor(worlds), worlds.tracker
    assert tracker is not None
    begun = ended = grown = 0
    for _ in range(150):
        before = executor.waited.copy()
        begins, idle = worlds.begins.copy(), tracker.kind <= 0
        over = (tracker.outcome == Outcome.REACHED) | (tracker.outcome == Outcome.FAILED)
        there = np.take_along_axis(tracker.field, worlds.env.pos[..., None].astype(int), 2)[..., 0] == 0
        moves = executor.act(worlds)
        worlds.advance(moves)
        assert (executor.waited[idle] == -1).all()
        assert (executor.waited[~idle & (begins[:, None] | over)] == 0).all()
        rest = ~idle & ~begins[:, None] & ~over & ~there & (before >= 0)
        assert (executor.waited[rest] == before[rest] + 1).all()
        begun += int(begins.sum())
        ended += int((tracker.outcome == Outcome.REACHED).sum())
        grown += int(rest.sum())
        worlds.settle()
    assert min(begun - 8, ended, grown) > 10


def test_greedy_changes_nothing_and_the_seed_something():
    def walk(seed: int, greedy: bool) -> NDArray[np.int32]:
        worlds = worlds_of("warehouse", 3, layout="open")
        executor = PIBTExecutor(worlds, seed)
        for _ in range(8):
            worlds.advance(executor.act(worlds, greedy=greedy))
            worlds.settle()
        return worlds.env.pos.copy()

    assert (walk(0, True) == walk(0, False)).all()
    assert (walk(0, True) != walk(1, True)).any()


def test_a_flat_team_gets_one_line():
    with pytest.raises(EchelonError, match="needs a planner"):
        PIBTExecutor(worlds_of("warehouse", 1, planner=None))
