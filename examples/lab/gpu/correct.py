"""Sections ``correct`` and ``families``: are answers on the device those on the CPU, however the engine is used?"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gpu.cases import CASES, Outcome, read, run_mode
from gpu.checks import Checks
from gpu.subjects import EngineMaker, load_reference, load_tokenizer, make_maker, make_tiny, write_flow
from semsharekv_integrations import SemShareEngine, UnsupportedModelError

MOST_ROUNDED = 0.25  # of answers may differ on a real GPU, where rounding is another one
FROM_OFF = {"mode exact": 0.0, "mode identical": 0.25, "mode semantic": 0.25}  # answers that may differ from full ones
HALVES = (torch.bfloat16, torch.float16)
SUPPORT = Path(__file__).resolve().parents[3] / "tests" / "support"
NEEDED_S = 20.0
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 64},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 16, "intermediate_size": 64},
    "deepseek_v3": {
        **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **{"moe_intermediate_size": 16, "num_key_value_heads": 4},
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "sliding_window": 9,
    },
    "falcon_mamba": {"state_size": 8, "conv_kernel": 3},
}


def check_correct(checks: Checks) -> None:
    """Every case here and on the CPU; modes beside a full prefill, and repeated; half precision."""
    here, on_cpu = (_make_maker(checks, str(place)) for place in (checks.device, "cpu"))
    outcomes: dict[str, Outcome] = {}
    for name, case in [(name, case) for name, case in CASES.items() if checks.wants("cases", name)]:
        if checks.left_s < NEEDED_S:
            checks.say("out of time", next=name)
            return
        checks.attempt(name, partial(_check_case, checks, name, case, here, on_cpu, outcomes))
    if checks.options.quick:
        return
    for dtype in [dtype for dtype in HALVES if checks.wants("cases", str(dtype))]:
        checks.attempt(str(dtype), partial(_check_half, checks, dtype))


def _make_maker(checks: Checks, device: str) -> EngineMaker:
    if checks.options.quick:
        return make_maker(make_tiny(checks.options.layers).to(device), is_random=True)
    return make_maker(load_reference(device))


def _check_case(
    checks: Checks,
    name: str,
    case: Callable[[EngineMaker], Outcome],
    here: EngineMaker,
    on_cpu: EngineMaker,
    outcomes: dict[str, Outcome],
) -> None:
    outcome = outcomes[name] = case(here)
    total, facts = len(outcome.answers), dict(outcome.facts)
    good = outcome.good
    if checks.device.type != "cpu":
        same = facts["as_on_the_cpu"] = outcome.count_same(case(on_cpu))
        is_drawn = checks.on_gpu and name.startswith("sampling")  # a GPU draws other numbers
        good &= is_drawn or total - same <= (MOST_ROUNDED * total if checks.on_gpu else 0)
    if name in FROM_OFF and "mode off" in outcomes:
        same = facts["as_in_full"] = outcome.count_same(outcomes["mode off"])
        good &= total - same <= FROM_OFF[name] * total or (checks.options.quick and name != "mode exact")
    if name.startswith("mode") and checks.on_gpu:
        good &= outcome.count_same(case(here)) == total
    checks.check(name, good, of=total, **facts)


def _check_half(checks: Checks, dtype: torch.dtype) -> None:
    make = make_maker(load_reference(str(checks.device), dtype))
    full = run_mode(make, "off")
    for mode in ("exact", "identical"):
        outcome = run_mode(make, mode)
        same, total = outcome.count_same(full), len(outcome.answers)
        facts = {**outcome.facts, "as_in_full": same, "of": total}
        checks.check(f"{mode}, {str(dtype).removeprefix('torch.')}", outcome.good and same >= total // 2, **facts)


def check_families(checks: Checks) -> None:
    """Tiny random models of many architectures, in every precision: are they admitted, and are answers the CPU's?"""
    sys.path.insert(0, str(SUPPORT))
    from tiny_models import ARCHITECTURES, STATEFUL

    kinds = {**{name: {} for name in ARCHITECTURES}, **STATEFUL, **FAMILIES}
    kinds = {name: more for name, more in kinds.items() if checks.wants("families", name)}
    for dtype in (torch.float32, *HALVES) if checks.on_gpu else (torch.float32,):
        for name, more in kinds.items():
            if checks.left_s < NEEDED_S:
                checks.say("out of time", next=f"{name} in {dtype}")
                return
            with _full_precision():
                checks.attempt(f"{name} in {dtype}", partial(_check_family, checks, name, more, dtype))


@contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _check_family(checks: Checks, name: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    from tiny_models import make_model

    model = make_model(name, len(load_tokenizer()), **more).to(dtype)
    models = {"cpu": model, "here": copy.deepcopy(model).to(checks.device)}
    is_exact = dtype == torch.float32
    for mode in ("exact", "identical"):
        found = {place: _ask_short(there, mode) for place, there in models.items() if is_exact or place == "here"}
        same = found["here"].count_same(found.get("cpu", found["here"]))
        total = len(found["here"].answers)
        good = total - same <= (MOST_ROUNDED * total if checks.on_gpu else 0)
        if checks.is_pretended:
            good &= dict(found["here"].facts) == dict(found["cpu"].facts)
        facts = {**found["here"].facts, "as_on_the_cpu": same, "of": total}
        checks.check(f"{name}, {mode}, {str(dtype).removeprefix('torch.')}", good, **facts)


def _ask_short(model: PreTrainedModel, mode: str) -> Outcome:
    """Two questions behind each of two beginnings."""
    try:
        engine: SemShareEngine = make_maker(model, is_random=True)(mode)
    except UnsupportedModelError as error:  # some models allow no approximation
        if mode != "identical":
            raise
        return Outcome([], facts={"refused": str(error)[:80]})
    tokenizer = load_tokenizer()
    texts = [tokenizer.decode(tokenizer(asked.prompt[0]["content"])["input_ids"][:120]) for asked in write_flow()]
    prompts = [f"{text} {end}" for text in (texts[0], texts[2]) for end in ("One.", "Two.")]
    said = [engine.generate(prompt, max_new_tokens=8) for prompt in prompts]
    return Outcome(read(said), facts={"reused": sum(generation.report.reused_tokens for generation in said)})
