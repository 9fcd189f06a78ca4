"""The command `echelon train-planner`: a planner trained by itself, on scenes of many worlds and sizes."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from echelon.errors import EchelonError, unknown_name
from echelon.fetching import ensure_local
from echelon.flags import parse, peek

__all__ = ["train_planner"]


@dataclass(frozen=True)
class _Own:
    """Train a planner by itself: imitation of a good one, then reinforcement, on random scenes of many sizes.

    Nobody else learns: classical executors (PIBT) carry its plans out. Presets: default is the recipe of the shipped
    planner, imitation leaves reinforcement out, small takes minutes. Other flags go over the preset's settings. The
    same command with the same --out goes on where it stopped, bit for bit.
    """

    preset: str = "default"
    """default, imitation or small."""
    out: Path | None = None
    """The training's folder; default: runs/planner-<preset>-seed<seed>."""


def train_planner(args: list[str]) -> int:
    """`echelon train-planner [--preset NAME] [OPTIONS]`."""
    from echelon.console import Stopper, Watch, console
    from echelon.planner_training import PRESETS, PlannerConfig, PlannerTrainer

    name = peek(args, "--preset") or "default"
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    plain = PlannerConfig(**PRESETS[name])
    learners = {table: _named(getattr(plain, table), table) for table in ("himac", "hiper")}
    fields = [(table, type(settings), dataclasses.field(default=settings)) for table, settings in learners.items()]
    # The help tells the command's own flags first.
    cls = cast(Any, dataclasses.make_dataclass("Flags", fields, bases=(PlannerConfig, _Own), frozen=True))
    cls.__doc__ = _Own.__doc__
    flags = parse("train-planner", cls, args, cls(**PRESETS[name], preset=name))
    given = {f.name: getattr(flags, f.name) for f in dataclasses.fields(PlannerConfig)}
    given |= {table: type(getattr(plain, table))(**vars(given[table])) for table in learners}
    config = PlannerConfig(**given)
    folder = flags.out or Path("runs") / f"planner-{name}-seed{config.seed}"
    if config.model.startswith(("openai:", "gguf:")):
        raise EchelonError(f"model {config.model} can't learn here: name one that torch loads (a known name or hf:…)")
    ensure_local(config.model)
    trainer = PlannerTrainer(config, folder)
    totals = {"imitation": config.imitation, "reinforcement": config.iterations}
    if trainer.stage in totals:
        console.print(f"planner in {folder}: {trainer.stage}, {trainer.step} of {totals[trainer.stage]} done")
    stopper = Stopper()
    with stopper.listening(), Watch() as watch:

        def told(line: dict[str, Any]) -> None:
            stage, step = line["stage"], line["step"]
            if stage == "imitation":
                info = f"updates, {line['accuracy']:.2f} as {config.teacher} does, loss {line['loss']:.3f}"
            else:
                watch.end("imitation")
                info = f"iterations, TSR {line['tsr']:.2f}, makespan {line['makespan']:.0f} steps"
            watch.show(stage, step, totals[stage], f"{info}, {line['seconds']:,.0f} s")

        if trainer.stage in totals:
            doing = f"watching {config.teacher}" if trainer.stage == "imitation" else "playing"
            watch.show(trainer.stage, trainer.step, totals[trainer.stage], doing)
        finished = trainer.run(told, stopper)
    if not finished:
        again = [*args, *([] if flags.out else ["--out", str(folder)])]
        console.print(f"stopped in {trainer.stage} at {trainer.step}; go on with:")
        console.print(f"  {shlex.join(['echelon', 'train-planner', *again])}")
        return 128 + stopper.signal
    planner = folder / "planner"
    if not planner.is_dir():  # killed between the last checkpoint and this
        trainer.save_planner(planner)
    console.print(f"done in {trainer.seconds:,.0f} s; to plan with it, or to train executors under it:")
    for command in ("plan", "train"):
        console.print(f"  {shlex.join(['echelon', command, '--model', f'hf:{planner}'])}")
    print(planner)
    return 0


def _named(settings: Any, table: str) -> Any:
    """A learner's settings, of a class whose errors name them as this command's flags do: here is no `learner`."""
    cls = type(settings)

    def check(self: Any, *rules: tuple[str, bool, str]) -> None:
        try:
            cls._check(self, *rules)
        except EchelonError as error:
            raise EchelonError(str(error).replace("learner.", f"{table}.", 1)) from None

    return type(cls.__name__, (cls,), {"_check": check})(**vars(settings))
