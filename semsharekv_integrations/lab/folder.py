"""A user's own folder of documents, measured without gold answers: ``semsharekv bench --documents FOLDER``.

Its texts are cut into passages, as a retriever would find them. What is asked of a passage is general, or what the
user gives; no answer is known to be right, so that agreement with a full prefill and the KL along its answer count.
Knows nothing about tokenizers, models or engines.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from semsharekv_integrations.errors import require
from semsharekv_integrations.lab.texts import SIZE, Passage, Question, check_size
from semsharekv_integrations.warming.folder import SUFFIXES, UnusableDocumentError, find_documents, read_document

PASSAGE_WORDS = 150  # at most
SCENARIOS = ("text_reordered", "text_shared", "text_next_turn", "text_unlike", "text_system")  # need no gold answer
USUAL, QUICK = SCENARIOS[:-1], SCENARIOS[:2]
TOPIC_WORDS = 3
GENERAL = ("Summarize the passages in two sentences.", "Which names, dates and numbers stand in the passages?")
STORED = ("What are the passages about?", "Which subjects do the passages have?")  # the stored prompt asks one of them
_WORD = re.compile(r"[^\W\d_]{4,}")


def read_folder(folder: Path, questions: Sequence[str] = ()) -> tuple[Passage, ...]:
    """Return the passages of all texts in UTF-8 in ``folder``, at any depth, each with what is asked of it.

    Raises:
        ValueError: if it is no folder, or has too few passages to put others beside some.
    """
    require(folder.is_dir(), "--documents", str(folder), "a folder of documents")
    cut = dict(_cut_all(folder))
    said = f"a folder whose files ({', '.join(SUFFIXES)}) make 4 or more passages of up to {PASSAGE_WORDS} words"
    require(len(cut) >= 4, "--documents", f"{folder} ({len(cut)} passages)", said)
    asked = tuple(questions) or GENERAL
    first = next(question for question in STORED if question not in asked)
    topics = {} if questions else _find_topics(cut)
    about = {key: (f"What do the passages say about {topic}?",) for key, topic in topics.items()}
    return tuple(_make_passage(key, text, (first, *about.get(key, ()), *asked)) for key, text in cut.items())


def choose_size(passages: Sequence[Passage], asked: int | None) -> int:
    """Return how many passages stand in a prompt: what was asked for, else what is usual, if there are so many."""
    if asked is not None:
        check_size(asked, passages)
    return asked or min(SIZE, len(passages) // 2)


def digest_folder(folder: Path) -> str:
    """Return what names the content of its passages."""
    return blake2b(repr(list(_cut_all(folder))).encode(), digest_size=8).hexdigest()


def find_unusable(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the id of every file that should be a document and cannot be one, and why."""
    for key, path in find_documents(folder):
        try:
            read_document(key, path)
        except UnusableDocumentError as error:
            yield key, str(error)


def _cut_all(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the passages of every document that is not unusable, by document and number."""
    from llama_index.core.node_parser import SentenceSplitter  # seconds, which other commands do not wait for

    splitter = SentenceSplitter(chunk_size=PASSAGE_WORDS, chunk_overlap=0, tokenizer=str.split)
    seen: set[str] = set()
    for key, path in find_documents(folder):
        try:
            text = read_document(key, path)
        except UnusableDocumentError:
            continue
        for number, passage in enumerate(splitter.split_text(text), 1):
            if passage.strip() and passage not in seen:  # the same text twice would be two documents in one
                seen.add(passage)
                yield f"{key}, passage {number}", passage.strip()


def _find_topics(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the words that a passage has more of than the others, in the order in which they stand in it."""
    words = {key: _WORD.findall(text) for key, text in texts.items()}
    known = Counter(word for found in words.values() for word in set(found))
    topics = {}
    for key, found in words.items():
        counts = Counter(found)
        best = sorted(counts, key=lambda word: (-counts[word] / known[word], found.index(word)))[:TOPIC_WORDS]
        if best:
            topics[key] = ", ".join(sorted(best, key=found.index))
    return topics


def _make_passage(key: str, text: str, asked: Sequence[str]) -> Passage:
    return Passage(key, (text,), {}, tuple(Question(question, ()) for question in asked))
