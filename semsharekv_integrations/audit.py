"""Checks reuse: prefills a share of the reusing prompts again in full, and compares the logits.

A namespace whose rolling agreement falls below the bound reuses nothing but exact prefixes from then on (in mode
``exact`` nothing at all); reports and stats say so.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from random import Random

import torch

from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.config import AuditConfig
from semsharekv_integrations.report import AuditResult

MOST_NAMESPACES = 10_000  # whose outcomes are kept, those audited latest


def _digest(namespace: str) -> bytes:
    return hashlib.blake2b(namespace.encode(), digest_size=16).digest()


class Auditor:
    """Decides at random which calls to audit, and keeps the latest outcomes of each namespace."""

    def __init__(self, config: AuditConfig, rng: Random | None = None) -> None:
        self.config = config
        self._rng = rng or Random()
        self._latest: OrderedDict[bytes, deque[bool]] = OrderedDict()  # by digest: no name outlives its KV
        self._lock = hold_at_forks(threading.Lock())

    def draws(self) -> bool:
        """Decide at random whether one call is audited; true for a share ``sample_ratio`` of all."""
        return self._rng.random() < self.config.sample_ratio

    def record(self, namespace: str, reused: torch.Tensor, full: torch.Tensor) -> AuditResult:
        """Compare logits [N, V] behind reused KV with those behind a full prefill; keep and return the outcome."""
        log_reused, log_full = reused.float().log_softmax(-1), full.float().log_softmax(-1)
        divergence = torch.nn.functional.kl_div(log_reused, log_full, log_target=True, reduction="batchmean")
        agrees = bool((reused.argmax(-1) == full.argmax(-1)).all())
        result = AuditResult(agrees, float(divergence), len(full))
        with self._lock:
            latest = self._latest.setdefault(_digest(namespace), deque(maxlen=self.config.window))
            latest.append(result.agrees)
            self._latest.move_to_end(_digest(namespace))
            if len(self._latest) > MOST_NAMESPACES:
                self._latest.popitem(last=False)
        return result

    def suspends(self, namespace: str) -> bool:
        """Return whether reuse is off for ``namespace``: its window of audits is full, and too few of them agreed."""
        with self._lock:
            latest = self._latest.get(_digest(namespace), ())
            return len(latest) == self.config.window and sum(latest) < self.config.min_agreement * len(latest)

    def clear(self, namespace: str | None) -> None:
        """Drop the outcomes of one namespace, or of all for None, so that reuse there is on again."""
        with self._lock:
            if namespace is None:
                self._latest.clear()
            else:
                self._latest.pop(_digest(namespace), None)

    def stats(self) -> dict[str, float]:
        """Return how many outcomes are kept, and the share of them that agreed (1 if there are none)."""
        with self._lock:
            outcomes = [agrees for latest in self._latest.values() for agrees in latest]
        return {"audits": len(outcomes), "audit_agreement_ratio": sum(outcomes) / len(outcomes) if outcomes else 1.0}
