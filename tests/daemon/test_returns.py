"""Answers that decode keeps go back to the host whose prefill engine had the prompt, and are in nobody's way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from daemon.fleet import BLOCK_TOKENS, PAGES, BareEngine, Daemon, Fleet, Prompt, prompt_of, until
from daemon.test_hostile import HostilePeer, handle_between, reserve_of

from pdx.keys import tenant_of
from pdx.wire import Ask, SendOpened, encode

AT_ONCE_S = 5.0  # half of what a handoff may wait for room


@pytest.fixture
def pair(fleet: Fleet) -> tuple[BareEngine, BareEngine]:
    return fleet.engine(fleet.daemon(), "P"), fleet.engine(fleet.daemon(), "D")


@dataclass
class Chat:
    """One conversation, whose every turn is prefilled by the one and answered by the other engine."""

    fleet: Fleet
    prefill: BareEngine
    decode: BareEngine
    tokens: list[int] = field(default_factory=list)
    origin: bytes = b""
    kept: int = 0  # leading blocks that decode's host has

    def ask(self, tokens: int) -> SendOpened:
        """A turn, up to the first token of its answer. Returns what prefill was told to compute."""
        self._say(tokens)
        prompt = Prompt(self.tokens)
        handle = self.fleet.handle(self.prefill, self.decode)
        opened = self.prefill.prefill(prompt, handle)
        assert self.decode.load(prompt, handle) == len(prompt.names)
        self.origin, self.kept = opened.handoff_id, len(prompt.hashes)
        return opened

    def answer(self, tokens: int) -> Prompt:
        """Decode keeps what has become whole, as one lot. Returns the whole conversation."""
        chain = self.name(tokens)
        self.decode.keep(chain.hashes[self.kept :], self.decode.tenant, self.origin)
        self.kept = len(chain.hashes)
        return chain

    def name(self, tokens: int) -> Prompt:
        self._say(tokens)
        return Prompt(self.tokens)

    def finish(self) -> None:
        self.decode.finish(self.origin)

    def returned(self, blocks: int) -> None:
        """Waits until prefill finds so many of its blocks, and looks at every byte of them."""
        chain, tenant = Prompt(self.tokens), self.decode.tenant
        until(lambda: self.prefill.look_up(chain.hashes, tenant) >= blocks, f"{blocks} blocks are back")
        found = self.prefill.open_look_up(chain.hashes, tenant)
        assert len(found.places) == blocks
        assert self.prefill.pages_present(found, chain) == blocks * self.prefill.pages.layers
        self.prefill.let_go(found.handoff_id, "load")

    def _say(self, tokens: int) -> None:
        self.tokens += range(len(self.tokens), len(self.tokens) + tokens)


@pytest.fixture
def chat(fleet: Fleet, pair: tuple[BareEngine, BareEngine]) -> Chat:
    return Chat(fleet, *pair)


def ended(daemon: Daemon, name: str, count: int = 1) -> None:
    """So many returns have come to this end, and no others."""
    until(lambda: daemon.counter(name) == count, f"{count} {name}: {daemon.stats()['counters']}", AT_ONCE_S)
    daemon.wait_unleased()
    counters = daemon.stats()["counters"]
    kinds = ("returns_settled", "returns_failed", "returns_evicted", "returns_dropped")
    assert sum(counters.get(kind, 0) for kind in kinds) == count, counters


def test_eight_turns_send_each_block_once_in_either_direction(chat: Chat) -> None:
    there, back = chat.prefill.daemon, chat.decode.daemon
    for turn in range(8):
        put = [daemon.counter("pages_put") for daemon in (there, back)]
        full = len(Prompt(chat.tokens).hashes)
        opened = chat.ask(37)
        prompt = Prompt(chat.tokens)
        assert [place is not None for place in opened.places] == [n >= full for n in range(len(prompt.names))]
        whole = chat.answer(45)
        chat.finish()
        chat.returned(len(whole.hashes))
        ended(back, "returns_settled", turn + 1)
        put = [daemon.counter("pages_put") - before for daemon, before in zip((there, back), put, strict=True)]
        assert put[0] == (len(prompt.names) - full) * PAGES.layers
        assert put[1] == (len(whole.hashes) - len(prompt.hashes)) * PAGES.layers
    assert there.counter("spares_settled") == 8
    assert back.counter("blocks_returned") == back.counter("blocks_kept")
    for daemon in (there, back):
        assert daemon.counter("sends_failed") == daemon.counter("receives_failed") == 0


def test_a_long_answer_goes_back_by_the_chunk_and_its_rest_when_it_is_over(chat: Chat) -> None:
    chat.ask(32)
    chat.answer(BLOCK_TOKENS)
    chat.answer(BLOCK_TOKENS)
    chat.returned(2 + PAGES.chunk_blocks)
    chat.answer(BLOCK_TOKENS)
    ended(chat.decode.daemon, "returns_settled")
    assert chat.prefill.look_up(Prompt(chat.tokens).hashes) == 4, "less than a chunk waits for more"
    chat.finish()
    chat.returned(5)


def test_an_answer_behind_a_long_prompt_goes_back_by_the_eighth_of_the_chain(chat: Chat) -> None:
    """A return is work for all blocks of its chain, on both hosts, and an answer has as many chunks as it likes."""
    chat.ask(64 * BLOCK_TOKENS)
    for _ in range(9):
        chat.answer(BLOCK_TOKENS)
    chat.decode.daemon.wait_unleased()
    assert not [name for name in chat.decode.daemon.stats()["counters"] if name.startswith("returns")]
    chat.answer(BLOCK_TOKENS)
    ended(chat.decode.daemon, "returns_settled")
    chat.returned(64 + 10)
    chat.answer(3 * BLOCK_TOKENS)
    chat.finish()
    ended(chat.decode.daemon, "returns_settled", 2)
    chat.returned(64 + 13)


def test_the_word_that_it_is_over_may_overtake_the_last_lot(chat: Chat) -> None:
    """The worker lets go of its blocks on a connection of its own."""
    chat.ask(32)
    chat.answer(BLOCK_TOKENS)
    chain = chat.name(BLOCK_TOKENS)
    lot = chat.decode.open_keep(chain.hashes[3:], origin=chat.origin)
    chat.finish()
    assert chat.decode.daemon.counter("returns_evicted") == 0, "nothing is handed back that is not kept yet"
    chat.decode.let_go(lot.handoff_id, "send")
    chat.returned(4)
    ended(chat.decode.daemon, "returns_settled")


def test_what_is_not_kept_ends_the_chain_before_it(chat: Chat) -> None:
    chat.ask(32)
    first, second = chat.name(BLOCK_TOKENS), chat.name(BLOCK_TOKENS)
    chat.decode.keep(first.hashes[2:], origin=chat.origin)
    lot = chat.decode.open_keep(second.hashes[3:], origin=chat.origin)
    chat.decode.let_go(lot.handoff_id, "send", ok=False)
    chat.returned(3)
    chat.decode.keep(chat.name(BLOCK_TOKENS).hashes[4:], origin=chat.origin)
    chat.finish()
    ended(chat.decode.daemon, "returns_settled")


def test_the_engine_may_leave_after_its_last_word(chat: Chat) -> None:
    chat.ask(32)
    chat.answer(BLOCK_TOKENS)
    chat.finish()
    chat.decode.scheduler.ask(Ask(verb="health"))  # it has been heard: who closes at once may not be
    chat.decode.close()
    chat.returned(3)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_shard_goes_back(fleet: Fleet, ranks: int) -> None:
    chat = Chat(fleet, fleet.engine(fleet.daemon(), "P", ranks=ranks), fleet.engine(fleet.daemon(), "D", ranks=ranks))
    chat.ask(40)
    chain = chat.answer(60)
    chat.finish()
    chat.returned(len(chain.hashes))
    ended(chat.decode.daemon, "returns_settled")


def test_on_one_host_nothing_needs_to_go_back(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    chat = Chat(fleet, fleet.engine(daemon, "P"), fleet.engine(daemon, "D"))
    chat.ask(32)
    chat.answer(48)
    chat.finish()
    chat.returned(5)
    daemon.wait_unleased()
    assert not [name for name in daemon.stats()["counters"] if name.startswith(("return", "spare", "pages_put"))]


@pytest.mark.parametrize("unwilling", ["prefill", "decode"])
def test_either_daemon_can_be_told_not_to(fleet: Fleet, unwilling: str) -> None:
    settings = {name: {"return_answers": "false"} if name == unwilling else {} for name in ("prefill", "decode")}
    engines = [fleet.engine(fleet.daemon(**settings[name]), name) for name in ("prefill", "decode")]
    chat = Chat(fleet, *engines)
    chat.ask(32)
    chat.answer(48)
    chat.finish()
    if unwilling == "prefill":
        ended(chat.decode.daemon, "returns_failed")
    chat.decode.daemon.wait_unleased()
    assert chat.decode.daemon.counter("returns_settled") == 0
    assert chat.prefill.look_up(Prompt(chat.tokens).hashes) == 2
    assert chat.prefill.daemon.counter("spares_settled") == 0


# --- what goes wrong ------------------------------------------------------------------------------------------


def test_a_full_peer_refuses_at_once_and_keeps_nobody_waiting(chat: Chat) -> None:
    chat.ask(32)
    others = prompt_of(BLOCK_TOKENS * 140, seed=3)
    opened = chat.prefill.open_send(others, chat.fleet.handle(chat.prefill, chat.prefill))
    chat.answer(BLOCK_TOKENS * 40)
    chat.finish()
    ended(chat.decode.daemon, "returns_failed")
    assert chat.prefill.daemon.stats()["reservations_waiting"] == 0
    chat.prefill.let_go(opened.handoff_id, "send", ok=False)


@pytest.fixture
def scene(fleet: Fleet) -> Iterator[tuple[BareEngine, HostilePeer, Callable[..., str]]]:
    """An engine, and a peer by hand with its way to offer blocks that nobody waits for: returns the answer's kind."""
    daemon = fleet.daemon()
    peer = HostilePeer(fleet, daemon)
    names = itertools.count(1)

    def offer(blocks: int) -> str:
        handoff_id = next(names).to_bytes(16, "big")
        ids = {"handoff_id": handoff_id, "attempt": 1, "lease_epoch": 0, "incarnation": peer.ref.incarnation}
        handle = handle_between(fleet, peer.ref, daemon.ref, handoff_id)
        peer.say(encode(reserve_of(handle, ids, BLOCK_TOKENS * blocks, handoff_id[-1], spare=True)))
        return str(peer.answer(handoff_id)["type"])

    yield fleet.engine(daemon, "E"), peer, offer
    peer.close()


