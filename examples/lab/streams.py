"""Measure what arranging spares: streams of questions over the same paragraphs, as retrieved and arranged.

    PYTHONPATH=. python examples/lab/streams.py --model FOLDER --data xquad.json --streams 20 --out streams.jsonl

A stream has ten questions over 20 paragraphs. For each, the six that BM25 ranks highest are retrieved, the one with
the answer always among them. Every stream runs twice in mode ``exact``, each time from an empty store: as retrieved,
and as ``engine.arrange`` orders it. Each stream's rows are appended to ``--out``; a later run goes on behind them.
Written down before the first run: more is reused, and answers are right as often.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.lab.figures import NUM_RESAMPLES

PARAGRAPHS, QUESTIONS, RETRIEVED = 20, 10, 6  # of a stream; for each question
ORDERS = ("given", "arranged")
SYSTEM = {"role": "system", "content": "Answer with as few words as possible, taken from the documents."}
BEFORE = [SYSTEM, {"role": "user", "content": "Documents:\n\n"}]
K1, B = 1.5, 0.75  # of BM25
GIB = 1024**3


class Question(NamedTuple):
    """A question, its right answers, and the paragraphs that were retrieved for it, best first."""

    text: str
    answers: Sequence[str]
    paragraphs: Sequence[str]


def list_words(text: str) -> list[str]:
    """Return the words of ``text`` as SQuAD compares answers: lower case, without articles and punctuation."""
    plain = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def rank(question: str, paragraphs: Sequence[str]) -> list[int]:
    """Return the indices of the paragraphs by BM25, the best first."""
    bags = [Counter(list_words(paragraph)) for paragraph in paragraphs]
    usual = sum(map(Counter.total, bags)) / len(bags)
    scores = [0.0] * len(bags)
    for word in set(list_words(question)):
        holding = sum(word in bag for bag in bags)
        weight = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
        for index, bag in enumerate(bags):
            found = bag[word]
            scores[index] += weight * found * (K1 + 1) / (found + K1 * (1 - B + B * bag.total() / usual))
    return sorted(range(len(bags)), key=lambda index: -scores[index])


def draw_stream(data: Sequence[dict[str, Any]], seed: int) -> Iterator[Question]:
    """Yield the questions of the stream with this seed, each with what was retrieved for it."""
    chance = random.Random(seed)
    drawn = chance.sample(range(len(data)), PARAGRAPHS)
    texts = [data[index]["text"] for index in drawn]
    asked = [(place, each) for place, index in enumerate(drawn) for each in data[index]["questions"]]
    for gold, each in chance.sample(asked, QUESTIONS):
        ranked = rank(each["question"], texts)
        top = ranked[:RETRIEVED] if gold in ranked[:RETRIEVED] else [*ranked[: RETRIEVED - 1], gold]
        yield Question(each["question"], each["answers"], [texts[index] for index in top])


def is_hit(answer: str, answers: Sequence[str]) -> bool:
    """Whether the words of one of the right answers stand in ``answer``, one behind the other."""
    said = f" {' '.join(list_words(answer))} "
    return any(f" {' '.join(list_words(right))} " in said for right in answers)


def ask(engine: SemShareEngine, question: Question, order: str, namespace: str, max_new_tokens: int) -> dict[str, Any]:
    """Return what one call said, reused and took, arranging included."""
    began = perf_counter()
    texts = list(question.paragraphs)
    if order == "arranged":
        texts = engine.arrange(texts, namespace, before=BEFORE)
    arrange_s = perf_counter() - began
    content = "".join([BEFORE[1]["content"], *(f"{text}\n\n" for text in texts), f"Question: {question.text}"])
    prompt = [SYSTEM, {"role": "user", "content": content}]
    generation = engine.generate(prompt, namespace=namespace, max_new_tokens=max_new_tokens)
    report = generation.report
    return {
        "order": order,
        "text": generation.text,
        "hit": is_hit(generation.text, question.answers),
        "prompt_tokens": report.prompt_tokens,
        "prefix_tokens": report.prefix_tokens,
        "arranged_tokens": report.arranged_tokens,
        "ttft_s": report.ttft_s + arrange_s,
        "arrange_s": arrange_s,
    }


def run_stream(engine: SemShareEngine, questions: Sequence[Question], seed: int, max_new_tokens: int) -> dict[str, Any]:
    """Return the calls of one stream in both orders, each in a namespace of its own, from an empty store.

    Both ask a question one behind the other, so that a busy machine slows both alike; which is first alternates.
    """
    calls: list[dict[str, Any]] = []
    for index, question in enumerate(questions):
        orders = ORDERS[:: 1 if (seed + index) % 2 else -1]
        calls += [{"question": index, **ask(engine, question, order, order, max_new_tokens)} for order in orders]
    engine.clear()
    return {"stream": seed, "calls": calls}


def summarize(streams: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of both orders and their paired differences, with 95% intervals by resampling streams."""
    by_order = {
        order: [[call for call in stream["calls"] if call["order"] == order] for stream in streams] for order in ORDERS
    }
    for order in ORDERS:
        by_order[order] = [sorted(calls, key=lambda call: call["question"]) for calls in by_order[order]]
    flat = {order: [call for calls in by_order[order] for call in calls] for order in ORDERS}
    pairs = list(zip(flat["given"], flat["arranged"], strict=True))
    found: dict[str, Any] = {"streams": len(streams), "n": len(pairs)}
    for order, calls in flat.items():
        found[order] = {
            "reused": sum(c["prefix_tokens"] for c in calls) / sum(c["prompt_tokens"] for c in calls),
            "gold": sum(c["hit"] for c in calls) / len(calls),
            "ttft_s": median(c["ttft_s"] for c in calls),
            "arranged_tokens": sum(c["arranged_tokens"] for c in calls) / len(calls),
        }
    hits = [
        [b["hit"] - a["hit"] for a, b in zip(*both, strict=True)]
        for both in zip(by_order["given"], by_order["arranged"], strict=True)
    ]
    picks = np.random.default_rng(0).integers(len(hits), size=(NUM_RESAMPLES, len(hits)))
    drawn = np.array([np.mean(each) for each in hits])[picks].mean(axis=1)
    found["gold_difference"] = [float(np.mean(hits)), *map(float, np.percentile(drawn, (2.5, 97.5)))]
    found["won_lost"] = [sum(d == sign for each in hits for d in each) for sign in (1, -1)]
    found["ttft_ratio"] = median(b["ttft_s"] / a["ttft_s"] for a, b in pairs)
    found["ttft_ratio_of_sums"] = sum(b["ttft_s"] for _, b in pairs) / sum(a["ttft_s"] for a, _ in pairs)
    found["agreement"] = sum(a["text"] == b["text"] for a, b in pairs) / len(pairs)
    found["arrange_ms"] = 1000 * median(call["arrange_s"] for call in flat["arranged"])
    return found


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or hub id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data", type=Path, required=True, help="paragraphs with questions, as JSON")
    parser.add_argument("--streams", type=int, default=20, help="how many in all, those in --out included")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each stream; continued if there")
    return parser.parse_args()


def main() -> None:
    """Run the streams that ``--out`` lacks, and print the figures of all as JSON."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    data = json.loads(arguments.data.read_text())
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    streams = [json.loads(line) for line in lines if re.fullmatch(r"\{.*\}", line)]  # the last may have been cut
    config = EngineConfig(reuse=ReuseConfig(mode="exact"), store=StoreConfig(max_bytes=3 * GIB))
    engine = SemShareEngine.from_pretrained(arguments.model, config, device="cpu", dtype=arguments.dtype)
    for seed in range(len(streams), arguments.streams):
        streams.append(run_stream(engine, list(draw_stream(data, seed)), seed, arguments.max_new_tokens))
        with arguments.out.open("a") as file:
            file.write(json.dumps(streams[-1]) + "\n")
    print(json.dumps(summarize(streams), indent=1))


if __name__ == "__main__":
    main()
