"""Requests without a handle: one torch engine finds in the arena what it, or another, has computed before."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from memory_daemon import Clock, MemoryDaemon
from torch_engine import BLOCK_TOKENS, LAYERS, LAYOUT, Request
from torch_pair import Side, alone, last_let_go, loading, prompt, run, sending, side

from pdx.config import Offload
from pdx.keys import tenant_of
from pdx.wire import Filled, Keep, LookUp


@pytest.fixture
def daemon() -> MemoryDaemon:
    return MemoryDaemon(LAYOUT, blocks=256, digest_mode=True)


@pytest.fixture
def engine(daemon: MemoryDaemon, clock: Clock) -> Side:
    return side(daemon, "both", clock, offload="all")


def ask(where: Side, name: str, tokens: list[int], max_tokens: int = 5) -> Request:
    request = where.engine.add(Request(name, tokens, max_tokens=max_tokens))
    run(where.engine)
    return request


def computed(where: Side, name: str, tokens: list[int], max_tokens: int = 5) -> tuple[int, Request]:
    """How many tokens the engine computes for this request."""
    before = where.engine.forward_tokens
    request = ask(where, name, tokens, max_tokens)
    return where.engine.forward_tokens - before, request


@pytest.mark.parametrize("tokens", [4, 5, 23, 24, 40])
def test_what_left_the_engines_own_cache_is_loaded(engine: Side, tokens: int) -> None:
    text = prompt(1, tokens)
    first = ask(engine, "a", text)
    engine.engine.forget_prefixes()
    count, second = computed(engine, "b", text)
    assert first.output == second.output == alone(text)
    whole = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    assert count == max(1, tokens - whole) + 4, "all full blocks were loaded; the last token is always computed"
    assert not engine.engine.unfinished


def test_another_engine_finds_it_too(daemon: MemoryDaemon, engine: Side, clock: Clock) -> None:
    text = prompt(2, 30)
    ask(engine, "a", text, max_tokens=1)
    other = side(daemon, "both", clock, offload="all")
    count, request = computed(other, "b", text)
    assert (count, request.output) == (2 + 4, alone(text))


def test_the_next_turn_finds_the_whole_conversation(engine: Side) -> None:
    """Of what is generated, every block that was whole a step before the answer ended."""
    text = prompt(3, 22)
    first = ask(engine, "a", text, max_tokens=20)
    engine.engine.forget_prefixes()
    turn = [*first.tokens, *prompt(4, 7)]
    count, second = computed(engine, "b", turn, max_tokens=1)
    assert second.output == [alone(turn)[0]]
    kept = (22 + 20 - 2) // BLOCK_TOKENS * BLOCK_TOKENS
    assert count == len(turn) - kept


@pytest.mark.parametrize("offload", ["prompts", "off"])
def test_less_is_kept_where_less_is_wanted(daemon: MemoryDaemon, clock: Clock, offload: Offload) -> None:
    engine = side(daemon, "both", clock, offload=offload)
    first = ask(engine, "a", prompt(5, 20), max_tokens=20)
    engine.engine.forget_prefixes()
    count, _ = computed(engine, "b", first.tokens, max_tokens=1)
    assert count == (20 if offload == "prompts" else 40)
    if offload == "off":
        assert not [m for m in daemon.received if isinstance(m, Keep | LookUp)]


def test_short_prompts_and_requests_that_want_no_cache_ask_nothing(daemon: MemoryDaemon, engine: Side) -> None:
    ask(engine, "a", prompt(6, BLOCK_TOKENS - 1), max_tokens=1)
    assert not [m for m in daemon.received if isinstance(m, Keep | LookUp)]
    text = prompt(6, 20)
    ask(engine, "b", text)
    engine.engine.forget_prefixes()
    engine.engine.add(Request("c", text, max_tokens=1, skip_reading_prefix_cache=True))
    before = engine.engine.forward_tokens
    run(engine.engine)
    assert engine.engine.forward_tokens - before == 20
    assert [m.request_id for m in daemon.received if isinstance(m, LookUp)] == ["b"]


def test_nothing_kept_is_announced_layer_by_layer(daemon: MemoryDaemon, engine: Side) -> None:
    ask(engine, "a", prompt(7, 20))
    assert not [m for m in daemon.received if isinstance(m, Filled)]
    assert len(daemon.kept) == 5  # the sixth was whole with the last step only


def test_a_spoilt_block_is_named_and_computed_again(daemon: MemoryDaemon, engine: Side) -> None:
    text = prompt(8, 24)
    ask(engine, "a", text, max_tokens=1)
    place = list(daemon.kept.values())[2]
    daemon.arena.memory[place.page_offset(LAYOUT, 1)] ^= 0xFF
    engine.engine.forget_prefixes()
    count, request = computed(engine, "b", text)
    assert (count, request.output) == (24 + 4, alone(text))
    ended = [m for m in daemon.let_go if m.side == "load"][-1]
    assert (ended.ok, ended.spoilt) == (False, [2])


def test_a_late_answer_is_a_miss(daemon: MemoryDaemon, engine: Side, clock: Clock) -> None:
    text = prompt(9, 20)
    ask(engine, "a", text)
    engine.engine.forget_prefixes()
    daemon.hold_back = True
    request = engine.engine.add(Request("b", text, max_tokens=5))
    engine.engine.step()
    assert request.status == "waiting"
    clock.now += 0.1
    run(engine.engine)
    assert request.output == alone(text)
    daemon.hold_back = False
    engine.engine.step()
    loads = {m.handoff_id for m in daemon.received if isinstance(m, LookUp)}
    assert loads <= {m.handoff_id for m in daemon.let_go if m.side == "load"} | {daemon_first(daemon)}


def test_how_late_is_a_setting(daemon: MemoryDaemon, clock: Clock) -> None:
    engine, text = side(daemon, "both", clock, offload="all", lookup_s=1.0), prompt(9, 20)
    ask(engine, "a", text)
    engine.engine.forget_prefixes()
    daemon.hold_back = True
    before = engine.engine.forward_tokens
    request = engine.engine.add(Request("b", text, max_tokens=5))
    engine.engine.step()
    clock.now += 0.9
    engine.engine.step()
    assert request.status == "waiting"
    daemon.hold_back = False
    run(engine.engine)
    assert (engine.engine.forward_tokens - before, request.output) == (1 + 4, alone(text))


def daemon_first(daemon: MemoryDaemon) -> bytes:
    """The first look-up found nothing, hence held nothing."""
    return next(m.handoff_id for m in daemon.received if isinstance(m, LookUp))


def test_a_full_arena_costs_nothing_but_the_hit(daemon: MemoryDaemon, clock: Clock) -> None:
    small = MemoryDaemon(LAYOUT, blocks=3)
    engine = side(small, "both", clock, offload="all")
    text = prompt(10, 20)
    assert ask(engine, "a", text).output == alone(text)
    assert not small.kept


def test_prefill_loads_what_it_has_computed_before_and_hands_all_of_it_over(
    daemon: MemoryDaemon, engine: Side, clock: Clock
) -> None:
    text = prompt(11, 30)
    ask(engine, "a", text, max_tokens=1)
    engine.engine.forget_prefixes()
    before = engine.engine.forward_tokens
    engine.engine.add(sending(daemon, text))
    run(engine.engine)
    assert engine.engine.forward_tokens - before == 2
    assert last_let_go(daemon, "send").ok
    decode = side(daemon, "decode", clock, offload="all")
    received = decode.engine.add(loading(daemon, text))
    run(decode.engine)
    assert received.output == alone(text)
    assert decode.engine.forward_tokens == 1 + 4


def test_a_restarted_daemon_is_offered_what_still_runs(daemon: MemoryDaemon, engine: Side, clock: Clock) -> None:
    request = engine.engine.add(Request("a", prompt(12, 20), max_tokens=30))
    while len(request.output) < 10:
        engine.engine.step()
    daemon.die()
    engine.engine.step()
    successor = MemoryDaemon(LAYOUT, blocks=256, incarnation=2)
    engine.move_to(successor)
    run(engine.engine)
    assert request.output[:5] == alone(prompt(12, 20))
    assert request.block_hashes[0] in successor.kept
    assert len(successor.kept) >= 45 // BLOCK_TOKENS


@pytest.mark.parametrize("seed", range(12))
def test_any_course_gives_the_same_answers(seed: int) -> None:
    """Two engines, prompts that share beginnings, preemptions, aborts, forgotten caches, spoilt bytes, deaths."""
    chance, clock = random.Random(seed), Clock()
    daemon = MemoryDaemon(LAYOUT, blocks=chance.choice([12, 60, 400]), digest_mode=True)
    sides = [side(daemon, "both", clock, offload="all", tokens_a_step=chance.choice([3, 10, 40])) for _ in range(2)]
    stems = [prompt(100 + n, 24) for n in range(3)]
    asked: list[Request] = []
    for number in range(400):
        where = chance.choice(sides)
        running = [r for r in where.engine.requests.values() if r.status == "running"]
        roll = chance.random()
        if roll < 0.12 and len(asked) < 30:
            text = chance.choice(stems)[: chance.randrange(1, 25)] + prompt(number, chance.randrange(0, 9))
            asked.append(where.engine.add(Request(f"r{number}", text, max_tokens=5)))
        elif roll < 0.16 and running:
            where.engine.preempt(chance.choice(running))
        elif roll < 0.18:
            where.engine.forget_prefixes()
        elif roll < 0.20 and daemon.kept:
            place = chance.choice(list(daemon.kept.values()))
            daemon.arena.memory[place.page_offset(LAYOUT, chance.randrange(LAYERS))] ^= 0x55
        elif roll < 0.205 and running:
            victim = chance.choice(running)
            where.engine.abort(victim)
            asked.remove(victim)
        elif roll < 0.21:
            daemon.die()
            daemon = MemoryDaemon(LAYOUT, blocks=60, incarnation=number + 2, digest_mode=True)
            for each in sides:
                each.move_to(daemon)
        clock.now += 0.01
        where.engine.step()
    for each in sides:
        run(each.engine)
    assert asked
    for request in asked:
        assert request.output == alone(request.prompt_token_ids)


def test_after_a_reset_nothing_old_is_loaded(daemon: MemoryDaemon, engine: Side) -> None:
    text = prompt(13, 20)
    ask(engine, "a", text)
    engine.engine.forget_prefixes()
    assert engine.engine.scheduler is not None
    assert engine.engine.scheduler.reset()
    count, request = computed(engine, "b", text)
    assert (count, request.output) == (24, alone(text))


def test_adapters_that_came_later_are_left_alone(daemon: MemoryDaemon, engine: Side) -> None:
    adapter = SimpleNamespace(lora_name="new", lora_path="somewhere", load_inplace=False)
    engine.engine.add(Request("a", prompt(14, 20), lora_request=adapter))
    run(engine.engine)
    assert not [m for m in daemon.received if isinstance(m, Keep | LookUp)]


def test_what_waits_in_the_queue_takes_no_room(daemon: MemoryDaemon, engine: Side) -> None:
    for number in range(5):
        engine.engine.add(Request(f"r{number}", prompt(number, 40), max_tokens=2))
    engine.engine.step()  # ten tokens: the first one runs
    assert [m.request_id for m in daemon.received if isinstance(m, Keep)] == ["r0"]


def test_the_salt_of_a_request_is_told_as_a_name_only(daemon: MemoryDaemon, engine: Side) -> None:
    engine.engine.add(Request("a", prompt(14, 20), cache_salt="secret"))
    engine.engine.add(Request("b", prompt(14, 20)))
    run(engine.engine)
    told = {m.request_id: m.tenant for m in daemon.received if isinstance(m, Keep | LookUp)}
    assert told == {"a": tenant_of("secret"), "b": b""}
    assert b"secret" not in told["a"]


def test_a_look_up_tells_how_fast_prompts_are_computed(
    daemon: MemoryDaemon, engine: Side, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds a step of ten tokens, whatever decoding and idling do between, and tails behind hits."""
    forward = engine.engine._forward

    def slow(counts: dict[str, int]) -> object:
        clock.now += 2.0
        return forward(counts)

    monkeypatch.setattr(engine.engine, "_forward", slow)
    ask(engine, "a", prompt(20, 20))
    clock.now += 1000.0
    ask(engine, "b", prompt(20, 20))
    ask(engine, "c", prompt(21, 20))
    told = [m.tokens_per_s for m in daemon.received if isinstance(m, LookUp)]
    assert told == [0.0, pytest.approx(5.0), pytest.approx(5.0)]


def test_the_end_of_a_load_tells_how_long_its_pages_took(
    daemon: MemoryDaemon, engine: Side, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers, one a step, a quarter of a second each; not what it waited for its first turn."""
    text = prompt(22, 24)
    ask(engine, "a", text)
    engine.engine.forget_prefixes()
    (worker,) = engine.engine.workers
    move = worker._mover.load

    def slow(*about: object) -> bool:
        clock.now += 0.25
        return move(*about)  # type: ignore[arg-type]

    monkeypatch.setattr(worker._mover, "load", slow)
    ask(engine, "b", text)
    ended = [m for m in daemon.let_go if m.side == "load"][-1]
    assert (ended.ok, ended.seconds) == (True, LAYERS * 0.25)
