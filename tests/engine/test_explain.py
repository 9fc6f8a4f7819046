"""Reports in sentences are true to the report; the latest lies beside the store, and goes with what is forgotten."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semsharekv_integrations import EngineConfig, ReuseConfig, ReuseReport, SemShareEngine, StoreConfig, StoreFileError
from semsharekv_integrations.cli.main import main
from semsharekv_integrations.explaining import ADVICE, explain_report
from semsharekv_integrations.last_report import LAST_REPORT, read_last_report
from semsharekv_integrations.logs import DECLINED_KINDS
from semsharekv_integrations.report import DocumentUse

TOWNS = ("Velmar", "Ostrin", "Kelda")
DOCUMENTS = {
    town: f"News from {town}. The mayor of {town} is Anna Kelsen. The cost to {town} is {cost} million crowns. "
    f"The people of {town} heard of it from the mayor in the spring of that year."
    for cost, town in enumerate(TOWNS, 40)
}


def make_engine(directory: Path | None = None, **reuse: Any) -> SemShareEngine:
    store = StoreConfig(directory=directory, disk_max_bytes=2**30) if directory else StoreConfig()
    return SemShareEngine.from_pretrained("semsharekv/reference", EngineConfig(reuse=ReuseConfig(**reuse), store=store))


def ask(engine: SemShareEngine, *towns: str, about: str = TOWNS[0]) -> ReuseReport:
    documents = {town: DOCUMENTS[town] for town in towns}
    prompt = "\n\n".join([*documents.values(), f"Who is the mayor of {about}?"])
    return engine.generate(prompt, documents=documents, max_new_tokens=4).report


@pytest.mark.parametrize("mode", ["off", "exact", "identical", "semantic", "paper", "auto"])
def test_an_explanation_has_the_report_s_numbers_and_survives_json(mode: str) -> None:
    engine = make_engine(mode=mode, report_origins=True)
    for towns in (TOWNS[:2], TOWNS[:2], TOWNS[::-1]):
        report = ask(engine, *towns)
        told = engine.explain(report)
        assert str(report.prompt_tokens) in told and repr(report.mode) in told
        assert report.mode == "off" or f"took {report.reused_tokens} of" in told
        assert (report.declined is None) == ("was not reused because" not in told)
        assert report.declined is None or report.declined in told
        for use in report.documents:
            assert f"{use.reused_tokens} of its {use.tokens}" in told or repr(use.document_id) in told
        assert engine.explain(json.loads(json.dumps(report.to_dict()))) == told
        assert ReuseReport.from_dict(report.to_dict()) == report
        assert ("is approximate" in told) == (report.identical_tokens + report.fuzzy_tokens > 0)


def test_every_reason_has_advice_of_its_own() -> None:
    assert ADVICE.keys() == DECLINED_KINDS.keys() and len(set(ADVICE.values())) == len(ADVICE)
    plain = ReuseReport("exact", 10)
    lines = {explain_report(replace(plain, declined=f"{start} 3"), ReuseConfig()) for start in ADVICE}
    assert len(lines) == len(ADVICE)


def test_many_documents_stay_readable() -> None:
    uses = tuple(DocumentUse(f"d{n}", 5, 0 if n % 2 else 3) for n in range(400))
    told = explain_report(ReuseReport("identical", 4000, identical_tokens=600, documents=uses), ReuseConfig())
    assert len(told.splitlines()) < 25 and "188 more" in told and "188 other documents" in told


@pytest.mark.parametrize(
    ("report", "named"),
    [
        (3, "report is 3"),
        (None, "report is None"),
        ({}, "prompt_tokens"),
        ({"mode": "exact", "prompt_tokens": "7"}, r"report\.prompt_tokens is '7'"),
        ({"mode": "exact", "prompt_tokens": 7, "documents": [3]}, "DocumentUse"),
        ({"mode": "exact", "prompt_tokens": 7, "documents": 3}, "report is"),
        ({"mode": "exact", "prompt_tokens": 7, "phases_s": 3}, r"report\.phases_s is 3"),
        ({"mode": "exact", "prompt_tokens": 7, "phases_s": {"plan": None}}, r"report\.phases_s\.plan is None"),
        (
            {
                "mode": "exact",
                "prompt_tokens": 7,
                "documents": [{"document_id": "d", "tokens": "x", "reused_tokens": 0}],
            },
            r"report\.documents\.tokens is 'x'",
        ),
        ({"mode": "exact", "prompt_tokens": 7, "colour": 1}, "colour"),
    ],
)
def test_what_is_no_report_is_refused_by_name(report: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        explain_report(report, ReuseConfig())


def test_the_latest_call_is_explained_from_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = make_engine(tmp_path / "kv", mode="identical", report_origins=True)
    for towns in (TOWNS[:2], TOWNS[::-1]):
        report = ask(engine, *towns)
    assert main(["inspect", str(tmp_path / "kv"), "--last"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == engine.explain(report)
    assert main(["inspect", str(tmp_path / "kv"), "--last", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert ReuseReport.from_dict(plain) == replace(report, prompt_ids=())
    assert main(["inspect", str(tmp_path / "kv"), "--last", "--namespace", "a"]) == 2
    engine.close()
    assert main(["inspect", str(tmp_path / "kv")]) == 0


@pytest.mark.parametrize("way", ["forget", "clear", "clear all", "command"])
def test_what_is_forgotten_takes_the_report_along(tmp_path: Path, way: str) -> None:
    engine = make_engine(tmp_path)
    ask(engine, *TOWNS)
    assert TOWNS[0] in (tmp_path / LAST_REPORT).read_text()
    (tmp_path / f"{LAST_REPORT}.77").write_text(f"what a killed writer left of {TOWNS[0]}")
    if way == "command":
        engine.close()
    {
        "forget": lambda: engine.forget(TOWNS[0]),
        "clear": lambda: engine.clear("default"),
        "clear all": engine.clear,
        "command": lambda: main(["clear", str(tmp_path)]),
    }[way]()
    assert not list(tmp_path.glob(f"{LAST_REPORT}*"))
    with pytest.raises(StoreFileError, match="has no report of a call"):
        read_last_report(tmp_path)


def test_a_call_that_was_forgotten_meanwhile_leaves_no_report(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    chunks = engine.stream(DOCUMENTS[TOWNS[0]], documents={TOWNS[0]: DOCUMENTS[TOWNS[0]]}, max_new_tokens=3)
    next(iter(chunks))
    engine.forget(TOWNS[0])
    assert [*chunks][-1].generation is not None
    assert not (tmp_path / LAST_REPORT).exists()


@pytest.mark.parametrize("planted", ["link", "directory", "nonsense", "other"])
def test_what_somebody_planted_is_neither_followed_nor_believed(tmp_path: Path, planted: str) -> None:
    engine, path, target = make_engine(tmp_path), tmp_path / LAST_REPORT, tmp_path.parent / f"{tmp_path.name}-target"
    target.write_text("precious")
    if planted == "link":
        path.symlink_to(target)
    elif planted == "directory":
        path.mkdir()
    else:
        path.write_text({"nonsense": "\x00", "other": '{"report": {}}'}[planted])
    with pytest.raises(StoreFileError):
        read_last_report(tmp_path)
    assert ask(engine, *TOWNS).output_tokens and target.read_text() == "precious"
    if planted in ("link", "directory"):
        assert path.is_symlink() or path.is_dir()
    else:
        read_last_report(tmp_path)
