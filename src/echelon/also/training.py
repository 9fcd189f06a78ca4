"""The run whose shaping grows with it: branches, verdicts, and the account of all of them.

A run is a tree of segments (see `segments`), and the mainline is a path in that tree. What decides is in
`account.json` before it is acted on, and a segment that is done stays done: the run goes on, after whatever ended it,
by doing everything again that isn't.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echelon._files import (
    atomic_write_json,
    atomic_write_text,
    only_writer,
    read_json,
    remove_leftovers,
)
from echelon.also.configs import AlsoConfig, also_to_toml, read_also_toml, resolved_proposer
from echelon.also.judging import Judge, known_numbers, numbers
from echelon.also.segments import Grown, Segment, Segments, StoppedError
from echelon.building import writer_of
from echelon.checkpoints import load_checkpoint
from echelon.envs import env_name, make
from echelon.errors import EchelonError
from echelon.evaluation.behaviour import record_behaviour
from echelon.extensions import resolved
from echelon.llm.prompts import clean
from echelon.runs import ACCOUNT, versions
from echelon.shaping import (
    Candidate,
    CriticCard,
    Proposed,
    Proposer,
    RecordedProposer,
    ResultDiagnosis,
    ShapingConfig,
    Situation,
    Summary,
    Trial,
    Verdict,
    evidence,
    make_proposer,
    needs_model,
    new_candidates,
    term_set,
)
from echelon.shaping.gate import NO_CHANGE

__all__ = ["AlsoProgress", "AlsoTrainer"]

FORMAT = 1

_REFERENCE = "reference"
_BEHAVIOUR = 64  # streams of the worlds in which behaviour is recorded: this one and those above


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
    control: str | None = None  # the segment in which it goes on beside a stage's branches
    reference: Grown | None = None
    had_reference: bool = False

    @property
    def stands_first(self) -> bool:
        """Whether the first shaping that was promoted is still the one in force."""
        return self.shaping is not None and self.shaping == self.first


class AlsoTrainer:
    """One run of LLM-ALSO or of one of its ablations and controls.

    Attributes:
        config: the run's config.
        folder: where it lives: `config.toml`, `account.json`, `metrics.jsonl` (of the mainline), `main/` (what was
            trained, as an ordinary run's folder), and `work/runs/` with all segments.
        account: what is in `account.json`.
    """

    def __init__(
        self, config: AlsoConfig, folder: Path, *, proposer: Proposer | None = None, keep_policies: bool = False
    ) -> None:
        """Prepare a new run.

        Args:
            config: the run.
            folder: where it is to live.
            proposer: one of your own in the place of `config.proposer`.
            keep_policies: keep the mainline's policies of all evaluations (`policies/` in its segments' folders).

        Raises:
            EchelonError: there is a run in `folder`, or a setting, map or proposer can't be used.
        """
        _require_free(folder)
        # Files that it names are found from anywhere, and the run is the same when it is resumed.
        config = dataclasses.replace(
            config, imports=resolved(config.imports), proposer=resolved_proposer(config.proposer)
        )
        self._build(config, folder, proposer, keep_policies)
        with only_writer(folder):
            _require_free(folder)
            atomic_write_json(folder / "versions.json", versions())
            atomic_write_text(folder / "config.toml", also_to_toml(config))

    @classmethod
    def resume(
        cls,
        folder: Path,
        *,
        proposer: Proposer | None = None,
        like: AlsoConfig | None = None,
        keep_policies: bool = False,
    ) -> AlsoTrainer:
        """A run as it was left, also in the middle of a round of branches.

        Args:
            folder: the run.
            proposer: the one that it began with, if that wasn't `config.proposer`.
            like: its config, for what results don't depend on: where imported files and records are now, and `workers`.
            keep_policies: as it began.

        Raises:
            EchelonError: no run there, or damaged files.
        """
        if not (folder / "config.toml").exists():
            raise EchelonError(f"{folder} is no run: it has no config.toml")
        config = read_also_toml(folder / "config.toml", imports=None if like is None else like.imports)
        if like is not None:
            config = dataclasses.replace(config, workers=like.workers)
            if config.proposer.startswith("recorded:") and like.proposer.startswith("recorded:"):
                config = dataclasses.replace(config, proposer=resolved_proposer(like.proposer))
        trainer = cls.__new__(cls)
        trainer._build(config, folder, proposer, keep_policies)
        trainer._remember()
        return trainer

    def _remember(self) -> None:
        """Take up what the account says was decided."""
        path = self.folder / ACCOUNT
        if not path.exists():
            return
        saved = read_json(path, "account")
        found = saved.get("format") if isinstance(saved, dict) else None
        if isinstance(found, int) and found > FORMAT:
            raise EchelonError(f"{path} is of format {found}, this Echelon reads format {FORMAT}: use a newer Echelon")
        if found != FORMAT:
            raise EchelonError(f"account {path} is damaged: begin anew in another folder")
        try:
            decided = {stage["name"]: stage for stage in saved["stages"]}
            for stage in decided.values():
                _check_stage(stage)
            self._decided.update(decided)
        except (KeyError, TypeError, ValueError, AttributeError, EchelonError):
            raise EchelonError(f"account {path} is damaged: begin anew in another folder") from None
        if isinstance(self.proposer, RecordedProposer):
            self.proposer.resume(saved)

    def _build(self, config: AlsoConfig, folder: Path, proposer: Proposer | None, keep_policies: bool) -> None:
        self.config, self.folder = config, folder
        self.terms = term_set(env_name(config.env))
        env = make(self.terms.world, config.env, num_envs=1)
        self.best_return = float(env.goals)
        self.proposer = None if config.kind.stages == "none" else proposer or self._proposer()
        if isinstance(self.proposer, RecordedProposer):
            self.proposer.require(self.terms.world)
        self.branch = config.branch_steps
        self._segments = Segments(config, folder, keep_policies=keep_policies)
        self._judging = Judge(config, self.best_return)
        self._decided: dict[str, dict[str, Any]] = {}
        self.account: dict[str, Any] = {
            "format": FORMAT, "method": config.method, "base": config.base, "environment": self.terms.world,
            "seed": config.seed, "steps": config.steps, "best_return": self.best_return,
            "proposer": "" if self.proposer is None else self.proposer.name, "vocabulary": self.terms.vocabulary(),
            "notes": self._notes(), "stages": [], "skipped": [], "mainline": [], "segments": [], "final": None,
        }  # fmt: skip

    def _notes(self) -> list[str]:
        """What whoever reads the verdicts should know."""
        c = self.config
        if not c.tries or c.branch_rollouts >= c.evaluations:
            return []
        n, least = c.branch_rollouts, c.evaluations
        begin = f"a branch of {c.branch_steps:,} steps has {n} rollout{'s' if n > 1 else ''}"
        return [f"{begin}, so it is evaluated {n}, not {least} times, and its verdict rests on little: raise steps or "
                f"also.branch, or lower num_envs"]  # fmt: skip

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
            for name in ("stages", "skipped", "mainline", "segments"):
                self.account[name] = []
            self._at = _Mainline()
            self._save()  # there is an account from the first moment on
            for note in self.account["notes"]:
                self._tell(note)
            try:
                with self._segments.open():
                    self._grow()
            except StoppedError:
                return False
            finally:
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
            if c.kind.branches and (why := self._useless()):
                self.account["skipped"].append({"name": f"C{k}", "at": at.step, "spent": at.spent, "why": why})
                self._tell(f"C{k}: {why}")
                continue
            self._stage(f"C{k}", k)
        self._advance(f"main-{len(shares)}", c.steps)
        last = self.account["mainline"][-1]
        config = None if at.shaping is None else at.shaping.to_json()
        self.account["final"] = {"config": config, "steps": at.step, "spent": at.spent,
                                 "tsr": last["tsr"], "task_return": last["task_return"]}  # fmt: skip
        self._decided.clear()
        self._save()

    def _useless(self) -> str | None:
        """Why branches can't come to anything now, or None."""
        if not self._fits(fresh=self._at.fresh):
            return "not enough steps are left for its branches"
        if self._judging.hopeless(self.account["mainline"], first_replacement=self._at.stands_first):
            return "the mainline is so good that the gate would refuse a perfect branch, too"
        return None

    def _fits(self, *, fresh: bool) -> bool:
        """Whether enough steps are left for a stage's branches, but for what rounding to whole rollouts may add."""
        also, at = self.config.also, self._at
        each = self.branch + (at.step if fresh else 0)
        reference = 0 if at.reference is None else at.step + self.branch - at.reference.end
        cost = also.seeds * (self.branch + also.candidates * also.rounds * each) + reference
        return at.spent + cost <= self.config.steps + self.branch // also.evaluations // 2

    def _advance(self, name: str, spent: int) -> None:
        """Train the mainline on until so many steps are spent."""
        at = self._at
        if at.spent >= spent:
            return
        until = at.step + spent - at.spent
        segment = Segment(name, at.segment, at.step, until, at.shaping)
        # Without it nothing can go on: what failed last time (no memory, say) is tried again.
        (grown,) = self._train([segment], f"{self._words()}, mainline", retry_failed=True)
        if grown.problem is not None:
            raise EchelonError(f"segment {name} of {self.folder} failed: {grown.problem}")
        first = at.segment is None
        self._follow(grown, "the beginning" if first else "the mainline goes on", at.spent, grown.steps)
        self._prune(name)

    def _follow(self, grown: Grown, why: str, begin: int, cost: int, *, control: Grown | None = None) -> None:
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
        entry = {
            "run": self._segments.place(grown.segment.id),
            "from": grown.segment.begin,
            "to": grown.end,
            "spent": [begin, at.spent],
            "why": why,
        }
        self.account["segments"].append(entry | {"config": _json(grown.segment.shaping)})
        self._save()

    def _point(self, point: Mapping[str, Any], spent: int, segment: Segment) -> None:
        told = {"step": point["step"], "spent": spent, "tsr": point["tsr"], "task_return": point["task_return"]}
        mode = "task reward" if segment.shaping is None else segment.shaping.mode
        self.account["mainline"].append(told | {"segment": self._segments.place(segment.id), "config": mode})

    # -- a checkpoint's stage --------------------------------------------------------------------

    def _stage(self, name: str, number: int) -> None:
        """Diagnose, propose, try, judge, promote."""
        c, at, kind = self.config, self._at, self.config.kind
        stage = self._entry(name)
        control: list[Grown] = []
        reference: Grown | None = None
        if "evidence" not in stage:
            stage["evidence"] = self._evidence(number)
        situation = Situation(
            terms=self.terms, count=c.also.candidates, initial=at.shaping is None, current=at.shaping,
            evidence=stage["evidence"], trials=tuple(at.trials), earlier=len(at.trials),
            underperforms=self._judging.underperforms(self.account["mainline"], at.reference),
        )  # fmt: skip
        if "card" not in stage:
            card, note = self._asked(name, "diagnose", CriticCard, situation) if kind.critic else (None, {})
            if kind.critic and card is None:
                note = note or {"asked": True}  # a record must tell that there was no card
            stage |= {"card": None if card is None else card.model_dump(mode="json"), "card_note": note}
            self._save()
        card = None if stage["card"] is None else CriticCard.model_validate(stage["card"])
        tried: dict[str, Candidate] = {}
        grown: dict[str, list[Grown]] = {}
        for n in range(c.also.rounds if kind.branches else 1):
            if n == len(stage["rounds"]):
                proposed = self._asked(name, "propose", Proposed, situation, card).named(tried)
                proposed = self._usable(proposed, tried)
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
                control = branches.pop(NO_CHANGE)
                if _REFERENCE in branches:
                    (reference,) = branches.pop(_REFERENCE)
                    at.reference = reference if reference.problem is None else None
            grown |= branches
            self._told(stage, n + 1, control, reference, branches)
            situation = self._after(situation, control, reference, candidates, grown)
            if not turn["review_note"]:
                review, note = self._asked(name, "review", ResultDiagnosis, situation)
                turn |= {"review": None if review is None else review.model_dump(mode="json"),
                         "review_note": note or {"reviewed": True}}  # fmt: skip
                self._save()
        self._judge(stage, control, reference, tried, grown)

    def _check_stop(self) -> None:
        if self._should_stop():
            raise StoppedError

    def _asked(self, name: str, what: str, kind: type, *args: Any) -> Any:
        """What the proposer says, of that kind: proposals, or a pair of a card or a review (or None) and a note.

        Raises:
            StoppedError: the run is to stop. A model that is asked then breaks off, and that isn't its answer.
            EchelonError: a proposer of somebody's own is broken; the run can go on with a mended one.
        """
        proposer = self.proposer
        assert proposer is not None
        self._check_stop()
        self._show(f"{name}: {proposer.name} {what}s")
        try:
            said = getattr(proposer, what)(*args)
            _require(said, kind)
        except EchelonError:
            raise
        except Exception as error:  # of whatever kind: the code isn't ours
            words = clean(f"{type(error).__name__}: {error}")[:200]
            raise EchelonError(f"the proposer {proposer.name} is broken: its {what} failed: {words}") from error
        self._check_stop()
        return said

    def _usable(self, proposed: Proposed, tried: Mapping[str, Candidate]) -> Proposed:
        """The proposals that can be tried: one that can't costs itself, not the run."""
        before = [candidate.config for candidate in tried.values()]
        new = new_candidates(proposed.candidates, current=self._at.shaping, tried=before)
        kept: list[Candidate] = []
        left = list(new.reasons)
        for candidate in new.usable:
            if len(kept) == self.config.also.candidates:  # the budget was reckoned for so many
                left.append(f"{candidate.id}: only {len(kept)} are tried")
                continue
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
        saved = self._segments.checkpoint(at.segment)
        if saved is None:  # the account is gone, and what it held can't be found out again
            raise EchelonError(
                f"{self.folder / ACCOUNT} doesn't say what was decided at step {at.step}, and the checkpoint of that "
                f"step is gone: begin anew in another folder"
            )
        policy = load_checkpoint(saved).algorithm
        stats = record_behaviour(
            c.run(at.shaping), policy, episodes=c.also.behaviour, stream=_BEHAVIOUR + number
        )  # fmt: skip
        curve = [point["task_return"] for point in self.account["mainline"]]
        return evidence(curve, stats, best_return=self.best_return)

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
    ) -> dict[str, list[Grown]]:
        """Train a round's branches, side by side: by name one for each seed; with the first round the control too."""
        at, seeds = self._at, range(self.config.also.seeds)
        until = at.step + self.branch

        def segments(word: str, shaping: ShapingConfig | None, *, fresh: bool = False) -> list[Segment]:
            source, begin = (None, 0) if fresh else (at.segment, at.step)
            return [Segment(f"{name}-{word}-{j}", source, begin, until, shaping, j) for j in seeds]

        wanted: dict[str, list[Segment]] = {}
        if first:
            wanted[NO_CHANGE] = segments("no-change", at.shaping)
            at.control = wanted[NO_CHANGE][0].id
            old = at.reference
            if old is not None:
                word = f"{name}-{_REFERENCE}"
                wanted[_REFERENCE] = [Segment(word, old.segment.id, old.end, until, old.segment.shaping)]
        for key, candidate in candidates.items():
            wanted[key] = segments(f"{turn + 1}-{key}", candidate.config, fresh=at.fresh)
        flat = [segment for some in wanted.values() for segment in some]
        grown = iter(self._train(flat, f"{name}, round {turn + 1}: {len(flat)} branches"))
        return {key: [next(grown) for _ in some] for key, some in wanted.items()}

    def _told(
        self,
        stage: dict[str, Any],
        turn: int,
        control: Sequence[Grown],
        reference: Grown | None,
        branches: Mapping[str, Sequence[Grown]],
    ) -> None:
        """Put a round's branches into the account."""
        shown: dict[str, Sequence[Grown]] = {NO_CHANGE: control} if turn == 1 and control else {}
        if turn == 1 and reference is not None:
            shown[_REFERENCE] = [reference]
        for name, some in {**shown, **branches}.items():
            for j, grown in enumerate(some):
                stage["branches"].append({
                    "name": name, "round": turn, "seed": j, "run": self._segments.place(grown.segment.id),
                    "config": _json(grown.segment.shaping), "curve": grown.curve, "problem": grown.problem,
                })  # fmt: skip
                stage["cost"] += grown.steps
            stage["summaries"][name] = numbers(self._summary(some))
        self._save()

    def _summary(self, some: Sequence[Grown], config: ShapingConfig | None = None) -> Summary:
        return self._judging.summary(some, self._at.step, config)

    def _after(
        self, situation: Situation, control: Sequence[Grown], reference: Grown | None,
        candidates: Mapping[str, Candidate], grown: Mapping[str, Sequence[Grown]],
    ) -> Situation:  # fmt: skip
        """What the proposer is told when a round's branches are done: whether each would be let in, were it alone."""
        ours, ref = self._summary(control), self._reference(reference)
        leads = self._judging.leads(control, {name: grown[name] for name in candidates}, self._at.step)
        trials = []
        for name, candidate in candidates.items():
            summary = self._summary(grown[name], candidate.config)
            verdict = self._judging.verdict(ours, {name: summary}, ref, leads, first_replacement=self._at.stands_first)
            trials.append(Trial(candidate, known_numbers(summary), verdict.accepted, verdict.reasons))
        return dataclasses.replace(situation, control=known_numbers(ours) or None, trials=(*situation.trials, *trials))

    def _reference(self, reference: Grown | None) -> Summary | None:
        return None if reference is None else self._summary([reference])

    def _judge(
        self,
        stage: dict[str, Any],
        control: Sequence[Grown],
        reference: Grown | None,
        tried: Mapping[str, Candidate],
        grown: Mapping[str, Sequence[Grown]],
    ) -> None:
        """Let the gate decide, and the mainline go on at the end of the branch that it names."""
        at = self._at
        before = at.shaping
        stands = before or self.terms.mode(self.terms.default)  # with no shaping at all: any at a strength of 0
        stands = stands if before is not None else dataclasses.replace(stands, beta=0.0)
        ours = self._summary(control, stands)
        theirs = {name: self._summary(some, tried[name].config) for name, some in grown.items()}
        leads = self._judging.leads(control, grown, at.step)
        stage["lead"] = {name: list(lead) for name, lead in leads.items()}
        verdict = self._judging.verdict(
            ours, theirs, self._reference(reference), leads, first_replacement=at.stands_first
        )  # fmt: skip
        stage["verdict"] = _verdict(verdict)
        winner = grown[verdict.winner][0] if verdict.winner is not None else control[0]
        at.control = None
        name, begin = stage["name"], at.spent
        said = f"{name}: {verdict.winner} is promoted" if verdict.winner is not None else f"{name}: no change"
        self._tell(f"{said} ({verdict.reasons[0]})" if verdict.winner is None else said)
        for key, candidate in tried.items():
            reasons = verdict.reasons if key == verdict.best else (verdict.rejected.get(key, "another scored better"),)
            at.trials.append(Trial(candidate, known_numbers(theirs[key]), key == verdict.winner, tuple(reasons)))
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
        self._prune(winner.segment.id)

    def _grid(self) -> None:
        """Try all mixtures of the world's grid from the beginning; the one with the best score goes on."""
        stage = self._entry("grid") | {"evidence": None, "card": None, "card_note": {}}
        self.account["stages"][-1] = stage
        until = self.branch
        segments = [Segment(f"grid-{name}", None, 0, until, config) for name, config in self.terms.grid.items()]
        # Without any nothing can go on: what failed last time (no memory, say) is tried again.
        again = all(self._segments.failed(segment.id) for segment in segments)
        found = self._train(segments, "the grid's mixtures", retry_failed=again)
        grown = {name: [x] for name, x in zip(self.terms.grid, found, strict=True)}
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
        self._prune(grown[best][0].segment.id)

    # -- segments --------------------------------------------------------------------------------

    def _train(self, segments: Sequence[Segment], words: str, *, retry_failed: bool = False) -> list[Grown]:
        """Train some segments side by side."""

        def told(done: int, running: int, news: tuple[str, ...]) -> None:
            self._show(words, self._at.spent + done, running, news)

        return self._segments.train(segments, told, self._should_stop, retry_failed=retry_failed)

    def _prune(self, keep: str) -> None:
        reference = self._at.reference
        mainline = {Path(point["segment"]).name for point in self.account["mainline"]}
        self._segments.prune({keep} if reference is None else {keep, reference.segment.id}, mainline)

    def _publish(self) -> None:
        """Leave what the mainline has become in `main/`, an ordinary run's folder, and its metrics in one file."""
        at = self._at
        runs = [self.folder / entry["run"] for entry in self.account["segments"]]
        # What was tried from the beginning takes the place of what was before.
        begun = max((k for k, entry in enumerate(self.account["segments"]) if entry["from"] == 0), default=0)
        segment, runs = at.segment, runs[begun:]
        if at.control is not None and self._segments.checkpoint(at.control) is not None:
            # Stopped while branches train: until a verdict the control is the mainline.
            segment, runs = at.control, [*runs, self._segments.folder(at.control)]
        if segment is None or self._segments.checkpoint(segment) is None:
            return
        metrics = [run / "metrics.jsonl" for run in runs]
        text = "".join(file.read_text(encoding="utf-8") for file in metrics if file.exists())
        atomic_write_text(self.folder / "metrics.jsonl", text)
        self._segments.publish(segment, self.folder / "main")

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


