"""Weights that change under way: no answer is made of KV of two kinds, and equal weights share blocks again.

Answers of the torch engine are compared with those of an engine that has always had the weights: KV of other weights
gives others.
"""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from memory_daemon import Clock, MemoryDaemon
from torch_engine import BLOCK_TOKENS, LAYERS, LAYOUT, Model, Request, TorchEngine
from torch_pair import Side, last_let_go, loading, prompt, run, sending, side

from pdx.engine.vllm.epoch import Epoch
from pdx.engine.vllm.steps import Report, Seen
from pdx.engine.vllm.watch import Watch
from pdx.wire import LookUp, OpenSend, Reset, WeightEpoch

TEXT = prompt(1, 24)
NEW = 8  # the seed of other weights


@pytest.fixture
def daemon() -> MemoryDaemon:
    return MemoryDaemon(LAYOUT, blocks=400, digest_mode=True)


@pytest.fixture
def engine(daemon: MemoryDaemon) -> Side:
    return side(daemon, "both", Clock(), offload="all")


@pytest.fixture
def other(daemon: MemoryDaemon) -> Side:
    """On the same host."""
    return side(daemon, "both", Clock(), offload="all")


def answered(request: Request, seed: int = 7) -> bool:
    """As by an engine that has had these weights all the time. The scores say so: many KV caches give one token."""
    engine = TorchEngine(Model(seed))
    alone = engine.add(Request("alone", request.prompt_token_ids, max_tokens=request.max_tokens))
    run(engine)
    assert len(request.scores) == len(alone.scores) == request.max_tokens
    return request.scores == pytest.approx(alone.scores, rel=1e-9)


def ask(where: Side, text: list[int] = TEXT) -> tuple[int, Request]:
    """How many tokens were computed, and the request."""
    before = where.engine.forward_tokens
    request = where.engine.add(Request(f"r{len(where.engine.requests)}", text, max_tokens=5))
    run(where.engine)
    return where.engine.forward_tokens - before, request


def epochs(daemon: MemoryDaemon) -> list[str]:
    return [message.epoch for message in daemon.received if isinstance(message, WeightEpoch)]


ALL = len(TEXT) + 4  # what a request computes that finds nothing
SOME = ALL - len(TEXT) + BLOCK_TOKENS  # and, at most, one that finds its prompt


def test_answers_tell_weights_apart(engine: Side) -> None:
    request = ask(engine)[1]
    assert answered(request) and not answered(request, NEW)


@pytest.mark.parametrize("forgets", [True, False], ids=["vLLM's cache is reset", "it is not"])
def test_an_update_without_a_reset_is_noticed_in_the_next_step(engine: Side, forgets: bool) -> None:
    ask(engine)
    assert ask(engine)[0] <= SOME
    engine.engine.update(Model(NEW))
    if forgets:
        engine.engine.forget_prefixes()
    engine.engine.step()
    computed, request = ask(engine)
    assert computed == ALL and answered(request, NEW)
    engine.engine.forget_prefixes()
    computed, request = ask(engine)
    assert computed <= SOME, "what the new weights made is found"
    assert answered(request, NEW)


def test_a_reset_comes_before_the_weights(daemon: MemoryDaemon, engine: Side) -> None:
    """vLLM's own order. Who digests at the reset, or counts resets, takes the old weights for the new ones."""
    ask(engine)
    assert engine.engine.scheduler is not None
    engine.engine.forget_prefixes()
    assert engine.engine.scheduler.reset()
    assert daemon.kept == {}
    engine.engine.update(Model(NEW))
    computed, request = ask(engine)
    assert computed == ALL and answered(request, NEW)
    assert epochs(daemon) == [Model(NEW).digest()]
    engine.engine.forget_prefixes()
    assert ask(engine)[0] <= SOME, "the first request after the update is kept"


def test_a_reset_without_new_weights_clears_all_that_the_daemon_has(daemon: MemoryDaemon, engine: Side) -> None:
    ask(engine)
    assert daemon.kept
    engine.engine.forget_prefixes()
    assert engine.engine.scheduler is not None and engine.engine.scheduler.reset()
    assert not daemon.kept
    computed, request = ask(engine)
    assert computed == ALL and answered(request)
    assert epochs(daemon) == [], "nothing has changed"
    engine.engine.forget_prefixes()
    assert ask(engine)[0] <= SOME


