"""Sweeps vary one thing: sentences, kept KV, budgets and hash bits are what their names say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("matplotlib")

import plots
import sweeps
from probes import RecallProbe, SimilarityProbe
from semsharekv_integrations import world
from semsharekv_integrations.lab.bench import Bench, Results, Study
from semsharekv_integrations.lab.figures import Estimate, Outcome, Row, summarize
from semsharekv_integrations.lab.policies import Subject
from semsharekv_integrations.lab.scenarios import Scenario
from semsharekv_integrations.report import ReuseReport
from semsharekv_integrations.reuse.matching import LONGEST_EXACT_TOKENS
from sentences import CHANGES, Change, change_sentences, sentence_cases
from sweeps import CONTROL_POLICIES, Options
from tiny_models import make_model

OUTCOME = Outcome("x", "off", 0, ReuseReport("off", 100, ttft_s=2.0), "x", "x", True, True)
SMALL = Options(cases=1, documents=(2, 3), quick=True)


@pytest.fixture(scope="module")
def subject(tokenizer) -> Subject:
    return Subject("tiny", make_model("llama", len(tokenizer), max_position_embeddings=4096), tokenizer)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_the_sentences_changes_and_the_kept_one_stays(change: Change, share: float) -> None:
    rng = Random(0)
    for document in world.make_documents(rng, 40):
        kind = rng.choice(sorted(document.facts))
        new = change_sentences(rng, document, change, share, kind)
        stays = [sentence for sentence in document.sentences if sentence in new.sentences]
        count = min(round(share * len(document.sentences)), len(document.sentences) - 1)
        assert new.headline == document.headline and new.facts[kind] == document.facts[kind]
        assert any(sentence.kind == kind for sentence in stays)
        assert new.facts.keys() == {sentence.kind for sentence in new.sentences if sentence.kind}
        if change == "removed":
            assert len(new.sentences) == len(document.sentences) - count == len(stays)
        else:
            assert len(new.sentences) == len(document.sentences)
            pairs = list(zip(document.sentences, new.sentences, strict=True))
            different = [old for old, other in pairs if old != other]
            assert len(different) == count
            for old in different:
                assert old.kind is None or new.facts[old.kind] != document.facts[old.kind]


@pytest.mark.parametrize("change", CHANGES)
def test_the_answer_stands_in_both_versions(change: Change) -> None:
    for case in sentence_cases(change, 0.5, 20, 0, (2, 4), ["completion", "system"]):
        seen, target = case.references[0].documents, case.target.documents
        assert case.asked is not None and case.stale is None and case.scenario == f"{change} 50%"
        assert case.values[0] in seen[case.asked] and case.values[0] in target[case.asked]
        assert all(target[town] != seen[town] for town in target), "every document is another"
    with pytest.raises(ValueError, match=r"share is 1\.0; accepted is above 0 and below 1"):
        sentence_cases(change, 1.0, 1, 0, (2, 4), ["system"])
    with pytest.raises(ValueError, match="change is 'moved'; accepted is 'removed' or 'replaced'"):
        sentence_cases("moved", 0.5, 1, 0, (2, 4), ["system"])  # type: ignore[arg-type]


def test_similarity_falls_with_the_share_of_sentences(subject: Subject) -> None:
    probe, found = SimilarityProbe(subject), []
    for share in (0.1, 0.9):
        cases = list(sentence_cases("replaced", share, 8, 0, (2, 3), ["completion"]))
        found.append([probe.measure(case)["similarity"] for case in cases])
    assert all(-1 <= value <= 1.001 for values in found for value in values)
    assert sum(found[0]) > sum(found[1])
    assert probe.measure(replace(cases[0], asked=None)) == {}
    same = replace(cases[0], target=cases[0].references[0])
    assert probe.measure(same)["similarity"] == pytest.approx(1)


def test_outcomes_are_put_in_bins_of_similarity() -> None:
    values = [("a", 0, 0.95), ("a", 1, 0.31), ("b", 0, 0.3), ("b", 1, 1.0), ("unlike", 0, None)]
    outcomes = [
        replace(OUTCOME, scenario=w, case=c, extra={} if s is None else {"similarity": s}) for w, c, s in values
    ]
    binned = sweeps.group_by_similarity(outcomes)
    assert [o.scenario for o in binned] == ["0.3 to 0.4", "0.3 to 0.4", "0.9 to 1.0", "0.9 to 1.0", "unlike"]
    assert len({(o.scenario, o.case) for o in binned}) == len(outcomes), "each case keeps a number of its own"
    assert [row.cases for row in summarize(binned)] == [2, 2, 1]


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_every_sweep_has_its_controls_and_runs(name: str, subject: Subject, tmp_path: Path) -> None:
    options = replace(SMALL, documents=(14, 14)) if name == "lsh" else SMALL
    study, axis = sweeps.SWEEPS[name](options, subject)
    assert tuple(study.configs)[:3] == CONTROL_POLICIES
    assert study.scenarios[-1].name.startswith("unlike")
    few = {policy: study.configs[policy] for policy in ("off", list(study.configs)[-1])}
    first = study.scenarios[0]
    results, short = Results(), Scenario(first.name, first.cases, 1, max_new_tokens=2)
    for _, found in Bench(subject, replace(study, configs=few)).measure(short):
        results.add(found)
    rows = summarize(study.regroup(results.outcomes), results.failures, study.figures)
    assert len(rows) == 2 and not results.failures
    assert ("similarity" in rows[0].figures) == (name in ("sentences", "similarity"))
    assert ("lsh_recall" in rows[1].figures) == (name == "lsh")
    drawn = plots.draw_answers(fired(rows), study.title, axis, tmp_path / "x.md")
    assert {path.name for path in drawn} >= {"x.agreement.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_sweep_is_a_command_that_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "budget.md"
    few = ["--quick", "--cases", "1", "--sizes", "2", "2", "--max-new-tokens", "2", "--out", str(out)]
    sweeps.main(["budget", *few])
    assert {path.suffix for path in tmp_path.iterdir()} >= {".md", ".json"}
    assert "Quality against compute" in out.read_text() and "| relevance 0.1 |" in out.read_text()
    with pytest.raises(SystemExit):
        sweeps.main(["bits"])
    assert "budget" in capsys.readouterr().out, "what there is"


def fired(rows: list[Row]) -> list[Row]:
    """With a figure for every row, whether or not a random model reused anything."""
    some = dict.fromkeys(("agreement", "compute_ratio", "kv_kept_ratio"), Estimate(0.5, 0.4, 0.6))
    return [replace(row, figures=some) for row in rows]


def rules_of(study: Study, name: str):
    return study.configs[name].reuse.resolve()


def test_retention_keeps_what_its_names_say(subject: Subject) -> None:
    study, _ = sweeps.sweep_retention(Options(cases=1, documents=(2, 2)), subject)
    assert len(study.configs) == 3 + len(sweeps.KEPT_RATIOS) * len(sweeps.FINAL_SHARES)
    rules = rules_of(study, "keeps 0.42, decaying")
    assert (rules.retention_ratio, rules.retention_final_share) == (0.42, 0.25)
    assert rules_of(study, "keeps 0.42, even").retention_final_share == 1


def test_each_signal_of_the_budget_stands_alone() -> None:
    signals = sweeps.make_budget_policies(Options())
    for signal, configs in signals.items():
        for reuse in configs.values():
            rules = reuse.resolve()
            acts = {
                "deviation": rules.deviation_ratio > 0,
                "attention": rules.attention_ratio > 0,
                "relevance": rules.relevance_ratio > 0,
                "boundaries": rules.boundary_tokens > 0,
            }
            expected = {"none": set(), "both": {"deviation", "attention", "boundaries"}}
            assert {name for name, does in acts.items() if does} == expected.get(signal, {signal, "boundaries"})
            assert rules.max_compute_ratio == 1 and (rules.full_layers == 1) == acts["deviation"]
    assert [r.deviation_ratio for r in signals["deviation"].values()] == list(sweeps.SIGNAL_RATIOS)
    both = list(signals["both"].values())[-1].resolve()
    assert both.deviation_ratio + both.attention_ratio == pytest.approx(sweeps.SIGNAL_RATIOS[-1])


def test_settings_reach_every_point(subject: Subject) -> None:
    study, _ = sweeps.sweep_budget(Options(cases=1, documents=(2, 2), settings={"min_run_tokens": 9}), subject)
    assert {rules_of(study, name).min_run_tokens for name in list(study.configs)[3:]} == {9}


def test_long_documents_are_hashed_and_recall_grows_with_bits(subject: Subject) -> None:
    options = Options(cases=1, documents=(14, 14))
    study, _ = sweeps.sweep_lsh(replace(options, quick=True), subject)
    (case,) = study.scenarios[0].cases
    (text,) = case.target.documents.values()
    prompt = case.target.prompt
    assert len(subject.tokenizer.encode(text)) > LONGEST_EXACT_TOKENS
    assert text in (prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt))
    probe = RecallProbe(subject, study.configs)
    exact, few, many = (probe.measure(case, name)["lsh_recall"] for name in ("0 bits", "16 bits", "512 bits"))
    assert exact == 1 and 0 < few < many <= 1
    assert probe.measure(case, "off") == {}
    short = next(sweeps.long_cases(replace(options, documents=(2, 2)), alike=True))
    assert probe.measure(short, "16 bits") == {}, "not hashed, so there is no recall"
