"""Audits: reuse held against a full prefill, and suspended where it disagrees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semsharekv_integrations import AuditConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.audit import Auditor
from tiny_models import EngineMaker

PROMPT = "Report on Prorna in the Daily Courier."


def disagree(engine, monkeypatch) -> None:
    """Spoil the logits of every prefill that reuses something."""
    adapter = engine._load().adapter
    prefill = adapter.prefill

    def spoilt(ids, prefix=None, checkpoints=()):
        result = prefill(ids, prefix, checkpoints)
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


def prompt(start: str, *names: str) -> str:
    return "\n\n".join([start, *(DOCUMENTS[name] for name in names), "Who was affected ?"])


DOCUMENTS = {
    "flood": "A flood hit the old town of Prorna in May , and the mayor said that many people were affected .",
    "fire": "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs .",
}
FIRST, SECOND = prompt("Answer in one line .", "flood", "fire"), prompt("You read the news for us .", "fire", "flood")


def approximate(make_engine: EngineMaker, mode: str, **audit: object) -> SemShareEngine:
    """An engine that borrows whatever it costs and has seen ``FIRST``."""
    reuse = ReuseConfig(mode=mode, max_compute_ratio=1.0, max_deviation=100.0)  # type: ignore[arg-type]
    engine = make_engine(reuse=reuse, audit=AuditConfig(sample_ratio=1.0, **audit))  # type: ignore[arg-type]
    engine.generate(FIRST, max_new_tokens=6)
    return engine


@pytest.mark.parametrize("mode", ["identical", "semantic", "paper"])
@pytest.mark.parametrize(("max_new_tokens", "tokens", "compared"), [(6, 4, 4), (3, 8, 3), (1, 8, 1)])
def test_approximate_reuse_is_held_against_a_full_prefill(
    make_engine: EngineMaker, mode: str, max_new_tokens: int, tokens: int, compared: int
) -> None:
    """The divergence over the first tokens, worked out once more from the answer that was given."""
    engine = approximate(make_engine, mode, tokens=tokens)
    generation = engine.generate(SECOND, max_new_tokens=max_new_tokens, temperature=3.0, seed=2)
    audit, adapter = generation.report.audit, engine._load().adapter
    assert audit is not None and audit.tokens == compared == min(tokens, len(generation.token_ids))
    assert generation.report.identical_tokens + generation.report.fuzzy_tokens > 10
    assert audit.kl_divergence > 1e-4, "borrowed KV is not that of a full prefill"
    ids = engine._load().renderer.render(SECOND, {}).token_ids
    steps = [
        adapter.prefill(np.concatenate([ids, np.array(generation.token_ids[:count], dtype=np.int64)])).logits
        for count in range(compared)
    ]
    whole = torch.cat(steps)
    answered = np.array(generation.token_ids[: compared - 1], dtype=np.int64)
    torch.testing.assert_close(adapter.compute_logits(ids, answered), whole, atol=1e-4, rtol=1e-3)


def test_every_compared_token_must_agree() -> None:
    full = torch.eye(5)[[0, 1, 2]] * 9
    for place in range(3):
        reused = full.clone()
        reused[place] = -reused[place]
        result = Auditor(AuditConfig()).record("a", reused, full)
        assert not result.agrees and result.tokens == 3 and result.kl_divergence > 0.1
    assert Auditor(AuditConfig()).record("a", full * 1.1, full).agrees


def test_kept_kv_is_audited_even_if_nothing_was_reused(make_engine: EngineMaker) -> None:
    reuse = ReuseConfig(mode="identical", retention_ratio=0.3)
    engine = make_engine(reuse=reuse, audit=AuditConfig(sample_ratio=1.0, tokens=5))
    audit = engine.generate(FIRST, max_new_tokens=6).report.audit
    assert audit is not None and audit.tokens == 5 and audit.kl_divergence > 1e-5


def spoil_approximate(engine: SemShareEngine, monkeypatch) -> None:
    """Turn the logits of every pass that borrows off the prefix around."""
    parts = engine._load()
    execute = parts.execute

    def spoilt(call):
        execute(call)
        if call.plan.borrowings:
            prefill = call.outcome.prefill
            call.outcome = call.outcome._replace(prefill=prefill._replace(logits=-prefill.logits))

    monkeypatch.setattr(parts, "execute", spoilt)


@pytest.mark.parametrize("mode", ["identical", "semantic"])
def test_disagreement_suspends_approximate_reuse_alone(make_engine: EngineMaker, monkeypatch, mode: str) -> None:
    engine = approximate(make_engine, mode, window=2, min_agreement=0.6, tokens=1)
    engine.generate(FIRST, namespace="b", max_new_tokens=2)
    spoil_approximate(engine, monkeypatch)
    for n in range(2):
        report = engine.generate(prompt(f"Now {n} :", "fire", "flood"), max_new_tokens=2).report
        assert report.identical_tokens > 0 and report.audit is not None and not report.audit.agrees
    suspended = engine.generate(SECOND, max_new_tokens=2)
    assert "audit suspended reuse in namespace 'default'" in (suspended.report.declined or "")
    assert suspended.report.identical_tokens == suspended.report.fuzzy_tokens == 0
    assert suspended.token_ids == make_engine("off").generate(SECOND, max_new_tokens=2).token_ids
    again = engine.generate(SECOND, max_new_tokens=2)
    assert again.report.prefix_tokens == again.report.prompt_tokens - 1, "the exact prefix goes on"
    assert again.token_ids == suspended.token_ids
    assert engine.generate(SECOND, namespace="b", max_new_tokens=2).report.identical_tokens > 0
    engine.clear("default")
    engine.generate(FIRST, max_new_tokens=2)
    assert engine.generate(SECOND, max_new_tokens=2).report.identical_tokens > 0, "cleared, it starts anew"


def test_a_suspension_lasts(make_engine: EngineMaker, monkeypatch) -> None:
    engine = approximate(make_engine, "identical", window=2, min_agreement=0.6, tokens=1)
    spoil_approximate(engine, monkeypatch)
    for n in range(2):
        engine.generate(prompt(f"Now {n} :", "fire", "flood"), max_new_tokens=2)
    for _ in range(4):
        assert "suspended" in (engine.generate(FIRST, max_new_tokens=2).report.declined or "")


def test_exact_prefixes_do_not_speak_for_approximate_reuse(make_engine: EngineMaker, monkeypatch) -> None:
    engine = approximate(make_engine, "identical", window=4, min_agreement=0.7, tokens=1)
    spoil_approximate(engine, monkeypatch)
    for n in range(6):
        for text in (prompt(f"Now {n} :", "fire", "flood"), FIRST, FIRST, FIRST):
            engine.generate(text, max_new_tokens=2)
    assert engine.auditor.suspends("default"), "six of six disagreed"
