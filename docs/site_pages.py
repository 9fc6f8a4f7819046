"""What the site shows beside this folder: README, results, tutorials and other pages, with links that lead there.

MkDocs calls these functions (``hooks`` in ``mkdocs.yml``). A link to what the site does not show becomes plain text.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what lists the pages needs no MkDocs
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
RESULTS = "examples/lab/results"
TUTORIALS = "examples/tutorials"
TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "semsharekv_integrations/assets/reference/README.md": "model_card.md",
    "semsharekv_integrations/assets/texts/README.md": "texts.md",
}
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<to>[^)\s]+)\)")


def list_pages() -> dict[str, str]:
    """Return where the site has each file of the repository that it shows, by path.

    ``results.md`` and ``results/index.md`` would have one address, so the overview of ``results/`` is no index.
    """
    own = {
        f"docs/{path.relative_to(ROOT / 'docs').as_posix()}" for path in (ROOT / "docs").rglob("*") if _is_shown(path)
    }
    results = {path.name: f"{RESULTS}/{path.name}" for path in (ROOT / RESULTS).iterdir()}
    pages = TOP | {path: path.removeprefix("docs/") for path in own} | {f"{TUTORIALS}/README.md": "tutorials/index.md"}
    for path in (ROOT / TUTORIALS).glob("*.ipynb"):
        pages[f"{TUTORIALS}/{path.name}"] = f"tutorials/{path.stem}.md"
    return pages | {path: f"results/{name.replace('README', 'overview')}" for name, path in results.items()}


def _is_shown(path: Path) -> bool:
    return path.is_file() and path.parent.name != "integrations"  # which holds texts for other projects' sites


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that lie outside of this folder."""
    from mkdocs.structure.files import File

    for path, page in list_pages().items():
        if path.endswith(".ipynb"):
            files.append(File.generated(config, page, content=render_notebook(ROOT / path)))
        elif not path.startswith("docs/"):
            files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def render_notebook(path: Path) -> str:
    """Return a notebook as Markdown: its text, its code, and what that printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [f"```text\n{''.join(output['text'])}```" for output in cell.get("outputs", ())]
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page to where the site has their files."""
    pages = list_pages()
    source = next(path for path, there in pages.items() if there == page.file.src_uri)
    return _LINK.sub(lambda link: _lead(link, source, pages), markdown)


def _lead(link: re.Match[str], source: str, pages: dict[str, str]) -> str:
    target, _, anchor = link["to"].partition("#")
    if "://" in target or not target:
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path not in pages:
        return link["text"]
    here = posixpath.dirname(pages[source]) or "."
    there = posixpath.relpath(pages[path], here) + (f"#{anchor}" if anchor else "")
    return f"{link['image']}[{link['text']}]({there})"
