"""Compare what a user could put into the same chain: seconds to the first token, right answers, memory.

    pip install kvboost==0.9.0 langchain-huggingface==1.2.3 llama-index-llms-huggingface==0.8.0 sentencepiece
    PYTHONPATH=. python examples/lab/compare_chains.py --model FOLDER --out examples/lab/results/chains.md

Ten questions each about sets of six Wikipedia paragraphs (XQuAD), which stand in another order for every question, as
a retriever gives them. Every way has a process with the model to itself, on one thread; they take turns question by
question, so that what else runs on the machine meets all alike. The first question of a set finds nothing stored. What
is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from statistics import median
from threading import Thread
from typing import Any, NamedTuple

import psutil

from semsharekv_integrations import EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.lab.answers import holds_answer, is_answer
from semsharekv_integrations.lab.figures import estimate_mean, estimate_median
from semsharekv_integrations.lab.report import describe_origin, write_whole
from semsharekv_integrations.lab.texts import SIZE, SYSTEM, Question, read_passages

Stream = Callable[[str], Iterator[str]]  # of a prompt, the answer in pieces
HEAD = f"{SYSTEM}\n\n"
TOKENS = 24  # of an answer, at most
MIB = 1024**2
STORE_BYTES = 2 * 1024**3
PLAIN = "langchain HuggingFacePipeline"
ABOUT = {
    PLAIN: "LangChain's own class, a full prefill each time; answers are compared with its",
    "llama-index HuggingFaceLLM": "LlamaIndex's own class, a full prefill each time",
    "transformers, cached prefix": "by hand: the KV of the first prompt of a set, cut to what the next one begins with",
    "KVBoost": "chunks of 128 tokens, its defaults",
    "langchain SemShareKVLLM exact": "this package as it comes",
    "langchain SemShareKVLLM exact, arranged": "as above, documents in the order that `engine.arrange` gives",
    "langchain SemShareKVLLM identical": "`mode='identical'`, budget 0.3: moved documents are reused, approximately",
    "langchain SemShareKVLLM identical 0.15": "likewise with a budget of 0.15",
    "llama-index SemShareKVLLM identical": "the same in LlamaIndex",
}


class Asked(NamedTuple):
    """One question, and the documents of its prompt by id, in their order."""

    group: int
    question: Question
    documents: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What came of a question."""

    ttft_s: float
    text: str
    grown_bytes: int  # of the process since the model was loaded, at its peak


def draw_questions(groups: int, questions: int, seed: int) -> Iterator[Asked]:
    """Yield the questions of each set of paragraphs, its documents in another order each time."""
    rng = Random(f"chains {seed}")
    order = rng.sample(read_passages(), groups * SIZE)
    for group in range(groups):
        own = order[group * SIZE : (group + 1) * SIZE]
        asked = {
            question.text: question
            for passage in own
            for question in passage.questions
            if any(holds_answer(passage.text, gold) for gold in question.golds)
        }
        for question in rng.sample(list(asked.values()), questions):
            yield Asked(group, question, {passage.id: passage.text for passage in rng.sample(own, len(own))})


def make_way(name: str, model: str) -> Callable[[Asked], Iterator[str]]:
    """Return what answers a question in that way; ``ImportError`` if what it takes is not installed."""
    if name == "KVBoost":
        return _ask_in(_make_kvboost(model))
    if name == "transformers, cached prefix":
        return _ask_in(_make_cached_prefix(model))
    framework, kind, *settings = name.replace(",", "").split(maxsplit=2)
    if framework == "langchain":
        return _make_langchain(kind, (settings or [""])[0], model)
    return _make_llama_index(kind, model)


def _ask_in(stream: Stream) -> Callable[[Asked], Iterator[str]]:
    return lambda asked: stream(_write_prompt("\n\n".join(asked.documents.values()), asked.question.text))


def _write_prompt(context: str, question: str) -> str:
    return f"{HEAD}{context}\n\nQuestion: {question}\nAnswer:"


def _load(model: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model, dtype="float32"), AutoTokenizer.from_pretrained(model)


def _make_langchain(kind: str, settings: str, model: str) -> Callable[[Asked], Iterator[str]]:
    """The chain ``prompt | llm``; only the class of the model differs."""
    from langchain_core.prompts import PromptTemplate

    if kind == "HuggingFacePipeline":
        from langchain_huggingface import HuggingFacePipeline
        from transformers import pipeline

        loaded, tokenizer = _load(model)
        options = {"max_new_tokens": TOKENS, "do_sample": False, "return_full_text": False}
        llm: Any = HuggingFacePipeline(pipeline=pipeline("text-generation", loaded, tokenizer=tokenizer, **options))
    else:
        llm = _make_ours("langchain", settings, model)
    chain = PromptTemplate.from_template(_write_prompt("{context}", "{question}")) | llm

    def ask(asked: Asked) -> Iterator[str]:
        documents = asked.documents
        if settings.endswith("arranged"):
            documents = llm.engine.arrange(documents, before=HEAD, namespace=llm.kv_namespace)
        return chain.stream({"context": "\n\n".join(documents.values()), "question": asked.question.text})

    return ask


