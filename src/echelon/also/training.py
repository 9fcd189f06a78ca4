"""The run whose shaping grows with it: segments, branches, verdicts, and the account of all of them.

A run is a tree of segments. Each is an ordinary run of the base method in a folder of its own, trained and judged by
the study engine: from the beginning, or as a fork of another segment's last checkpoint. The mainline is a path in that
tree. What decides is in `account.json` before it is acted on, and a segment that is done stays done: the run goes on,
after whatever ended it, by doing everything again that isn't.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echelon._files import (
    atomic_directory,
    atomic_write_json,
    atomic_write_text,
    only_writer,
    read_json,
    remove_leftovers,
)
from echelon.also.configs import AlsoConfig, also_to_toml, read_also_toml
from echelon.building import writer_of
from echelon.checkpoints import checkpoints_of, load_checkpoint
from echelon.envs import env_name, make
from echelon.errors import EchelonError
from echelon.evaluation.behaviour import record_behaviour
from echelon.evaluation.protocol import Protocol
from echelon.forking import fork_run
from echelon.rng import spawn_keys
from echelon.runs import versions
from echelon.shaping import (
    Candidate,
    CriticCard,
    Proposed,
    Proposer,
    RecordedProposer,
    ShapingConfig,
    Situation,
    Summary,
    Trial,
    Verdict,
    evidence,
    gate,
    make_proposer,
    needs_model,
    reference_leads,
    score_lead,
    summarise,
    term_set,
)
from echelon.shaping.situation import fresh_id
from echelon.studies.backends import PoolBackend, cores
from echelon.studies.engine import Matrix, do_runs, kept_result
from echelon.studies.spec import Study, StudyRun

__all__ = ["ACCOUNT", "AlsoProgress", "AlsoTrainer"]

ACCOUNT = "account.json"
"""The file of a run's folder with every diagnosis, proposal, branch and verdict."""
FORMAT = 1

_WORK = "work"  # the study engine's folder
_NO_CHANGE, _REFERENCE = "no change", "reference"
_BEHAVIOUR = 64  # streams of the worlds in which behaviour is recorded: this one and those above
_FRESH = 65  # streams of root seeds


@dataclass(frozen=True)
class AlsoProgress:
    """Where a run is, for whoever shows it.

    Attributes:
        spent, steps: environment steps spent, those of branches counted, and wanted.
        stage: what is being done, in words.
        running: segments under way.
        evaluation: the mainline's newest evaluation (`step`, `tsr`, `task_return`, …), or None.
        news: what happened since the last call, in words.
    """

    spent: int
    steps: int
    stage: str
    running: int = 0
    evaluation: Mapping[str, Any] | None = None
    news: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Segment:
    """A stretch of training: where it begins, under which shaping, and how far it goes."""

    id: str
    source: str | None
    begin: int
    until: int
    shaping: ShapingConfig | None
    stream: int = 0


@dataclass(frozen=True)
class _Grown:
    """What became of a segment: its evaluations after where it began, and its last step; or what went wrong."""

    segment: _Segment
    curve: list[dict[str, Any]]
    end: int
    problem: str | None = None

    @property
    def steps(self) -> int:
        return self.end - self.segment.begin


@dataclass
class _Mainline:
    """Where the mainline stands."""

    segment: str | None = None
    step: int = 0
    spent: int = 0
    shaping: ShapingConfig | None = None
    first: ShapingConfig | None = None  # the first shaping that was promoted
    fresh: bool = False  # this stage's proposals are tried from the beginning
    trials: list[Trial] = field(default_factory=list)
    reference: _Grown | None = None
    had_reference: bool = False


class _StoppedError(Exception):
    """The caller wants no more."""


