"""Which engines are chosen, and which never meet."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from engine_fakes import CONTENT, LAYOUT, daemon_ref, engine_info

from pdx.router.choice.policy import Candidate, Snapshot, choose_alone, choose_pair, fit
from pdx.wire import Role


def candidate(engine_id: str, role: Role, *, load: int = 0, pairable: bool = True, **changed: object) -> Candidate:
    info = engine_info(engine_id, role, **changed)
    return Candidate(info=info, daemon=daemon_ref(), waiting=load // 2, in_flight=load - load // 2, pairable=pairable)


@pytest.mark.parametrize("prefills", range(1, 5))
@pytest.mark.parametrize("decodes", range(1, 5))
def test_round_robin_meets_every_pair(prefills: int, decodes: int) -> None:
    engines = [candidate(f"p{n}", "prefill") for n in range(prefills)]
    snapshot = (*engines, *(candidate(f"d{n}", "decode") for n in range(decodes)))
    pairs = prefills * decodes
    chosen = [choose_pair(snapshot, "smol", policy="round_robin", turn=turn) for turn in range(3 * pairs)]
    counts = Counter((pair.prefill.engine_id, pair.decode.engine_id) for pair in chosen if pair)
    assert len(counts) == pairs
    assert set(counts.values()) == {3}


def test_least_loaded_chooses_each_side_for_itself() -> None:
    snapshot = (
        candidate("p0", "prefill", load=3), candidate("p1", "prefill", load=1),
        candidate("d0", "decode", load=2), candidate("d1", "decode", load=5),
    )  # fmt: skip
    for turn in range(4):
        pair = choose_pair(snapshot, "smol", policy="least_loaded", turn=turn)
        assert pair is not None
        assert (pair.prefill.engine_id, pair.decode.engine_id) == ("p1", "d0")


def test_least_loaded_takes_turns_among_equals() -> None:
    snapshot = tuple(candidate(f"d{n}", "decode", load=4) for n in range(3))
    chosen = Counter(choose_alone(snapshot, "smol", policy="least_loaded", turn=turn) is None for turn in range(3))
    assert chosen == {False: 3}
    ids = {c.engine_id for turn in range(3) if (c := choose_alone(snapshot, "smol", policy="least_loaded", turn=turn))}
    assert len(ids) == 3


PREFILL = candidate("p0", "prefill")


@pytest.mark.parametrize(
    ("decode", "fits"),
    [
        (candidate("d0", "decode"), True),
        (candidate("b0", "both"), True),
        (candidate("d0", "decode", layout=msgspec.structs.replace(LAYOUT, packing="other")), False),
        (candidate("d0", "decode", layout=msgspec.structs.replace(LAYOUT, ranks=2)), False),
        (candidate("d0", "decode", layout=msgspec.structs.replace(LAYOUT, chunk_blocks=64)), False),
        (candidate("d0", "decode", shares_blocks=False), False),
        (candidate("d0", "decode", content=msgspec.structs.replace(CONTENT, weights="cd34")), False),
        (candidate("d0", "decode", content=msgspec.structs.replace(CONTENT, weight_epoch="new")), False),
        (candidate("d0", "decode", pairable=False), False),
        (PREFILL, False),
    ],
)
def test_fit(decode: Candidate, fits: bool) -> None:
    assert fit(PREFILL, decode, "smol") is fits
    pair = choose_pair((PREFILL, decode), "smol", policy="round_robin", turn=0)
    assert (pair is not None) is fits


def test_engines_of_both_roles_pair_only_with_dedicated_ones() -> None:
    both = (candidate("b0", "both"), candidate("b1", "both"))
    assert choose_pair(both, "smol", policy="round_robin", turn=0) is None
    assert choose_alone(both, "smol", policy="round_robin", turn=1) == both[1]
    pair = choose_pair((*both, candidate("d0", "decode")), "smol", policy="round_robin", turn=0)
    assert pair is not None
    assert (pair.prefill.engine_id, pair.decode.engine_id) == ("b0", "d0")


def test_other_models_and_missing_sides() -> None:
    assert choose_pair((PREFILL,), "smol", policy="round_robin", turn=0) is None
    assert choose_alone((PREFILL,), "smol", policy="round_robin", turn=0) is None
    decode = candidate("d0", "decode")
    assert choose_pair((PREFILL, decode), "other", policy="round_robin", turn=0) is None
    assert choose_alone((decode,), "smol", policy="round_robin", turn=0, exclude=frozenset({"d0"})) is None


def test_a_prefill_engine_without_partner_is_passed_over() -> None:
    odd = candidate("a0", "prefill", content=msgspec.structs.replace(CONTENT, weights="cd34"))
    snapshot = (odd, PREFILL, candidate("d0", "decode"))
    for turn in range(4):
        pair = choose_pair(snapshot, "smol", policy="round_robin", turn=turn)
        assert pair is not None
        assert pair.prefill == PREFILL


def test_a_full_line_takes_no_more() -> None:
    def seen(p0: int, p1: int, d0: int) -> Snapshot:
        lines = {"p0": p0, "p1": p1}
        prefills = [msgspec.structs.replace(candidate(name, "prefill"), in_line=n) for name, n in lines.items()]
        # What decode is running is no line, however much it is: what waits in the engine is.
        return (*prefills, msgspec.structs.replace(candidate("d0", "decode"), waiting=d0, in_line=99))

    for turn in range(4):
        pair = choose_pair(seen(3, 2, 2), "smol", policy="round_robin", turn=turn, line_max=3)
        assert pair is not None
        assert (pair.prefill.engine_id, pair.decode.engine_id) == ("p1", "d0")
        assert choose_pair(seen(3, 3, 0), "smol", policy="round_robin", turn=turn, line_max=3) is None
        assert choose_pair(seen(0, 0, 3), "smol", policy="round_robin", turn=turn, line_max=3) is None
        assert choose_pair(seen(9, 9, 9), "smol", policy="round_robin", turn=turn) is not None
        assert choose_alone(seen(9, 9, 3), "smol", policy="round_robin", turn=turn, line_max=3) is None
        assert choose_alone(seen(9, 9, 2), "smol", policy="round_robin", turn=turn, line_max=3) is not None


def test_an_adapter_pairs_where_both_engines_have_the_same() -> None:
    prefill, decode = candidate("p0", "prefill", adapters={"tuned": "aa"}), candidate("d0", "decode")
    assert choose_pair((prefill, decode), "tuned", policy="round_robin", turn=0) is None
    assert choose_pair((prefill, decode), "smol", policy="round_robin", turn=0) is not None
    for digest, fits in (("aa", True), ("bb", False)):
        decode = candidate("d1", "decode", adapters={"other": "cc", "tuned": digest})
        assert (choose_pair((prefill, decode), "tuned", policy="round_robin", turn=0) is not None) is fits
        assert choose_alone((prefill, decode), "tuned", policy="round_robin", turn=0) == decode
        assert choose_pair((prefill, decode), "smol", policy="round_robin", turn=0) is not None
