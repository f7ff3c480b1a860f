"""One page with the counters of all workers that there have been."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from pdx.router.metrics import Metrics
from pdx.router.workers.merging import Totals, added
from pdx.router.workers.texts import read_text, serve_text


def some(count: int, *, under_way: int = 0, engines: int = 0) -> bytes:
    metrics = Metrics()
    for _ in range(count):
        metrics.requests.labels(model='a "b" c', code="200").inc()
        metrics.ttft_s.of("m").observe(0.5)
    metrics.in_flight.set(under_way)
    metrics.engines.labels(role="decode").set(engines)
    return generate_latest(metrics.registry)


def value(text: bytes, sample: str) -> float:
    return float(next(line.rpartition(" ")[2] for line in text.decode().splitlines() if line.startswith(sample + " ")))


def test_texts_are_added_up() -> None:
    text = added([some(3, under_way=1, engines=2), some(4, under_way=2, engines=2)])
    assert value(text, 'pdx_router_requests_total{code="200",model="a \\"b\\" c"}') == 7
    assert value(text, 'pdx_router_ttft_seconds_bucket{le="+Inf",model="m"}') == 7
    assert value(text, 'pdx_router_ttft_seconds_sum{model="m"}') == 3.5
    assert value(text, "pdx_router_inflight") == 3
    assert value(text, 'pdx_router_engines{role="decode"}') == 2
    assert text.decode().count("# TYPE pdx_router_inflight gauge") == 1
    assert "_created" not in text.decode()


def test_names_with_any_characters_are_added_up() -> None:
    metrics = Metrics()
    for odd in "\u2028\x0b\x0c\x85\x1c\r\n":
        metrics.requests.labels(model=f"a{odd}b", code="200").inc()
    text = generate_latest(metrics.registry)
    assert added([text, text]).count(b'code="200",model="a') == 7
    assert added([text, text]).count(b" 2.0\n") == 7


def test_a_text_that_cannot_be_added_up_costs_nobody_elses(caplog: pytest.LogCaptureFixture) -> None:
    totals = Totals()
    text = b"# HELP a_total x\n# TYPE a_total counter\na_total 3.0\n"
    for broken in (b"a_total three\n", b"# TYPE\n", b"# TYPE a_total\n", b"\xff\n"):
        totals.heard({"w0": text, "w1": text})
        totals.heard({"w0": text, "w1": broken})
        assert b"a_total 6.0" in totals.added(b""), "its last text stands"
    totals.heard({"w0": text})
    assert b"a_total 6.0" in totals.added(b"")
    assert len(caplog.records) == 1


def test_no_counter_falls_when_a_process_ends() -> None:
    totals = Totals()
    line = 'pdx_router_requests_total{code="200",model="a \\"b\\" c"}'
    totals.heard({"0-1": some(3, under_way=1), "1-2": some(4)})
    totals.heard({"1-2": some(5)})
    assert value(totals.added(b""), line) == 8
    assert value(totals.added(b""), "pdx_router_inflight") == 0
    totals.heard({"1-2": some(5), "0-3": some(1)})
    totals.heard({"1-2": some(6), "0-3": some(2)})
    assert value(totals.added(some(1)), line) == 12


def test_a_process_that_is_silent_for_a_while_is_not_counted_twice() -> None:
    totals = Totals()
    text = b"# HELP a_total x\n# TYPE a_total counter\na_total 3.0\n"
    for texts in ({"w0": text}, {"w0": b""}, {"w0": text}):
        totals.heard(texts)
        assert b"a_total 3.0" in totals.added(b"")


def test_a_text_is_read_to_its_end(tmp_path: Path) -> None:
    """Longer than what one read brings, or a socket holds."""
    text = b"".join(b"metric_%d 1.0\n" % number for number in range(100_000))

    async def test() -> None:
        async with AsyncExitStack() as stack:
            await serve_text(stack, tmp_path / "text", lambda: text)
            assert await read_text(tmp_path / "text") == text

    asyncio.run(test())


def test_half_a_text_is_none(tmp_path: Path) -> None:
    async def killed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"metric_1 1.0\nmetric_2 1")
        writer.close()

    async def test() -> None:
        async with await asyncio.start_unix_server(killed, tmp_path / "text"):
            assert await read_text(tmp_path / "text") == b""

    asyncio.run(test())
