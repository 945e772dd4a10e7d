"""What a server tells of itself: Prometheus metrics, one line of JSON for each request, and spans. None of it holds data or tenants."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any

from opentelemetry import propagate, trace
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adaptrt.serve.core import Stats
from adaptrt.serve.web.model import Served, Stage

LOG = logging.getLogger("adaptrt.serve")
TRACER = trace.get_tracer("adaptrt.serve")

_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_WINDOW_S = 60.0
_WINDOW_REQUESTS = 4096
_WORK = ("adapt", "infer")
_GUARDS = "not kept"


class Telemetry:
    """Counts requests, and reads an engine's counts when it is asked.

    Args:
      served: the model.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._recent: deque[tuple[float, str, float, bool]] = deque(maxlen=_WINDOW_REQUESTS)
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "adaptrt_http_request_seconds", "Seconds a request took", ("route", "status"), buckets=_BUCKETS_S, registry=self._registry
        )
        self._registry.register(_OfEngine(served))

    def answered(self, *, route: str, method: str, status: int, took_s: float, request_id: str) -> None:
        """Notes that a request was answered."""
        self._requests.labels(route, str(status)).observe(took_s)
        self._recent.append((time.monotonic(), route, took_s, status < 400))
        context = trace.get_current_span().get_span_context()
        fields = {"route": route, "method": method, "status": status, "took_ms": round(1e3 * took_s, 3), "request_id": request_id}
        if context.is_valid:
            fields["trace_id"] = f"{context.trace_id:032x}"
        LOG.log(logging.ERROR if status >= 500 and status not in (503, 504) else logging.INFO, "request", extra={"fields": fields})

    def metrics(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def summary(self) -> dict[str, Any]:
        """Returns what the page shows: latencies of the last minute, sizes of batches, guards, and how much there is to do."""
        now = time.monotonic()
        recent = [entry for entry in self._recent if now - entry[0] < _WINDOW_S]
        taken: dict[str, list[float]] = {}
        for _, route, took_s, is_ok in recent:
            if is_ok and route in _WORK:
                taken.setdefault(route, []).append(took_s)
        found = self._served.stats()
        since = min([entry[0] for entry in recent], default=now)
        return {
            "stage": self._served.stage,
            "requests_per_s": len(recent) / max(now - since, 1.0),
            "refused": sum([not is_ok for _, route, _, is_ok in recent if route in _WORK]),
            "latency_ms": {route: _percentiles(values) for route, values in sorted(taken.items())},
            "engine": None if found is None else _of_stats(found),
        }


class _OfEngine(Collector):
    """Metrics that are an engine's counts at the moment."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def collect(self) -> Iterable[Metric]:
        stages = GaugeMetricFamily("adaptrt_stage", "1 for what the server does at the moment", labels=["stage"])
        for stage in Stage:
            stages.add_metric([stage.value], float(stage is self._served.stage))
        yield stages
        found = self._served.stats()
        if found is not None:
            yield from _metrics_of(found)

    def describe(self) -> Iterable[Metric]:
        return []


def _metrics_of(found: Stats) -> Iterator[Metric]:
    events = CounterMetricFamily("adaptrt_engine_events", "What the engine has done with requests", labels=["event"])
    for event, count in sorted(found.events.items()):
        events.add_metric([event], count)
    yield events
    batches = CounterMetricFamily("adaptrt_engine_batches", "Batches by their number of requests", labels=["requests"])
    for requests, count in sorted(found.lanes.items()):
        batches.add_metric([str(requests)], count)
    yield batches
    for name, text, value in (
        ("adaptrt_engine_waiting", "Requests that wait", found.num_waiting),
        ("adaptrt_engine_open", "Requests that are not answered yet", found.num_open),
        ("adaptrt_engine_cached_states", "States in memory", found.num_cached_tenants),
        ("adaptrt_engine_cached_bytes", "Bytes of the states in memory", found.cached_bytes),
        ("adaptrt_engine_programs", "Compiled programs", found.num_programs),
        (
            "adaptrt_engine_compiled_after_ready",
            "Programs that were compiled after the start, which should be 0",
            found.num_compiled_after_ready,
        ),
    ):
        yield GaugeMetricFamily(name, text, value)


def _of_stats(found: Stats) -> dict[str, Any]:
    return {
        "waiting": found.num_waiting,
        "open": found.num_open,
        "cached_states": found.num_cached_tenants,
        "cached_bytes": found.cached_bytes,
        "programs": found.num_programs,
        "compiled_after_ready": found.num_compiled_after_ready,
        "guards_fired": found.events.get(_GUARDS, 0),
        "events": found.events,
        "batches": {str(requests): count for requests, count in sorted(Counter(found.lanes).items())},
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{percent}": 1e3 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] for percent in (50, 90, 99)}


def context_of(headers: dict[str, str]) -> Any:
    """Returns the context that a request's headers carry, so that its span belongs to the caller's trace."""
    return propagate.extract(headers)


class JSONLines(logging.Formatter):
    """Writes each record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        fields = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"), "level": record.levelname.lower(), "event": record.getMessage()}
        fields.update(getattr(record, "fields", {}))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
