"""One engine's host: blocks in its memory, which forgets what was used longest ago, and a daemon's word about them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from benchmarks.routing.workloads import BLOCK_TOKENS
from pdx.buffer.index import Index
from pdx.daemon.holdings import HoldingsTeller
from pdx.keys import ContentFingerprint, LayoutFingerprint, space_of
from pdx.wire import DaemonRef, EngineInfo, Role

ENGINES = 16  # of either role
ROLES: tuple[Role, Role] = ("prefill", "decode")
MODEL = "simulated"
PREFILL_TOKENS_PER_S = 4_000.0
REQUEST_S = 0.01  # which a prefill takes beside its tokens
STEP_S, STEP_MORE_S = 0.01, 0.0002  # of decode, and more of it for each other request
HOST_BLOCKS = 10_000  # that a host's memory keeps: 640 thousand tokens
CONTENT = ContentFingerprint(
    model=MODEL, weights="w", weight_epoch="", dtype="bf16", block_tokens=BLOCK_TOKENS, hash_algorithm="sha256_cbor/s"
)
LAYOUT = LayoutFingerprint(
    engine="simulated", attention="none", layers=32, page_bytes=64 << 10, block_tokens=BLOCK_TOKENS, packing="none",
    kv_groups=1, ranks=1, chunk_blocks=1,
)  # fmt: skip
SPACE = space_of(CONTENT, LAYOUT)


class Host:
    """`names` are names of a prompt's full blocks, in order."""

    def __init__(self, name: str, role: Role, url: str = "http://simulated") -> None:
        self.ref = DaemonRef(daemon_id=name, incarnation=1, control="tcp://127.0.0.1:9", lanes=[])
        self.index = Index()
        self.teller = HoldingsTeller(self.ref, self.index, None)
        self.info = EngineInfo(
            engine_id=name, role=role, model=MODEL, url=url, context_tokens=1 << 20, content=CONTENT, layout=LAYOUT
        )
        self.running = 0  # answers
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def uncached(self, names: Sequence[bytes]) -> int:
        """How many tokens of a prompt of these blocks must be computed. The last one always is."""
        held = next((n for n, name in enumerate(names) if name not in self._blocks), len(names))
        return max(1, (len(names) - held) * BLOCK_TOKENS)

    def keep(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):  # the head of a chain is used last, and outlives its tail
            if name not in self._blocks:
                self.index.told((SPACE, name), True)
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while len(self._blocks) > HOST_BLOCKS:
            name, _ = self._blocks.popitem(last=False)
            self.index.told((SPACE, name), False)

    def step_s(self) -> float:
        return STEP_S + STEP_MORE_S * self.running


def prefill_s(uncached: int) -> float:
    return REQUEST_S + uncached / PREFILL_TOKENS_PER_S