def test_a_reset_while_the_daemon_is_away_is_made_up_for(daemon: MemoryDaemon, engine: Side) -> None:
    ask(engine)
    daemon.die()
    engine.engine.forget_prefixes()
    assert engine.engine.scheduler is not None and engine.engine.scheduler.reset()
    ask(engine)
    again = MemoryDaemon(LAYOUT, blocks=60, incarnation=2)
    again.kept = dict(daemon.kept)  # as from its disk
    engine.move_to(again)
    engine.engine.forget_prefixes()
    assert ask(engine)[0] == ALL


def test_two_engines_of_one_host(engine: Side, other: Side) -> None:
    ask(engine)
    assert ask(other)[0] <= SOME, "they share"
    engine.engine.update(Model(NEW))
    for each in (engine, other):
        each.engine.forget_prefixes()
        each.engine.step()
    computed, request = ask(engine)
    assert computed == ALL and answered(request, NEW), "nothing of the other's is found"
    other.engine.forget_prefixes()
    computed, request = ask(other)
    assert computed <= SOME and answered(request), "and its own is still there"
    other.engine.update(Model(NEW))
    other.engine.forget_prefixes()
    other.engine.step()
    computed, request = ask(other)
    assert computed <= SOME and answered(request, NEW), "given the same weights they share again"


def test_back_to_the_weights_of_the_start(daemon: MemoryDaemon, engine: Side, other: Side) -> None:
    ask(other)
    engine.engine.update(Model(NEW))
    engine.engine.step()
    engine.engine.update(Model())
    engine.engine.step()
    assert epochs(daemon) == [Model(NEW).digest(), ""]
    assert ask(engine)[0] <= SOME


def test_a_request_that_waits_is_not_loaded_from_the_past(daemon: MemoryDaemon, engine: Side, other: Side) -> None:
    """It was answered before the update, and is admitted after it."""
    ask(other)
    request = engine.engine.add(Request("waits", TEXT, max_tokens=5))
    assert any(isinstance(message, LookUp) for message in daemon.received)
    engine.engine.update(Model(NEW))
    run(engine.engine)
    assert answered(request, NEW)


def test_an_answer_of_the_past_that_comes_late_is_not_used(daemon: MemoryDaemon, engine: Side, other: Side) -> None:
    ask(other)
    daemon.hold_back = True
    request = engine.engine.add(Request("waits", TEXT, max_tokens=5))
    engine.engine.update(Model(NEW))
    engine.engine.step()
    daemon.hold_back = False
    run(engine.engine)
    assert answered(request, NEW)


def test_a_load_under_way_is_void_with_all_that_it_has_brought(daemon: MemoryDaemon) -> None:
    clock = Clock()
    prefill, decode = side(daemon, "prefill", clock, tokens_a_step=10), side(daemon, "decode", clock)
    prefill.engine.add(sending(daemon, TEXT))
    prefill.engine.step()
    request = decode.engine.add(loading(daemon, TEXT))
    decode.engine.step()
    assert request.status == "loading", "what has landed is in its blocks; the rest is awaited"
    decode.engine.update(Model(NEW))
    prefill.engine.step()
    run(decode.engine)
    assert answered(request, NEW)
    assert "weights have changed" in last_let_go(daemon, "load").reason


def test_a_step_planned_for_the_old_weights_saves_nothing_with_the_new(daemon: MemoryDaemon) -> None:
    """With async scheduling: the step that would complete the handoff was planned before the update."""
    prefill = side(daemon, "prefill", Clock())
    prefill.engine.add(sending(daemon, TEXT))
    prefill.engine.step()
    (saved,) = daemon.handoffs.values()
    before = {block: len(layers) for block, layers in saved.filled.items()}
    prefill.engine.update(Model(NEW))
    run(prefill.engine)
    assert {block: len(layers) for block, layers in saved.filled.items()} == before
    assert {len(layers) for layers in saved.filled.values()} == {LAYERS}
    assert not last_let_go(daemon, "send").ok


def test_a_request_that_goes_on_over_an_update_is_not_kept_any_more(engine: Side) -> None:
    """Nor is who shares its blocks: they are of both weights."""
    running = engine.engine.add(Request("long", TEXT, max_tokens=30))
    for _ in range(5):
        engine.engine.step()
    engine.engine.update(Model(NEW))
    engine.engine.step()
    long = [*TEXT, *running.output]
    ask(engine, long)  # while it runs, so that its newest blocks may be hit
    engine.engine.forget_prefixes()
    assert answered(ask(engine, long)[1], NEW)
    run(engine.engine)
    engine.engine.forget_prefixes()
    assert answered(ask(engine, running.tokens[:-1])[1], NEW)


