"""The survey of causal types, on one of each kind: no type answers otherwise than ``generate`` does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import survey_checks
import survey_models
from survey_checks import CRASHED, DIFFERS, EQUAL, NOT_RUN, REUSED, Answer, Finding

KINDS = {
    "llama": "plain attention",
    "gemma3_text": "sliding windows",
    "gpt2": "learned positions",
    "bloom": "ALiBi",
    "mpt": "ALiBi, made otherwise",
    "mamba2": "recurrent",
    "qwen3_next": "gated delta net and attention",
    "falcon_h1": "both in each layer",
    "deepseek_v3": "latent attention",
    "gpt_oss": "sinks and windows",
}


def survey(model_type: str) -> dict[str, Finding]:
    model = survey_models.build_tiny_model(model_type)
    layers = survey_models.build_single_layers(model_type)
    return {found.mode: found for found in survey_checks.check_model(model, survey_models.VOCABULARY, layers)}


@pytest.fixture(autouse=True)
def few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer one is longer than every window, in little time."""
    monkeypatch.setattr(survey_checks, "LENGTHS", (7, 24))
    monkeypatch.setattr(survey_checks, "NEW_TOKENS", 6)


@pytest.mark.parametrize("model_type", KINDS)
def test_no_mode_answers_otherwise_than_generate(model_type: str) -> None:
    found = survey(model_type)
    assert found["off"].status == EQUAL, found
    assert not [finding for finding in found.values() if finding.status in (DIFFERS, CRASHED, NOT_RUN)], found


def test_what_is_reused_is_told() -> None:
    found = survey("llama")
    assert found["exact"].status == found["identical"].status == REUSED
    assert found["exact"].reused_tokens["24 branch"] == 20
    assert found["identical"].reused_tokens["moved"] > 0


def test_an_engine_that_answers_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    make_engine = survey_checks._make_engine
    monkeypatch.setattr(survey_models, "SEED", 12)
    other = survey_models.build_tiny_model("llama")
    monkeypatch.undo()
    monkeypatch.setattr(survey_checks, "_make_engine", lambda model, *args, **rules: make_engine(other, *args, **rules))
    found = survey("llama")
    assert {mode: finding.status for mode, finding in found.items()} == dict.fromkeys(survey_checks.MODES, DIFFERS)
    assert "7 first" in found["off"].why and "all computed again" in found["identical"].why


def test_keys_that_are_not_turned_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything is computed again they do no harm; in a single layer they do."""
    make_engine = survey_checks._make_engine

    def forget_turning(*args, mode: str, **rules):
        turning = {"rotate_keys": False} if mode == "identical" else {}
        return make_engine(*args, mode=mode, **turning, **rules)

    monkeypatch.setattr(survey_checks, "_make_engine", forget_turning)
    found = survey("llama")["identical"]
    assert found.status == DIFFERS and "a single layer: order" in found.why, found


def test_only_rounding_may_change_a_token() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    scores[1, :2] = torch.tensor([9.0, 9.0 - 1e-5])
    answer = Answer(scores.argmax(1).tolist(), scores)
    assert answer.tokens[1] == 0 and answer.find_difference(answer.tokens) is None
    assert answer.find_difference([answer.tokens[0], 1, 7]) is None
    assert answer.find_difference([answer.tokens[0], 2, answer.tokens[2]]) == 1
    assert answer.find_difference(answer.tokens[:2]) == 2


def test_the_table_ends_the_page_and_a_stopped_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Models\n\nAbout them.\n\n{survey_models.HEADING}\n\nOf an earlier run.\n")
    line = ["--out", str(page), "--only", "gemma4_assistant"]
    survey_models.main(line)
    survey_models.main([*line, "gpt2"])
    written = page.read_text()
    assert written.startswith(f"# Models\n\nAbout them.\n\n{survey_models.HEADING}\n\n") and "earlier" not in written
    assert "| gpt2 | equal | reused | refused: " in written and f"| gemma4_assistant | {NOT_RUN}: not built" in written
    assert capsys.readouterr().out.splitlines()[1].startswith("1/1 gpt2"), "the other one is known"
    journal = page.with_suffix(".jsonl")
    journal.write_text(journal.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(ValueError, match="of another commit or other versions"):
        survey_models.main(line)


def test_a_type_that_ends_its_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_models, "SECONDS", 0.0)
    row = survey_models.survey_apart("llama")
    assert row["off"]["status"] == CRASHED and row["off"]["why"] == "more than 0.0 s"
