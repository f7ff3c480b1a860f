"""What daemons say of themselves at a glance, in Prometheus' text format: they have no HTTP port of their own.

docs/metrics.md lists these metrics; a test compares. Counters are the daemon's: they begin at 0 when it starts anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdx.admin import DaemonReport
from pdx.verbs import DaemonView

PREFIX = "pdx_daemon_"


class Shown(NamedTuple):
    """A metric, and where in the view each of its samples is: label values, then the field."""

    name: str
    what: str
    fields: Sequence[tuple[tuple[str, ...], str]]
    labels: tuple[str, ...] = ()
    counts: bool = False  # a counter, which is exposed with _total behind its name


def _one(name: str, what: str, field: str = "", *, counts: bool = False) -> Shown:
    return Shown(name, what, [((), field or name)], counts=counts)


OF_DAEMON = (
    _one("arena_bytes", "Shared memory for KV"),
    _one("leased_bytes", "Of the arena: held by engines, handoffs and pins, being filled or given up"),
    _one("cached_bytes", "Of the arena: may be evicted"),
    _one("cached_blocks", "Blocks in the arena that lookups find"),
    _one("pinned_bytes", "Of the arena: held by pins"),
    _one("reservations_waiting", "Handoffs that wait for room in the arena", "waiting"),
    _one("handoffs_under_way", "Halves of handoffs under way"),
    Shown("handoffs", "Halves of handoffs that ended", [(("ok",), "handoffs_ok"), (("failed",), "handoffs_failed")],
          ("outcome",), counts=True),
    _one("lookup_blocks", "Blocks that requests without a handle asked for", counts=True),
    Shown("hit_blocks", "Of these: found", [(("arena",), "arena_hit_blocks"), (("disk",), "disk_hit_blocks")],
          ("tier",), counts=True),
    _one("evicted_blocks", "Blocks that left the arena for others", counts=True),
    _one("sent_bytes", "KV put to other hosts", counts=True),
    _one("landed_pages", "Pages that came from other hosts", counts=True),
)  # fmt: skip
OF_DISK = (
    _one("disk_blocks", "Blocks on the disk", "blocks"),
    _one("disk_used_bytes", "Bytes that they take", "used_bytes"),
    _one("disk_cap_bytes", "Bytes that they may take", "cap_bytes"),
    _one("disk_waiting_writes", "Blocks that wait to be written", "waiting_writes"),
    _one("disk_loaded_blocks", "Blocks read from the disk", "loaded_blocks", counts=True),
    _one("disk_written_blocks", "Blocks written to the disk", "written_blocks", counts=True),
    _one("disk_io_errors", "Reads and writes that failed", "io_errors", counts=True),
)
UP = "up"
DISK_STATE = "disk_state"


def exposed(reports: Iterable[DaemonReport]) -> bytes:
    """`reports`: of the verb "view"; of a daemon that did not answer only that."""
    registry = CollectorRegistry()
    registry.register(_Views(list(reports)))
    return generate_latest(registry)


class _Views(Collector):
    def __init__(self, reports: list[DaemonReport]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(PREFIX + UP, "Whether it answered just now", labels=("daemon",))
        state = GaugeMetricFamily(PREFIX + DISK_STATE, "1: the disk tier's state", labels=("daemon", "state"))
        views: dict[str, DaemonView] = {}
        for report in self._reports:
            view = _view(report)
            up.add_metric((report.daemon,), 0 if view is None else 1)
            if view is not None:
                views[report.daemon] = view
        yield up
        disks = {daemon: view.disk for daemon, view in views.items() if view.disk is not None}
        for daemon, disk in disks.items():
            state.add_metric((daemon, disk.state), 1)
        yield state
        for table, shown in ((OF_DAEMON, views), (OF_DISK, disks)):
            for each in table:
                yield _family(each, shown)


def _view(report: DaemonReport) -> DaemonView | None:
    """None of one that has not answered, or in words of another version."""
    try:
        return None if report.error else msgspec.convert(report.body, DaemonView)
    except msgspec.ValidationError:
        return None


def _family(shown: Shown, views: Mapping[str, object]) -> Metric:
    make = CounterMetricFamily if shown.counts else GaugeMetricFamily
    family = make(PREFIX + shown.name, shown.what, labels=("daemon", *shown.labels))
    for daemon, view in views.items():
        for labels, field in shown.fields:
            family.add_metric((daemon, *labels), getattr(view, field))
    return family
