"""Whose turn it is, and pieces. Fairness of whole channels is checked with outboxes and one-sided channels."""

from __future__ import annotations

import random

from pdx.transport.api import Copy
from pdx.transport.outbox import Put
from pdx.transport.queues import Queues, cut

MEMORY = memoryview(bytes(1 << 12))


def a_put(ticket: int, *copies: Copy, window: int = 1) -> Put:
    return Put(ticket, b"", window, MEMORY, copies, b"")


def test_who_is_passed_over_keeps_its_turn() -> None:
    queues: Queues[Put] = Queues()
    for number, urgency in enumerate((0.0, 2.0, 1.0)):
        queues.add(b"%d" % number, a_put(number), urgency)
    order = []
    passed_over: set[bytes] = set()
    while (queue := queues.next(passed_over)) is not None:
        order.append(queue.name)
        passed_over.add(queue.name)
    assert order == [b"1", b"2", b"0"]
    first = queues.next()
    assert first is not None and first.name == b"1"


def test_what_is_dropped_leaves_the_rest_in_order() -> None:
    queues: Queues[Put] = Queues()
    for ticket in range(6):
        queues.add(b"%d" % (ticket % 2), a_put(ticket, window=ticket % 3), 0.0)
    assert sorted(put.ticket for put in queues.drop_all(lambda put: put.window == 0)) == [0, 3]
    assert [put.ticket for put in queues.drop(b"0")] == [2, 4]
    assert queues.drop(b"0") == []
    assert [put.ticket for put in queues] == [1, 5]
    queues.end_first(b"1")
    queues.end_first(b"1")
    assert queues.next() is None


def test_pieces_are_the_put_and_within_bounds() -> None:
    rng = random.Random(3)
    for _ in range(200):
        lengths = [rng.randrange(1, 50) for _ in range(rng.randrange(8))]
        copies = [Copy(sum(lengths[:at]), 1000 + 2 * sum(lengths[:at]), length) for at, length in enumerate(lengths)]
        put, bytes_max, copies_max = a_put(1, *copies), rng.randrange(1, 60), rng.randrange(1, 4)
        ways: list[tuple[int, int]] = []
        while put.copy_index < len(copies):
            piece = cut(put, bytes_max=bytes_max, copies_max=copies_max)
            assert 0 < sum(copy.length for copy in piece) <= bytes_max and len(piece) <= copies_max
            ways += [(copy.source_offset + at, copy.target_offset + at) for copy in piece for at in range(copy.length)]
        whole = [(copy.source_offset + at, copy.target_offset + at) for copy in copies for at in range(copy.length)]
        assert ways == whole
        assert cut(put, bytes_max=1, copies_max=1) == []
