"""Prometheus metrics: they agree with stats and reports, and name nobody."""

from __future__ import annotations

import subprocess
import sys

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from semsharekv_integrations import AuditConfig, ReuseConfig, ReuseReport, SemShareEngine, SemShareError
from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.metrics import PREFIX, EngineCollector, export
from tiny_models import EngineMaker

DOCUMENT = "A flood hit the old town of Prorna in May , and the mayor said that many people were affected ."
PROMPT = f"Answer in one line .\n\n{DOCUMENT}\n\nWho was it ?"
PRIVATE = ("tenant-zyxq", "chat-zyxq", "contract-zyxq", "Prorna", "flood")
READ = {
    "call_ttft_seconds": lambda report: report.ttft_s,
    "call_decode_seconds": lambda report: report.decode_s,
    "call_prompt_tokens": lambda report: report.prompt_tokens,
    "call_compute_ratio": lambda report: report.compute_ratio,
    "call_reused_ratio": lambda report: report.reused_tokens / report.prompt_tokens,
}
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def call(engine: SemShareEngine, prompt: str = PROMPT, **options) -> ReuseReport:
    given = {"max_new_tokens": 3, "namespace": PRIVATE[0], "session": PRIVATE[1], "documents": {PRIVATE[2]: DOCUMENT}}
    return engine.generate(prompt, **{**given, **options}).report


def registry_of(*collectors: EngineCollector) -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return registry


def scrape(registry: CollectorRegistry) -> Series:
    """Every series by name and labels, without times of creation, as a strict parser reads them."""
    text = generate_openmetrics(registry).decode()
    series: Series = {}
    for family in text_string_to_metric_families(text):  # refuses a family that stands there twice
        for sample in family.samples:
            key = (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items()))
            assert sample.name.startswith(PREFIX) and key not in series
            if not sample.name.endswith("_created"):
                series[key] = sample.value
    return series


def value(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset(labels.items())]


def stats_in(series: Series, **labels: str) -> dict[str, float]:
    """Counters and gauges under their names in ``stats``."""
    found = {name: v for (name, keys), v in series.items() if keys == labels.items() and not name.startswith("call_")}
    return {name.removesuffix("_total"): v for name, v in found.items()}


def assert_reports(series: Series, reports: list[ReuseReport], **labels: str) -> None:
    """The histograms under these labels hold these reports and no other."""
    labels = {**labels, "mode": reports[0].mode}
    for name, read in READ.items():
        values = [read(report) for report in reports]
        assert value(series, f"{name}_count", **labels) == len(reports)
        assert value(series, f"{name}_sum", **labels) == pytest.approx(sum(values))
        for (sample, keys), count in series.items():
            if sample == f"{name}_bucket" and labels.items() <= keys:
                assert count == sum(value <= float(dict(keys)["le"]) for value in values)
    phases = {phase for report in reports for phase in report.phases_s}
    for phase in phases:
        seconds = [report.phases_s[phase] for report in reports if phase in report.phases_s]
        assert value(series, "call_phase_seconds_count", phase=phase, **labels) == len(seconds)
        assert value(series, "call_phase_seconds_sum", phase=phase, **labels) == pytest.approx(sum(seconds))
    shown = {dict(keys)["phase"] for name, keys in series if "call_phase" in name and labels.items() <= keys}
    assert shown == phases


def test_metrics_agree_with_stats_and_reports(make_engine: EngineMaker) -> None:
    engine = make_engine("exact", audit=AuditConfig(sample_ratio=1.0))
    registry = registry_of(EngineCollector(engine))
    assert stats_in(scrape(registry)) == engine.stats()
    reports = [call(engine), call(engine)]
    series = scrape(registry)
    assert stats_in(series) == engine.stats()
    assert_reports(series, reports)
    assert value(series, "requests_total") == 2 and value(series, "audits") == 1
    assert value(series, "reused_tokens_total") == reports[1].reused_tokens > 0
    assert value(series, "prompt_tokens_total") == value(series, "call_prompt_tokens_sum", mode="exact")
    assert scrape(registry) == series, "a scrape changes nothing"


