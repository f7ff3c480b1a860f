"""Does what the plan says: waits for a fault's phase, breaks its victim, heals it when its time is over.

Faults keep pace with the requests, so that both end together; several may be under way at once. One thread.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence

from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.plan import CLIENT, Fault, Phase, next_fault
from benchmarks.chaos.traffic import Traffic
from pdx.client import DaemonClient
from pdx.errors import PdxError
from pdx.wire import Ask, Attach

PHASE_S = 3.0  # a phase that is not seen by then: the fault comes all the same, and is counted as "any"
LOOK_S = 1.0
KEEP_S = 10.0
TELL_S = 30.0
HEALED_S = 600.0  # all four engines may have to load their model at once, on two cores that serve besides
ASK_S = 0.3  # a daemon may be stopped


class Injector:
    """`run` until the plan is done and enough requests have ended; `heal` afterwards."""

    def __init__(self, fleet: Fleet, traffic: Traffic, ledger: Ledger, *, plan: Sequence[Fault], requests: int) -> None:
        self._fleet = fleet
        self._traffic = traffic
        self._ledger = ledger
        self._faults = len(plan)
        self._waiting = [fault for fault in plan if fault.number not in ledger.state.faults_done]
        self._requests = requests
        self._watch = Watch(fleet)
        self._order = itertools.count()
        self._heals: list[tuple[float, int, Callable[[], None]]] = []
        self._last: dict[str, float] = {}
        self._clocked_at = time.monotonic()

    def run(self, *, deadline_s: float) -> None:
        """Raises TimeoutError."""
        ends_at = time.monotonic() + deadline_s
        while self._waiting or self._ledger.wishes_ended < self._requests:
            if time.monotonic() > ends_at:
                raise TimeoutError(f"not done after {deadline_s:g} s: {self._told()}")
            self._turn()
            fault = next_fault(self._waiting, unwell=self._fleet.unwell) if self._due() else None
            if fault is None:
                self._traffic.wait()
            elif self._break(fault):
                self._waiting.remove(fault)

    def heal(self) -> None:
        """Everything serves again. Raises TimeoutError."""
        ends_at = time.monotonic() + HEALED_S
        self._heals = [(0.0, order, heal) for _, order, heal in self._heals]
        while self._heals or self._fleet.unwell:
            if time.monotonic() > ends_at:
                raise TimeoutError(f"not well after {HEALED_S:g} s: {', '.join(sorted(self._fleet.unwell))}")
            self._turn()
            self._traffic.wait()

    def close(self) -> None:
        self._watch.close()

    # --- steps --------------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        done = self._faults - len(self._waiting)
        return bool(self._waiting) and self._ledger.wishes_ended >= self._requests * done / self._faults

    def _break(self, fault: Fault) -> bool:
        """False: its victim has gone in the meantime."""
        phase = self._await(fault.phase)
        if fault.target in self._fleet.unwell:
            return False
        match fault.kind:
            case "kill":
                self._fleet.kill(fault.target, fault.piece)
                self._later(fault, lambda: self._fleet.revive(fault.target))
            case "stop":
                self._fleet.stop(fault.target, fault.piece)
                self._later(fault, lambda: self._fleet.resume(fault.target))
            case "cut":
                self._fleet.cut(fault.target, fault.way)
                self._later(fault, lambda: self._fleet.mend(fault.target))
            case "leave":
                assert fault.target == CLIENT
                if not self._traffic.leave_one(fault.phase):
                    return False
        self._ledger.fault(fault, phase)
        return True

    def _later(self, fault: Fault, heal: Callable[[], None]) -> None:
        heapq.heappush(self._heals, (time.monotonic() + fault.seconds, next(self._order), heal))

    def _await(self, phase: Phase) -> Phase:
        """The phase if it is seen in time, else "any"."""
        sent, tokens = self._traffic.marks()
        seen: dict[Phase, Callable[[], bool]] = {
            "sent": lambda: self._traffic.marks()[0] > sent,
            "decode": lambda: self._traffic.marks()[1] > tokens,
            "prefill": lambda: self._watch.sees("Sender", "sending"),
            "handover": lambda: self._watch.sees("Receiver", "landed") or self._watch.sees("Receiver", "loading"),
            "any": lambda: False,
        }
        ends_at = time.monotonic() + (PHASE_S if phase != "any" else 0.0)
        while time.monotonic() < ends_at:
            if seen[phase]():
                return phase
            self._turn()
            self._traffic.wait()
        return "any"

    def _turn(self) -> None:
        """What has to be done all the time: healing, looking, telling."""
        now = time.monotonic()
        self._ledger.state.seconds += now - self._clocked_at
        self._clocked_at = now
        while self._heals and self._heals[0][0] <= time.monotonic():
            heapq.heappop(self._heals)[2]()
        if self._every("look", LOOK_S):
            self._fleet.look()
        if self._every("keep", KEEP_S):
            self._ledger.keep()
        if self._every("tell", TELL_S):
            print(f"  {self._told()}", flush=True)

    def _every(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._last.get(what, 0.0) < seconds:
            return False
        self._last[what] = now
        return True

    def _told(self) -> str:
        outcomes = ", ".join(f"{count} {kind}" for kind, count in sorted(self._ledger.state.outcomes.items()))
        done = self._faults - len(self._waiting)
        return (
            f"{self._ledger.wishes_ended} of {self._requests} requests ({outcomes}), {done} of {self._faults} faults, "
            f"{self._ledger.state.seconds:.0f} s; unwell: {', '.join(sorted(self._fleet.unwell)) or 'nobody'}"
        )


class Watch:
    """What the daemons say of their handoffs. One that does not answer soon is not waited for."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._tools: dict[str, DaemonClient] = {}

    def sees(self, half: str, word: str) -> bool:
        """Whether some daemon has such a half of a handoff in such a state now."""
        return any(half in line and word in line for name in "ab" for line in self._halves(name))

    def close(self) -> None:
        for tool in self._tools.values():
            tool.close()
        self._tools.clear()

    def _halves(self, name: str) -> list[str]:
        try:
            if name not in self._tools:
                settings = self._fleet.rig.settings_of(name)
                hello = Attach(kind="tool")
                self._tools[name] = DaemonClient.attach(settings, hello, start=False, deadline_s=ASK_S)
            return list(self._tools[name].ask(Ask(verb="stats"), timeout_s=ASK_S).body["handoffs"])
        except PdxError:
            if name in self._tools:  # its late answer would be taken for the next one
                self._tools.pop(name).close()
            return []
