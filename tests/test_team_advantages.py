"""Returns over trees of joint samples and advantages within a group: golden vectors, definitions, and bad trees."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from echelon.advantages import TeamMode, team_advantages, team_tree_returns

Array = NDArray[np.float64]
NAN = float("nan")
MODES: tuple[TeamMode, ...] = get_args(TeamMode)
NUMBERS = st.floats(-50, 50).map(lambda x: round(x, 3))


# -- returns ---------------------------------------------------------------------------------------


def test_the_golden_tree_by_level() -> None:
    """Root [1, 3], children [2, 4] and [0, 1]: 1 + 3 and 3 + 0.5."""
    root, below = team_tree_returns([[1, 3], [[2, 4], [0, 1]]])
    assert root.tolist() == [4.0, 3.5] and below.tolist() == [[2, 4], [0, 1]]
    assert root.dtype == below.dtype == np.float64
    half = team_tree_returns([[1, 3], [[2, 4], [0, 1]]], discount=0.5)
    assert half[0].tolist() == [2.5, 3.25]


def test_the_golden_tree_by_node() -> None:
    pair = team_tree_returns(([1, 3], [([2, 4], None), ([0, 1], [])]))
    assert isinstance(pair, tuple) and pair[0].tolist() == [4.0, 3.5]
    assert [child[0].tolist() for child in pair[1]] == [[2, 4], [0, 1]]
    assert pair[1][0][1] is None and pair[1][1][1] == []
    plain = team_tree_returns({"rewards": [1, 3], "children": [{"rewards": [2, 4]}, [0, 1]]})
    assert plain["rewards"].tolist() == [4.0, 3.5]
    assert plain["children"][0]["rewards"].tolist() == [2, 4] and plain["children"][1].tolist() == [0, 1]


def test_the_golden_advantages_of_that_tree() -> None:
    root, below = team_tree_returns([[1, 3], [[2, 4], [0, 1]]])
    assert team_advantages(root).tolist() == [[0.25, -0.25]]
    assert [team_advantages(child)[0].tolist() for child in below] == [[-1, 1], [-0.5, 0.5]]


def test_where_nothing_follows_a_joint_action_is_worth_its_reward() -> None:
    wanted = [1 + 0.5 * 3, 3]
    assert team_tree_returns([[1, 3], [[2, 4], [NAN, NAN]]], discount=0.5)[0].tolist() == wanted
    assert np.isnan(team_tree_returns([[1, 3], [[2, 4], [NAN, NAN]]])[1][1]).all()
    assert team_tree_returns(([1, 3], [[2, 4], None]), discount=0.5)[0].tolist() == wanted
    assert team_tree_returns(np.array([1, 3])).tolist() == [1, 3]
    assert team_tree_returns([[1, 3]])[0].tolist() == [1, 3]
    assert team_tree_returns([[1, 3], []])[0].tolist() == [1, 3]


def test_three_turns_discount_twice() -> None:
    tree = ([1, 0], [([0, 2], [[4, 4], None]), None])
    out = team_tree_returns(tree, discount=0.5)
    # Turn 1: 0 + 0.5 * 4 = 2 and 2; its mean is 2: turn 0 is 1 + 0.5 * 2.
    assert out[0].tolist() == [2, 0] and out[1][0][0].tolist() == [2, 2]


def test_cross_children_are_in_the_order_of_their_joint_actions() -> None:
    """Two agents, G = 2: 4 joint actions; only (1, 0), the third, goes on."""
    leaf = np.array([[1.0, 2], [3, 10]])
    root = np.array([[0.0, 1], [2, 3]])
    by_node = team_tree_returns((root, [None, None, leaf, None]), discount=0.5)
    assert by_node[0].tolist() == [[0, 1], [4, 3]]
    level = np.full((2, 2, 2, 2), NAN)
    level[1, 0] = leaf
    by_level = team_tree_returns([root, level], discount=0.5)
    assert by_level[0].tolist() == by_node[0].tolist()
    np.testing.assert_array_equal(by_level[1], level)


@dataclass
class Node:
    rewards: Array
    children: list[Node | None] = field(default_factory=list)


@st.composite
def trees(draw: st.DrawFn) -> Node:
    """A tree of up to three turns, some of whose branches end early."""
    group, agents = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    shape = (group,) * agents

    def node(turns: int) -> Node:
        rewards = draw(hnp.arrays(np.float64, shape, elements=NUMBERS))
        more = turns > 1 and draw(st.booleans())
        children = [node(turns - 1) if draw(st.booleans()) else None for _ in range(group**agents)] if more else []
        return Node(rewards, children)

    return node(draw(st.integers(1, 3 if agents == 1 else 2)))


def by_definition(node: Node, discount: float) -> Array:
    out = node.rewards.copy()
    for j, child in enumerate(node.children):
        if child is not None:
            out.flat[j] += discount * by_definition(child, discount).mean()
    return out


def levels_of(root: Node) -> list[Array]:
    """The same tree, by level."""
    shape, levels, row = root.rewards.shape, [root.rewards], [root]
    nodes: list[Node | None] = list(row)
    while True:
        below = [
            child
            for node in nodes
            for child in (node.children if node and node.children else [None] * root.rewards.size)
        ]
        if all(child is None for child in below):
            return levels
        rows = [np.full(shape, NAN) if child is None else child.rewards for child in below]
        levels.append(np.stack(rows).reshape(shape * (len(levels) + 1)))
        nodes = below


@settings(max_examples=150)
@given(trees(), st.floats(0, 1))
def test_returns_are_their_definition_in_both_forms(tree: Node, discount: float) -> None:
    wanted = by_definition(tree, discount)
    np.testing.assert_allclose(team_tree_returns(tree, discount=discount)[0], wanted, atol=1e-10)
    np.testing.assert_allclose(team_tree_returns(levels_of(tree), discount=discount)[0], wanted, atol=1e-10)
    np.testing.assert_array_equal(team_tree_returns(tree, discount=0)[0], tree.rewards)


@settings(max_examples=60)
@given(trees(), st.floats(0, 1), st.floats(-3, 3), st.integers(0, 2**32 - 1))
def test_returns_are_linear_in_rewards(tree: Node, discount: float, factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = levels_of(tree)
    second = [np.where(np.isnan(x), NAN, rng.normal(size=x.shape)) for x in first]
    one, other = (team_tree_returns(levels, discount=discount) for levels in (first, second))
    both = team_tree_returns([a + factor * b for a, b in zip(first, second, strict=True)], discount=discount)
    for a, b, c in zip(one, other, both, strict=True):
        np.testing.assert_allclose(c, a + factor * b, atol=1e-9)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ([[1, 3], [[2, 4], [0, NAN]]], "level 1 has rewards that aren't finite"),
        ([[1, NAN]], "root's rewards aren't finite"),
        ([[1, 3], [[NAN, NAN], [1, 2]], [[[5, 5], [NAN, NAN]], [[NAN, NAN], [NAN, NAN]]]], "parents there aren't"),
        ([[1, float("inf")]], "level 0 has rewards that aren't finite"),
        (([1, 3], [[2, 4]]), "1 children for 2 joint actions"),
        (([1, 3], [([2, 4, 5], None), None]), "like the root's"),
        (([1, 3], [([2, NAN], None), None]), "aren't finite"),
        ([[1, 3], [2, 4]], "a tree is a list of levels or a node"),
        ("nothing", "a tree is a list of levels or a node"),
        ([], "a tree is a list of levels or a node"),
        ({"rewards": 3}, "must be an array"),
    ],
)
def test_bad_trees_are_named(tree: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        team_tree_returns(tree)


def test_a_discount_out_of_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="discount must be 0 to 1"):
        team_tree_returns([[1, 2]], discount=1.1)


# -- advantages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("mean", [-1.5, -0.5, -0.5, 2.5]),
        ("raw", [1, 2, 2, 5]),
        ("max", [-4, -3, -3, 0]),
        ("rloo", [-2, -2 / 3, -2 / 3, 10 / 3]),
    ],
)
def test_the_golden_modes(mode: TeamMode, wanted: list[float]) -> None:
    found = team_advantages([1, 2, 2, 5], mode=mode)
    assert found.shape == (1, 4) and found.dtype == np.float64
    np.testing.assert_allclose(found[0], wanted, rtol=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_normalised_the_golden_modes_are_one_and_the_same_and_say_so(mode: TeamMode) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = team_advantages([1, 2, 2, 5], mode=mode, normalize=True)
    np.testing.assert_allclose(found, [[-1, -1 / 3, -1 / 3, 5 / 3]], rtol=1e-12)
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(told) == (mode != "mean") and all("give the same advantages" in line for line in told)


def test_cross_scores_are_sums_over_what_the_others_wrote() -> None:
    returns = np.array([[1.0, 2], [3, 5]])
    raw = team_advantages(returns, mode="raw", joint="cross")
    assert raw.tolist() == [[3, 8], [4, 7]]
    assert team_advantages(returns, joint="cross").tolist() == [[-2.5, 2.5], [-1.5, 1.5]]
    three = np.arange(27.0).reshape(3, 3, 3)
    found = team_advantages(three, mode="raw", joint="cross")
    for agent, c in itertools.product(range(3), range(3)):
        assert found[agent, c] == sum(three[j] for j in np.ndindex(3, 3, 3) if j[agent] == c)


def test_aligned_agents_are_all_alike() -> None:
    found = team_advantages([1, 2, 2, 5], agents=3)
    assert found.shape == (3, 4) and (found == [-1.5, -0.5, -0.5, 2.5]).all()


@pytest.mark.parametrize("mode", MODES)
def test_equal_returns_teach_nothing_but_raw_ones(mode: TeamMode) -> None:
    """Exactly nothing, whatever rounding makes of the mean of 0.1, also normalised."""
    found = team_advantages([0.1] * 7, mode=mode)
    assert (found == (0.1 if mode == "raw" else 0)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (team_advantages([0.1] * 7, mode=mode, normalize=True) == 0).all()


GROUPS = st.integers(2, 6).flatmap(lambda n: hnp.arrays(np.float64, n, elements=NUMBERS))
CROSS = st.tuples(st.integers(2, 3), st.integers(1, 3)).flatmap(
    lambda s: hnp.arrays(np.float64, (s[0],) * s[1], elements=NUMBERS)
)


@settings(max_examples=100)
@given(CROSS)
def test_what_is_centred_has_mean_zero_and_the_best_has_none_above(returns: Array) -> None:
    for mode in ("mean", "rloo"):
        np.testing.assert_allclose(team_advantages(returns, mode=mode, joint="cross").mean(1), 0, atol=1e-9)
    assert (team_advantages(returns, mode="max", joint="cross").max(1) == 0).all()


@settings(max_examples=100)
@given(CROSS)
def test_normalised_all_modes_coincide(returns: Array) -> None:
    """Wherever scores differ by more than rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [team_advantages(returns, mode=mode, normalize=True, joint="cross") for mode in MODES]
    clear = np.ptp(team_advantages(returns, mode="raw", joint="cross"), axis=1) > 1e-4
    for one in found[1:]:
        np.testing.assert_allclose(one[clear], found[0][clear], atol=1e-6)
    np.testing.assert_allclose(found[0][clear].std(1), 1, rtol=1e-6)


