"""The pages of README and docs/, and their fenced blocks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "integrations"),
]
TO_SUBMIT = sorted((ROOT / "docs" / "integrations").glob("*.md*"))  # pages of other projects' sites, in their form
ELSEWHERE = {"serving"}  # whose blocks need a server: ``tests/serving`` runs them
_UNRUN = r"<!-- not run: (?P<reason>[^>]*?) -->\s*"  # stands right before a block that no test runs


def find_blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each fenced block; the language is empty where none is named."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def find_unrun(page: Path) -> dict[str, str]:
    """The reason for each block that is marked as not run, by its text."""
    found = re.finditer(_UNRUN + r"^```\w*\n(?P<code>.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return {each["code"]: each["reason"] for each in found}