Scene = tuple[BareEngine, HostilePeer, Callable[..., str]]


def test_one_that_does_not_fit_now_is_refused_and_harms_no_other(scene: Scene) -> None:
    engine, _, offer = scene
    assert [offer(80), offer(140)] == ["grant", "refuse"]
    assert engine.daemon.stats()["store"]["slots"]["filling"] > 0, "the first goes on"


def test_none_is_granted_while_a_handoff_waits_for_room(fleet: Fleet, scene: Scene) -> None:
    """Even if there would be room for it: whoever waits is served first."""
    engine, _, offer = scene
    opened = engine.open_send(prompt_of(BLOCK_TOKENS * 100, seed=3), fleet.handle(engine, engine))
    engine.ask_send(prompt_of(BLOCK_TOKENS * 100, seed=4), fleet.handle(engine, engine))
    until(lambda: engine.daemon.stats()["reservations_waiting"] == 1, "the second waits")
    assert offer(1) == "refuse"
    engine.let_go(opened.handoff_id, "send", ok=False)
    engine.let_go(engine.expect(SendOpened).handoff_id, "send", ok=False)


def test_one_under_way_gives_way_to_a_handoff_that_waits(fleet: Fleet, scene: Scene) -> None:
    """Its sender has been granted the room, and puts nothing."""
    engine, _, offer = scene
    assert offer(80) == "grant"
    engine.ask_send(prompt_of(BLOCK_TOKENS * 140), fleet.handle(engine, engine))
    opened = engine.expect(SendOpened, deadline_s=0.9)  # the spare one's own budget is a second
    engine.let_go(opened.handoff_id, "send", ok=False)


