"""Who is started anew, when, and when that is given up: over a supervisor whose clock is a number."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pdx.launch import outlive
from pdx.launch.engine import EngineSpec
from pdx.launch.outlive import AGAIN_S, PAUSES_S, serve_on
from pdx.launch.supervise import ChildDied, Interrupted

ENGINES = [EngineSpec(name=name, role=role, model="m", port=1) for name, role in (("p", "prefill"), ("d", "decode"))]


class Scripted:
    """Commands die as a script says: a name, and how long after the wait began."""

    def __init__(self, deaths: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.said: list[str] = []
        self.started: list[float] = []
        self._deaths = deaths
        monkeypatch.setattr(outlive.time, "monotonic", lambda: self.now)

    def wait(self, timeout_s: float | None = None) -> None:
        if not self._deaths:
            if timeout_s is None:
                raise Interrupted("enough")
            self.now += timeout_s
            return
        name, in_s = self._deaths[0]
        if timeout_s is not None and timeout_s < in_s:
            self._deaths[0] = name, in_s - timeout_s
            self.now += timeout_s
            return
        self._deaths.pop(0)
        self.now += in_s
        raise ChildDied(name, f"{name} ended with exit code 9; its last lines")

    def bury(self, name: str) -> None:
        pass

    def say(self, line: str) -> None:
        self.said.append(line)

    def serve(self) -> None:
        start: Callable[[], None] = lambda: self.started.append(self.now)  # noqa: E731
        serve_on(self, ENGINES, needed="decode", restart={"pdxd": start})  # type: ignore[arg-type]


def test_a_daemon_is_started_later_each_time_and_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted([("pdxd", 0.5 + pause_s) for pause_s in (0.0, *PAUSES_S)], monkeypatch)
    with pytest.raises(ChildDied):
        scripted.serve()
    assert len(scripted.started) == len(PAUSES_S)
    assert scripted.now - 100.0 < AGAIN_S
    assert [line.partition("anew")[2] for line in scripted.said[:3]] == [", empty", " in 1 s, empty", " in 2 s, empty"]


def test_deaths_that_are_far_apart_are_each_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted([("pdxd", AGAIN_S + 1)] * 10, monkeypatch)
    with pytest.raises(Interrupted):
        scripted.serve()
    assert len(scripted.started) == 10


def test_an_engine_that_dies_meanwhile_keeps_nobody_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted([("pdxd", 1.0), ("pdxd", 1.0), ("p", 0.5)], monkeypatch)
    with pytest.raises(Interrupted):
        scripted.serve()
    assert scripted.started == [101.0, 103.0]
    assert scripted.said[-1] == "p ended with exit code 9; the others serve on: d"


def test_without_one_that_decodes_all_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildDied):
        Scripted([("d", 1.0)], monkeypatch).serve()
