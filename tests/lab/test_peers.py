"""The frameworks' own classes beside the policies: missing ones are named, and their errors are theirs."""

from __future__ import annotations

import sys

import pytest

import peers
from peers import Peer, PeerBench, PeerError
from semsharekv_integrations.lab.bench import Results, Study
from semsharekv_integrations.lab.figures import summarize
from semsharekv_integrations.lab.policies import Subject
from semsharekv_integrations.lab.scenarios import Case, Query, Scenario
from tiny_models import make_model

MESSAGES = [{"role": "user", "content": "What?"}]
SCENARIO = Scenario("unlike", [Case("unlike", (), Query(MESSAGES, {}), None)] * 2, 2, 2)


@pytest.fixture(scope="module")
def subject(tokenizer) -> Subject:
    return Subject("tiny", make_model("llama", len(tokenizer)), tokenizer)


def measured(subject: Subject) -> Results:
    results = Results()
    for _, found in PeerBench(subject, Study("", (), {})).measure(SCENARIO):
        results.add(found)
    return results


def test_missing_peers_are_named(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("langchain_huggingface", "llama_index.llms.huggingface"):
        monkeypatch.setitem(sys.modules, module, None)
    results = measured(subject)
    assert [failure.policy for failure in results.failures] == [*peers.make_peers(subject)]
    assert all(failure.reason.startswith("not installed: l") for failure in results.failures)


def test_a_peer_is_timed_beside_the_policies(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(peers, "make_peers", lambda _: {"Mine": lambda: Peer("Mine", asked.append)})
    results = measured(subject)
    assert not results.failures and asked == ["Warm up.", MESSAGES, MESSAGES]
    off, mine = summarize(results.outcomes)
    assert mine.policy == "Mine" and mine["ttft_s"].value > 0 and mine["ttft_ratio"] is not None and off["ttft_s"]


def test_errors_of_peers_are_theirs() -> None:
    def fail(prompt: object) -> None:
        raise KeyError("pad_token")

    with pytest.raises(PeerError, match="Pipeline: KeyError: 'pad_token'"):
        Peer("Pipeline", fail).generate("x")
