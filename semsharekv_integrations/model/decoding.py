"""Decoding behind a prefill: token by token, or several tokens of a draft in one pass that verifies them.

What drafts change: nothing but time. A token of a draft is in the answer only if it is the one that is chosen behind
those before it, by the same processors on the same ids and, where tokens are drawn, by the same draw: for a seed, the
answer is the same, and its distribution is. A pass of several tokens rounds otherwise than passes of one, so where the
choice is closer than such rounding, the token is computed again by itself. What no pass by itself can undo: keys and
values of verified tokens differ in the last bits as well, as those of a prefill do from those of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from time import perf_counter

import torch
from torch import Tensor
from transformers import DynamicCache

from semsharekv_integrations.kv import TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter, Prefill
from semsharekv_integrations.model.batching import Row, SharedDecoding
from semsharekv_integrations.model.choosing import TokenChooser
from semsharekv_integrations.model.continuing import cut_back, has_kv_alone
from semsharekv_integrations.model.drafting import Drafter
from semsharekv_integrations.model.transfers import send
from semsharekv_integrations.sampling import SamplingConfig
from semsharekv_integrations.store.codec import is_out_of_memory
from semsharekv_integrations.text.grammar import Constraint


class _Pass:
    """What one pass gave: logits behind the latest token, and behind each token of the draft that came with it."""

    def __init__(self, logits: Tensor, draft: Sequence[int] = (), began_at: float | None = None) -> None:
        self.draft = draft
        self.began_at = began_at  # None once its time was noted, or where that says nothing
        self._rows = logits.split(1)  # [B, V] each
        self._at = 0

    @property
    def logits(self) -> Tensor:
        """Those [B, V] that the next token is chosen from."""
        return self._rows[self._at]

    def accept(self, token_id: int) -> bool:
        """Return whether the chosen token is the draft's; then go on to the logits behind it."""
        is_drafted = self._at < len(self.draft) and self.draft[self._at] == token_id
        self._at += is_drafted
        return is_drafted


class Decoder:
    """Finds the tokens of one answer, one after another.

    ``decode`` sets ``cache``, the cache it works on. Once it has ended, that holds KV of all tokens but the last.

    Args:
        prompt_ids: [T].
        sampling: how tokens are chosen, ``max_new_tokens`` already within the context window.
        together: the decode steps of the engine's other calls. Drafts are verified where none of them would join.
        constraint: what the answer is held to, or None.
        sources: stored texts that drafts may come from, beside the prompt and the answer, [S] each.
    """

    cache: DynamicCache

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt_ids: TokenIds,
        sampling: SamplingConfig,
        together: SharedDecoding,
        constraint: Constraint | None = None,
        sources: Sequence[TokenIds] = (),
    ) -> None:
        self._adapter = adapter
        self._together = together
        self._most_tokens = len(prompt_ids) + sampling.max_new_tokens
        self.chooser = TokenChooser(adapter, prompt_ids, sampling, constraint)
        lookup = sampling.prompt_lookup
        self.drafter = Drafter(prompt_ids, sources, together.costs, None if lookup is True else int(lookup))
        self._drafts = bool(lookup) and adapter.takes_drafts and self.chooser.is_repeatable

    def decode(
        self, prefill: Prefill, see: Callable[[Tensor], None] | None = None
    ) -> Generator[tuple[int, bool], None, None]:
        """Yield each new token and whether it is the last one. Closing the generator, or an error, ends the call.

        ``see`` gets the model's logits [B, V] for each token. After the first, ``cache`` may be replaced.
        """
        self.cache, latest = prefill.cache, _Pass(prefill.logits)
        row = self._together.join()
        try:
            while True:
                choice = self.chooser.choose(latest.logits, is_verified=bool(latest.draft))
                self._note_time(latest)
                if not choice.is_sure:
                    self.drafter.note_repeated()
                    latest = self._run(row, latest, may_draft=False)
                    continue
                if see is not None:
                    see(latest.logits)
                last, is_drafted = self.chooser.add(choice), latest.accept(choice.token_id)
                self._note_token(choice.token_id, is_drafted=is_drafted)
                yield choice.token_id, last
                if last:
                    return
                if not is_drafted:
                    latest = self._run(row, latest)
        finally:
            if latest.draft:
                cut_back(self.cache, self.chooser.ids.shape[1] - 1)
            self._together.leave(row)

    def _run(self, row: Row, former: _Pass, *, may_draft: bool = True) -> _Pass:
        """Run the latest token, and a draft behind it where one pays. Cuts off what ``former`` left of its draft."""
        ids = self.chooser.ids
        if former.draft:
            cut_back(self.cache, ids.shape[1] - 1)
        if not self._drafts or not self._together.decodes_alone(self.cache):
            return _Pass(self._together.step(row, ids, self.cache))
        began_at = perf_counter()
        draft = self.drafter.propose(self._most_tokens - ids.shape[1] - 1 if may_draft else 0)
        if len(draft) and self._is_whole(ids.shape[1] - 1):
            try:
                return _Pass(self._verify(ids, draft), draft.tolist(), began_at)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # there may be room for one token, as there was for those before
                cut_back(self.cache, ids.shape[1] - 1)
                self._drafts = False
        return _Pass(self._together.step(row, ids, self.cache), began_at=began_at)

    def _verify(self, ids: Tensor, draft: TokenIds) -> Tensor:
        """Run the last of ``ids`` [B, T] and ``draft`` [N] behind it; return logits [N + 1, V]."""
        rows = torch.cat([ids[:, -1:], send(draft, ids.device)[None]], dim=1)
        return self._adapter.verify(rows, self.cache, ids.shape[1] - 1)

    def _is_whole(self, num_tokens: int) -> bool:
        """Return whether the cache has KV of so many tokens at each layer, and nothing that could not be cut back."""
        return has_kv_alone(self.cache) and all(layer.keys.shape[2] == num_tokens for layer in self.cache.layers)

    def _note_time(self, latest: _Pass) -> None:
        """Note how long the pass took, now that its first token is chosen."""
        if latest.began_at is not None:
            self.drafter.note_pass(len(latest.draft), perf_counter() - latest.began_at)
            latest.began_at = None

    def _note_token(self, token_id: int, *, is_drafted: bool) -> None:
        if self._drafts:
            self.drafter.add(token_id)
        if is_drafted:
            self.drafter.note_accepted()
