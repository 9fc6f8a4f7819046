"""Packages that only measuring needs, imported when they are needed; all of them come with the extra ``lab``."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from semsharekv_integrations.errors import SemShareError

INSTALL = 'pip install -e ".[lab]"'


class MissingPackageError(SemShareError, ImportError):
    """A package that is not installed is needed; the message says how to install it."""


def is_installed(module: str) -> bool:
    """Whether the top-level ``module`` can be imported; imports nothing."""
    return find_spec(module) is not None


def imported(module: str, purpose: str) -> ModuleType:
    """The module of that dotted name.

    Args:
        module: what to import.
        purpose: what it is needed for, to be read before "needs".

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackageError(f"{purpose} needs {module.split('.')[0]}: {INSTALL}") from error