def test_the_next_daemon_is_told_the_epoch_before_anything_else(daemon: MemoryDaemon, engine: Side) -> None:
    ask(engine)
    engine.engine.update(Model(NEW))
    engine.engine.step()
    daemon.die()
    again = MemoryDaemon(LAYOUT, blocks=400, incarnation=2)
    again.kept = dict(daemon.kept)
    engine.move_to(again)
    engine.engine.forget_prefixes()
    computed, request = ask(engine)
    assert computed == ALL and answered(request, NEW)
    assert isinstance(again.received[0], WeightEpoch)


def test_a_daemon_that_was_told_the_epoch_of_before_is_told_that_of_the_start(
    daemon: MemoryDaemon, engine: Side
) -> None:
    """It comes between a reset and the weights that follow: what its hello says is true no longer."""
    engine.engine.update(Model(NEW))
    engine.engine.step()
    daemon.die()
    assert engine.engine.scheduler is not None and engine.engine.scheduler.reset()
    again = MemoryDaemon(LAYOUT, blocks=400, incarnation=2)
    engine.move_to(again)
    engine.engine.update(Model())
    assert answered(ask(engine)[1])
    assert epochs(again) == [""]
    new = side(again, "both", Clock(), offload="all")
    new.engine.update(Model(NEW))
    new.engine.step()
    computed, request = ask(new)
    assert computed == ALL and answered(request, NEW)


def test_a_reset_that_a_daemon_has_not_read_is_for_the_next_one(daemon: MemoryDaemon, engine: Side) -> None:
    ask(engine)
    kept = dict(daemon.kept)
    engine.engine.forget_prefixes()
    assert engine.engine.scheduler is not None and engine.engine.scheduler.reset()
    daemon.die()  # with the reset unread, as far as the engine can tell
    again = MemoryDaemon(LAYOUT, blocks=400, incarnation=2)
    again.kept = dict(kept)  # as from its disk
    engine.move_to(again)
    assert ask(engine)[0] == ALL
    assert [message.epoch for message in again.received if isinstance(message, Reset)] == [""]
    again.die()
    third = MemoryDaemon(LAYOUT, blocks=400, incarnation=3)
    engine.move_to(third)
    ask(engine)
    assert not any(isinstance(message, Reset) for message in third.received), "the second one had read it"


def test_a_daemon_that_refuses_what_came_after_a_reset_has_read_it() -> None:
    full = MemoryDaemon(LAYOUT, blocks=1)
    engine = side(full, "prefill", Clock())
    assert engine.engine.scheduler is not None and engine.engine.scheduler.reset()
    engine.engine.step()  # looks at the weights, for which requests wait
    handle = {"do_remote_decode": True, "pdx_handle": full.handle()}
    engine.engine.add(Request("r", TEXT, handle))
    run(engine.engine)
    assert any(isinstance(message, OpenSend) for message in full.received) and not full.handoffs
    full.die()
    again = MemoryDaemon(LAYOUT, blocks=400, incarnation=2)
    engine.move_to(again)
    engine.engine.step()
    assert not any(isinstance(message, Reset) for message in again.received)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.prove) for n in range(4, 12))])
def test_any_course_with_updates_gives_right_answers(seed: int) -> None:
    """Updates with and without resets, at any time, while requests wait, load, run, are preempted and aborted.

    A request that has begun before an update may say anything, and who is given its blocks by the engine's own cache.
    All others are answered by the weights of now; and so are those who find later what has been kept of all that.
    """
    chance, clock = random.Random(seed), Clock()
    daemon = MemoryDaemon(LAYOUT, blocks=2000, digest_mode=True)
    sides = [side(daemon, "both", clock, offload="all", tokens_a_step=chance.choice([3, 10, 40])) for _ in range(2)]
    weights = [7, 7]
    stems = [prompt(100 + n, 24) for n in range(3)]
    asked: dict[str, tuple[Request, int]] = {}
    for number in range(500):
        which = chance.randrange(2)
        engine = sides[which].engine
        assert engine.scheduler is not None
        running = [r for r in engine.requests.values() if r.status == "running"]
        roll = chance.random()
        if roll < 0.15 and number < 400:
            text = chance.choice(stems)[: chance.randrange(1, 25)] + prompt(number, chance.randrange(0, 9))
            request = engine.add(Request(f"r{number}", text, max_tokens=5))
            asked[request.request_id] = request, weights[which]
        elif roll < 0.18:
            for request in engine.requests.values():
                if request.status != "finished":
                    asked.pop(request.request_id, None)
            if chance.random() < 0.5:
                assert engine.scheduler.reset()
            weights[which] = chance.choice([7, NEW, 9])
            engine.update(Model(weights[which]))
            engine.step()
        elif roll < 0.20 and running:
            engine.preempt(chance.choice(running))
        elif roll < 0.22:
            engine.forget_prefixes()
        elif roll < 0.225:
            daemon.die()
            daemon = MemoryDaemon(LAYOUT, blocks=2000, incarnation=number + 2, digest_mode=True)
            for each in sides:
                each.move_to(daemon)
        clock.now += 0.01
        engine.step()
        for misled in engine.scheduler._tainted._requests:
            asked.pop(misled, None)
    for each in sides:
        run(each.engine)
    assert len(asked) > 5
    assert [name for name, (request, weight) in asked.items() if not answered(request, weight)] == []
    for weight in (7, NEW, 9):
        late = side(daemon, "both", clock, offload="all")
        late.engine.update(Model(weight))
        late.engine.step()
        for stem in stems:
            late.engine.forget_prefixes()
            assert answered(ask(late, [*stem, 1])[1], weight)


