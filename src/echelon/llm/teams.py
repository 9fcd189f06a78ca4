"""Teams of language models that learn: one model for all, one base with an adapter for each, or a model for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from echelon._files import atomic_directory, atomic_write_json, read_json
from echelon.errors import EchelonError, unknown_name
from echelon.llm.token_policy import TokenPolicy
from echelon.rng import spawn_keys

__all__ = ["Share", "load_team", "load_team_state", "num_held", "save_team", "saved_team", "team_state"]

Share = Literal["weights", "adapters", "separate"]

_SEEDS = 61  # the stream of adapters' seeds
_FILE = "team.json"


def load_team(
    specs: str | Sequence[str], *, agents: int, share: Share = "adapters", seed: int = 0, **settings: Any
) -> list[TokenPolicy]:
    """Load a policy for each agent.

    Args:
        specs: one model or adapter for all agents, or one for each; as for `TokenPolicy.load`, or `saved_team`'s.
        agents: how many there are, at least 1.
        share: "weights": one policy, N times in the list, learns from all agents' replies. "adapters": one frozen
            base in memory, and beside it for each agent an adapter, with its own optimiser and reference; specs are
            that base or adapters on it. "separate": a model for each agent, also of different families and with
            different tokenizers.
        seed: of LoRA's first matrices. The first agent's is this one itself, so a team of one is what
            `TokenPolicy.load` gives; each other one has its own, drawn from this one.
        settings: as for `TokenPolicy.load`, the same for all.

    Returns:
        N policies. Those that are not one and the same have their agent in `name`, and so in their errors:
        "smollm2-135m (agent 1)".

    Raises:
        EchelonError: as `TokenPolicy.load`; numbers of specs and agents that don't fit; several specs to share
            weights; adapters on different bases, or beside a base that learns itself (`adapt="full"`).
    """
    if share not in get_args(Share):
        raise unknown_name("share", share, get_args(Share))
    if agents < 1:
        raise EchelonError(f"agents is {agents}: a team has at least 1")
    given = [specs] if isinstance(specs, str) else list(specs)
    if len(given) not in (1, agents):
        raise EchelonError(f"{len(given)} models for {agents} agents: give one for all, or one for each")
    named = given * agents if len(given) == 1 else given
    if share == "weights":
        if len(set(named)) > 1:
            raise EchelonError(f"agents that share weights have one model, not {' and '.join(sorted(set(named)))}")
        return [TokenPolicy.load(named[0], seed=seed, **settings)] * agents
    if share == "adapters" and settings.get("adapt", "lora") != "lora":
        raise EchelonError(f"share 'adapters' needs adapt 'lora', not {settings['adapt']!r}: share weights or separate")
    # torch's generator takes 32 bits of a seed.
    seeds = [seed, *(int(key) >> 32 for key in spawn_keys(seed, (_SEEDS,), agents)[1:])]
    team: list[TokenPolicy] = []
    for agent, (spec, own) in enumerate(zip(named, seeds, strict=True)):
        beside = team[0] if share == "adapters" and team else None
        team.append(TokenPolicy.load(spec, seed=own, beside=beside, **settings))
        if agents > 1:
            team[-1].name = f"{spec} (agent {agent})"
    return team


def num_held(policies: Sequence[TokenPolicy]) -> int:
    """How many numbers a team keeps as weights: a shared base once, and the references' copies."""
    held: dict[int, int] = {}
    for policy in policies:
        held |= policy.held()
    return sum(held.values())


def save_team(policies: Sequence[TokenPolicy], folder: Path, *, base: str | None = None) -> None:
    """Write what a team has learnt into `folder`, whole or not at all; what stands there is replaced.

    Each policy gets a folder `agent<i>` of its first agent i, fit for `hf:<folder>`: a LoRA adapter or a whole model.
    `saved_team` reads from team.json which agent has which.

    Args:
        policies: one an agent; the same one several times is written once.
        folder: where to.
        base: what adapters call their base model; default: what was loaded.

    Raises:
        EchelonError: the place can't be written.
    """
    places = _places(policies)
    # Those who share a base have their adapters with it, whatever they are called.
    alone = num_held(policies) == sum(policy.num_held for policy in places)
    share = "weights" if len(places) == 1 < len(policies) else "separate" if alone else "adapters"
    with atomic_directory(folder) as temp:
        for policy, place in places.items():
            policy.save(temp / place, base=base)
        atomic_write_json(temp / _FILE, {"agents": [places[policy] for policy in policies], "share": share})


def saved_team(folder: Path) -> tuple[list[str], Share]:
    """The specs of a team that `save_team` wrote, one an agent, and what its agents share: for `load_team`.

    Raises:
        EchelonError: there is no such team, or its files are damaged.
    """
    told = read_json(folder / _FILE, "team")
    try:
        names, share = list(map(str, told["agents"])), told["share"]
    except (KeyError, TypeError) as error:
        raise EchelonError(f"{folder / _FILE} is damaged: it does not say who has which folder") from error
    if share not in get_args(Share):
        raise unknown_name(f"share in {folder / _FILE}", share, get_args(Share))
    if lacking := [name for name in names if not (folder / name).is_dir()]:
        raise EchelonError(f"the team in {folder} is not whole: there is no folder {lacking[0]}")
    return [f"hf:{folder / name}" for name in names], share


def team_state(policies: Sequence[TokenPolicy]) -> dict[str, Tensor]:
    """All that decides what a team learns next, as copies: each policy's state once, as `agent<i>.…` of its first."""
    return {
        f"{place}.{name}": tensor
        for policy, place in _places(policies).items()
        for name, tensor in policy.state_dict().items()
    }


def load_team_state(policies: Sequence[TokenPolicy], state: Mapping[str, Tensor]) -> None:
    """Put back what `team_state` gave of such a team.

    Raises:
        EchelonError: it is of another team or of other settings; nothing has changed then.
    """
    places = _places(policies)
    if {name.partition(".")[0] for name in state} != set(places.values()):
        raise EchelonError("the saved state is of a team of another size, or whose agents share something else")
    before = {policy: policy.state_dict() for policy in places}
    try:
        for policy, place in places.items():
            own = {name.partition(".")[2]: x for name, x in state.items() if name.partition(".")[0] == place}
            policy.load_state_dict(own)
    except EchelonError:
        for policy, own in before.items():
            policy.load_state_dict(own)
        raise


def _places(policies: Sequence[TokenPolicy]) -> dict[TokenPolicy, str]:
    """What each policy is called in files and states, by the first agent that has it."""
    found: dict[TokenPolicy, str] = {}
    for agent, policy in enumerate(policies):
        found.setdefault(policy, f"agent{agent}")
    return found
