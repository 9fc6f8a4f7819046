"""How far an answer's probabilities behind reused KV are from those behind a full prefill, token by token.

The full prefill's own answer is read behind the policy's KV in one more pass, so that both are compared at the same
places, whatever the policy would have said itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import kl_div

from semsharekv_integrations.call import Call
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.kv import Reference
from semsharekv_integrations.runtime import Runtime
from semsharekv_integrations.store.records import reference_id
from semsharekv_integrations.text.prompt import Prompt


class Draft(NamedTuple):
    """A full prefill's answer, and the logits [N, V] that it was chosen from."""

    token_ids: Sequence[int]
    logits: Tensor


class TracedEngine(SemShareEngine):
    """An engine that also reads a draft behind each prompt, or its own answer.

    Attributes:
        draft: what to read, empty for the own answer, or None to read nothing.
        traced: of the last call, the draft with its logits; None if nothing was read: in mode ``off``, whose cache may
            have dropped tokens, and where retention did.
    """

    draft: Sequence[int] | None = None
    traced: Draft | None = None

    def _remember(self, call: Call, runtime: Runtime) -> None:
        super()._remember(call, runtime)
        self.traced = None
        if self.draft is None or runtime.mode == "off" or call.kv_bytes.retained < call.kv_bytes.prefilled:
            return
        draft = list(self.draft or call.answer.token_ids)
        read = np.array(draft[:-1], dtype=np.int64)
        self.traced = Draft(draft, runtime.adapter.trace_answer(call.outcome.prefill, call.plan.token_ids, read))

    def compute_first_half(self, prompt: Prompt, namespace: str) -> Reference:
        """Return the KV of the first half of a prompt, computed by itself."""
        runtime = self._load()
        ids = runtime.renderer.render(prompt, {}).token_ids
        half = ids[: len(ids) // 2]
        return Reference(reference_id(namespace, half), namespace, half, runtime.adapter.compute_kv(half, 0))


class Divergence(NamedTuple):
    """KL divergence of each token, full to reused, in nats; and on what share both have the same likeliest token."""

    kl: tuple[float, ...]
    top1: float


def measure_divergence(full: Tensor, reused: Tensor) -> Divergence:
    """Compare logits [N, V] along the same tokens."""
    log_full, log_reused = full.float().log_softmax(-1), reused.float().log_softmax(-1)
    kl = kl_div(log_reused, log_full, log_target=True, reduction="none").sum(-1).clamp_min(0)  # but for rounding
    return Divergence(tuple(kl.tolist()), float((full.argmax(-1) == reused.argmax(-1)).float().mean()))
