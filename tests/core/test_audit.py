"""Audits: reuse held against a full prefill, and suspended where it disagrees."""

from __future__ import annotations

import pytest
import torch

from semsharekv_integrations import AuditConfig
from semsharekv_integrations.audit import Auditor
from tiny_models import EngineMaker

PROMPT = "Report on Prorna in the Daily Courier."


def disagree(engine, monkeypatch) -> None:
    """Spoil the logits of every prefill that reuses something."""
    adapter = engine._ready().adapter
    prefill = adapter.prefill

    def spoilt(ids, prefix=None):
        result = prefill(ids, prefix)
        return result._replace(logits=-result.logits) if prefix else result

    monkeypatch.setattr(adapter, "prefill", spoilt)


def test_exact_reuse_agrees(make_engine: EngineMaker) -> None:
    engine = make_engine(audit=AuditConfig(sample_ratio=1.0))
    reports = [engine.generate(PROMPT + " And" * n, max_new_tokens=2).report for n in range(4)]
    assert reports[0].audit is None, "there was no reuse to audit"
    for report in reports[1:]:
        assert report.audit is not None and report.audit.agrees
        assert report.audit.kl_divergence == pytest.approx(0, abs=1e-5)
    assert engine.stats()["audits"] == 3 and engine.stats()["audit_agreement_ratio"] == 1.0


def test_disagreement_suspends_reuse_visibly(make_engine: EngineMaker, monkeypatch) -> None:
    engine = make_engine(audit=AuditConfig(sample_ratio=1.0, window=2, min_agreement=0.6))
    engine.generate(PROMPT, max_new_tokens=2, namespace="a")
    engine.generate(PROMPT, max_new_tokens=2, namespace="b")
    wanted = make_engine("off").generate(PROMPT, max_new_tokens=2).token_ids
    disagree(engine, monkeypatch)
    for _ in range(2):
        report = engine.generate(PROMPT, max_new_tokens=2, namespace="a").report
        assert report.audit is not None and not report.audit.agrees and report.audit.kl_divergence > 0.1
        assert report.prefix_tokens > 0
    suspended = engine.generate(PROMPT, max_new_tokens=2, namespace="a")
    assert suspended.report.prefix_tokens == 0 and "audit suspended" in (suspended.report.declined or "")
    assert suspended.token_ids == wanted and suspended.report.audit is None
    assert engine.stats()["audit_agreement_ratio"] == 0.0
    assert engine.generate(PROMPT, max_new_tokens=2, namespace="b").report.prefix_tokens > 0
    engine.clear("a")
    engine.generate(PROMPT, max_new_tokens=2, namespace="a")
    assert engine.generate(PROMPT, max_new_tokens=2, namespace="a").report.prefix_tokens > 0


def test_a_suspension_needs_a_full_window() -> None:
    auditor, logits = Auditor(AuditConfig(sample_ratio=1.0, window=3, min_agreement=0.5)), torch.eye(4)[:1] * 9
    for disagreements in range(3):
        assert not auditor.suspends("a"), disagreements
        auditor.record("a", -logits, logits)
    assert auditor.suspends("a") and not auditor.suspends("b")
    for _ in range(2):
        auditor.record("a", logits, logits)
    assert not auditor.suspends("a"), "the latest count"


def test_the_share_is_kept() -> None:
    assert not any(Auditor(AuditConfig(sample_ratio=0.0)).draws() for _ in range(50))
    drawn = sum(Auditor(AuditConfig(sample_ratio=0.5)).draws() for _ in range(400))
    assert 120 < drawn < 280