@settings(max_examples=100)
@given(GROUPS, st.sampled_from(MODES), st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_replies_does_not_matter(returns: Array, mode: TeamMode, normalize: bool, random: Any) -> None:
    order = list(range(len(returns)))
    random.shuffle(order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = team_advantages(returns, mode=mode, normalize=normalize)
        moved = team_advantages(returns[order], mode=mode, normalize=normalize)
    np.testing.assert_allclose(moved, plain[:, order], atol=1e-6)


@settings(max_examples=60)
@given(GROUPS, st.sampled_from(MODES))
def test_a_team_of_one_makes_the_same_of_both_kinds_of_joint_actions(returns: Array, mode: TeamMode) -> None:
    crossed = team_advantages(returns, mode=mode, joint="cross")
    np.testing.assert_array_equal(crossed, team_advantages(returns, mode=mode))


@pytest.mark.parametrize(
    ("returns", "options", "line"),
    [
        ([1.0], {"mode": "rloo"}, "at least two"),
        ([1.0, 2], {"mode": "median"}, "mode must be one of"),
        ([1.0, 2], {"joint": "crossed"}, "joint must be one of"),
        ([[1.0, 2], [3, 4]], {}, "aligned returns must be"),
        ([[1.0, 2, 3], [3, 4, 5]], {"joint": "cross"}, "cross returns must be"),
        ([], {}, "aligned returns must be"),
        (3.0, {"joint": "cross"}, "cross returns must be"),
        ([1.0, NAN], {}, "aren't finite"),
    ],
)
def test_bad_returns_are_refused(returns: Any, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        team_advantages(returns, **options)
