"""What the demo gives a model to read, and what it asks.

Real models read made-up news in plain English (``assets/articles.toml``). The model that ships knows nothing but the
synthetic news world, so it reads that.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from random import Random

from semsharekv_integrations.lab import prompts, world

PARTS = ("chain", "query", "chat")
_ANSWER_TOKENS = 24
_WORLD_ANSWER_TOKENS_PER_ARTICLE = 60  # a summary has a line for each


@dataclass(frozen=True)
class Question:
    """What is asked, and what tells a right answer."""

    text: str
    expected: str


@dataclass(frozen=True)
class Script:
    """The whole of what is read and asked.

    Attributes:
        articles: texts by id; all of them stand in every prompt.
        questions: those of each of ``PARTS``, in order.
        is_right: whether an answer is the expected one.
        answer_tokens: most tokens of an answer.
        reword: an article with the same facts in other words, or None where that cannot be had.
    """

    articles: Mapping[str, str]
    questions: Mapping[str, Sequence[Question]]
    is_right: Callable[[str, str], bool]
    answer_tokens: int
    reword: Callable[[Random, str], str] | None = None

    @property
    def num_calls(self) -> int:
        """How many questions there are in all."""
        return sum(map(len, self.questions.values()))


def read_news() -> Script:
    """The news that real models read."""
    text = (files("semsharekv_integrations") / "assets" / "articles.toml").read_text(encoding="utf-8")
    found = tomllib.loads(text)
    questions = {part: [Question(**one) for one in found["questions"][part]] for part in PARTS}
    articles = {article["id"]: article["text"].strip() for article in found["article"]}
    return Script(articles, questions, _mentions, _ANSWER_TOKENS)


def make_world_news(num_articles: int, seed: int) -> Script:
    """News of the synthetic world, for the model that was trained on it.

    Raises:
        ValueError: if there are no articles.
    """
    rng = Random(seed)
    documents = world.make_documents(rng, num_articles)
    asked = [Question(text, answer) for text, answer in world.converse(rng, documents, 6)]
    summary = Question(prompts.SUMMARY_REQUESTS[0], prompts.summary(documents))
    by_text = {document.text: document for document in documents}
    return Script(
        articles={document.town: document.text for document in documents},
        questions={"chain": [summary, asked[0]], "query": asked[1:3], "chat": asked[3:]},
        is_right=lambda said, expected: prompts.right_share(said, expected) == 1,
        answer_tokens=_WORLD_ANSWER_TOKENS_PER_ARTICLE * num_articles,
        reword=lambda rng, text: world.reword(rng, by_text[text]).text,
    )


def _mentions(said: str, expected: str) -> bool:
    return expected.lower() in said.lower()