def test_what_has_been_evicted_in_between_is_not_sent(chat: Chat) -> None:
    chat.ask(32)
    chat.answer(BLOCK_TOKENS)
    chain = Prompt(chat.tokens).hashes
    for seed in range(3, 6):
        chat.decode.keep(prompt_of(BLOCK_TOKENS * 80, seed).hashes)
        chat.decode.look_up(chain[:2])
    until(lambda: chat.decode.look_up(chain) == 2, "of the chain, only what is asked for is there")
    chat.finish()
    ended(chat.decode.daemon, "returns_evicted")
    assert chat.decode.daemon.counter("pages_put") == 0


def test_a_lot_whose_lease_has_ended_is_not_sent(fleet: Fleet) -> None:
    chat = Chat(fleet, fleet.engine(fleet.daemon(), "P"), fleet.engine(fleet.daemon(lease_s="0.3"), "D"))
    chat.ask(32)
    chain = chat.name(BLOCK_TOKENS)
    lot = chat.decode.open_keep(chain.hashes[2:], origin=chat.origin)
    assert chat.decode.expect_failed_send().handoff_id == lot.handoff_id
    chat.finish()
    chat.decode.daemon.wait_unleased()
    assert not [name for name in chat.decode.daemon.stats()["counters"] if name.startswith("returns")]


