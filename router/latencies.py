"""A Prometheus histogram that a stream can afford to feed with every token: a bisection and two additions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry


class Series:
    """The counts under one label's value. Belongs to the event loop's thread."""

    __slots__ = ("counts", "edges", "sum_s")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.edges, seconds)] += 1
        self.sum_s += seconds


class Latencies(Collector):
    """One histogram, by model."""

    def __init__(self, name: str, help_text: str, edges: Sequence[float], *, registry: CollectorRegistry) -> None:
        self._name, self._help, self._edges = name, help_text, tuple(edges)
        self._series: dict[str, Series] = {}
        registry.register(self)

    def of(self, model: str) -> Series:
        """Keep it for as long as a request takes: looking it up costs more than observing."""
        series = self._series.get(model)
        if series is None:
            series = self._series[model] = Series(self._edges)
        return series

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._help, labels=["model"])

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._help, labels=["model"])
        for model, series in self._series.items():
            total, buckets = 0, []
            for edge, count in zip((*map(str, self._edges), "+Inf"), series.counts, strict=True):
                total += count
                buckets.append((edge, float(total)))
            family.add_metric([model], buckets, series.sum_s)
        yield family
