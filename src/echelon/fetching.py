"""A language model on this machine before a command needs it."""

from __future__ import annotations

from pathlib import Path

from echelon.configs import RunConfig
from echelon.methods import method

__all__ = ["ensure_model", "fetch"]


def ensure_model(run: RunConfig) -> None:
    """Fetch the model that a run needs, if it isn't there: once, with a progress bar."""
    from echelon.envs import env_name, make
    from echelon.llm import ModelStore
    from echelon.planners import make_rule_planner

    if not method(run.method).needs_model(run.planner):
        return
    spec = run.model_spec
    if not spec.startswith("hf:") and ModelStore().status(spec).state == "absent":
        # Settings that can't be used are told before a hundred megabytes come.
        make(env_name(run.env), run.env, num_envs=1)
        for planner in (run.planner, run.cheap_planner):
            if planner is not None and planner != "llm" and not planner.startswith("llm:"):
                make_rule_planner(planner)
        fetch(spec, force=False, source=None)


def fetch(name: str, *, force: bool, source: Path | None) -> None:
    """Fetch a model by its name, with a progress bar."""
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

        path = ModelStore().fetch(name, progress, force, source)
    console.print(f"model {name} is ready in {path}")
