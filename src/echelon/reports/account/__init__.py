"""The account of a run whose rewards were shaped by evidence: one page that says what was tried, and why what won won.

`write_account` makes of a run's `account.json` a single HTML file with no other file, font or address behind it. It
works on a run that is under way, and on methods that try nothing in branches. The charts are inline SVG, the switch
between measures is plain CSS: the page has no script at all.

Text from data (names, diagnoses, a model's replies) is never trusted: it is escaped wherever it stands, and the page's
content security policy lets no script run. The same account gives the same bytes.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from echelon._files import atomic_write_text
from echelon.reports.account.file import Account, read_account
from echelon.reports.account.looks import Looks
from echelon.reports.account.run import details_section, run_head, run_section
from echelon.reports.account.stage import stage_section
from echelon.reports.account.words import said
from echelon.runs import ACCOUNT

__all__ = ["write_account"]


def write_account(folder: Path) -> Path:
    """Write `<folder>/account.html`, the page of a run's account; the file appears whole or not at all.

    Args:
        folder: a run's folder with its `account.json` (format 1), finished or not.

    Returns:
        Where the page is.

    Raises:
        EchelonError: there is no account, it is damaged or of a newer format, or the page can't be written.
    """
    folder = Path(folder)
    account = read_account(folder / ACCOUNT)
    path = folder / "account.html"
    atomic_write_text(path, _page(account))
    return path


def _page(account: Account) -> str:
    looks = Looks(account)
    details = details_section(account, looks)
    stages = [stage_section(account, looks, k) for k in range(len(account.stages))]
    sections = [run_section(account, looks), *stages, *([details] if details else [])]
    names = ["The run", *(stage.name for stage in account.stages), *(["Details"] if details else [])]
    title = f"{account.method} over {account.base or '?'} on {account.environment or '?'}"
    # One look for all that is made of these parts: the report's, and what is the account's own after it.
    report = files("echelon.reports").joinpath("study.html").read_text(encoding="utf-8")
    parts = {
        "STYLE": report.split("<style>", 1)[1].split("</style>", 1)[0],
        "TITLE": said(f"{title}: account"),
        "HEADING": said(title),
        "HEAD": run_head(account),
        "CONTENTS": "".join(
            f'<li><a href="#{s.anchor}">{said(n)}</a></li>' for s, n in zip(sections, names, strict=True)
        ),
        "BODY": "\n".join(
            f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title">'
            f'<h2 id="{s.anchor}-title">{said(s.title)}</h2>{"".join(s.body)}</section>'
            for s in sections
        ),
    }
    template = files("echelon.reports").joinpath("account.html").read_text(encoding="utf-8")
    # In one pass, so that text from data which looks like a place isn't taken for one.
    return re.sub(r"__([A-Z_]+?)__", lambda match: parts[match.group(1)], template)
