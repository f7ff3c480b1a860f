"""The line before the engines: order, fairness, bounds, and that nobody is forgotten."""

from __future__ import annotations

import random

import pytest

from pdx.router.line.admission import QUEUE_BYTES_MAX, RETRY_AFTER_MAX_S, Admission, Call, TurnAway, Wish, Word

NEED = "pair smol"


def line(size: int = 100, timeout_s: float = 60.0) -> Admission:
    return Admission(queue_size=size, queue_timeout_s=timeout_s)


def fill(queue: Admission, *wishes: Wish, need: str = NEED, now: float = 0.0) -> list[int]:
    numbers = []
    for wish in wishes:
        number, words = queue.arrive(need, wish, now)
        assert words == []
        numbers.append(number)
    return numbers


def goes(queue: Admission, number: int) -> None:
    """There is room for one, which should be this one."""
    (call,) = queue.stir()
    assert call == Call(number)
    for word in queue.went(number, 0.0):
        queue.stays(word.number)


def served(queue: Admission) -> list[int]:
    """The order in which all would go if there were room for ever."""
    order, words = [], queue.stir()
    while words:
        (call,) = words
        assert isinstance(call, Call)
        order.append(call.number)
        words = queue.went(call.number, 0.0)
    assert len(queue) == 0
    queue.check_integrity()
    return order


def test_first_come_first_served() -> None:
    queue = line()
    numbers = fill(queue, *[Wish()] * 3)
    assert repr(queue) == "<Admission 3 of 100 waiting in 1 lines>"
    assert queue.needs == {NEED}
    assert served(queue) == numbers
    assert queue.needs == frozenset()
    assert queue.stir() == []


def test_lower_numbers_go_first() -> None:
    queue = line()
    late, usual, early = fill(queue, Wish(priority=5), Wish(), Wish(priority=-5))
    assert served(queue) == [early, usual, late]


def test_tenants_take_turns_however_many_requests_each_has() -> None:
    queue = line()
    many = fill(queue, *[Wish(tenant="many")] * 4)
    few = fill(queue, *[Wish(tenant="few")] * 2)
    assert served(queue) == [many[0], few[0], many[1], few[1], many[2], many[3]]


def test_who_comes_back_has_no_credit_from_the_time_when_it_asked_nothing() -> None:
    queue = line()
    busy = fill(queue, *[Wish(tenant="busy")] * 6)
    for number in busy[:3]:
        goes(queue, number)
    back = fill(queue, *[Wish(tenant="back")] * 3)
    assert served(queue) == [busy[3], back[0], busy[4], back[1], busy[5], back[2]]


def test_each_need_has_a_line_of_its_own() -> None:
    queue = line()
    (pair,), (alone,) = fill(queue, Wish()), fill(queue, Wish(), need="alone smol")
    assert queue.stir() == [Call(pair), Call(alone)]
    assert queue.stays(pair) == []
    assert queue.went(alone, 0.0) == []
    assert queue.needs == {NEED}


def test_the_head_is_called_once_and_nobody_overtakes_it_while_it_looks() -> None:
    queue = line()
    first, second = fill(queue, Wish(), Wish())
    assert queue.stir() == [Call(first)]
    (urgent,) = fill(queue, Wish(priority=-1))
    assert queue.stays(first) == []  # nothing became free meanwhile
    assert queue.stir() == [Call(urgent)]
    assert queue.went(urgent, 0.0) == [Call(first)]
    assert queue.stir() == []
    assert queue.stays(first) == [Call(first)]  # something did: it looks again
    assert queue.left(first) == [Call(second)]  # its client went away instead
    queue.check_integrity()


def test_a_full_queue_turns_away_the_last_of_who_has_most() -> None:
    queue = line(size=3)
    fill(queue, *[Wish(tenant="many")] * 2)
    (last,) = fill(queue, Wish(tenant="many"))
    few, words = queue.arrive(NEED, Wish(tenant="few"), 0.0)
    assert words == [TurnAway(last, "queue_full")]
    again, words = queue.arrive(NEED, Wish(tenant="many"), 0.0)
    assert words == [TurnAway(again, "queue_full")]
    assert few in served(queue)


def test_a_full_queue_turns_away_the_least_urgent() -> None:
    queue = line(size=2)
    _, late = fill(queue, Wish(), Wish(priority=3))
    _, words = queue.arrive(NEED, Wish(), 0.0)
    assert words == [TurnAway(late, "queue_full")]
    late, words = queue.arrive(NEED, Wish(priority=1), 0.0)
    assert words == [TurnAway(late, "queue_full")]
    queue.check_integrity()