def test_a_peer_that_is_dead_costs_nothing(chat: Chat) -> None:
    chat.ask(32)
    chat.decode.daemon.wait_unleased()
    chat.prefill.daemon.kill()
    until(lambda: not chat.prefill.worker.alive, "the engine notices")
    chain = chat.answer(48)
    chat.finish()
    chat.decode.daemon.wait_unleased()
    assert chat.decode.look_up(chain.hashes) == len(chain.hashes)


def test_a_peer_that_has_started_anew_takes_nothing_of_its_former_life(fleet: Fleet) -> None:
    first = fleet.daemon()
    chat = Chat(fleet, fleet.engine(first, "P"), fleet.engine(fleet.daemon(), "D"))
    chat.ask(32)
    first.kill()
    until(lambda: not chat.prefill.worker.alive, "the engine notices")
    chat.prefill.close()
    again = fleet.daemon_in(first.run_dir.with_name("again"))
    chat.prefill = fleet.engine(again, "P")
    chain = chat.answer(48)
    chat.finish()
    chat.decode.daemon.wait_unleased()
    assert chat.prefill.look_up(chain.hashes) == 0
    chat.tokens = []
    chat.ask(32)
    chat.answer(48)
    chat.finish()
    chat.returned(5)


def test_another_model_under_the_engines_name_refuses(chat: Chat) -> None:
    chat.ask(32)
    chat.prefill.close()
    daemon = chat.prefill.daemon
    until(lambda: "P" not in daemon.stats()["engines"], "it has left")
    other = chat.fleet.engine(daemon, "P", model="n")
    chain = chat.answer(48)
    chat.finish()
    ended(chat.decode.daemon, "returns_failed")
    assert other.look_up(chain.hashes) == 0


def test_a_tenant_gets_its_own_and_no_more_than_its_quota(fleet: Fleet) -> None:
    """Room for 16 blocks of each tenant's where the prompts are computed, for all of them where they are answered."""
    prefill = fleet.engine(fleet.daemon(tenant_share="0.1"), "P")
    chat = Chat(fleet, prefill, fleet.engine(fleet.daemon(), "D"))
    prefill.tenant = chat.decode.tenant = tenant_of("alice")
    chat.ask(64)
    chain = chat.answer(32)
    chat.finish()
    chat.returned(6)
    assert prefill.look_up(chain.hashes) == prefill.look_up(chain.hashes, tenant_of("bob")) == 0
    chat.ask(16)
    chat.answer(16 * 20)
    chat.finish()
    until(lambda: chat.decode.daemon.counter("returns_failed") == 1, "it is refused")
    chat.returned(7)
