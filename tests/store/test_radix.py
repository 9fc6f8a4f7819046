"""The radix tree alone: what is found, split and pruned, against a plain list of sequences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kept_prompts import Tokens, distinct_tokens
from semsharekv_integrations.kv import Span
from semsharekv_integrations.store.radix import Node, RadixTree

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=8, unique=True)


def ids(tokens: Tokens) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def tree_of(prompts: list[Tokens], on_split: Callable[[Node, Node], None] = lambda upper, lower: None) -> RadixTree:
    tree = RadixTree(on_split)
    for tokens in prompts:
        tree.insert(ids(tokens)).entries.add(str(tokens))
        tree.check()
    return tree


def tokens_of(node: Node) -> Tokens:
    return tuple(int(token) for step in node.path() for token in step.token_ids)


@given(PROMPTS, st.lists(st.integers(0, 2), max_size=7).map(tuple))
def test_it_finds_how_far_any_prompt_agrees(prompts: list[Tokens], wanted: Tokens) -> None:
    tree = tree_of(prompts)
    found = tree.find(ids(wanted))
    beginnings = {tokens[:n] for tokens in prompts for n in range(len(tokens) + 1)}
    assert found.num_tokens == max(n for n in range(len(wanted) + 1) if wanted[:n] in beginnings)
    agreed = tokens_of(found.node)[: found.num_tokens]
    assert agreed == wanted[: found.num_tokens] and found.node.start <= found.num_tokens <= found.node.stop
    assert found.num_tokens == 0 or found.node.start < found.num_tokens


@given(PROMPTS)
def test_every_token_of_a_common_beginning_is_there_once(prompts: list[Tokens]) -> None:
    tree = tree_of(prompts)
    assert sum(len(node.token_ids) for node in tree.nodes()) == distinct_tokens(prompts)
    ends = {key: tokens_of(node) for node in tree.nodes() for key in node.entries}
    assert ends == {str(tokens): tokens for tokens in prompts}


@given(PROMPTS, st.randoms(use_true_random=False))
def test_pruning_leaves_what_others_need(prompts: list[Tokens], random: object) -> None:
    tree = tree_of(prompts)
    left = list(prompts)
    random.shuffle(left)  # type: ignore[attr-defined]
    while left:
        tokens = left.pop()
        node = tree.insert(ids(tokens))
        node.entries.remove(str(tokens))
        gone = tree.prune(node)
        tree.check()
        assert all(one.start >= other.stop for one, other in pairwise(gone)), "the last one first"
        assert sum(len(node.token_ids) for node in tree.nodes()) == distinct_tokens(left)
    assert not tree.root.children


def test_a_split_divides_all_that_a_node_carries() -> None:
    seen: list[tuple[Tokens, Tokens]] = []
    tree = tree_of([(1, 2, 3, 4)], lambda upper, lower: seen.append((tokens_of(upper), tokens_of(lower))))
    (node,) = tree.nodes()
    node.hits, node.pins, node.documents = 3.0, 2, {"d": Span(0, 2), "e": Span(2, 4), "f": Span(0, 3)}
    tree.insert(ids((1, 2, 9))).entries.add("x")
    assert seen == [((1, 2), (1, 2, 3, 4))]
    upper, lower = node.parent, node
    assert upper is not None
    assert (upper.hits, upper.pins, upper.documents, upper.entries) == (3.0, 2, {"d": Span(0, 2)}, set())
    assert (lower.hits, lower.pins, lower.documents) == (3.0, 2, {"e": Span(2, 4), "f": Span(0, 3)})
    assert lower.id != upper.id and (upper.start, upper.stop, lower.start, lower.stop) == (0, 2, 2, 4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda node: setattr(node, "start", 1),
        lambda node: node.entries.clear(),
        lambda node: setattr(node, "token_ids", node.token_ids[:0]),
        lambda node: node.parent.children.update({7: node}),
    ],
)
def test_check_sees_damage(damage: Callable[[Node], object]) -> None:
    tree = tree_of([(1, 2, 3), (1, 2, 4)])
    damage(tree.find(ids((1, 2, 4))).node)
    with pytest.raises(AssertionError):
        tree.check()
