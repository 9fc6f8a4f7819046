"""Ways to use an engine, each as a function from a maker of engines to the answers: the same on every device."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpu.subjects import NEWS, TOWNS, EngineMaker, run_flow, write_flow
from semsharekv_integrations import AuditConfig, Generation, SemShareEngine
from semsharekv_integrations.model.loading import REFERENCE_MODEL

TOKENS = 6  # of an answer
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
}


@dataclass(frozen=True)
class Outcome:
    """What a case came to.

    Attributes:
        answers: token ids or texts, in an order of their own.
        good: whether all is as the case wants it besides.
        facts: what to say of it.
    """

    answers: Sequence[Any]
    good: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    def count_same(self, other: Outcome) -> int:
        """How many answers are the same."""
        return sum(own == theirs for own, theirs in zip(self.answers, other.answers, strict=True))


def read(generations: Sequence[Generation]) -> list[Any]:
    """Token ids of the answers."""
    return [generation.token_ids for generation in generations]


def run_mode(make: EngineMaker, mode: str, **settings: Any) -> Outcome:
    """The flow in a mode."""
    engine = make(mode, **settings)
    said = run_flow(engine, TOKENS)
    engine.store.check()
    reused = sum(generation.report.reused_tokens for generation in said)
    deviation = max(generation.report.deviation or 0.0 for generation in said)
    declined = {generation.report.declined for generation in said} - {None}
    facts = {"reused_tokens": reused, "deviation": deviation, "declined": sorted(map(str, declined))[:2]}
    return Outcome(read(said), reused > 0 or mode == "off", facts)


def sample_by_seed(make: EngineMaker) -> Outcome:
    """The same seed gives the same answers."""
    one, other = (read(run_flow(make("identical"), 4, temperature=0.9, seed=5)) for _ in range(2))
    return Outcome(one, one == other)


def keep_on_host(make: EngineMaker) -> Outcome:
    """The device holds about one and a half prompts, host memory all."""
    size = next(iter(run_flow(make("exact"), 1))).report.kv_bytes
    engine = make("exact", {"max_bytes": int(1.6 * size), "host_max_bytes": 40 * size})
    for index in range(4):
        others = " ".join(NEWS[town] for town in TOWNS[index % 3 :])
        engine.generate([{"role": "user", "content": f"{index}. {others}"}], max_new_tokens=2)
    said = run_flow(engine, TOKENS)
    engine.store.check()
    stats = engine.store.stats()
    facts = {name: stats[name] for name in ("demoted", "promoted", "evicted", "host_bytes")}
    return Outcome(read(said), stats["demoted"] > 0 and stats["promoted"] > 0, facts)


def keep_on_disk(make: EngineMaker) -> Outcome:
    """A directory is closed and opened again, and a file of KV is saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        stored, file = {"directory": folder}, Path(folder) / "kv.safetensors"
        engine = make("identical", stored)
        run_flow(engine, 1, namespace="kept")
        saved = engine.save(file)
        engine.close()
        engine = make("identical", stored)
        reopened = run_flow(engine, TOKENS, namespace="kept")
        unreadable = engine.store.stats()["unreadable"]
        engine.close()
        engine = make("exact")
        loaded = engine.load(file)
        said = run_flow(engine, TOKENS, namespace="kept")
    prefixes = [generations[0].report.prefix_tokens for generations in (reopened, said)]
    good = min(prefixes) > 0 and unreadable == 0 and loaded == saved > 0
    return Outcome(read([*reopened, *said]), good, {"entries": loaded, "prefix": prefixes, "unreadable": unreadable})


def retain(make: EngineMaker) -> Outcome:
    """A part of the KV is dropped before decoding."""
    said = run_flow(make("identical", retention_ratio=0.6), TOKENS)
    ratio = max(generation.report.kv_retained_ratio for generation in said)
    return Outcome(read(said), ratio < 0.9, {"retained": ratio})


def audit(make: EngineMaker) -> Outcome:
    """Every reusing prompt is rerun in full."""
    said = run_flow(make("identical", audit=AuditConfig(sample_ratio=1.0)), TOKENS)
    found = [generation.report.audit for generation in said if generation.report.audit]
    worst = max((result.kl_divergence for result in found), default=0.0)
    return Outcome(read(said), bool(found), {"audits": len(found), "worst_kl": worst})


def ask_at_once(make: EngineMaker) -> Outcome:
    """A batch, tasks and threads."""
    prompts = [asked.prompt for asked in write_flow()]
    engine = make("exact")
    batch = engine.generate_batch(prompts, max_new_tokens=TOKENS)

    async def ask_all() -> list[Generation]:
        calls = (engine.agenerate(prompt, max_new_tokens=TOKENS, namespace="tasks") for prompt in prompts)
        return list(await asyncio.gather(*calls))

    tasks, in_threads = asyncio.run(ask_all()), {}

    def ask(index: int) -> None:
        in_threads[index] = engine.generate(prompts[index], max_new_tokens=TOKENS, namespace="threads")

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.store.check()
    return Outcome(read([*batch, *tasks, *(in_threads[index] for index in range(3))]))


