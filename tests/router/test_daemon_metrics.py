"""What the admin port exposes of daemons, against the page that lists it."""

from __future__ import annotations

import asyncio

from engine_fakes import FakeEngine, within
from markdown_tables import rows_under
from msgspec import to_builtins
from prometheus_client.parser import text_string_to_metric_families
from test_admin import admin_of, answer

from pdx.admin import DaemonReport
from pdx.router.front.daemon_metrics import exposed
from pdx.verbs import DaemonView, DiskView

DISK = DiskView(
    state="on", blocks=5, used_bytes=50, cap_bytes=500, waiting_writes=1, loaded_blocks=6, written_blocks=7,
    io_errors=0,
)  # fmt: skip
VIEW = DaemonView(
    arena_bytes=1000, leased_bytes=10, cached_bytes=20, cached_blocks=2, pinned_bytes=0, waiting=3,
    handoffs_under_way=1, disk=DISK, arena_hit_blocks=8, disk_hit_blocks=9, handoffs_ok=11, handoffs_failed=12,
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
    assert found["pdx_daemon_disk_state", "a", "on"] == 1
    assert [key for key in found if "b" in key[1:]] == [("pdx_daemon_up", "b")]


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
