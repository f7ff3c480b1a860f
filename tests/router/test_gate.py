"""The gate between the admission machine and the requests' tasks: no word is lost, however late a task wakes."""

from __future__ import annotations

import asyncio

from engine_fakes import within

from pdx.router.line.gate import Place


@within(5)
async def test_who_is_turned_away_before_he_could_look_hears_that() -> None:
    place = Place(1)
    heard = asyncio.create_task(place.turn())
    await asyncio.sleep(0)
    place.tell(None)
    place.tell("queue_timeout")  # in the same turn of the loop
    assert await heard == "queue_timeout"


@within(5)
async def test_each_word_is_heard_once() -> None:
    place = Place(1)
    place.tell(None)
    assert await place.turn() is None
    heard = asyncio.create_task(place.turn())
    await asyncio.sleep(0)
    assert not heard.done()
    place.tell("draining")
    assert await heard == "draining"