def leave_early(make: EngineMaker) -> Outcome:
    """Streams are dropped after a few chunks, and the next calls go on from what they left."""
    engine, texts, later = make("exact"), [], []
    for asked in write_flow():
        with closing(engine.stream(asked.prompt, max_new_tokens=TOKENS)) as chunks:
            texts.append(next(chunks).text)
        later.append(engine.generate(asked.prompt, max_new_tokens=TOKENS))
    engine.store.check()
    prefix = min(generation.report.prefix_tokens for generation in later)
    return Outcome([*texts, *read(later)], prefix > 0, {"prefix": prefix})


def warm(make: EngineMaker) -> Outcome:
    """Documents are computed before they are asked about; one is forgotten; others are put in a stored order."""
    engine = make("identical")
    stored = engine.warm(NEWS, pinned=True)
    said = run_flow(engine, TOKENS)
    order = engine.arrange(dict(reversed(NEWS.items())))
    forgotten = engine.forget(TOWNS[0])
    again = run_flow(engine, TOKENS)
    engine.store.check()
    good = stored == len(NEWS) and forgotten > 0 and said[0].report.reused_tokens > 0
    return Outcome([*read([*said, *again]), list(order)], good, {"reused": said[0].report.reused_tokens})


def go_on(make: EngineMaker) -> Outcome:
    """A session continues from answers that rest on approximate KV."""
    said = run_flow(make("semantic"), TOKENS, session="one")
    return Outcome(read(said), max(generation.report.reused_tokens for generation in said) > 0)


def write_json(make: EngineMaker) -> Outcome:
    """An answer in a grammar."""
    said = make("exact").generate("Give JSON:", json_schema=SCHEMA, max_new_tokens=40)
    return Outcome([said.text], said.text.startswith("{"), {"text": said.text[:40]})


def penalize(make: EngineMaker) -> Outcome:
    """Every way to sample."""
    ways = ({"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.0, "top_k": 5}, {"repetition_penalty": 1.3})
    engine = make("exact")
    prompt = next(write_flow()).prompt
    return Outcome(read([engine.generate(prompt, max_new_tokens=TOKENS, seed=3, **way) for way in ways]))


def load_by_name(make: EngineMaker) -> Outcome:
    """The built-in model is loaded to the device by the engine, and answers as it was trained to."""
    device = make("off").model.device
    engine = SemShareEngine.from_pretrained(REFERENCE_MODEL, device=device)
    said = [engine.generate(asked.prompt, max_new_tokens=4) for asked in list(write_flow())[:2]]
    good = engine.model.device == device and said[1].report.prefix_tokens > 0
    return Outcome(read(said), good, {"prefix": said[1].report.prefix_tokens})


def ask_through_langchain(make: EngineMaker) -> Outcome:
    """Chat model and LLM: one answer, a stream and a batch."""
    from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM

    messages = [("system", "\n\n".join(NEWS.values())), ("human", "Who is the mayor of Karna?")]
    text = "\n\n".join([*NEWS.values(), "Who is the mayor of Karna?"])
    chat = ChatSemShareKV(engine=make("exact"), max_tokens=TOKENS)
    said = [chat.invoke(messages) for _ in range(2)]
    answers = [message.content for message in (*said, *chat.batch([messages] * 2))]
    answers.append("".join(chunk.content for chunk in chat.stream(messages)))
    llm = SemShareKVLLM(engine=make("identical"), max_tokens=TOKENS)
    answers += [llm.invoke(text), "".join(llm.stream(text))]
    read_tokens = said[1].usage_metadata["input_token_details"]["cache_read"]
    return Outcome(answers, read_tokens > 0, {"cache_read": read_tokens})


def ask_through_llama_index(make: EngineMaker) -> Outcome:
    """Completion and chat, whole and streamed."""
    from llama_index.core.llms import ChatMessage

    from semsharekv_integrations.llama_index import SemShareKVLLM

    text = "\n\n".join([*NEWS.values(), "Who is the mayor of Karna?"])
    llm = SemShareKVLLM(engine=make("exact"), max_tokens=TOKENS)
    said = [llm.complete(text) for _ in range(2)]
    answers = [response.text for response in said]
    answers.append("".join(response.delta for response in llm.stream_complete(text)))
    messages = [ChatMessage(role="user", content=text)]
    answers.append(llm.chat(messages).message.content)
    answers.append("".join(response.delta for response in llm.stream_chat(messages)))
    prefix = said[1].raw["kv_cache"]["prefix_tokens"]
    return Outcome(answers, prefix > 0, {"prefix": prefix})


MODES = ("off", "exact", "identical", "semantic", "paper")
PACKED = {"kv_bits": 8}
CASES: Mapping[str, Callable[[EngineMaker], Outcome]] = MappingProxyType(
    {
        **{f"mode {mode}": partial(run_mode, mode=mode) for mode in MODES},
        "sampling by seed": sample_by_seed,
        "sampling": penalize,
        "KV on the host": keep_on_host,
        "KV on disk": keep_on_disk,
        "KV in 8 bits": partial(run_mode, mode="identical", store=PACKED),
        "retention": retain,
        "audit": audit,
        "batch, tasks and threads": ask_at_once,
        "streams left early": leave_early,
        "warm, arrange and forget": warm,
        "session": go_on,
        "JSON of a schema": write_json,
        "loaded by name": load_by_name,
        "LangChain": ask_through_langchain,
        "LlamaIndex": ask_through_llama_index,
    }
)
