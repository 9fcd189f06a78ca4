"""Language models: fetching them, asking them multiple-choice questions, and writing their prompts.

transformers is imported only when a local model is loaded or converted.
"""

from echelon.llm.choice import CausalChoiceModel, ChoiceModel, ChoicePrompt, ChoiceScores
from echelon.llm.prompts import LETTERS, Block, PromptTemplate, clean, lines, option_lines
from echelon.llm.store import KNOWN_MODELS, CheckReport, KnownModel, ModelStatus, ModelStore, resolve

__all__ = [
    "KNOWN_MODELS",
    "LETTERS",
    "Block",
    "CausalChoiceModel",
    "CheckReport",
    "ChoiceModel",
    "ChoicePrompt",
    "ChoiceScores",
    "KnownModel",
    "ModelStatus",
    "ModelStore",
    "PromptTemplate",
    "clean",
    "lines",
    "option_lines",
    "resolve",
]