def test_bounds_suit_what_is_measured(make_engine: EngineMaker) -> None:
    engine = make_engine("exact")
    registry = registry_of(EngineCollector(engine))
    call(engine)
    bounds: dict[str, set[float]] = {}
    for name, keys in scrape(registry):
        if name.endswith("_bucket"):
            bounds.setdefault(name.removesuffix("_bucket"), set()).add(float(dict(keys)["le"]))
    assert bounds.keys() == READ.keys() | {"call_phase_seconds"}
    for name, found in bounds.items():
        finite = sorted(found)[:-1]
        least, most = {"seconds": (0.001, 120), "ratio": (0, 1), "tokens": (16, 131072)}[name.rpartition("_")[2]]
        assert (finite[0], finite[-1]) == (least, most) and len(finite) > 10


def test_what_can_fall_is_no_counter(make_engine: EngineMaker) -> None:
    """Whatever happens to the store: Prometheus takes a falling counter for a restart."""
    audit = AuditConfig(sample_ratio=1.0, window=2)
    first = make_engine("exact")
    call(first)
    engine = make_engine("exact", audit=audit, store=StoreConfig(max_bytes=2 * int(first.stats()["store_bytes"])))
    collector = EngineCollector(engine)
    registry, before, fallen = registry_of(collector), scrape(registry_of(collector)), set()
    for step in (
        lambda: call(engine),
        lambda: call(engine),
        lambda: call(engine, "News from Velmar ." + PROMPT, documents={}),
        lambda: call(engine, "A word from Oslo ." + PROMPT, documents={}),
        lambda: engine.forget(PRIVATE[2], PRIVATE[0]),
        lambda: call(engine),
        engine.clear,
    ):
        step()
        after = scrape(registry)
        fallen |= {name for (name, keys), number in before.items() if number > after[name, keys]}
        before = after
    gauges = {family.name.removeprefix(PREFIX) for family in collector.collect() if family.type == "gauge"}
    assert {"store_entries", "store_bytes", "audits"} <= fallen <= gauges
    assert "store_max_bytes" in gauges and "audit_agreement_ratio" in gauges


def test_cancelled_calls_are_requests_alone(make_engine: EngineMaker) -> None:
    engine = make_engine("exact")
    registry = registry_of(EngineCollector(engine))
    stream = engine.stream(PROMPT, max_new_tokens=50, temperature=3.0, seed=4)
    next(stream)
    stream.close()
    series = scrape(registry)
    assert value(series, "requests_total") == 1 and not [name for name, _ in series if name.startswith("call_")]


def test_histograms_are_by_mode(make_engine: EngineMaker) -> None:
    collector = EngineCollector(make_engine("off"), service="a")
    registry, reports = registry_of(collector), {}
    for mode, service in (("exact", "b"), ("identical", "c")):
        engine = make_engine(mode)
        collector.add(engine, service=service)
        reports[mode, service] = [call(engine), call(engine, "You read the news ." + PROMPT)]
    series = scrape(registry)
    for (mode, service), of_mode in reports.items():
        assert {report.mode for report in of_mode} == {mode}
        assert_reports(series, of_mode, service=service)
    assert {dict(keys)["mode"] for name, keys in series if name.startswith("call_")} == {"exact", "identical"}


def test_engines_with_other_labels_share_a_registry(make_engine: EngineMaker) -> None:
    engines = {"a": make_engine("exact"), "b": make_engine("exact")}
    collector = EngineCollector(engines["a"], engine="a", tier="one")
    collector.add(engines["b"], tier="one", engine="b")
    registry = registry_of(collector)
    reports = {"a": [call(engines["a"])], "b": [call(engines["b"]), call(engines["b"])]}
    series = scrape(registry)
    for name, engine in engines.items():
        assert stats_in(series, engine=name, tier="one") == engine.stats()
        assert_reports(series, reports[name], engine=name, tier="one")