def _make_llama_index(kind: str, model: str) -> Callable[[Asked], Iterator[str]]:
    if kind == "HuggingFaceLLM":
        from llama_index.llms.huggingface import HuggingFaceLLM

        loaded, tokenizer = _load(model)
        llm: Any = HuggingFaceLLM(
            model=loaded, tokenizer=tokenizer, max_new_tokens=TOKENS, generate_kwargs={"do_sample": False}
        )
    else:
        llm = _make_ours("llama_index", "identical", model)
    return _ask_in(lambda prompt: (piece.delta or "" for piece in llm.stream_complete(prompt)))


def _make_ours(framework: str, settings: str, model: str) -> Any:
    mode, *budget = settings.removesuffix("arranged").split()
    reuse = ReuseConfig(mode=mode, budget=float(budget[0]) if budget else None)  # type: ignore[arg-type]
    config = EngineConfig(reuse=reuse, store=StoreConfig(max_bytes=STORE_BYTES))
    cls = import_module(f"semsharekv_integrations.{framework}").SemShareKVLLM
    llm = cls(model=model, model_kwargs={"dtype": "float32"}, config=config, max_tokens=TOKENS)
    _ = llm.engine.model
    return llm


def _make_kvboost(model: str) -> Stream:
    from kvboost import KVBoost

    loaded, tokenizer = _load(model)
    engine = KVBoost(loaded, tokenizer, max_cache_bytes=STORE_BYTES)

    def stream(prompt: str) -> Iterator[str]:
        began = time.perf_counter()
        times: list[float] = []
        result = engine.generate(prompt, max_new_tokens=TOKENS, on_token=lambda _: times.append(time.perf_counter()))
        yield f"\0{times[0] - began}"  # it gives all at once: the first token came so much later
        yield result.output_text

    return stream


def _make_cached_prefix(model: str) -> Stream:
    """As transformers' documentation shows it: a copy of a prefix's cache goes to ``generate``."""
    import torch
    from transformers import DynamicCache, TextIteratorStreamer

    loaded, tokenizer = _load(model)
    kept: dict[str, Any] = {"ids": torch.zeros(0, dtype=torch.int64), "cache": DynamicCache()}

    def stream(prompt: str) -> Iterator[str]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        most = min(len(kept["ids"]), ids.shape[1] - 1)
        same = int((kept["ids"][:most] == ids[0, :most]).cumprod(0).sum())
        cache = deepcopy(kept["cache"])
        if same:
            if same < len(kept["ids"]):
                cache.crop(same - len(kept["ids"]))  # so many tokens less
        else:
            cache = DynamicCache()
            with torch.inference_mode():
                loaded(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            kept.update(ids=ids[0, :-1], cache=deepcopy(cache))
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"max_new_tokens": TOKENS, "do_sample": False, "past_key_values": cache, "streamer": streamer}
        Thread(target=loaded.generate, args=(ids,), kwargs=options).start()
        return streamer

    return lambda prompt: iter(stream(prompt))


def answer(way: Callable[[Asked], Iterator[str]], asked: Asked) -> tuple[float, str]:
    """Return seconds to the first piece of text, and the text."""
    began, first, pieces = time.perf_counter(), None, []
    for piece in way(asked):
        if piece.startswith("\0"):
            first = float(piece[1:])
            continue
        if piece and first is None:
            first = time.perf_counter() - began
        pieces.append(piece)
    return first if first is not None else time.perf_counter() - began, "".join(pieces)


def work(name: str, model: str) -> None:
    """Answer the questions that come in, a line of JSON each; begin with a line that says whether it can."""
    import torch

    out, sys.stdout = sys.stdout, sys.stderr  # what others print is no answer
    torch.set_num_threads(1)
    try:
        way = make_way(name, model)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=out, flush=True)
        return
    answer(way, Asked(0, Question("Why?", ()), {"warm": "Up."}))
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    print(json.dumps({}), file=out, flush=True)
    for line in sys.stdin:
        group, (text, golds), documents = json.loads(line)
        ttft_s, said = answer(way, Asked(group, Question(text, tuple(golds)), documents))
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        print(json.dumps([ttft_s, said, peak - before]), file=out, flush=True)