def test_no_queue_and_bodies_that_are_too_large_for_it() -> None:
    number, words = line(size=0).arrive(NEED, Wish(), 0.0)
    assert words == [TurnAway(number, "queue_full")]
    queue = line()
    fill(queue, Wish(size_bytes=QUEUE_BYTES_MAX))
    number, words = queue.arrive(NEED, Wish(size_bytes=1), 0.0)
    assert words == [TurnAway(number, "queue_full")]


def test_who_fills_the_queue_with_bytes_loses_his_own_places() -> None:
    queue = line()
    large = Wish(tenant="large", size_bytes=QUEUE_BYTES_MAX // 2)
    _, last = fill(queue, large, large)
    few, words = queue.arrive(NEED, Wish(tenant="few", size_bytes=1), 0.0)
    assert words == [TurnAway(last, "queue_full")]
    assert few in served(queue)
    queue.check_integrity()


def test_waiting_has_an_end() -> None:
    queue = line(timeout_s=5.0)
    patient, hasty = fill(queue, Wish(), Wish(ttl_s=2.0), now=10.0)
    assert queue.expire(11.9) == []
    assert queue.expire(12.0) == [TurnAway(hasty, "queue_timeout")]
    queue.stir()
    assert queue.expire(15.0) == [TurnAway(patient, "queue_timeout")]
    assert queue.stays(patient) == queue.went(patient, 15.0) == queue.left(patient) == []
    queue.check_integrity()


def test_draining() -> None:
    queue = line()
    numbers = fill(queue, Wish(), Wish())
    queue.stir()
    assert queue.drain() == [TurnAway(number, "draining") for number in numbers]
    number, words = queue.arrive(NEED, Wish(), 0.0)
    assert words == [TurnAway(number, "draining")]
    queue.resume()
    fill(queue, Wish())
    queue.check_integrity()


def test_retry_after_is_what_waits_at_the_pace_of_late() -> None:
    queue = line()
    assert queue.retry_after_s(0.0) == 1  # nothing is known yet
    now = 0.0
    for _ in range(200):  # two a second, for long enough
        now += 0.5
        (number,) = fill(queue, Wish())
        queue.stir()
        queue.went(number, now)
    fill(queue, *[Wish()] * 40)
    assert 18 <= queue.retry_after_s(now) <= 22
    assert queue.retry_after_s(now + 1000) == RETRY_AFTER_MAX_S  # nothing has moved since


@pytest.mark.parametrize("seed", range(20))
def test_chance(seed: int) -> None:
    """Whatever comes in whatever order: one call in each line at a time, everybody ends once, the books agree."""
    chance, queue, now = random.Random(seed), line(size=6, timeout_s=9.0), 0.0
    waiting: set[int] = set()
    called: set[int] = set()

    def hear(words: list[Word]) -> None:
        for word in words:
            assert word.number in waiting
            if isinstance(word, Call):
                called.add(word.number)
            else:
                waiting.remove(word.number)
                called.discard(word.number)

    for _ in range(400):
        now += chance.random()
        match chance.randrange(6):
            case 0 | 1:
                wish = Wish(tenant=chance.choice("abc"), priority=chance.randrange(3), ttl_s=chance.choice([1.0, 99.0]))
                number, words = queue.arrive(chance.choice("xy"), wish, now)
                waiting.add(number)
                hear(words)
            case 2:
                hear(queue.stir())
            case 3:
                hear(queue.expire(now))
            case 4 if waiting:
                gone = chance.choice(sorted(waiting))
                waiting.remove(gone)
                called.discard(gone)
                hear(queue.left(gone))
            case 5 if called:
                looked = chance.choice(sorted(called))
                called.remove(looked)
                if chance.random() < 0.5:
                    waiting.remove(looked)
                    hear(queue.went(looked, now))
                else:
                    hear(queue.stays(looked))
        queue.check_integrity()
        assert len(queue) == len(waiting) <= 6
        assert len(called) <= 2
    while waiting:
        hear(queue.stir())
        assert called
        number = called.pop()
        waiting.remove(number)
        hear(queue.went(number, now))


def test_a_long_life_of_a_line_is_bounded() -> None:
    queue = line(size=4)
    fill(queue, Wish(priority=-9))
    for number in range(1000):
        (left,) = fill(queue, Wish(tenant=str(number)))
        queue.left(left)
    assert len(queue._lines[NEED].heap) <= 20
    assert len(queue._lines[NEED].turns) <= 20


def test_tenants_of_a_line_are_forgotten_when_their_turn_is_over() -> None:
    queue = line(size=4)
    (stays,) = fill(queue, Wish(priority=9))
    for number in range(1000):
        (urgent,) = fill(queue, Wish(tenant=str(number)))
        goes(queue, urgent)
    assert len(queue._lines[NEED].turns) <= 20
    assert served(queue) == [stays]
