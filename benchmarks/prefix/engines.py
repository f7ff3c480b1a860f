"""The arms of the prefix benchmark: one vLLM engine on core 0, and what keeps its prefixes on core 1.

`plain` has only its own cache; `pdx` a pdxd beside it. All answer on their own port, without a router.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.arms import DECODE_CPUS, ENGINE_FLAGS, PREFILL_CPUS, Arm, Scratch, serving, start_plain
from benchmarks.harness.arms import wait_engines as wait
from benchmarks.harness.measure import Timing, completion, stream
from benchmarks.harness.rig import post, stats, wait_until
from pdx.admin import ClearRequest
from pdx.client import DaemonClient
from pdx.errors import PdxError
from pdx.kv import LocalKv

ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
ANSWER_S = 300.0
RESET_S = 10.0
WRITE_S = 60.0


class CachingArm(Arm):
    """An engine that can be made to forget its own cache. `counters`: lookup_hit_blocks were found below that."""

    def ask(self, prompt: list[int], tokens: int) -> Timing:
        timing = stream(self.url, completion(self.model, prompt, tokens), ANSWER_S)
        if not timing.good or timing.usage.get("completion_tokens") != tokens:
            raise PdxError(f"{self.name}: status {timing.status}, {timing.error}, {timing.usage}")
        return timing

    def forget(self) -> None:
        """The engine's own cache; what lies below it stays."""
        reply = post(f"{self.url}/reset_prefix_cache", {}, deadline_s=RESET_S)
        if reply.status != 200:
            raise PdxError(f"{self.name} does not forget: {reply.text}")

    def counters(self) -> dict[str, int]:
        return {}


class PdxArm(CachingArm):
    tool: DaemonClient  # asks its daemon

    def counters(self) -> dict[str, int]:
        return dict(stats(self.tool)["counters"])

    def forget_memory(self) -> None:
        """The engine's own cache, and the arena's once all of it is on the disk."""
        self.forget()
        wait_until(lambda: not stats(self.tool)["disk"]["waiting_writes"], WRITE_S, "the disk has everything")
        LocalKv(self.tool).clear(ClearRequest(tier="arena", everything=True))


def plain(scratch: Scratch, name: str, flags: Sequence[str] = ()) -> CachingArm:
    rig = scratch.rig(name)
    engine = start_plain(rig, "engine", PREFILL_CPUS, flags, environment=ENVIRONMENT)
    wait([engine])
    arm = CachingArm(scratch, name, engine.url, [engine], ready=serving(engine))
    arm.pause()
    return arm


def pdx(scratch: Scratch, name: str, *, arena: str, flags: Sequence[str] = (), disk: Path | None = None) -> PdxArm:
    rig = scratch.rig(name)
    disk_settings = {"disk": str(disk), "disk_cap": "4GiB"} if disk else {}
    daemon = rig.start_daemon("a", cpus=DECODE_CPUS, arena=arena, linger_s="600", **disk_settings)
    engine = rig.start_engine(
        "engine", "both", "a", cpu=PREFILL_CPUS, flags=(*ENGINE_FLAGS, *flags), environment=ENVIRONMENT
    )
    wait([engine])
    arm = PdxArm(scratch, name, engine.url, [engine, daemon], ready=serving(engine))
    arm.tool = rig.tool("a")
    stats(arm.tool)  # its connection, which ZeroMQ makes in the background, is there before the arm is paused
    arm.pause()
    return arm