def test_calls_of_an_engine_without_a_store_count_as_those_of_another(make_engine: EngineMaker) -> None:
    engine, helper = make_engine(), make_engine("off")
    collector, registry = EngineCollector(engine, service="a"), CollectorRegistry()
    registry.register(collector)
    collector.add_calls(helper, service="a")
    engine.generate(PROMPT, max_new_tokens=2)
    stored = registry.get_sample_value("semsharekv_store_entries", {"service": "a"})
    helper.generate(PROMPT, max_new_tokens=2)
    assert registry.get_sample_value("semsharekv_requests_total", {"service": "a"}) == 2
    assert registry.get_sample_value("semsharekv_output_tokens_total", {"service": "a"}) == 4
    assert registry.get_sample_value("semsharekv_store_entries", {"service": "a"}) == stored == 1
    for mode in ("exact", "off"):
        labels = {"service": "a", "mode": mode}
        assert registry.get_sample_value("semsharekv_call_ttft_seconds_count", labels) == 1
    with pytest.raises(ValueError, match="labels"):
        collector.add_calls(helper, service="b")


def test_a_registry_refuses_a_second_collector(make_engine: EngineMaker) -> None:
    registry = registry_of(EngineCollector(make_engine(), engine="a"))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(EngineCollector(make_engine(), engine="b"))


def test_labels_that_would_mix_series_up_are_refused(make_engine: EngineMaker) -> None:
    engine = make_engine()
    collector = EngineCollector(engine, service="a")
    for labels in ({"service": "a"}, {}, {"other": "b"}, {"service": "b", "other": "b"}):
        with pytest.raises(ValueError, match="labels is"):
            collector.add(make_engine(), **labels)
    for labels in ({"mode": "x"}, {"phase": "x"}, {"le": "x"}, {"__x": "x"}, {"größe": "x"}, {"service": 3}):
        with pytest.raises(ValueError, match="label"):
            EngineCollector(engine, **labels)
    registry = registry_of(collector)
    call(engine)
    assert value(scrape(registry), "call_ttft_seconds_count", service="a", mode="exact") == 1


def test_nobody_is_named(make_engine: EngineMaker, monkeypatch) -> None:
    engine = make_engine(reuse=ReuseConfig(mode="identical", max_compute_ratio=1.0))
    registry = registry_of(EngineCollector(engine, service="search"))
    report = call(engine)
    assert report.documents[0].document_id == PRIVATE[2]
    engine.warm({PRIVATE[2]: DOCUMENT}, namespace=PRIVATE[0])
    assert call(engine, "You read the news ." + PROMPT).sources
    monkeypatch.setattr(engine.auditor, "suspends", lambda namespace: True)
    assert PRIVATE[0] in (call(engine).declined or "")
    for text in (generate_latest(registry).decode(), generate_openmetrics(registry).decode()):
        assert not [word for word in PRIVATE if word in text]
    labels = {label for _, keys in scrape(registry) for label, _ in keys}
    assert labels == {"service", "mode", "phase", "le"}


def test_export_registers_and_serves_if_asked(make_engine: EngineMaker, monkeypatch) -> None:
    served = []
    monkeypatch.setattr(prometheus_client, "start_http_server", lambda port, **options: served.append((port, options)))
    default = CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", default)
    engine = make_engine()
    export(engine, engine="a").add(make_engine(), engine="b")
    assert not served and stats_in(scrape(default), engine="b") == make_engine().stats()
    registry = CollectorRegistry()
    export(engine, port=9109, registry=registry)
    assert served == [(9109, {"addr": "127.0.0.1", "registry": registry})], "other machines are served if asked alone"
    call(engine)
    assert stats_in(scrape(registry)) == stats_in(scrape(default), engine="a") == engine.stats()


def test_a_port_that_is_taken_leaves_nothing_registered(make_engine: EngineMaker, monkeypatch) -> None:
    def taken(*args: object, **options: object) -> None:
        raise OSError("address already in use")

    monkeypatch.setattr(prometheus_client, "start_http_server", taken)
    registry = CollectorRegistry()
    with pytest.raises(OSError, match="in use"):
        export(make_engine(), port=9109, registry=registry)
    assert not scrape(registry)


def test_the_extra_is_named_where_it_is_missing(make_engine: EngineMaker, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for begin in (EngineCollector, export):
        with pytest.raises(SemShareError, match=r"pip install -e .*\[metrics\]"):
            begin(make_engine())


def test_importing_metrics_loads_nothing_for_them() -> None:
    code = "import sys, semsharekv_integrations.metrics; print({'prometheus_client', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
