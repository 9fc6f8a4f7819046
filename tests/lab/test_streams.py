"""Streams of questions over the same paragraphs: what is drawn, and what is said of both orders."""

from __future__ import annotations

import streams
from semsharekv_integrations.lab.answers import holds_answer
from semsharekv_integrations.lab.texts import Passage, Question
from tiny_models import EngineMaker

TOWNS = ["Velmar", "Osteck", "Karna", "Prorna", "Dora", "Cenro", "Hexvia"]
PASSAGES = [
    Passage(
        f"{town} {n}",
        (f"In {town} number {n} the bridge was closed for {n + 3} days.",),
        {},
        (Question(f"How long was it closed in {town} number {n}?", (f"{n + 3} days",)),),
    )
    for n, town in enumerate(TOWNS * 4)
]


def test_a_stream_is_the_same_every_time_and_retrieves_the_right_paragraph() -> None:
    drawn = list(streams.draw_stream(PASSAGES, 3))
    assert drawn == list(streams.draw_stream(PASSAGES, 3)) != list(streams.draw_stream(PASSAGES, 4))
    assert len(drawn) == streams.QUESTIONS
    for question in drawn:
        assert len(set(question.paragraphs)) == streams.RETRIEVED
        assert any(holds_answer(paragraph, question.answers[0]) for paragraph in question.paragraphs)


def test_both_orders_read_the_same_and_arranging_reuses_more(make_engine: EngineMaker) -> None:
    engine = make_engine("exact", max_context_tokens=1024)
    done = [streams.run_stream(engine, list(streams.draw_stream(PASSAGES, seed)), seed, 2) for seed in range(2)]
    found = streams.summarize(done)
    assert found["n"] == 2 * streams.QUESTIONS and found["given"]["arranged_tokens"] == 0
    assert found["arranged"]["reused"] > found["given"]["reused"]
    assert engine.stats()["store_entries"] == 0
    low, high = found["gold_difference"][1:]
    assert low <= found["gold_difference"][0] <= high
