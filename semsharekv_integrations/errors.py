"""Errors that callers may want to catch. Bad arguments raise ``ValueError`` naming field, value and bound.

None of these is a ``ValueError``: LlamaIndex takes that for a badly written answer, and goes on without one.
"""

from __future__ import annotations


class SemShareError(Exception):
    """Base of all errors of this package that are not plain bad arguments."""


class UnsupportedModelError(SemShareError):
    """The model does not allow what was asked of it; the message names what was found."""


class ModelLoadError(SemShareError):
    """The model or its tokenizer could not be loaded; the message names the path or hub id."""


class UnsupportedVersionError(SemShareError, ImportError):
    """A package that this one builds on has a version that was not tested; the message names those that were."""


class ContextWindowError(SemShareError):
    """The prompt leaves no room for a single new token in the model's context window."""


class PromptError(SemShareError):
    """The prompt cannot be rendered: it is empty, malformed, or refused by the chat template."""


class CallError(SemShareError):
    """LlamaIndex called with what the engine refuses as a bad argument; the message names field, value and bound."""


class StoreFileError(SemShareError):
    """A file of stored KV is missing, damaged, or belongs to another model or format version."""


class StoreLockedError(SemShareError):
    """The directory of stored KV is in use by another process; the message names the directory."""


class StoreWriteError(SemShareError):
    """Stored KV could not be written to disk; the message names the file and the reason."""
