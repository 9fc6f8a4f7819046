"""Section ``decode``: tokens a second beside transformers' ``generate``, and of a batch."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.checks import Checks
from gpu.subjects import ForgetfulEngine, TimedSubject
from semsharekv_integrations.lab.scenarios import Query

ROUNDS, BATCH = 3, (3, 4, 5, 6)
COMPILE_S = 150  # that must be left, for what is compiled


def check_decoding(checks: Checks) -> None:
    """Behind prompts of the first two lengths."""
    subject, tokens = TimedSubject(checks), 64 if checks.on_gpu else 4 if checks.options.quick else 16
    subject.model.generation_config.eos_token_id = None
    for length in checks.options.lengths[:2]:
        checks.attempt(f"behind {length}", partial(_compare, checks, subject, length, tokens))
    engine, length = subject.make_engine("exact"), checks.options.lengths[0]
    prompts = [subject.make_case("next_turn", length, seed).target.prompt for seed in BATCH]
    began = time.perf_counter()
    said = engine.generate_batch(prompts, max_new_tokens=tokens)
    seconds = time.perf_counter() - began
    checks.say("batch of 4", seconds=seconds, tokens=sum(len(generation.token_ids) for generation in said))


def _compare(checks: Checks, subject: TimedSubject, length: int, tokens: int) -> None:
    query, engine = subject.make_case("next_turn", length, 3).target, subject.make_engine("exact")
    ids = torch.from_numpy(subject.renderer.render(query.prompt, {}).token_ids)[None].to(checks.device)
    ours = partial(_decode, checks, subject, engine, query, tokens)
    theirs = partial(_generate, checks, subject, ids, tokens)
    rates: dict[str, list[float]] = {"engine": [], "generate": []}
    for _ in range(1 if checks.options.quick else ROUNDS):
        rates["engine"].append(ours())
        rates["generate"].append(theirs())
    medians = {name: statistics.median(found) for name, found in rates.items()}
    checks.say(f"tokens/s behind {length}", **medians, their_lookup=theirs(prompt_lookup_num_tokens=8))
    if checks.on_gpu and checks.left_s > COMPILE_S and length == checks.options.lengths[0]:
        seconds = checks.time(lambda: theirs(cache_implementation="static"))
        compiled = theirs(cache_implementation="static")
        checks.say(f"static cache behind {length}", tokens_per_s=compiled, compile_s=seconds)


def _decode(checks: Checks, subject: TimedSubject, engine: ForgetfulEngine, query: Query, tokens: int) -> float:
    """Tokens a second of the engine behind the first one."""
    one = checks.time(lambda: subject.ask(engine, query, 1))
    said: list[int] = []
    whole = checks.time(lambda: said.extend(subject.ask(engine, query, tokens)[0].token_ids))
    return (len(said) - 1) / max(whole - one, 1e-9)


def _generate(checks: Checks, subject: TimedSubject, ids: Tensor, tokens: int, **more: Any) -> float:
    """Tokens a second of ``generate`` behind the first one."""
    generate = partial(subject.model.generate, ids, attention_mask=torch.ones_like(ids), do_sample=False, **more)
    one = checks.time(lambda: generate(max_new_tokens=1))
    said: list[Tensor] = []
    whole = checks.time(lambda: said.append(generate(max_new_tokens=tokens)))
    return (said[0].shape[1] - ids.shape[1] - 1) / max(whole - one, 1e-9)
