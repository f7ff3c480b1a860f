"""Whatever somebody waits for wakes a daemon that would otherwise sleep for an hour. (So does whoever asks it.)"""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon.fleet import PAGES, BareEngine, Fleet, prompt_of, until
from lanes_here import needing

from pdx.wire import LoadOpened, OpenLoad

SLEEPY = str(Path(__file__).with_name("sleepy.py"))
ALL_BUT_LAST = range(PAGES.layers - 1)
LAST = range(PAGES.layers - 1, PAGES.layers)
Pair = tuple[Fleet, BareEngine, BareEngine]


@pytest.fixture(params=["tcp", pytest.param("cma", marks=needing("cma"))])
def pair(request: pytest.FixtureRequest, example: None, fleet: Fleet) -> Pair:
    first, second = (fleet.daemon(program=SLEEPY, transport=request.param) for _ in range(2))
    return fleet, fleet.engine(first, "P"), fleet.engine(second, "D")


def test_what_has_landed_before_anybody_asked_is_there_when_somebody_does(pair: Pair) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(70), fleet.handle(prefill, decode)
    opened = prefill.open_send(prompt, handle)
    prefill.fill(opened, prompt, [0, 1, 2], ALL_BUT_LAST)
    loaded = decode.open_load(prompt, handle)
    until(lambda: decode.pages_present(loaded, prompt) == 3 * len(ALL_BUT_LAST), "what was there when it asked")
    prefill.fill(opened, prompt, [0, 1, 2], LAST)
    until(lambda: decode.pages_present(loaded, prompt) == 3 * PAGES.layers, "what has come since")
    prefill.fill(opened, prompt, [3, 4])
    until(lambda: decode.pages_present(loaded, prompt) == 5 * PAGES.layers, "all of it")
    prefill.let_go(opened.handoff_id, "send")
    decode.let_go(loaded.handoff_id, "load")


def test_commit_is_said_when_the_last_page_is_out(pair: Pair) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode)
    opened = prefill.open_send(prompt, handle)
    prefill.fill(opened, prompt, [0, 1, 2, 3], ALL_BUT_LAST)
    prefill.let_go(opened.handoff_id, "send")  # its last bells ring behind that: nobody has anything to say any more
    prefill.fill(opened, prompt, [0, 1, 2, 3], LAST)
    until(lambda: " landed: " in "".join(decode.daemon.stats()["handoffs"]), "decode's side has COMMIT")
    until(lambda: decode.look_up(prompt.hashes) == 4, "its blocks are found")
    loaded = decode.open_load(prompt, handle)
    decode.let_go(loaded.handoff_id, "load")


def test_whole_prompts_one_behind_the_other(pair: Pair) -> None:
    fleet, prefill, decode = pair
    for seed in range(3):
        prompt, handle = prompt_of(100, seed), fleet.handle(prefill, decode)
        prefill.prefill(prompt, handle)
        assert decode.load(prompt, handle) == len(prompt.names)


def test_an_early_question_hears_of_the_first_page(pair: Pair) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(70), fleet.handle(prefill, decode)
    question = OpenLoad(
        request_id="r", handle=handle, block_hashes=prompt.hashes, prompt_tokens=70, tail_hash=prompt.tail, early=True
    )
    decode.scheduler.send(question)
    assert decode.expect(LoadOpened).status == "wait"
    opened = prefill.open_send(prompt, handle)
    prefill.fill(opened, prompt, [0], range(1))
    assert decode.expect(LoadOpened).status == "granted"
    prefill.fill(opened, prompt, [0, 1, 2, 3, 4])
    prefill.let_go(opened.handoff_id, "send")
    decode.let_go(opened.handoff_id, "load")


def test_who_reads_hears_that_the_rest_does_not_come_and_prefill_is_rid_of_it(pair: Pair) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(70), fleet.handle(prefill, decode)
    opened = prefill.open_send(prompt, handle)
    prefill.fill(opened, prompt, [0, 1, 2], ALL_BUT_LAST)
    decode.open_load(prompt, handle)
    prefill.let_go(opened.handoff_id, "send", ok=False)
    decode.expect_failed_load()
    assert prefill.expect_failed_send().handoff_id == opened.handoff_id
