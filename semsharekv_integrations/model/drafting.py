"""Drafts of an answer (prompt lookup): what once followed the latest tokens, in the prompt, the answer or stored texts.

The model verifies several tokens of a draft in one pass, which takes longer than a pass of one. A draft is given out
where it likely saves more: by how long such passes took before, and by how often guesses were right in this answer.
Most guesses are tried for nothing, on tokens that came one by one. Knows nothing about models: a draft is a guess, and
whoever runs the model tells what came of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from semsharekv_integrations.kv import TokenIds

MOST_MATCHED = 24  # tokens: more that agree are no better sign
MOST_WEIGHED = 15  # tokens of a draft, where its length is weighed
SAME_PROMPT = 16  # so many agreeing tokens, those of the prompt included, count in full
_LENGTHS = (3, 7, MOST_WEIGHED)
_LEAST_GAIN = 1.1  # expected tokens in the time of one
_ALLOWED, _ALLOWED_SHARE = 1.5, 0.01  # passes that drafts may have cost, and more for each token of the answer
_BORDER = -1  # between texts
_EDGES = (2, 3, 4, 6, 9, 13, 17)  # of agreeing tokens
_EXPECTED = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.88, 0.92)  # how often the next token agrees too, where nothing is known
_WEIGHT = 6.0  # of that, in guesses


class PassCosts:
    """How long passes of several tokens take, in passes of one token; learnt from one model's passes.

    Args:
        on_cpu: whether the model is there, where several rows cost more from the start.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        self._base, self._slope = (1.5, 0.06) if on_cpu else (1.1, 0.01)
        self._single_s = 0.0
        self._ratios: dict[int, float] = {}  # by size, see ``_find_size_class``

    def estimate(self, rows: int) -> float:
        """Return the time of a pass of ``rows`` tokens in passes of one; 1 for one."""
        return 1.0 if rows == 1 else self._ratios.get(_find_size_class(rows), self._base + self._slope * rows)

    def note(self, rows: int, seconds: float) -> None:
        """Take in how long a pass of ``rows`` tokens took."""
        if rows == 1:
            known = self._single_s or seconds
            self._single_s += 0.2 * (min(seconds, 3 * known) - self._single_s) if self._single_s else seconds
        elif self._single_s:
            ratio = min(max(1.0, seconds / self._single_s), rows + 1.0)
            before = self.estimate(rows)
            self._ratios[_find_size_class(rows)] = before + 0.2 * (ratio - before)


def _find_size_class(rows: int) -> int:
    """Return the number of the class of sizes: 1 for 2 rows, 2 for 3 to 4, 3 for 5 to 8, and so on."""
    return (rows - 1).bit_length()


class Drafter:
    """Guesses how one answer goes on.

    Args:
        prompt_ids: [T].
        sources: stored texts, [S] each, of which the call may know.
        costs: of the model's passes.
        fixed: how many tokens a draft has, wherever there is one; None to weigh.

    Attributes:
        drafted_tokens: tokens of drafts that the model verified.
        accepted_tokens: those of them that the answer has.
    """

    def __init__(
        self, prompt_ids: TokenIds, sources: Sequence[TokenIds], costs: PassCosts, fixed: int | None = None
    ) -> None:
        border = np.array([_BORDER], dtype=np.int64)
        texts = [part for source in sources for part in (border, source)]
        self._ids = np.concatenate([*texts, border, prompt_ids])
        self._size = self._answer = len(self._ids)  # of what is filled, and where the answer begins
        self._costs = costs
        self._fixed = fixed
        self._tried, self._right = [0] * len(_EXPECTED), [0] * len(_EXPECTED)
        self._next = 0  # where the guessed token stands; 0 for none
        self._agreed = 0
        self._balance = 0.0  # passes of one token that drafts have saved
        self.drafted_tokens = self.accepted_tokens = 0

    def add(self, token_id: int) -> None:
        """Take one more token of the answer, and look for what may follow."""
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(64, self._size // 8), dtype=np.int64)])
        self._ids[self._size] = token_id
        self._size += 1
        if self._next:
            is_right = bool(self._ids[self._next] == token_id)
            self._count(is_right)
            self._next, self._agreed = (self._next + 1, self._agreed + 1) if is_right else (0, 0)
        if not self._next or self._next >= self._size or self._ids[self._next] == _BORDER:
            self._next, self._agreed = self._search()

    def propose(self, room: int) -> NDArray[np.int64]:
        """Return the next tokens, at most ``room``, as far as it likely pays to verify them; maybe none."""
        if not self._next or room < 1:
            return self._ids[:0]
        most = min(room, self._fixed or MOST_WEIGHED)
        found = self._ids[self._next : min(self._next + most, self._size)]
        borders = np.flatnonzero(found == _BORDER)
        found = found[: borders[0]] if borders.size else found
        return found[: len(found) if self._fixed else self._weigh(len(found))].copy()

    def note_pass(self, drafted: int, seconds: float) -> None:
        """Take in that a pass with a draft of so many tokens, maybe 0, took ``seconds``."""
        self._costs.note(drafted + 1, seconds)
        self.drafted_tokens += drafted
        self._balance -= self._costs.estimate(drafted + 1) - 1

    def note_accepted(self) -> None:
        """Take in that the token added last was one of a draft, and saved a pass."""
        self.accepted_tokens += 1
        self._balance += 1

    def note_repeated(self) -> None:
        """Take in that the latest pass with a draft did not tell the next token, so that another pass must."""
        self._balance -= 1

    def _weigh(self, available: int) -> int:
        """Return the length, up to ``available`` tokens, that likely gives most tokens for its time; 0 if none pays."""
        allowed = self._balance + _ALLOWED + _ALLOWED_SHARE * (self._size - self._answer)
        best, gain, expected, reached = 0, _LEAST_GAIN, 0.0, 1.0
        for length in range(1, available + 1):
            reached *= self._estimate(self._agreed + length - 1)
            expected += reached
            if length in _LENGTHS or length == available:
                cost = self._costs.estimate(length + 1)
                if (1 + expected) / cost > gain and cost - 1 <= allowed:
                    best, gain = length, (1 + expected) / cost
        return best

    def _estimate(self, agreed: int) -> float:
        """Return how often the token behind so many agreeing ones is right."""
        at = bisect_right(_EDGES, agreed)
        return (self._right[at] + _WEIGHT * _EXPECTED[at]) / (self._tried[at] + _WEIGHT)

    def _count(self, is_right: bool) -> None:
        at = bisect_right(_EDGES, self._agreed)
        self._tried[at] += 1
        self._right[at] += is_right

    def _search(self) -> tuple[int, int]:
        """Return where what follows the latest tokens stands, and how many agree before it; zeros for nothing.

        Of several places those where most tokens agree, and of these the last one with much behind it. Tokens of the
        prompt count only where so many agree that the whole question does: every prompt ends alike.
        """
        ids, last = self._ids, self._size - 1
        found = np.flatnonzero(ids[:last] == ids[last])
        if not found.size:
            return 0, 0
        agreed = 1
        while agreed < MOST_MATCHED:
            longer = found[ids[found - agreed] == ids[last - agreed]]
            if not longer.size or ids[last - agreed] == _BORDER:
                break
            found, agreed = longer, agreed + 1
        roomy = found[found + MOST_WEIGHED < last]
        at = int(roomy[-1] if roomy.size else found[0]) + 1
        answered = self._size - self._answer
        if ids[at] == _BORDER:
            return 0, 0
        return at, agreed if agreed <= answered or agreed >= SAME_PROMPT else answered
