"""Structured logs: one record for each finished call, in numbers alone, and observers that cannot break an answer."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from unittest.mock import Mock

import numpy as np
import pytest

from semsharekv_integrations import AuditConfig, ReuseConfig, ReuseReport, SemShareEngine
from semsharekv_integrations.kv import PrefixMatch, Reference, Rendered
from semsharekv_integrations.logs import (
    CALL_FIELDS,
    DECLINED_KINDS,
    LOGGER,
    WITHHELD,
    JsonFormatter,
    Observers,
    classify_declined,
    log_call,
    log_trouble,
)
from semsharekv_integrations.reuse.planner import Planner, Scope, StateRules
from tiny_models import EngineMaker

DOCUMENT = "A flood hit the old town of Prorna in May , and the mayor said that many people were affected ."
PROMPT, OTHER = f"Answer in one line .\n\n{DOCUMENT}\n\nWho ?", f"You read the news .\n\n{DOCUMENT}\n\nWhen ?"
PRIVATE = ("tenant-zyxq", "chat-zyxq", "contract-zyxq", "Prorna", "flood")
LINE_KEYS = {"timestamp", "level", "logger", "message"}


class Lines(logging.Handler):
    """Keeps every record, and the line that ``JsonFormatter`` makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.records: list[logging.LogRecord] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What the package logs from level INFO on."""
    handler, level = Lines(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield handler
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


def call(engine: SemShareEngine, prompt: str = PROMPT, **options) -> ReuseReport:
    given = {"max_new_tokens": 3, "namespace": PRIVATE[0], "session": PRIVATE[1], "documents": {PRIVATE[2]: DOCUMENT}}
    return engine.generate(prompt, **{**given, **options}).report


def suspend(engine: SemShareEngine, monkeypatch) -> SemShareEngine:
    monkeypatch.setattr(engine.auditor, "suspends", lambda namespace: True)
    return engine


def test_a_finished_call_is_one_record_of_its_report(make_engine: EngineMaker, lines: Lines) -> None:
    engine = make_engine("exact")
    reports = [call(engine), call(engine)]
    assert reports[1].prefix_tokens > 0
    assert [(r.message, r.levelno, r.name) for r in lines.records] == [("generated", logging.INFO, LOGGER.name)] * 2
    for line, report in zip(map(json.loads, lines.lines), reports, strict=True):
        assert line.keys() == LINE_KEYS | {*CALL_FIELDS, "declined"}
        assert {name: line[name] for name in CALL_FIELDS} == {name: getattr(report, name) for name in CALL_FIELDS}
    assert [record.declined for record in lines.records] == ["no_prefix", None]


def test_cancelled_and_failed_calls_leave_no_record(make_engine: EngineMaker, lines: Lines, monkeypatch) -> None:
    engine, seen = make_engine("exact"), []
    engine.observe(seen.append)
    stream = engine.stream(PROMPT, max_new_tokens=50, temperature=3.0, seed=4)
    next(stream)
    stream.close()
    assert engine.stats()["requests"] == 1, "it counts as a request all the same"
    monkeypatch.setattr(engine._load().adapter, "decode_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPT, max_new_tokens=9, temperature=3.0, seed=4)
    assert not seen and not lines.records


def test_nothing_private_is_logged(make_engine: EngineMaker, lines: Lines, monkeypatch) -> None:
    engine = make_engine("identical")
    call(engine)
    call(engine, OTHER)
    report = call(suspend(engine, monkeypatch))
    assert PRIVATE[0] in (report.declined or ""), "the reason does name the namespace"

    def blabbing(report: ReuseReport) -> None:
        raise ValueError(f"{report.documents} in {PRIVATE[0]}")

    engine.observe(blabbing)
    call(engine)
    assert len(lines.records) == 5
    plain = [logging.Formatter().format(record) + str(vars(record)) for record in lines.records]
    for text in [*lines.lines, *plain]:
        assert not [word for word in PRIVATE if word in text]


def test_every_reason_has_its_kind(make_engine: EngineMaker, monkeypatch) -> None:
    eager = ReuseConfig(mode="identical", max_compute_ratio=1.0)
    frugal = ReuseConfig(mode="identical", max_compute_ratio=0.0)
    wary = ReuseConfig(mode="identical", max_compute_ratio=1.0, max_deviation=1e-9)
    picky = ReuseConfig(mode="exact", min_prefix_tokens=1000)

    def second(engine: SemShareEngine) -> ReuseReport:
        call(engine)
        return call(engine, OTHER)

    found = {
        "no_prefix": call(make_engine("exact")),
        "nothing_similar": call(make_engine(reuse=eager)),
        "too_costly": second(make_engine(reuse=frugal)),
        "deviation": second(make_engine(reuse=wary)),
        "short_prefix": second(make_engine(reuse=picky)),
        "suspended": call(suspend(make_engine("exact"), monkeypatch)),
    }
    kinds = {kind: classify_declined(report.declined) for kind, report in found.items()}
    planner = Planner(picky, make_engine().store, None, 3, max_tokens=5)
    kinds["too_long"] = classify_declined(planner.plan(Rendered(np.arange(9), ()), Scope("default"), False).declined)
    stored = Reference("r", "default", np.arange(9), ())
    one_by_one = Planner(
        ReuseConfig(mode="exact").resolve(),
        Mock(find_prefix=lambda *_, **__: PrefixMatch(stored, 1)),
        None,
        3,
        max_tokens=None,
        states=StateRules(every=1, one_by_one=True),
    )
    plan = one_by_one.plan(Rendered(np.arange(9), ()), Scope("default"), False)
    kinds["one_by_one"] = classify_declined(plan.declined)
    assert kinds == {kind: kind for kind in DECLINED_KINDS.values()}
    assert classify_declined(second(make_engine(reuse=eager)).declined) is None
    assert classify_declined("no longer lent to tenant-zyxq") == "other"


def test_disabled_logging_makes_no_record(make_engine: EngineMaker, lines: Lines, monkeypatch) -> None:
    made, factory = [], logging.getLogRecordFactory()
    monkeypatch.setattr(
        logging, "_logRecordFactory", lambda *args, **kwargs: made.append(1) or factory(*args, **kwargs)
    )
    LOGGER.setLevel(logging.WARNING)
    call(make_engine("exact"))
    log_call(object())  # type: ignore[arg-type]  # it is not even looked at
    assert not made
    log_trouble("damaged_file")
    assert made == [1]
    LOGGER.setLevel(logging.CRITICAL)
    log_trouble("damaged_file")
    assert made == [1]


def test_the_package_configures_no_logging() -> None:
    assert [type(handler) for handler in LOGGER.handlers] == [logging.NullHandler]
    assert LOGGER.level == logging.NOTSET and LOGGER.propagate


def test_trouble_is_told_in_numbers_and_identifiers(lines: Lines) -> None:
    log_trouble("damaged_file", count=2, seconds=0.5, error="OSError", name="store.disk", level=3)
    assert lines.records[0].levelno == logging.WARNING
    line = json.loads(lines.lines[0])
    extra = {name: line[name] for name in line.keys() - LINE_KEYS}
    assert extra == {"count": 2, "seconds": 0.5, "error": "OSError", "name_": "store.disk"}
    assert (line["message"], line["level"], line["logger"]) == ("damaged_file", "WARNING", LOGGER.name)


@pytest.mark.parametrize(
    "value",
    ["a prompt", "/home/me/kv.safetensors", "x" * 81, "", "wörd", float("nan"), float("inf"), None, b"x", ["x"]],
)
def test_other_values_are_withheld(lines: Lines, value) -> None:
    log_trouble("damaged_file", value=value)
    assert json.loads(lines.lines[0])["value"] == WITHHELD


def test_an_event_that_is_a_text_is_withheld(lines: Lines) -> None:
    log_trouble("cannot read %s for tenant-zyxq")
    assert json.loads(lines.lines[0])["message"] == WITHHELD


def test_lines_are_json_whatever_is_logged(lines: Lines) -> None:
    try:
        raise ValueError("zyxq in a traceback")
    except ValueError:
        LOGGER.warning("two\nlines of %s", "text", exc_info=True, stack_info=True, extra={"odd": {1}, "level": "mine"})
    assert "\n" not in lines.lines[0] and "traceback" not in lines.lines[0]
    line = json.loads(lines.lines[0])
    assert line.keys() == LINE_KEYS | {"odd"}
    assert line["level"] == "WARNING" and line["message"] == "two\nlines of text"
    assert line["timestamp"].endswith("+00:00")


def test_a_failing_observer_does_not_break_the_answer(make_engine: EngineMaker, lines: Lines) -> None:
    engine, seen = make_engine("exact", audit=AuditConfig(sample_ratio=1.0)), []

    def failing(report: ReuseReport) -> None:
        raise KeyError("zyxq")

    engine.observe(failing)
    engine.observe(seen.append)
    generations = [engine.generate(PROMPT, max_new_tokens=3) for _ in range(3)]
    off = make_engine("off").generate(PROMPT, max_new_tokens=3)
    assert [generation.token_ids for generation in generations] == [off.token_ids] * 3
    assert seen == [generation.report for generation in generations], "those behind it are told, of the final report"
    assert seen[1].audit is not None and "audit" in seen[1].phases_s
    troubles = [json.loads(line) for line in lines.lines if "failed_observer" in line]
    assert len(troubles) == 1, "it is logged once"
    assert troubles[0]["error"] == "KeyError" and troubles[0]["observer"].endswith("<locals>.failing")


def test_each_type_of_observer_is_logged_once(lines: Lines) -> None:
    class Broken:
        def __call__(self, report: ReuseReport) -> None:
            raise RuntimeError

    observers = Observers(Broken(), Broken(), lambda report: 1 / 0)
    for _ in range(2):
        observers.tell(ReuseReport("off", 5))
    assert [record.error for record in lines.records] == ["RuntimeError", "ZeroDivisionError"]
    assert [record.observer.rpartition(".")[2] for record in lines.records] == ["Broken", "<lambda>"]


def test_an_interrupt_is_not_held_up() -> None:
    observers = Observers(lambda report: sys.exit(3))
    with pytest.raises(SystemExit):
        observers.tell(ReuseReport("off", 5))


def test_an_observer_may_add_another() -> None:
    observers, seen = Observers(), []
    observers.add(lambda report: observers.add(seen.append))
    for count in range(3):
        observers.tell(ReuseReport("off", 5))
        assert len(seen) == count * (count + 1) / 2