def _check_stage(stage: Mapping[str, Any]) -> None:
    """Raise whatever it may be where a stage's part of an account can't be gone on from."""
    if stage.get("card") is not None:
        CriticCard.model_validate(stage["card"])
    for turn in stage["rounds"]:
        Proposed.from_json(turn["proposed"])
        dict(turn["review_note"])
        if turn["review"] is not None:
            dict(turn["review"])
    if stage.get("evidence") is not None:
        dict(stage["evidence"])


def _require(said: Any, kind: type) -> None:
    """Raise whatever it may be where a proposer's answer is none, or can't be kept in an account."""
    words: list[Any] = []
    if kind is Proposed:
        if not isinstance(said, Proposed):
            raise TypeError(f"it returned {said!r}, no Proposed")
        words = [said.stage, said.policy, *(word for c in said.candidates for word in (c.id, c.type, c.rationale))]
        note, kept = said.note, said.to_json()
    else:
        told, note = said
        if told is not None and not isinstance(told, kind):
            raise TypeError(f"it returned {told!r}, no {kind.__name__} and not None")
        kept = note
    if not isinstance(note, dict):
        raise TypeError(f"its note is {note!r}, no dict")
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"{word!r} isn't a text")
    json.dumps(kept, sort_keys=True, allow_nan=False)  # as an account is written


def _json(shaping: ShapingConfig | None) -> dict[str, Any] | None:
    return None if shaping is None else shaping.to_json()


def _verdict(verdict: Verdict) -> dict[str, Any]:
    told = dataclasses.asdict(verdict)
    scores = {name: round(score, 6) for name, score in verdict.scores.items()}
    return told | {"reasons": list(verdict.reasons), "rejected": dict(verdict.rejected), "scores": scores}
