"""Language models: fetching them, asking them multiple-choice questions, and writing their prompts.

transformers is imported only when a local model is loaded or converted.
"""

from echelon.llm._loading import locate
from echelon.llm.budget import Budget, BudgetConfig, BudgetedChoice, BudgetedText
from echelon.llm.causal_text import CausalTextModel
from echelon.llm.choice import CausalChoiceModel, ChoiceModel, ChoicePrompt, ChoiceScores
from echelon.llm.gguf import GGUFConfig, GGUFModel
from echelon.llm.policy import ChoicePolicy, LearningChoice, PolicyConfig, PolicyModel
from echelon.llm.prompts import LETTERS, Block, PromptTemplate, clean, lines, option_lines
from echelon.llm.server import ServerConfig, ServerModel
from echelon.llm.store import KNOWN_MODELS, CheckReport, KnownModel, ModelStatus, ModelStore, resolve, resolve_gguf
from echelon.llm.teams import Share, load_team, load_team_state, num_held, save_team, saved_team, team_state
from echelon.llm.text import TextModel, TextPrompt, TextReply
from echelon.llm.token_policy import TokenPolicy, TokenPrompt, TokenSample

__all__ = [
    "KNOWN_MODELS",
    "LETTERS",
    "Block",
    "Budget",
    "BudgetConfig",
    "BudgetedChoice",
    "BudgetedText",
    "CausalChoiceModel",
    "CausalTextModel",
    "CheckReport",
    "ChoiceModel",
    "ChoicePolicy",
    "ChoicePrompt",
    "ChoiceScores",
    "GGUFConfig",
    "GGUFModel",
    "KnownModel",
    "LearningChoice",
    "ModelStatus",
    "ModelStore",
    "PolicyConfig",
    "PolicyModel",
    "PromptTemplate",
    "ServerConfig",
    "ServerModel",
    "Share",
    "TextModel",
    "TextPrompt",
    "TextReply",
    "TokenPolicy",
    "TokenPrompt",
    "TokenSample",
    "clean",
    "lines",
    "load_team",
    "load_team_state",
    "locate",
    "num_held",
    "option_lines",
    "resolve",
    "resolve_gguf",
    "save_team",
    "saved_team",
    "team_state",
]
