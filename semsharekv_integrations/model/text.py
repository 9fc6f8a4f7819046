"""Token ids to text, piece by piece: whole characters only, and nothing that may belong to a stop string.

Where several stop strings stand in the text, the one that is complete first ends it (the longest, of several that
end together): so the text does not depend on how it was cut into tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"


class StopStrings:
    """Ends a text at the first of some strings that is complete.

    Args:
        stop: the strings.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""  # may be the start of a stop string
        self.stopped = False

    def push(self, text: str, *, final: bool = False) -> str:
        """What certainly stands before a stop string; sets ``stopped`` when one is complete. ``final`` lets all go."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)[1]], ""
            return released
        keep = 0 if final else self._possible_stop_chars()
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def _possible_stop_chars(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0


class TextStream:
    """The text of one generation as it grows.

    Decoding starts a few tokens back, since some tokenizers put a space before a token only behind another one.

    Args:
        tokenizer: of the model.
        stop: strings that end the text.
        marks: special tokens that are part of the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], marks: Collection[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = StopStrings(stop)
        self._marks = marks
        self._special = special_ids(tokenizer) if marks else frozenset()
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self._stop_ids = {token_id for token, token_id in special if token in stop}  # never in the decoded text
        self._ids: list[int] = []
        self._context_start = 0  # decoding starts here
        self._text_start = 0  # tokens before this are in the text already

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stop.stopped

    def push(self, token_id: int) -> str:
        """Text that became certain with this token."""
        self._ids.append(token_id)
        ends = token_id in self._stop_ids
        text = self._stop.push(self._new_text(final=ends), final=ends)
        self._stop.stopped = self.stopped or ends
        return text

    def finish(self) -> str:
        """The text held back until now; nothing if a stop string ended it."""
        return "" if self.stopped else self._stop.push(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        context = self._decode(self._ids[self._context_start : self._text_start])
        whole = self._decode(self._ids[self._context_start :])
        if len(whole) <= len(context) or (whole.endswith(_INCOMPLETE) and not final):
            return ""
        self._context_start, self._text_start = self._text_start, len(self._ids)
        return whole[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        if not self._marks:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        kept = [token_id for token_id in ids if token_id in self._marks or token_id not in self._special]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that decoding drops."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}
