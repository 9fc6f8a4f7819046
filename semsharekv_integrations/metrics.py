"""Prometheus metrics of engines: what ``stats`` counts, and distributions over finished calls.

No namespace, session, document id or text is a label or a value: labels are the caller's own, the mode and the phase.
Needs the extra ``metrics``. Knows nothing about servers but the one that ``prometheus_client`` starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from semsharekv_integrations.errors import SemShareError, require
from semsharekv_integrations.report import ReuseReport

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Histogram, Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    from semsharekv_integrations.engine import SemShareEngine

PREFIX = "semsharekv_"
GAUGES = ("entries", "bytes", "ratio", "audits")  # last words of names in ``stats`` that can fall; others count events
OWN_LABELS = ("mode", "phase", "le")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
TOKENS = tuple(float(2**power) for power in range(4, 18))


class _Figure(NamedTuple):
    """One histogram: its name, what it measures, its upper bounds, and how to read it off a report."""

    name: str
    what: str
    bounds: tuple[float, ...]
    read: Callable[[ReuseReport], float]


FIGURES = (
    _Figure("call_ttft_seconds", "Seconds from the call to the first new token", SECONDS, lambda r: r.ttft_s),
    _Figure("call_decode_seconds", "Seconds of decoding", SECONDS, lambda r: r.decode_s),
    _Figure("call_prompt_tokens", "Tokens of the prompt", TOKENS, lambda r: r.prompt_tokens),
    _Figure("call_compute_ratio", "Token-layers computed over all", SHARES, lambda r: r.compute_ratio),
    _Figure("call_reused_ratio", "Prompt tokens reused over all", SHARES, lambda r: r.reused_tokens / r.prompt_tokens),
)


class EngineCollector:
    """A Prometheus collector for one engine, or several: ``REGISTRY.register(EngineCollector(engine))``.

    Scrapes read ``SemShareEngine.stats``. Histograms count calls that finish from now on, not cancelled or failed ones.

    Args:
        engine: whose calls and store are measured.
        labels: set on every series, such as ``service="search"``; few values, and nothing private.

    Raises:
        SemShareError: if ``prometheus_client`` is not installed.
        ValueError: if a label's name or value is not accepted.
    """

    def __init__(self, engine: SemShareEngine, /, **labels: str) -> None:
        self._client = _import_prometheus()
        self._label_names = tuple(sorted(labels))
        self._engines: dict[tuple[str, ...], SemShareEngine] = {}
        self._helpers: list[tuple[tuple[str, ...], SemShareEngine]] = []  # with the labels that their calls count under
        _check_labels(labels)
        self._histograms = [(self._histogram(f.name, f.what, f.bounds), f.read) for f in FIGURES]
        self._phases = self._histogram("call_phase_seconds", "Seconds by phase", SECONDS, "phase")
        self.add(engine, **labels)

    def add(self, engine: SemShareEngine, /, **labels: str) -> None:
        """Measure another engine too. Raises ``ValueError`` unless label names are those of the first, and values new.

        A registry takes one collector of engines, as each family of metrics may stand in a scrape once.
        """
        _check_labels(labels)
        values = tuple(labels[name] for name in sorted(labels))
        same = tuple(sorted(labels)) == self._label_names
        require(same, "labels", sorted(labels), f"those of the first engine, {list(self._label_names)}")
        require(values not in self._engines, "labels", labels, "values that no other engine of this collector has")
        self._engines[values] = engine
        engine.observe(lambda report: self._record(values, report))

    def add_calls(self, engine: SemShareEngine, /, **labels: str) -> None:
        """Count the calls of an engine that has no store of its own as those of the one with the same labels.

        Raises ``ValueError`` if there is none.
        """
        values = tuple(labels[name] for name in sorted(labels))
        require(values in self._engines, "labels", labels, "those of an engine of this collector")
        self._helpers.append((values, engine))
        engine.observe(lambda report: self._record(values, report))

    def collect(self) -> Iterator[Metric]:
        """Yield every family of metrics with its present values, read from the engines and the histograms."""
        from semsharekv_integrations.engine import COUNTS

        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for labels, engine in tuple(self._engines.items()):
            helpers = [helper.stats() for values, helper in tuple(self._helpers) if values == labels]
            for name, value in engine.stats().items():
                if name not in families:
                    families[name] = self._family(name)
                more = sum(stats[name] for stats in helpers) if name in COUNTS else 0
                families[name].add_metric(labels, value + more)
        yield from families.values()
        for histogram in (*(histogram for histogram, _ in self._histograms), self._phases):
            yield from histogram.collect()

    def describe(self) -> Iterator[Metric]:
        """Yield what ``collect`` does: a registry reads the names, to refuse a second collector."""
        return self.collect()

    def _family(self, name: str) -> CounterMetricFamily | GaugeMetricFamily:
        gauge = name.rpartition("_")[2] in GAUGES
        kind = self._client.core.GaugeMetricFamily if gauge else self._client.core.CounterMetricFamily
        return kind(PREFIX + name, f"{name} of SemShareEngine.stats", labels=self._label_names)

    def _histogram(self, name: str, what: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
        names = (*self._label_names, "mode", *labels)
        return self._client.Histogram(PREFIX + name, f"{what}, by finished call.", names, buckets=bounds, registry=None)

    def _record(self, labels: tuple[str, ...], report: ReuseReport) -> None:
        for histogram, read in self._histograms:
            histogram.labels(*labels, report.mode).observe(read(report))
        for phase, seconds in report.phases_s.items():
            self._phases.labels(*labels, report.mode, phase).observe(seconds)


def export(
    engine: SemShareEngine,
    /,
    port: int | None = None,
    registry: CollectorRegistry | None = None,
    address: str = "127.0.0.1",
    **labels: str,
) -> EngineCollector:
    """Serve the registry over HTTP if a port is given; register a collector for ``engine`` and return it.

    Args:
        engine: whose calls and store are measured.
        port: where a daemon thread serves ``/metrics``, or None.
        registry: what to register with, or None for the default one.
        address: which interface is served; this machine alone unless set, to ``0.0.0.0`` for all.
        labels: as for ``EngineCollector``.
    """
    client = _import_prometheus()
    registry = client.REGISTRY if registry is None else registry
    collector = EngineCollector(engine, **labels)
    if port is not None:
        client.start_http_server(port, addr=address, registry=registry)
    registry.register(collector)
    return collector


def _import_prometheus() -> ModuleType:
    """Return the module ``prometheus_client``; raise ``SemShareError`` if it cannot be imported."""
    try:
        import prometheus_client.core
    except ImportError as error:
        raise SemShareError('metrics need prometheus_client: pip install -e ".[metrics]"') from error
    return prometheus_client


def _check_labels(labels: dict[str, str]) -> None:
    """Raise ``ValueError`` for a label whose name is malformed or taken, or whose value is no string."""
    for name, value in labels.items():
        fits = re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_]*", name) and name not in OWN_LABELS
        require(bool(fits), "label", name, f"letters, digits and underscores, and none of {', '.join(OWN_LABELS)}")
        require(isinstance(value, str), f"label {name}", value, "a string")