# --- who decides ------------------------------------------------------------------------------------------------


def test_ranks_answer_together_and_only_the_last_question() -> None:
    epoch = Epoch(2)
    assert (epoch.name, epoch.states) == ("", {})
    epoch.reported({0: Seen(0, "aa")})
    first = epoch.name
    assert first and epoch.states == {0: "aa"}, "one rank's shard alone has changed"
    epoch.reported({1: Seen(0, "bb")})
    assert epoch.name not in (first, "", None)
    epoch.ask()
    assert (epoch.name, epoch.states) == (None, None)
    epoch.reported({0: Seen(0, "")})
    epoch.reported({0: Seen(1, "")})
    assert epoch.name is None, "the other has not looked since"
    epoch.reported({1: Seen(1, "bb")})
    assert epoch.states == {1: "bb"}
    turned = Epoch(2)
    turned.reported({0: Seen(0, "bb"), 1: Seen(0, "aa")})
    again = Epoch(2)
    again.reported({0: Seen(0, "aa"), 1: Seen(0, "bb")})
    assert turned.name != again.name


def test_what_ranks_have_seen_is_joined() -> None:
    one, two = Report(3, seen={0: Seen(1, "aa")}), Report(3, seen={1: Seen(1, "")})
    assert one.joined(two).seen == {0: Seen(1, "aa"), 1: Seen(1, "")}


def test_a_watch_looks_only_when_something_may_have_happened() -> None:
    weights, looks = ["a"], []
    watch = Watch()
    assert watch.look(1) is None and watch.state is None
    watch.begin(lambda: looks.append(weights[0]) or weights[0])  # type: ignore[func-returns-value]
    assert watch.look(0) is None and len(looks) == 1
    weights[0] = "b"
    assert watch.look(0) is None and watch.state == "", "nobody has said a word"
    assert watch.look(1) == Seen(1, "b")
    assert watch.look(1) is None
    weights[0] = "a"
    watch.mark()
    assert watch.look(1) == Seen(1, "")


def test_weights_that_can_t_be_seen_are_like_no_others() -> None:
    names = iter(["x", "y"])
    watch = Watch(unseen=lambda: next(names))
    watch.begin(lambda: None)
    assert watch.state == ""
    watch.mark()
    assert watch.look(0) == Seen(0, "x")
    assert watch.look(1) == Seen(1, "y")


def test_a_reset_keeps_from_nothing_what_has_computed_nothing(daemon: MemoryDaemon, engine: Side) -> None:
    """vLLM's flow of an update resets twice, with requests in its queue. What they have asked is asked anew; a handle
    that was asked with is spent."""
    assert engine.engine.scheduler is not None
    ask(engine)
    waiting = engine.engine.add(Request("waits", TEXT, max_tokens=5))
    spent = engine.engine.add(sending(daemon, prompt(3, 24), 2))
    engine.engine.scheduler.reset()
    sent = engine.engine.add(sending(daemon, prompt(2, 24)))
    engine.engine.scheduler.reset()
    run(engine.engine)
    assert [request.result is None for request in (waiting, spent, sent)] == [True, True, False]
    assert [m.request_id for m in daemon.received if isinstance(m, LookUp)].count("waits") == 2
    assert [m.request_id for m in daemon.received if isinstance(m, OpenSend)] == ["p2", "p1"]
    engine.engine.forget_prefixes()
    assert ask(engine)[0] <= SOME, "what the one that had waited computed is found"
