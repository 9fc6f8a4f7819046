"""Which versions of transformers this package was tested with: it lives on internals that minor versions change."""

from __future__ import annotations

from importlib import import_module

import transformers
from packaging.version import Version

from semsharekv_integrations.errors import UnsupportedVersionError

_OLDEST, _NEWEST = (5, 19), (5, 24)  # minor versions, as the requirement in pyproject.toml has them


def require_tested_transformers() -> None:
    """Do nothing if transformers has a version that the tests ran on, else raise.

    Raises:
        UnsupportedVersionError: naming its version and those that were tested.
    """
    for module in (transformers, import_module("transformers")):  # importing peft makes the module anew
        found = module.__version__
        if not _OLDEST <= Version(found).release[:2] <= _NEWEST:
            oldest, newest, above = (".".join(map(str, minor)) for minor in (_OLDEST, _NEWEST, (5, _NEWEST[1] + 1)))
            raise UnsupportedVersionError(
                f"transformers {found} is not supported; tested are {oldest} to {newest}: "
                f"pip install 'transformers>={oldest},<{above}'"
            )