class Worker:
    """A process that answers in one way."""

    def __init__(self, name: str, model: str) -> None:
        command = [sys.executable, __file__, "--work", name, "--model", model]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self.missing: str | None = self._read().get("missing")

    def _read(self) -> Any:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, asked: Asked) -> Answer:
        """Return the answer to a question."""
        self._process.stdin.write(f"{json.dumps(asked)}\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return Answer(*self._read())

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def measure(names: Sequence[str], model: str, asked: Sequence[Asked]) -> tuple[dict[str, list[Answer]], dict[str, str]]:
    """Return the answers of every way, and why some have none."""
    workers = {name: Worker(name, model) for name in names}
    missing = {name: worker.missing for name, worker in workers.items() if worker.missing}
    found: dict[str, list[Answer]] = {name: [] for name in names if name not in missing}
    for number, each in enumerate(asked):
        for name in Random(number).sample(list(found), len(found)):
            found[name].append(workers[name].ask(each))
        print(f"{number + 1} of {len(asked)}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    return found, missing


TITLES = ("way", "TTFT, s", "later questions", "times as fast", "right", "points", "same answer", "memory, MiB")


def make_table(found: Mapping[str, Sequence[Answer]], asked: Sequence[Asked]) -> Iterator[str]:
    """Yield the lines of the table. Ratios and points are to the first way, question by question."""
    yield f"| {' | '.join(TITLES)} |"
    yield "| --- " * len(TITLES) + "|"
    groups = [each.group for each in asked]
    is_later = [group in groups[:place] for place, group in enumerate(groups)]
    plain = found[next(iter(found))]
    for name, answers in found.items():
        later = [place for place, chosen in enumerate(is_later) if chosen]
        over = [groups[place] for place in later]
        ratio = estimate_median([plain[place].ttft_s / answers[place].ttft_s for place in later], over)
        right = [_is_right(answer, each) for answer, each in zip(answers, asked, strict=True)]
        wanted = [_is_right(answer, each) for answer, each in zip(plain, asked, strict=True)]
        points = estimate_mean([100.0 * (one - other) for one, other in zip(right, wanted, strict=True)], groups)
        same = sum(one.text.strip() == other.text.strip() for one, other in zip(answers, plain, strict=True))
        cells = (
            name,
            f"{median(answer.ttft_s for answer in answers):.2f}",
            f"{median(answers[place].ttft_s for place in later):.2f}",
            f"{ratio.value:.1f} [{ratio.low:.1f}, {ratio.high:.1f}]",
            f"{sum(right)} of {len(right)}",
            f"{points.value:+.1f} [{points.low:+.1f}, {points.high:+.1f}]",
            f"{same / len(answers):.0%}",
            f"{max(answer.grown_bytes for answer in answers) / MIB:,.0f}",
        )
        yield f"| {' | '.join(cells)} |"


def _is_right(answer: Answer, asked: Asked) -> bool:
    return bool(is_answer(answer.text, asked.question.golds[0], asked.question.golds, "gold"))


def make_page(
    command: str, found: Mapping[str, Sequence[Answer]], missing: Mapping[str, str], asked: Sequence[Asked]
) -> str:
    """Return the page."""
    legend = " ".join((__doc__ or "").split("\n\n")[2].split())
    commit = str(describe_origin(command)["commit"])[:12]
    said = f"`{command}` at commit {commit}, float32, greedy, {len(asked)} questions."
    columns = (
        "TTFT: median seconds from the call to the first piece of text; of all questions, and of those that are not "
        "the first of their set. Ratios are of those, question by question, to the first way; brackets are 95% "
        "intervals over sets. Memory: how much the process grew at its peak behind loading and one short call."
    )
    ways = "\n".join(f"- **{name}**: {ABOUT[name]}" for name in found)
    left_out = "\n".join(f"Not installed: {name} ({why})" for name, why in missing.items())
    parts = ["# The same chain with other classes", said, legend, columns, "\n".join(make_table(found, asked)), ways]
    return "\n\n".join(filter(None, [*parts, left_out])) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print or write the page; every answer goes to a .json beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--groups", type=int, default=4, help="sets of paragraphs")
    parser.add_argument("--questions", type=int, default=10, help="about each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=ABOUT, default=list(ABOUT), metavar="WAY", help=", ".join(ABOUT))
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--work", choices=ABOUT, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        work(args.work, args.model)
        return
    asked = list(draw_questions(args.groups, args.questions, args.seed))
    found, missing = measure(args.ways, args.model, asked)
    told = f"--model {Path(args.model).name} --groups {args.groups} --questions {args.questions} --seed {args.seed}"
    page = make_page(f"python examples/lab/compare_chains.py {told}", found, missing, asked)
    if args.out is None:
        print(page)
        return
    write_whole(args.out, page)
    kept = {name: [vars(answer) for answer in answers] for name, answers in found.items()}
    write_whole(args.out.with_suffix(".json"), json.dumps({"asked": asked, "answers": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
