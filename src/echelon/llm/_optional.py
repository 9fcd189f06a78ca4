"""The optional third parties of the local language model, imported only when one is really used."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from echelon.errors import EchelonError

__all__ = ["quiet_transformers", "require"]


def require(module: str) -> Any:
    """Import an optional module.

    Raises:
        EchelonError: it isn't installed, or doesn't import; the line says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        reason = "is not installed" if error.name == package else f"does not import ({error})"
        raise EchelonError(
            f"a local language model needs {package}, which {reason}: pip install 'echelon-marl[llm]'"
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and notes off the terminal inside the block; its settings are put back."""
    logging = require("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
