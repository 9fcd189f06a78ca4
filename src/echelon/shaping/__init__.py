"""Rewards shaped by potentials, and what decides which: terms, mixtures, evidence, candidates, the gate.

One file a world says what its terms are, and one line below makes them known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon._lazy import lazily
from echelon.shaping.base import ShapingConfig, TermSet, mode_table, register, shaped_worlds, term_set
from echelon.shaping.evidence import Behaviour, CurveFeatures, Recording, behaviour, curve_features, evidence, flags
from echelon.shaping.gate import Summary, Verdict, gate, hopeless, reference_leads, score_lead, summarise
from echelon.shaping.potential import PotentialShaper, ShapingRules, mixture, relabel
from echelon.shaping.repair import REPAIR
from echelon.shaping.search import SEARCH
from echelon.shaping.settings import ShapingSettings
from echelon.shaping.warehouse import WAREHOUSE

if TYPE_CHECKING:
    from echelon.shaping.candidates import (
        CONTINUING_TYPES,
        FALLBACK_TYPES,
        INITIAL_TYPES,
        Candidate,
        Checked,
        CriticCard,
        GeneratorReply,
        Proposal,
        ResultDiagnosis,
        check_candidates,
        is_nontrivial,
        new_candidates,
        read_reply,
    )
    from echelon.shaping.proposers import (
        HeuristicProposer,
        ModelProposer,
        Proposed,
        Proposer,
        RecordedProposer,
        Situation,
        Trial,
        make_proposer,
        needs_model,
    )

__all__ = [
    "CONTINUING_TYPES",
    "FALLBACK_TYPES",
    "INITIAL_TYPES",
    "Behaviour",
    "Candidate",
    "Checked",
    "CriticCard",
    "CurveFeatures",
    "GeneratorReply",
    "HeuristicProposer",
    "ModelProposer",
    "PotentialShaper",
    "Proposal",
    "Proposed",
    "Proposer",
    "RecordedProposer",
    "Recording",
    "ResultDiagnosis",
    "ShapingConfig",
    "ShapingRules",
    "ShapingSettings",
    "Situation",
    "Summary",
    "TermSet",
    "Trial",
    "Verdict",
    "behaviour",
    "check_candidates",
    "curve_features",
    "evidence",
    "flags",
    "gate",
    "hopeless",
    "is_nontrivial",
    "make_proposer",
    "mixture",
    "mode_table",
    "needs_model",
    "new_candidates",
    "read_reply",
    "reference_leads",
    "register",
    "relabel",
    "score_lead",
    "shaped_worlds",
    "summarise",
    "term_set",
]

register(WAREHOUSE)
register(SEARCH)
register(REPAIR)

__getattr__ = lazily(__name__, "candidates", "proposers")
