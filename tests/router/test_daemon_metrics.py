"""What the admin port exposes of daemons, against the page that lists it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engine_fakes import FakeEngine, within
from markdown_tables import rows_under
from msgspec import to_builtins
from prometheus_client.parser import text_string_to_metric_families
from test_admin import admin_of, answer

from pdx.admin import DaemonReport
from pdx.daemon.name import daemon_name
from pdx.members import host_of
from pdx.router.front.daemon_metrics import exposed
from pdx.verbs import DaemonView, DiskView

DISK = DiskView(
    state="on", blocks=5, used_bytes=50, cap_bytes=500, waiting_writes=1, loaded_blocks=6, written_blocks=7,
    io_errors=0,
)  # fmt: skip
VIEW = DaemonView(
    arena_bytes=1000, leased_bytes=10, cached_bytes=20, cached_blocks=2, pinned_bytes=0, waiting=3,
    handoffs_under_way=1, disk=DISK, arena_hit_blocks=8, disk_hit_blocks=9, handoffs_ok=11, handoffs_failed=12,
    handoffs_by_lane={"local": 13, "tcp": 14}, lanes_lost={"tcp": 15},
)  # fmt: skip


def samples(body: bytes) -> dict[tuple[str, ...], float]:
    """(name, label values …) -> value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_the_page_lists_what_is_exposed() -> None:
    listed = {}
    for name, kind, labels, _ in rows_under("Exported by the admin port", page="docs/metrics.md"):
        listed[name.strip("`")] = (kind, set(labels.split(", ")))
    body = exposed([DaemonReport(daemon="d", body=to_builtins(VIEW))])
    found = {
        family.name + ("_total" if family.type == "counter" else ""): (family.type, set(family.samples[0].labels))
        for family in text_string_to_metric_families(body.decode())
    }
    assert listed == found


def test_a_daemon_that_does_not_answer_is_down_and_no_more() -> None:
    reports = [DaemonReport(daemon="a", body=to_builtins(VIEW)), DaemonReport(daemon="b", error="gone")]
    found = samples(exposed(reports))
    assert found["pdx_daemon_up", "a"] == 1
    assert found["pdx_daemon_hit_blocks_total", "a", "disk"] == 9
    assert found["pdx_daemon_lane_handoffs_total", "a", "tcp"] == 14
    assert found["pdx_daemon_lanes_lost_total", "a", "tcp"] == 15
    assert found["pdx_daemon_disk_state", "a", "on"] == 1
    assert [key for key in found if "b" in key[1:]] == [("pdx_daemon_up", "b")]


def test_a_daemons_next_life_goes_on_with_its_series() -> None:
    """What is left of the last one, which cannot answer, neither doubles them nor looks like a daemon that is down."""
    first, second = (daemon_name(Path("run") / "pdx") for _ in range(2))
    before = samples(exposed([DaemonReport(daemon=first, body=to_builtins(VIEW))]))
    silent = DaemonReport(daemon=first, error="gone")
    assert samples(exposed([silent, DaemonReport(daemon=second, body=to_builtins(VIEW))])) == before
    host = host_of(second)
    assert samples(exposed([silent]))["pdx_daemon_up", host] == 0
    both = samples(exposed([DaemonReport(daemon=each, body=to_builtins(VIEW)) for each in (first, second)]))
    assert both["pdx_daemon_arena_bytes", host] == both["pdx_daemon_arena_bytes", second] == 1000, (
        "of one name two live"
    )


def test_words_of_another_version_come_from_somebody_who_is_up() -> None:
    reports = [DaemonReport(daemon="a", body={**to_builtins(VIEW), "of_tomorrow": 1})]
    assert samples(exposed(reports)) == {("pdx_daemon_up", "a"): 1}


@within(20)
async def test_prometheus_asks_the_admin_port() -> None:
    async with admin_of(FakeEngine("d0", "decode"), token="t0ken") as router:
        url = f"{router.published.admin}/admin/metrics"
        async with router.client.get(url) as refused:
            assert refused.status == 401
        asking = asyncio.create_task(router.client.get(url, headers={"Authorization": "Bearer t0ken"}).__aenter__())
        await answer(router.daemons[0], 0, VIEW)
        async with await asking as reply:
            assert reply.headers["Content-Type"].startswith("text/plain")
            found = samples(await reply.read())
        assert found["pdx_daemon_arena_bytes", router.daemons[0].ref.daemon_id] == 1000