class AlsoTrainer:
    """One run of LLM-ALSO or of one of its ablations and controls.

    Attributes:
        config: the run's config.
        folder: where it lives: `config.toml`, `account.json`, `metrics.jsonl` (of the mainline), `main/` (what was
            trained, as an ordinary run's folder), and `work/runs/` with all segments.
        account: what is in `account.json`.
    """

    def __init__(self, config: AlsoConfig, folder: Path, *, proposer: Proposer | None = None) -> None:
        """Prepare a new run.

        Args:
            config: the run.
            folder: where it is to live.
            proposer: one of your own in the place of `config.proposer`.

        Raises:
            EchelonError: there is a run in `folder`, or a setting, map or proposer can't be used.
        """
        _require_free(folder)
        self._build(config, folder, proposer)
        with only_writer(folder):
            _require_free(folder)
            atomic_write_json(folder / "versions.json", versions())
            # Files that it imports are found from anywhere.
            imports = tuple(str(Path(name).resolve()) if name.endswith(".py") else name for name in config.imports)
            told = dataclasses.replace(config, imports=imports, proposer=_resolved(config.proposer))
            atomic_write_text(folder / "config.toml", also_to_toml(told))

    @classmethod
    def resume(cls, folder: Path, *, proposer: Proposer | None = None) -> AlsoTrainer:
        """A run as it was left, also in the middle of a round of branches.

        Args:
            folder: the run.
            proposer: the one that it began with, if that wasn't `config.proposer`.

        Raises:
            EchelonError: no run there, or damaged files.
        """
        if not (folder / "config.toml").exists():
            raise EchelonError(f"{folder} is no run: it has no config.toml")
        config = read_also_toml(folder / "config.toml")
        trainer = cls.__new__(cls)
        trainer._build(config, folder, proposer)
        trainer._remember()
        return trainer

    def _remember(self) -> None:
        """Take up what the account says was decided."""
        path = self.folder / ACCOUNT
        if not path.exists():
            return
        saved = read_json(path, "account")
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise EchelonError(f"{path} isn't of format {FORMAT}: begin anew in another folder")
        try:
            self._decided.update({stage["name"]: stage for stage in saved["stages"]})
        except (KeyError, TypeError):
            raise EchelonError(f"account {path} is damaged: begin anew in another folder") from None
        if isinstance(self.proposer, RecordedProposer):
            self.proposer.resume(saved)

    def _build(self, config: AlsoConfig, folder: Path, proposer: Proposer | None) -> None:
        self.config, self.folder = config, folder
        self.terms = term_set(env_name(config.env))
        env = make(self.terms.world, config.env, num_envs=1)
        self.best_return = float(env.goals)
        self.proposer = None if config.kind.stages == "none" else proposer or self._proposer()
        self.slots = config.workers or cores()
        self.branch = max(1, round(config.also.branch * config.steps))
        every = max(1, self.branch // config.also.evaluations)
        self._study = Study(
            name="also",
            imports=config.imports,
            protocol=Protocol(every=every, episodes=config.also.episodes, final_episodes=1),
        )
        self._decided: dict[str, dict[str, Any]] = {}
        self.account: dict[str, Any] = {
            "format": FORMAT, "method": config.method, "base": config.base, "environment": self.terms.world,
            "seed": config.seed, "steps": config.steps, "best_return": self.best_return,
            "proposer": "" if self.proposer is None else self.proposer.name, "vocabulary": self.terms.vocabulary(),
            "stages": [], "mainline": [], "segments": [], "final": None,
        }  # fmt: skip

    def _proposer(self) -> Proposer:
        c = self.config
        writer = writer_of(c.proposer, c.server, c.gguf) if needs_model(c.proposer) else None
        return make_proposer(c.proposer, writer, seed=c.seed)

    # -- the loop ------------------------------------------------------------------------------

    def run(
        self,
        report: Callable[[AlsoProgress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Spend the configured number of steps; what was done before is not done again.

        Args:
            report: called about twice a second.
            should_stop: asked as often; segments under way then save a checkpoint, and it returns.

        Returns:
            Whether all steps are spent.

        Raises:
            EchelonError: the mainline can't be trained (it diverged, a setting can't be), or files are damaged.
            StorageError: the disk is full or can't be written; what is done is kept.
        """
        self._report, self._should_stop = report, should_stop
        with only_writer(self.folder):
            remove_leftovers(self.folder)
            self._remember()  # anew: another process may have gone on since
            for name in ("stages", "mainline", "segments"):
                self.account[name] = []
            self._seen: list[str] = []
            self._at = _Mainline()
            self._save()  # there is an account from the first moment on
            self._backend = PoolBackend(self.slots, self.folder / "workers.log")
            try:
                self._grow()
            except _StoppedError:
                return False
            finally:
                self._backend.close()
                self._publish()
        return True

    def _grow(self) -> None:
        c, at = self.config, self._at
        if c.kind.start == "grid":
            self._grid()
        at.shaping = at.shaping or c.start
        shares = {"all": c.also.checkpoints, "first": c.also.checkpoints[:1], "none": ()}[c.kind.stages]
        for k, share in enumerate(shares):
            begin = max(1, round(share * c.steps))  # there must be a checkpoint to fork from
            self._advance(f"main-{k}", begin)
            # From the beginning only where that fits: late in a run it would cost more than is left.
            at.fresh = c.also.fresh and at.shaping is None and self._fits(fresh=True)
            if c.kind.branches and not self._fits(fresh=at.fresh):
                self._tell(f"C{k}: not enough steps are left for its branches")
                break
            self._stage(f"C{k}", k)
        self._advance(f"main-{len(shares)}", c.steps)
        last = self.account["mainline"][-1]
        config = None if at.shaping is None else at.shaping.to_json()
        self.account["final"] = {"config": config, "steps": at.step, "spent": at.spent,
                                 "tsr": last["tsr"], "task_return": last["task_return"]}  # fmt: skip
        self._decided.clear()
        self._save()

    def _fits(self, *, fresh: bool) -> bool:
        """Whether enough steps are left for a stage's branches, but for what rounding to whole rollouts may add."""
        also, at = self.config.also, self._at
        each = self.branch + (at.step if fresh else 0)
        reference = 0 if at.reference is None else at.step + self.branch - at.reference.end
        cost = also.seeds * (self.branch + also.candidates * also.rounds * each) + reference
        return at.spent + cost <= self.config.steps + self._study.protocol.every // 2

    def _advance(self, name: str, spent: int) -> None:
        """Train the mainline on until so many steps are spent."""
        at = self._at
        if at.spent >= spent:
            return
        until = at.step + spent - at.spent
        segment = _Segment(name, at.segment, at.step, until, at.shaping)
        # Without it nothing can go on: what failed last time (no memory, say) is tried again.
        (grown,) = self._train([segment], f"{self._words()}, mainline", retry_failed=True)
        if grown.problem is not None:
            raise EchelonError(f"segment {name} of {self.folder} failed: {grown.problem}")
        first = at.segment is None
        self._follow(grown, "the beginning" if first else "the mainline goes on", at.spent, grown.steps)
        self._prune({name})

    def _follow(self, grown: _Grown, why: str, begin: int, cost: int, *, control: _Grown | None = None) -> None:
        """Let the mainline go on at the end of a segment.

        Args:
            grown: the segment.
            why: for the account.
            begin: steps spent when it began.
            cost: steps spent since then, on it and on what was tried beside it.
            control: what the mainline would have been until the segment was chosen; default: the segment itself.
        """
        at, shown = self._at, control or grown
        for point in shown.curve:
            share = (point["step"] - shown.segment.begin) / max(1, shown.steps)
            self._point(point, begin + round(share * cost), shown.segment)
        at.segment, at.step, at.spent, at.shaping = grown.segment.id, grown.end, begin + cost, grown.segment.shaping
        if control is not None and grown is not control:
            self._point(grown.curve[-1], at.spent, grown.segment)
        entry = {"run": self._place(grown.segment.id), "from": grown.segment.begin, "to": grown.end, "why": why}
        self.account["segments"].append(entry | {"config": _json(grown.segment.shaping)})
        self._save()

    def _point(self, point: Mapping[str, Any], spent: int, segment: _Segment) -> None:
        told = {"step": point["step"], "spent": spent, "tsr": point["tsr"], "task_return": point["task_return"]}
        mode = "task reward" if segment.shaping is None else segment.shaping.mode
        self.account["mainline"].append(told | {"segment": self._place(segment.id), "config": mode})

    # -- a checkpoint's stage --------------------------------------------------------------------

    def _stage(self, name: str, number: int) -> None:
        """Diagnose, propose, try, judge, promote."""
        c, at, kind = self.config, self._at, self.config.kind
        stage = self._entry(name)
        control: list[_Grown] = []
        reference: _Grown | None = None
        if "evidence" not in stage:
            stage["evidence"] = self._evidence(number)
        situation = Situation(
            terms=self.terms, count=c.also.candidates, initial=at.shaping is None, current=at.shaping,
            evidence=stage["evidence"], trials=tuple(at.trials), earlier=len(at.trials),
            underperforms=self._underperforms(),
        )  # fmt: skip
        proposer = self.proposer
        assert proposer is not None
        if "card" not in stage:
            self._check_stop()
            self._show(f"{name}: {proposer.name} diagnoses")
            card, note = proposer.diagnose(situation) if kind.critic else (None, {})
            if kind.critic and card is None:
                note = note or {"asked": True}  # a record must tell that there was no card
            stage |= {"card": None if card is None else card.model_dump(mode="json"), "card_note": note}
            self._save()
        card = None if stage["card"] is None else CriticCard.model_validate(stage["card"])
        tried: dict[str, Candidate] = {}
        grown: dict[str, list[_Grown]] = {}
        for n in range(c.also.rounds if kind.branches else 1):
            if n == len(stage["rounds"]):
                self._check_stop()
                self._show(f"{name}: {proposer.name} proposes")
                proposed = self._usable(_named(proposer.propose(situation, card), tried))
                stage["rounds"].append({"proposed": proposed.to_json(), "review": None, "review_note": {}})
                self._save()
            turn = stage["rounds"][n]
            candidates = {x.id: x for x in Proposed.from_json(turn["proposed"]).candidates}
            if not kind.branches:
                self._take(stage, candidates)
                return
            tried |= candidates
            branches = self._branches(name, n, candidates, first=n == 0)
            if n == 0:
                control = branches.pop(_NO_CHANGE)
                if _REFERENCE in branches:
                    (reference,) = branches.pop(_REFERENCE)
                    at.reference = reference if reference.problem is None else None
            grown |= branches
            self._told(stage, n + 1, control, reference, branches)
            situation = self._after(situation, control, candidates, grown)
            if not turn["review_note"]:
                self._check_stop()
                review, note = proposer.review(situation)
                turn |= {"review": None if review is None else review.model_dump(mode="json"),
                         "review_note": note or {"reviewed": True}}  # fmt: skip
                self._save()
        self._judge(stage, control, reference, tried, grown)

    def _check_stop(self) -> None:
        if self._should_stop():
            raise _StoppedError

    def _usable(self, proposed: Proposed) -> Proposed:
        """The proposals that can be tried: one that can't costs itself, not the run."""
        kept, left = [], []
        for candidate in proposed.candidates:
            try:
                self.config.run(candidate.config)
                Proposed.from_json(dataclasses.replace(proposed, candidates=(candidate,)).to_json())
                kept.append(candidate)
            except EchelonError as error:
                left.append(f"{candidate.id}: {error}")
        note = {**proposed.note, "left_out": left} if left else proposed.note
        return dataclasses.replace(proposed, candidates=tuple(kept), note=note)

    def _entry(self, name: str) -> dict[str, Any]:
        """The account of a stage: what was decided before a crash is kept, what follows from it is told anew."""
        at, kept = self._at, self._decided.get(name, {})
        stage: dict[str, Any] = {"name": name, "at": at.step, "spent": at.spent, "current": _json(at.shaping)}
        stage |= {key: kept[key] for key in ("evidence", "card", "card_note") if key in kept}
        stage["rounds"] = kept.get("rounds", [])
        stage |= {"branches": [], "summaries": {}, "lead": {}, "verdict": None, "cost": 0}
        self.account["stages"].append(stage)
        return stage

    def _evidence(self, number: int) -> dict[str, Any]:
        at, c = self._at, self.config
        assert at.segment is not None
        self._show(f"C{number}: recording behaviour")
        saved = checkpoints_of(self._folder(at.segment) / "checkpoints")
        if not saved:  # the account is gone, and what it held can't be found out again
            raise EchelonError(
                f"{self.folder / ACCOUNT} doesn't say what was decided at step {at.step}, and the checkpoint of that "
                f"step is gone: begin anew in another folder"
            )
        policy = load_checkpoint(saved[-1]).algorithm
        stats = record_behaviour(
            c.run(at.shaping), policy, episodes=c.also.behaviour, stream=_BEHAVIOUR + number
        )  # fmt: skip
        curve = [point["task_return"] for point in self.account["mainline"]]
        return evidence(curve, stats, best_return=self.best_return)

    def _underperforms(self) -> bool:
        """Whether the reference, as of the last checkpoint, clearly leads the mainline's newest evaluations."""
        reference, line = self._at.reference, self.account["mainline"]
        if reference is None:
            return False
        ours = [point["task_return"] for point in line[-self.config.also.evaluations :]]
        theirs = [point["task_return"] for point in reference.curve]
        return reference_leads(*(summarise(x, best_return=self.best_return) for x in (ours, theirs)))

    def _take(self, stage: dict[str, Any], candidates: Mapping[str, Candidate]) -> None:
        """Promote the first proposal untried."""
        winner = next(iter(candidates), None)
        reasons = ["there is no candidate"] if winner is None else [f"{winner}: taken untried"]
        stage["verdict"] = _verdict(Verdict(winner is not None, winner, tuple(reasons), winner))
        if winner is not None:
            self._at.shaping = candidates[winner].config
            self._at.trials.append(Trial(candidates[winner], {}, True, ("taken untried",)))
        self._tell(f"{stage['name']}: {reasons[0]}")
        self._save()

    def _branches(
        self, name: str, turn: int, candidates: Mapping[str, Candidate], *, first: bool
    ) -> dict[str, list[_Grown]]:
        """Train a round's branches, side by side: by name one for each seed; with the first round the control too."""
        at, seeds = self._at, range(self.config.also.seeds)
        until = at.step + self.branch

        def segments(word: str, shaping: ShapingConfig | None, *, fresh: bool = False) -> list[_Segment]:
            source, begin = (None, 0) if fresh else (at.segment, at.step)
            return [_Segment(f"{name}-{word}-{j}", source, begin, until, shaping, j) for j in seeds]

        wanted: dict[str, list[_Segment]] = {}
        if first:
            wanted[_NO_CHANGE] = segments("no-change", at.shaping)
            old = at.reference
            if old is not None:
                word = f"{name}-{_REFERENCE}"
                wanted[_REFERENCE] = [_Segment(word, old.segment.id, old.end, until, old.segment.shaping)]
        for key, candidate in candidates.items():
            wanted[key] = segments(f"{turn + 1}-{key}", candidate.config, fresh=at.fresh)
        flat = [segment for some in wanted.values() for segment in some]
        grown = iter(self._train(flat, f"{name}, round {turn + 1}: {len(flat)} branches"))
        return {key: [next(grown) for _ in some] for key, some in wanted.items()}

    def _told(
        self,
        stage: dict[str, Any],
        turn: int,
        control: Sequence[_Grown],
        reference: _Grown | None,
        branches: Mapping[str, Sequence[_Grown]],
    ) -> None:
        """Put a round's branches into the account."""
        shown: dict[str, Sequence[_Grown]] = {_NO_CHANGE: control} if turn == 1 and control else {}
        if turn == 1 and reference is not None:
            shown[_REFERENCE] = [reference]
        for name, some in {**shown, **branches}.items():
            for j, grown in enumerate(some):
                stage["branches"].append({
                    "name": name, "round": turn, "seed": j, "run": self._place(grown.segment.id),
                    "config": _json(grown.segment.shaping), "curve": grown.curve, "problem": grown.problem,
                })  # fmt: skip
                stage["cost"] += grown.steps
            stage["summaries"][name] = self._numbers(self._summary(some))
        self._save()

    def _summary(self, some: Sequence[_Grown], config: ShapingConfig | None = None) -> Summary:
        """The gate's five numbers of a branch, its seeds taken together."""
        if problem := next((grown.problem for grown in some if grown.problem is not None), None):
            return Summary(math.nan, math.nan, math.nan, math.nan, math.nan, problem, config)
        rising = self.config.also.rising
        return summarise(_curves(some, self._at.step), best_return=self.best_return, config=config, rising=rising)

    def _numbers(self, summary: Summary) -> dict[str, float | None]:
        names = ("last_k", "auc", "final", "best", "std", "score", "spike_gap")
        found = {name: float(getattr(summary, name)) for name in names}
        return {name: round(value, 6) if math.isfinite(value) else None for name, value in found.items()}

    def _known(self, summary: Summary) -> dict[str, float]:
        return {name: value for name, value in self._numbers(summary).items() if value is not None}

    def _after(
        self, situation: Situation, control: Sequence[_Grown], candidates: Mapping[str, Candidate],
        grown: Mapping[str, Sequence[_Grown]],
    ) -> Situation:  # fmt: skip
        """What the proposer is told when a round's branches are done."""
        ours = self._summary(control)
        trials = []
        for name, candidate in candidates.items():
            summary = self._summary(grown[name], candidate.config)
            verdict = self._gate(ours, {name: summary}, None)
            trials.append(Trial(candidate, self._known(summary), verdict.accepted, verdict.reasons))
        return dataclasses.replace(situation, control=self._known(ours) or None, trials=(*situation.trials, *trials))

    def _gate(
        self, control: Summary, candidates: Mapping[str, Summary], reference: Summary | None,
        lead: Mapping[str, float] | None = None,
    ) -> Verdict:  # fmt: skip
        at, c = self._at, self.config.also
        return gate(
            control, candidates, reference, low_return=c.low_return, soft=c.soft, lead=lead,
            first_replacement=at.shaping is not None and at.shaping == at.first,
        )  # fmt: skip

    def _judge(
        self,
        stage: dict[str, Any],
        control: Sequence[_Grown],
        reference: _Grown | None,
        tried: Mapping[str, Candidate],
        grown: Mapping[str, Sequence[_Grown]],
    ) -> None:
        """Let the gate decide, and the mainline go on at the end of the branch that it names."""
        at = self._at
        before = at.shaping
        stands = before or self.terms.mode(self.terms.default)  # with no shaping at all: any at a strength of 0
        stands = stands if before is not None else dataclasses.replace(stands, beta=0.0)
        ours = self._summary(control, stands)
        theirs = {name: self._summary(some, tried[name].config) for name, some in grown.items()}
        ref = None if reference is None else self._summary([reference])
        if self.config.also.seeds > 1 and not ours.fault:
            begun, rising = _curves(control, at.step), self.config.also.rising
            stage["lead"] = {
                name: list(score_lead(begun, _curves(some, at.step), best_return=self.best_return, rising=rising))
                for name, some in grown.items()
                if not theirs[name].fault
            }
        verdict = self._gate(ours, theirs, ref, {name: lead[1] for name, lead in stage["lead"].items()} or None)
        stage["verdict"] = _verdict(verdict)
        winner = grown[verdict.winner][0] if verdict.winner is not None else control[0]
        name, begin = stage["name"], at.spent
        said = f"{name}: {verdict.winner} is promoted" if verdict.winner is not None else f"{name}: no change"
        self._tell(f"{said} ({verdict.reasons[0]})" if verdict.winner is None else said)
        for key, candidate in tried.items():
            reasons = verdict.reasons if key == verdict.best else (verdict.rejected.get(key, "another scored better"),)
            at.trials.append(Trial(candidate, self._known(theirs[key]), key == verdict.winner, tuple(reasons)))
        if winner.problem is not None:  # nothing can be judged without a control: the mainline stands where it was
            at.spent = begin + stage["cost"]
            self._save()
            return
        self._follow(winner, said, begin, stage["cost"], control=control[0] if control[0].problem is None else None)
        if verdict.winner is not None:
            if before is None:
                at.first = at.shaping
            elif not at.had_reference and self.config.also.reference:
                at.reference, at.had_reference = control[0], True
        self._prune({winner.segment.id})

    def _grid(self) -> None:
        """Try all mixtures of the world's grid from the beginning; the one with the best score goes on."""
        stage = self._entry("grid") | {"evidence": None, "card": None, "card_note": {}}
        self.account["stages"][-1] = stage
        until = self.branch
        segments = [_Segment(f"grid-{name}", None, 0, until, config) for name, config in self.terms.grid.items()]
        grown = {
            name: [x] for name, x in zip(self.terms.grid, self._train(segments, "the grid's mixtures"), strict=True)
        }
        self._told(stage, 1, [], None, grown)
        summaries = {name: self._summary(some) for name, some in grown.items()}
        rejected = {name: x.fault for name, x in summaries.items() if x.fault is not None}
        scores = {name: x.score for name, x in summaries.items() if x.fault is None}
        if not scores:
            raise EchelonError(f"no mixture of the grid could be trained: {'; '.join(rejected.values())}")
        best = min(scores, key=lambda name: (-scores[name], name))
        verdict = Verdict(True, best, (f"{best}: the best score of the grid",), best, rejected, scores)
        stage["verdict"] = _verdict(verdict)
        first = next(some[0] for some in grown.values() if some[0].problem is None)
        self._follow(grown[best][0], f"{best} has the best score", 0, stage["cost"], control=first)
        self._prune({grown[best][0].segment.id})

    # -- segments --------------------------------------------------------------------------------

    def _train(self, segments: Sequence[_Segment], words: str, *, retry_failed: bool = False) -> list[_Grown]:
        """Train and judge some segments, side by side; those that are done are only read."""
        c = self.config
        if not segments:
            return []
        # A recurrent network's results depend on the number of threads.
        threads = 1 if c.algorithm.recurrent else max(1, self.slots // len(segments))
        runs = []
        for s in segments:
            folder = self._folder(s.id)
            run = c.run(s.shaping, steps=s.until, threads=threads)
            if s.source is None:
                run = dataclasses.replace(run, seed=_seed(c.seed, s.stream))
            else:
                fork_run(self._folder(s.source), folder, run.shaping, steps=s.until, stream=s.stream, threads=threads)
            runs.append(StudyRun(s.id, run, self.terms.world, c.env.size, c.env.num_agents, c.base, c.seed))
            self._seen.append(s.id)

        def told(matrix: Matrix) -> None:
            done = 0
            for s in segments:
                said = matrix.running.get(s.id)
                if said is not None and said["stage"] == "training":
                    done += max(0, int(said["done"]) - s.begin)
                elif s.id not in matrix.running and kept_result(self._folder(s.id))[0] is not None:
                    done += s.until - s.begin
            news = tuple(line for line in matrix.news if ": finished" not in line)
            self._show(words, self._at.spent + done, len(matrix.running), news)

        do_runs(
            self._study, runs, self.folder / _WORK, self._backend, retry_failed=retry_failed, report=told,
            should_stop=self._should_stop,
        )  # fmt: skip
        return [self._grown(s) for s in segments]

    def _grown(self, segment: _Segment) -> _Grown:
        state, told = kept_result(self._folder(segment.id))
        if state == "finished":
            points = [{k: e[k] for k in ("step", "tsr", "task_return")} for e in told["evaluations"]]
            # Where a fork begins, all of them are the same.
            curve = [point for point in points if point["step"] > segment.begin or segment.source is None]
            return _Grown(segment, curve, int(told["last"]["step"]))
        if state == "failed":
            return _Grown(segment, [], segment.until, str(told.get("reason") or "it failed"))
        if self._should_stop():
            raise _StoppedError
        raise EchelonError(f"segment {segment.id} of {self.folder} isn't done: another process may hold it; run again")

    def _prune(self, keep: set[str]) -> None:
        """Remove the checkpoints of segments that nothing goes on from: with a replay memory one may take 100 MB."""
        if self._at.reference is not None:
            keep = keep | {self._at.reference.segment.id}
        for name in self._seen:
            if name not in keep:
                shutil.rmtree(self._folder(name) / "checkpoints", ignore_errors=True)
                (self._folder(name) / "best.safetensors").unlink(missing_ok=True)

    def _publish(self) -> None:
        """Leave what the mainline has become in `main/`, an ordinary run's folder, and its metrics in one file."""
        at = self._at
        if at.segment is None or not checkpoints_of(self._folder(at.segment) / "checkpoints"):
            return
        lines: list[str] = []
        for entry in self.account["segments"]:
            if entry["from"] == 0:  # what was tried from the beginning takes the place of what was before
                lines.clear()
            metrics = self.folder / entry["run"] / "metrics.jsonl"
            lines.append(metrics.read_text(encoding="utf-8") if metrics.exists() else "")
        atomic_write_text(self.folder / "metrics.jsonl", "".join(lines))
        if _same_policy(self.folder / "main", self._folder(at.segment)):
            return  # with what it was evaluated on
        with atomic_directory(self.folder / "main") as temp:
            for name in (
                "config.toml",
                "versions.json",
                "metrics.jsonl",
                "timings.jsonl",
                "plans.jsonl",
                "checkpoints",
            ):
                for file in _files(self._folder(at.segment) / name):
                    target = temp / file.relative_to(self._folder(at.segment))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)

    def _folder(self, name: str) -> Path:
        return self.folder / self._place(name)

    def _place(self, name: str) -> str:
        return f"{_WORK}/runs/{name}"

    # -- words -----------------------------------------------------------------------------------

    def _words(self) -> str:
        return "task reward" if self._at.shaping is None else self._at.shaping.mode

    def _show(self, stage: str, spent: int | None = None, running: int = 0, news: tuple[str, ...] = ()) -> None:
        line = self.account["mainline"]
        newest = line[-1] if line else None
        done = self._at.spent if spent is None else spent
        self._report(AlsoProgress(min(done, self.config.steps), self.config.steps, stage, running, newest, news))

    def _tell(self, news: str) -> None:
        self._report(AlsoProgress(self._at.spent, self.config.steps, self._words(), news=(news,)))

    def _save(self) -> None:
        # Stages that were decided before a stop, and aren't reached again yet: killed now, they must not be lost.
        told = {stage["name"] for stage in self.account["stages"]}
        later = [stage for name, stage in self._decided.items() if name not in told]
        atomic_write_json(self.folder / ACCOUNT, self.account | {"stages": [*self.account["stages"], *later]})


def _require_free(folder: Path) -> None:
    if (folder / "config.toml").exists():
        raise EchelonError(f"{folder} holds a run already: go on with --resume {folder}, or choose another --out")


def _resolved(proposer: str) -> str:
    """A record's name, to be found from anywhere."""
    kind, _, path = proposer.partition(":")
    return f"{kind}:{Path(path).resolve()}" if kind == "recorded" else proposer


def _named(proposed: Proposed, taken: Mapping[str, Candidate]) -> Proposed:
    """Proposals under names that no other branch of their stage has; folders are called so, too."""
    found: dict[str, Candidate] = {}
    for candidate in proposed.candidates:
        name = fresh_id(candidate.id, [*taken, *found])
        found[name] = dataclasses.replace(candidate, id=name)
    return dataclasses.replace(proposed, candidates=tuple(found.values()))


def _seed(seed: int, stream: int) -> int:
    """The root seed of a segment that begins from scratch."""
    return int(spawn_keys(seed, (_FRESH, stream), 1)[0] >> np.uint64(1)) if stream else seed


def _json(shaping: ShapingConfig | None) -> dict[str, Any] | None:
    return None if shaping is None else shaping.to_json()


def _curves(some: Sequence[_Grown], after: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Task returns of a branch's evaluations after so many steps, float64 `(seeds, n)`.

    One that began from scratch is compared over the steps that the control did, too.
    """
    curves = [[point["task_return"] for point in grown.curve if point["step"] > after] for grown in some]
    length = min(map(len, curves))
    return np.array([curve[len(curve) - length :] for curve in curves])


def _verdict(verdict: Verdict) -> dict[str, Any]:
    told = dataclasses.asdict(verdict)
    scores = {name: round(score, 6) for name, score in verdict.scores.items()}
    return told | {"reasons": list(verdict.reasons), "rejected": dict(verdict.rejected), "scores": scores}


def _same_policy(one: Path, other: Path) -> bool:
    """Whether two runs' folders have the same config and the same newest checkpoint."""
    found = []
    for folder in (one, other):
        newest = checkpoints_of(folder / "checkpoints")[-1:]
        files = [folder / "config.toml", *(checkpoint / "manifest.json" for checkpoint in newest)]
        found.append([file.read_bytes() for file in files if file.is_file()])
    return len(found[0]) == 2 and found[0] == found[1]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (p for p in sorted(path.rglob("*")) if p.is_file())
