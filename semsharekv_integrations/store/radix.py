"""The radix tree of one namespace: a beginning that several prompts share is one node, whose KV is kept once.

A node stands for consecutive tokens behind those of its parent. It carries KV and places for the tiers; the tree knows
nothing about them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from semsharekv_integrations.kv import Span, TokenIds, count_common_tokens, select_within

if TYPE_CHECKING:
    from semsharekv_integrations.store.codec import PackedKV
    from semsharekv_integrations.store.placed import PlacedKV


class FileRange(NamedTuple):
    """The KV of a node on disk: as many tokens of ``file`` as the node has, from ``first`` on."""

    file: str
    first: int


@dataclass(eq=False)
class Node:
    """Consecutive tokens of every stored prompt that goes through here."""

    token_ids: TokenIds  # [N] its own
    parent: Node | None = None  # the node before it; None for a root, and for a tainted entry's node
    start: int = 0  # position of its first token
    children: dict[int, Node] = field(default_factory=dict)  # those behind it, by their first token
    entries: set[str] = field(default_factory=set)  # keys of the entries that end with it
    pins: int = 0  # number of pinned entries that need it
    held: PackedKV | None = None  # its KV in memory
    on_disk: FileRange | None = None  # its KV on disk
    shelved: PlacedKV | None = None  # its KV in a library
    hits: float = 0.0  # number of times it was reused
    documents: dict[str, Span] = field(default_factory=dict)  # that end in it; every prompt with its tokens has them
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # for records

    @property
    def outlasts_memory(self) -> bool:
        """Whether its KV lies on disk or in a library, so that memory may drop it."""
        return self.on_disk is not None or self.shelved is not None

    @property
    def stop(self) -> int:
        """Position behind its last token."""
        return self.start + len(self.token_ids)

    def path(self) -> list[Node]:
        """Return all nodes from the first token to this one, without the root, which has no tokens."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and len(node.token_ids):
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def below(self) -> Iterator[Node]:
        """Yield this node and all behind it, parents before children."""
        pending = [self]
        while pending:
            node = pending.pop()
            yield node
            pending += node.children.values()


class Found(NamedTuple):
    """The deepest node that shares a token with a prompt, and how many tokens agree in all."""

    node: Node
    num_tokens: int


class RadixTree:
    """Token sequences, found by their beginning. Not thread-safe.

    Calls ``on_split`` with a new upper node and the node whose first tokens it took over.
    """

    def __init__(self, on_split: Callable[[Node, Node], None]) -> None:
        self.root = Node(np.empty(0, dtype=np.int64))
        self._on_split = on_split

    def find(self, token_ids: TokenIds) -> Found:
        """Follow ``token_ids`` [T] as far as the tree agrees; return the last node and how many tokens agree."""
        node, agreed = self.root, 0
        while agreed < len(token_ids):
            child = node.children.get(int(token_ids[agreed]))
            if child is None:
                break
            shared = count_common_tokens(child.token_ids, token_ids[agreed:])
            node, agreed = child, agreed + shared
            if shared < len(child.token_ids):
                break
        return Found(node, agreed)

    def insert(self, token_ids: TokenIds) -> Node:
        """Return the node that ends with the last of ``token_ids`` [T]; split or add one if needed, without KV."""
        node, agreed = self.find(token_ids)
        if agreed < node.stop:
            node = self._split(node, agreed - node.start)
        return node if agreed == len(token_ids) else self.attach(node, token_ids[agreed:])

    def attach(self, parent: Node, token_ids: TokenIds, node_id: str | None = None) -> Node:
        """Add a node behind ``parent`` and return it. Asserts that no child begins with the same token."""
        assert int(token_ids[0]) not in parent.children
        node = Node(token_ids, parent, parent.stop, id=node_id or uuid.uuid4().hex)
        parent.children[int(token_ids[0])] = node
        return node

    @staticmethod
    def prune(node: Node) -> list[Node]:
        """Remove ``node`` and those before it, as far as no entry needs them; return them, the last one first."""
        gone = []
        while node.parent is not None and not node.entries and not node.children:
            gone.append(node)
            del node.parent.children[int(node.token_ids[0])]
            node = node.parent
        return gone

    def nodes(self) -> Iterator[Node]:
        """Yield all nodes but the root, parents before children."""
        return (node for node in self.root.below() if node is not self.root)

    def _split(self, node: Node, num_tokens: int) -> Node:
        """Move the first tokens of ``node`` to a new node before it, call ``on_split``, and return the new node."""
        assert node.parent is not None and 0 < num_tokens < len(node.token_ids)
        upper = Node(node.token_ids[:num_tokens], node.parent, node.start, pins=node.pins, hits=node.hits)
        node.parent.children[int(upper.token_ids[0])] = upper
        node.token_ids, node.start, node.parent = node.token_ids[num_tokens:], upper.stop, upper
        upper.children[int(node.token_ids[0])] = node
        upper.documents = select_within(node.documents, upper.stop)
        node.documents = {key: span for key, span in node.documents.items() if key not in upper.documents}
        self._on_split(upper, node)
        return upper

    def check(self) -> None:
        """Assert that tokens are ordered from the root on, and that no node is empty or superfluous."""
        for parent in self.root.below():
            for token, node in parent.children.items():
                assert len(node.token_ids) > 0 and token == node.token_ids[0] and node.parent is parent
                assert node.start == parent.stop
                assert node.entries or node.children, "a node that no entry needs"
