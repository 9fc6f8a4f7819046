"""The states that one model was seen in, with the runtime for each, and what all of them share."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from semsharekv_integrations.config import EngineConfig
from semsharekv_integrations.model.state import State
from semsharekv_integrations.store import KVStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_STATES = 8  # of which a runtime is kept, each with an index of passages


class OfState(Protocol):
    """What is kept for a state: a runtime."""

    embeddings_at: int  # where the model's embeddings lie, which tells replaced weights apart


Kept = TypeVar("Kept", bound=OfState)


class SharedStates(Generic[Kept]):
    """What the runtimes of one model share, and the runtimes for its latest states.

    Args:
        first: the state that the model was found in.
        config: settings of the engine.
        store: of the engine.
    """

    def __init__(self, first: str, config: EngineConfig, store: KVStore) -> None:
        self.config = config
        self.store = store
        self.as_loaded = ""  # identity of a model that was loaded by name
        self._first = first
        self._runtimes: OrderedDict[str, Kept] = OrderedDict()
        self._vocabularies: dict[int, str] = {}  # by the number of tokens: it takes long, and they only become more

    def vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a digest of all tokens and their ids, computed once for each size of the vocabulary."""
        size = len(tokenizer)
        if size not in self._vocabularies:
            self._vocabularies[size] = make_digest(json.dumps(sorted(tokenizer.get_vocab().items())))
        return self._vocabularies[size]

    def store_of(self, state: State) -> KVStore:
        """Return a view of the store for ``state``."""
        return self.store.view_state("" if state.key == self._first else state.key)

    def find_runtime(self, key: str) -> Kept | None:
        """Return the runtime kept for a state, which now counts as the latest; None if there is none."""
        if key in self._runtimes:
            self._runtimes.move_to_end(key)
        return self._runtimes.get(key)

    def list_runtimes(self) -> list[Kept]:
        """Return all kept runtimes, the latest used last."""
        return list(self._runtimes.values())

    def keep(self, key: str, runtime: Kept) -> None:
        """Keep the runtime for a state. Drop those of replaced weights, and the oldest beyond the bound."""
        for other in [k for k, r in self._runtimes.items() if r.embeddings_at != runtime.embeddings_at]:
            del self._runtimes[other]
        self._runtimes[key] = runtime
        while len(self._runtimes) > _MOST_STATES:
            self._runtimes.popitem(last=False)


def make_digest(*texts: str) -> str:
    """Return a digest of ``texts``, 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()
