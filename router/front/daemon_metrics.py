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
from pdx.members import host_of
from pdx.verbs import DaemonView

PREFIX = "pdx_daemon_"


class Shown(NamedTuple):
    """A metric, and where in the view each of its samples is: label values, then the field. One that is a table has
    the last label's values as its keys."""

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
    Shown("lane_handoffs", "Handoffs that began there, by the lane that they took", [((), "handoffs_by_lane")],
          ("lane",), counts=True),
    Shown("lanes_lost", "Lanes to other daemons that broke", [((), "lanes_lost")], ("lane",), counts=True),
    _one("commit_mismatches", "Handoffs whose checksums did not agree at the end", counts=True),
    _one("spoilt_blocks", "Blocks that engines found wrong when they loaded them", "blocks_spoilt", counts=True),
    _one("failed_loads", "Loads of engines that failed, wholly or in part", "loads_failed", counts=True),
    _one("expired_leases", "Leases that engines did not renew in time", "leases_expired", counts=True),
    _one("bad_frames", "Messages of clients, peers and routers that were none", counts=True),
)  # fmt: skip
OF_DISK = (
    _one("disk_blocks", "Blocks on the disk", "blocks"),
    _one("disk_used_bytes", "Bytes that they take", "used_bytes"),
    _one("disk_cap_bytes", "Bytes that they may take", "cap_bytes"),
    _one("disk_waiting_writes", "Blocks that wait to be written", "waiting_writes"),
    _one("disk_loaded_blocks", "Blocks read from the disk", "loaded_blocks", counts=True),
    _one("disk_written_blocks", "Blocks written to the disk", "written_blocks", counts=True),
    _one("disk_io_errors", "Reads and writes that failed", "io_errors", counts=True),
    _one("disk_lost_blocks", "Blocks that left the arena and were nowhere else", "lost_blocks", counts=True),
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
        self._reports = _by_host(reports)

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(PREFIX + UP, "Whether it answered just now", labels=("host",))
        state = GaugeMetricFamily(PREFIX + DISK_STATE, "1: the disk tier's state", labels=("host", "state"))
        views: dict[str, DaemonView] = {}
        for host, report in self._reports.items():
            up.add_metric((host,), 0 if report.error else 1)
            view = _view(report)
            if view is not None:
                views[host] = view
        yield up
        disks = {host: view.disk for host, view in views.items() if view.disk is not None}
        for host, disk in disks.items():
            state.add_metric((host, disk.state), 1)
        yield state
        for table, shown in ((OF_DAEMON, views), (OF_DISK, disks)):
            for each in table:
                yield _family(each, shown)


def _by_host(reports: Iterable[DaemonReport]) -> dict[str, DaemonReport]:
    """A daemon's id ends with its life, but its series should not. Who does not answer, beside one of the same host who
    does, is an earlier life of that; a second one who answers is told by its id."""
    found: dict[str, DaemonReport] = {}
    for report in sorted(reports, key=lambda report: bool(report.error)):
        host = host_of(report.daemon)
        if host not in found:
            found[host] = report
        elif not report.error:
            found[report.daemon] = report
    return found


def _view(report: DaemonReport) -> DaemonView | None:
    """None of one that has not answered, or in words of another version."""
    try:
        return None if report.error else msgspec.convert(report.body, DaemonView)
    except msgspec.ValidationError:
        return None


def _family(shown: Shown, views: Mapping[str, object]) -> Metric:
    make = CounterMetricFamily if shown.counts else GaugeMetricFamily
    family = make(PREFIX + shown.name, shown.what, labels=("host", *shown.labels))
    for host, view in views.items():
        for labels, field in shown.fields:
            value = getattr(view, field)
            if isinstance(value, dict):
                for last, number in value.items():
                    family.add_metric((host, *labels, last), number)
            else:
                family.add_metric((host, *labels), value)
    return family
