"""Section ``env``: versions, and what launches, waits, copies, multiplications and attention take on this device."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from gpu.checks import Checks

_BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}
_WIDTH, _INNER, _HEADS, _HEAD_DIM = 4096, 14336, 32, 128  # of an 8B model
_MILLION, _HALF_GB, _QUARTER_GB = 1e6, 1 << 29, 1 << 28


def check_machine(checks: Checks) -> None:
    """Say what is here; on a GPU measure it."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    checks.say("versions", **versions, python=sys.version.split()[0])
    if not checks.on_gpu:
        return
    properties = torch.cuda.get_device_properties(0)
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    memory_gb = properties.total_memory / 1e9
    checks.say("device", name=properties.name, cudnn=torch.backends.cudnn.version(), gb=memory_gb, allocator=allocator)
    for measure in (_measure_launches, _measure_products, _measure_copies, _find_backends, _measure_attention):
        checks.attempt(measure.__name__.removeprefix("_"), lambda measure=measure: measure(checks))


def _measure_launches(checks: Checks) -> None:
    device = checks.device
    number, host = torch.ones(64, device=device), torch.arange(5000)
    mask = torch.rand(5000, device=device) < 0.1
    for _ in range(200):
        number.add_(1)
    calls: dict[str, Callable[[], object]] = {
        "launch": lambda: number.add_(1),
        "item": lambda: int(number[0]),
        "small_copy_in": lambda: host.to(device),
        "bool_index": lambda: mask[mask],
    }
    checks.say("microseconds", **{name: _MILLION * checks.time(call, 500) for name, call in calls.items()})


def _draw(checks: Checks, *sizes: int) -> Tensor:
    return torch.randn(*sizes, device=checks.device, dtype=torch.bfloat16)


def _measure_products(checks: Checks) -> None:
    one, other = (_draw(checks, 8192, 8192) for _ in range(2))
    weight, found = _draw(checks, _INNER, _WIDTH), {}
    checks.time(lambda: one @ other, 3)
    found["square"] = 2 * 8192**3 / checks.time(lambda: one @ other, 10) / 1e12
    for rows in (128, 512, 5000):
        hidden = _draw(checks, rows, _WIDTH)
        seconds = checks.time(lambda hidden=hidden: linear(hidden, weight), 50)
        found[f"rows_{rows}"] = 2 * rows * _WIDTH * _INNER / seconds / 1e12
    checks.say("bf16 TFLOP/s", **found)


def _measure_copies(checks: Checks) -> None:
    there = torch.empty(_HALF_GB, dtype=torch.uint8, device=checks.device)
    plain = torch.ones(_QUARTER_GB, dtype=torch.uint8)
    pinned, half = plain.pin_memory(), there[:_QUARTER_GB]
    calls: dict[str, Callable[[], object]] = {
        "to_device_pageable": lambda: plain.to(checks.device),
        "to_device_pinned": lambda: pinned.to(checks.device, non_blocking=True),
        "to_host_pageable": lambda: half.cpu(),
        "to_host_pinned": lambda: pinned.copy_(half, non_blocking=True),
        "pin_memory": lambda: plain.pin_memory(),
    }
    rates = {name: _QUARTER_GB / checks.time(call, 3) / 1e9 for name, call in calls.items()}
    checks.say("GB/s", device_copy=2 * _HALF_GB / checks.time(there.clone, 10) / 1e9, **rates)


def _draw_attention(checks: Checks, rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = (_draw(checks, 1, _HEADS, length, _HEAD_DIM) for length in (rows, keys, keys))
    return query, key, value, torch.zeros(1, 1, rows, keys, device=checks.device, dtype=torch.bfloat16)


def _find_backends(checks: Checks) -> None:
    query, key, value, mask = _draw_attention(checks, 68, 2693)
    whole, one = _draw_attention(checks, 512, 512)[:3], _draw_attention(checks, 1, 2693)[:3]
    plain = [tensor.float() for tensor in (query, key, value, mask)]
    found = {
        "masked": torch._fused_sdp_choice(query, key, value, mask, 0.0, False),
        "causal": torch._fused_sdp_choice(*whole, None, 0.0, True),
        "one_query": torch._fused_sdp_choice(*one, None, 0.0, False),
        "masked_float32": torch._fused_sdp_choice(*plain, 0.0, False),
    }
    checks.say("attention picks", **{name: _BACKENDS[choice] for name, choice in found.items()})


def _measure_attention(checks: Checks) -> None:
    for name, context in (
        ("as picked", nullcontext),
        ("efficient", lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)),
    ):
        first, again, one = [], [], []
        with context():
            for index in range(4):
                query, key, value, mask = _draw_attention(checks, 65 + index, 2600 + 37 * index)

                def attend(q: Tensor = query, k: Tensor = key, v: Tensor = value, m: Tensor = mask) -> Tensor:
                    return scaled_dot_product_attention(q, k, v, attn_mask=m)

                first.append(1e3 * checks.time(attend))
                again.append(1e3 * checks.time(attend, 20))
                alone = query[:, :, :1]
                one.append(1e3 * checks.time(lambda a=alone, k=key, v=value: scaled_dot_product_attention(a, k, v)))
            elsewhere: list[float] = []
            thread = threading.Thread(target=lambda call=attend, out=elsewhere: out.append(1e3 * checks.time(call)))
            thread.start()
            thread.join()
        found = {"new_shape": first, "again": again, "one_query": one, "in_a_new_thread": elsewhere}
        checks.say(f"attention ms, {name}", **{key: [round(x, 3) for x in ms] for key, ms in found.items()})
