"""What to save and what to load, step by step, for one request. Pure arithmetic on blocks, layers and tokens.

Knows nothing of any engine, of memory or of the daemon. Blocks are counted along the prompt (`block index`); where the
engine keeps them is a `block id`, which may change when the engine preempts a request. A block is *whole* once its last
token is computed; the tail, a prompt's last, unfull block, once the prompt's last token is.

Layers that keep their blocks apart are in different *groups*, each with a block table of its own: a block has an id in
each of them, or NO_BLOCK where the group's layers have forgotten it, or will never look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pdx.errors import Refused
from pdx.layout import CONTROL_BYTES, PageLayout, Place, blocks_for

LOOK_AHEAD = 32  # blocks; of twenty prompts of 2,000 blocks each, to look at all would take 16 ms of every step
WINDOW = 256  # blocks looked at together: all 2,000 of a prompt took 2 ms of every step, most of what it may take
NO_BLOCK = 0  # what stands for no block in a table, as in vLLM; real ones count from 1


class SendPlan:
    """The pages of one outgoing request that are still to be saved. One owner, no clock.

    `places[i]` is where block i goes, None if the store holds it already. Raises Refused if the places do not cover
    the prompt, tail included.
    """

    def __init__(self, places: Sequence[Place | None], *, prompt_tokens: int, block_tokens: int) -> None:
        if len(places) != blocks_for(prompt_tokens, block_tokens):
            raise Refused(f"{len(places)} places were offered for a prompt of {prompt_tokens} tokens")
        self._places = places
        self._prompt_tokens = prompt_tokens
        self._block_tokens = block_tokens
        self._unsaved = [index for index, place in enumerate(places) if place is not None]
        self.blocks_to_save = len(self._unsaved)

    def step(self, tables: Sequence[Sequence[int]], *, tokens_after: int) -> list[tuple[int, tuple[int, ...], Place]]:
        """Takes out what to save in a step that ends with `tokens_after` tokens computed: (index, block ids, place).

        That is every whole block not saved yet, so the first step also takes what the engine found in its own prefix
        cache: of that, some groups may have NO_BLOCK, and then its pages are nowhere. After a preemption `tokens_after`
        starts low again; what was saved stays saved.
        """
        whole = min(self._whole_blocks(tokens_after), *map(len, tables))
        due = [index for index in self._unsaved if index < whole]
        self._unsaved = self._unsaved[len(due) :]
        return [(index, tuple(table[index] for table in tables), self._place(index)) for index in due]

    @property
    def complete(self) -> bool:
        return not self._unsaved

    def _whole_blocks(self, tokens: int) -> int:
        return len(self._places) if tokens >= self._prompt_tokens else tokens // self._block_tokens

    def _place(self, index: int) -> Place:
        place = self._places[index]
        assert place is not None
        return place


class LoadPlan:
    """The pages of one incoming request that are still to be scattered: block i lies at `places[i]` and goes, in a
    layer of group g, to engine block `tables[g][i]`, or nowhere if that is NO_BLOCK. Layers of a block are taken in
    order. One owner, no clock. `group_of`: each layer's."""

    def __init__(
        self,
        places: Sequence[Place],
        tables: Sequence[Sequence[int]],
        *,
        group_of: Sequence[int],
        ahead: bool = False,
    ) -> None:
        """`ahead`: batches are reported as issued, and some time later as done; else at once as done."""
        if not places or any(len(table) != len(places) for table in tables):
            raise Refused(f"{len(places)} places do not match {[len(table) for table in tables]} engine blocks")
        self.places = places
        self.tables = tables
        self._group_of = group_of
        self._layers = len(group_of)
        # Leading layers scattered and verified, or not needed.
        self._done = [self._needed_from(position, 0) for position in range(len(places))]
        self._issued = list(self._done) if ahead else self._done  # the same, or on their way
        self._first_open = 0  # before it, all is issued
        self._window_end = 0  # behind it, nothing is before the window's blocks are
        self._open = sum(done < self._layers for done in self._done)  # positions that are not done
        self.pages_done = 0

    def batches(self, watermark: Callable[[Place], int], *, pages_max: int) -> Iterator[tuple[int, list[int]]]:
        """(layer, positions in `places`) of pages that have landed and are not issued: of a window of blocks, which
        are the first to be whole then, the lowest layer first.

        `pages_max` is for each. Report each with `issue` or `done` before taking the next; stop when you like. Blocks
        land in the order of the prompt, more or less: nothing is looked for far behind the last that has.
        """
        while self._first_open < len(self.places):
            if self._first_open >= self._window_end:
                self._window_end = min(self._first_open + max(WINDOW, pages_max), len(self.places))
            landed = self._landed(watermark)
            for layer in range(min((self._issued[n] for n in landed), default=0), max(landed.values(), default=0)):
                due = [position for position, layers in landed.items() if self._issued[position] == layer < layers]
                for start in range(0, len(due), pages_max):
                    yield layer, due[start : start + pages_max]
            while self._first_open < self._window_end and self._issued[self._first_open] >= self._layers:
                self._first_open += 1
            if self._first_open < self._window_end:
                return

    def issue(self, layer: int, positions: Sequence[int]) -> None:
        """These pages are on their way into the engine's cache. Only with `ahead`."""
        for position in positions:
            assert self._issued[position] == layer
            self._issued[position] = self._needed_from(position, layer + 1)

    def done(self, layer: int, positions: Sequence[int]) -> None:
        """These pages are in the engine's cache and verified."""
        for position in positions:
            assert self._done[position] == layer
            self._done[position] = needed = self._needed_from(position, layer + 1)
            self._open -= needed == self._layers
        self.pages_done += len(positions)

    def block_ids(self, layer: int, positions: Sequence[int]) -> list[int]:
        """Where the engine keeps these positions' pages of this layer."""
        table = self.tables[self._group_of[layer]]
        return [table[position] for position in positions]

    @property
    def complete(self) -> bool:
        return not self._open

    @property
    def unverified_block_ids(self) -> set[int]:
        """Engine blocks that must not be used: at least one of their layers has not been verified."""
        unverified = {table[n] for n, done in enumerate(self._done) if done < self._layers for table in self.tables}
        return unverified - {NO_BLOCK}

    @property
    def block_ids_of_all(self) -> set[int]:
        """Every engine block that this load fills, or has filled."""
        return {block_id for table in self.tables for block_id in table} - {NO_BLOCK}

    def _landed(self, watermark: Callable[[Place], int]) -> dict[int, int]:
        """Positions in the window of which layers have landed that are not issued: how many have."""
        landed: dict[int, int] = {}
        blank = 0  # positions in a row with nothing new
        for position in range(self._first_open, self._window_end):
            issued = self._issued[position]
            if issued >= self._layers:
                continue
            layers = min(watermark(self.places[position]), self._layers)
            blank = 0 if layers > issued else blank + 1
            if layers > issued:
                landed[position] = layers
            elif blank >= LOOK_AHEAD:
                break
        return landed

    def _needed_from(self, position: int, layer: int) -> int:
        """The first layer, from `layer` on, that has a block for this position; the number of layers if none has."""
        while layer < self._layers and self.tables[self._group_of[layer]][position] == NO_BLOCK:
            layer += 1
        return layer


def promised_tokens(places: int, *, prompt_tokens: int, block_tokens: int) -> int:
    """How many tokens of a prompt can be loaded if its first `places` blocks can. The tail counts only with all.

    >>> promised_tokens(3, prompt_tokens=40, block_tokens=16), promised_tokens(2, prompt_tokens=40, block_tokens=16)
    (40, 32)
    """
    return min(places * block_tokens, prompt_tokens)


def fits(place: Place, layout: PageLayout, arena_bytes: int) -> bool:
    """Whether a place that another process named lies inside the arena."""
    return (
        0 <= place.position < place.slot_blocks
        and CONTROL_BYTES <= place.slot_offset <= arena_bytes - place.slot_blocks * layout.block_bytes
        and CONTROL_BYTES <= place.header_offset <= arena_bytes - layout.header_bytes
        and place.header_offset % 8 == 0
    )
