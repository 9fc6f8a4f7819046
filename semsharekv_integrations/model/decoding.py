"""Decoding behind a prefill, token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator

from torch import Tensor
from transformers import DynamicCache

from semsharekv_integrations.config import SamplingConfig
from semsharekv_integrations.kv import TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter, Prefill
from semsharekv_integrations.model.batching import SharedDecoding
from semsharekv_integrations.model.choosing import TokenChooser
from semsharekv_integrations.text.grammar import Constraint


class Decoder:
    """Finds the tokens of one answer, one after another.

    ``decode`` sets ``cache``, the cache it works on. Once it has ended, that holds KV of all tokens but the last.

    Args:
        prompt_ids: [T].
        sampling: how tokens are chosen, ``max_new_tokens`` already within the context window.
        together: the decode steps of the engine's other calls.
        constraint: what the answer is held to, or None.
    """

    cache: DynamicCache

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt_ids: TokenIds,
        sampling: SamplingConfig,
        together: SharedDecoding,
        constraint: Constraint | None = None,
    ) -> None:
        self._together = together
        self.chooser = TokenChooser(adapter, prompt_ids, sampling, constraint)

    def decode(
        self, prefill: Prefill, see: Callable[[Tensor], None] | None = None
    ) -> Generator[tuple[int, bool], None, None]:
        """Yield each new token and whether it is the last one. Closing the generator, or an error, ends the call.

        ``see`` gets the model's logits [B, V] for each token. After the first, ``cache`` may be replaced.
        """
        self.cache, logits = prefill.cache, prefill.logits
        row = self._together.join()
        try:
            while True:
                choice = self.chooser.choose(logits)
                if see is not None:
                    see(logits)
                last = self.chooser.add(choice)
                yield choice.token_id, last
                if last:
                    return
                logits = self._together.step(row, self.chooser.ids, self.cache)
        finally:
            self._together.leave(row)
