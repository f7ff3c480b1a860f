from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import pytest

from pdx.buffer import lease as lease_module
from pdx.buffer import slots as slots_module
from pdx.buffer.extents import Extents
from pdx.buffer.lease import LeaseState
from pdx.buffer.slots import MOVES, Slot, SlotEvent, SlotState
from pdx.errors import IllegalTransition
from pdx.layout import CONTROL_BYTES, ExtentPlan, PageLayout

PAGES = PageLayout(layers=2, page_bytes=1000, chunk_blocks=4)
ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"


def new_slot(blocks: int = 4) -> Slot:
    extents = Extents(arena_bytes=CONTROL_BYTES + (64 << 10), extent_bytes=64 << 10)
    (run,) = extents.take(PAGES, blocks)
    return Slot(run, generation=9, keys=(None,) * blocks)


def documented(heading: str) -> set[tuple[str, str, str]]:
    section = ARCHITECTURE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {(row[0], row[1], row[2]) for row in rows[2:]}


@pytest.mark.parametrize(("heading", "module"), [("Slot states", slots_module), ("Lease states", lease_module)])
def test_the_tables_are_those_of_the_architecture_page(heading: str, module: object) -> None:
    moves = module.MOVES  # type: ignore[attr-defined]
    assert documented(heading) == {(str(start), event, str(end)) for (start, event), end in moves.items()}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(SlotState, get_args(SlotEvent))))
def test_every_event_in_every_state(state: SlotState, event: SlotEvent) -> None:
    slot = new_slot()
    slot.state = state
    if (state, event) in MOVES:
        slot.on(event)
        assert slot.state is MOVES[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"{event} of <Slot {state}"):
            slot.on(event)
        assert slot.state is state


def test_a_held_slot_does_not_drain() -> None:
    slot = new_slot()
    slot.state, slot.holds = SlotState.QUARANTINE, 1
    with pytest.raises(IllegalTransition):
        slot.on("drain")
    slot.holds = 0
    slot.on("drain")
    assert slot.state is SlotState.FREE


def test_places_follow_the_layout() -> None:
    slot, plan = new_slot(), ExtentPlan(PAGES, 64 << 10)
    assert [place.position for place in slot.places] == [0, 1, 2, 3]
    for place in slot.places:
        assert (place.slot_offset, place.slot_blocks, place.generation) == (slot.run.offset, 4, 9)
        assert place.header_offset == plan.header_offset(CONTROL_BYTES, slot.run.first_unit + place.position)
    last_byte = slot.places[3].page_offset(PAGES, layer=1) + PAGES.page_bytes
    assert last_byte <= slot.run.offset + slot.blocks * PAGES.unit_bytes


def test_repr() -> None:
    assert repr(new_slot()) == "<Slot free at 0x2000: 4 blocks, 0 indexed, 0 holds, generation 9>"


def test_lease_states_are_documented_words() -> None:
    assert {state.value for state in LeaseState} == {"live", "quarantined", "ended"}
