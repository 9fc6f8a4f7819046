"""Room in the context window: text far beyond it is refused before all of it is tokenized."""

from __future__ import annotations

from collections.abc import Callable

from semsharekv_integrations.errors import ContextWindowError

_USUAL_TOKEN_CHARS = 4  # a text of so many for each token of the window is tokenized at once
_PIECE_CHARS = 1 << 15
_CUT_TOKENS = 16  # by so many a piece's tokens may differ from the whole text's, at its ends
_MARGIN_RATIO = 1.25  # beyond which the count of the pieces is trusted


def require_room(num_tokens: int, window: int | None, *, counted: str = "") -> None:
    """Whether a prompt leaves room for a new token.

    Args:
        num_tokens: of the prompt.
        window: context window in tokens, or None if nothing bounds it.
        counted: what stands before the number, if not all were counted.

    Raises:
        ContextWindowError: if it does not.
    """
    if window is not None and num_tokens >= window:
        raise ContextWindowError(
            f"prompt has {counted}{num_tokens} tokens; accepted is up to {window - 1}, "
            f"since the context window of {window} must also hold a new token"
        )


def require_room_for_text(text: str, window: int | None, count: Callable[[str], int]) -> None:
    """Whether a text that looks too long is not so long that this is beyond doubt; piece by piece.

    Args:
        text: the whole prompt.
        window: context window in tokens, or None.
        count: how many tokens a text has.

    Raises:
        ContextWindowError: if it is.
    """
    if window is None or len(text) <= _USUAL_TOKEN_CHARS * window:
        return
    found = 0
    for start in range(0, len(text), _PIECE_CHARS):
        found += max(0, count(text[start : start + _PIECE_CHARS]) - _CUT_TOKENS)
        if found > _MARGIN_RATIO * window:
            require_room(found, window, counted="more than ")
