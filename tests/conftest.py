"""What every test gets: a leak check after it, reasons for skips, and hypothesis without luck."""

from __future__ import annotations

import gc
import importlib.util
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import hypothesis
import pytest
from daemon.forkserver import forkserver

SETTLE_S = 15.0  # a thread or process that has been told to end gets this long to be gone
ARENAS_GONE_S = 30.0
# Started once per process by the standard library, on purpose, and never ended by it.
LASTING = ("resource_tracker", "forkserver")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

REAL_ENGINES = Path(__file__).parent / "e2e"
WITH_PROCESSES = {"benchmarks", "daemon", "launch", "router", "transport"}
MARKS: dict[str, tuple[Callable[[], bool], str]] = {
    "vllm": (lambda: importlib.util.find_spec("vllm") is not None, "vLLM is not installed: pip install 'pdx-kv[cpu]'"),
    "gpu": (lambda: Path("/dev/nvidia0").exists(), "this machine has no NVIDIA GPU"),
    "browser": (lambda: bool(browser.found()), "no Chromium: scripts/testtools, which make test runs, installs one"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark, (is_here, reason) in MARKS.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and not is_here():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=_turn)


def pytest_collection_finish() -> None:
    """What has been imported stays: a collection that had to go through it would take 0.4 s, and there are many."""
    gc.collect()
    gc.freeze()


def _turn(item: pytest.Item) -> int:
    """Real engines first, which take one process the longest. Beside them what is only computed: they spin on all
    cores, and what is killed there takes seconds to die. Last what starts processes and has deadlines."""
    return 0 if REAL_ENGINES in item.path.parents else 2 if WITH_PROCESSES & set(item.path.parts) else 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Files stay whole and in order, and one process of several has all real engines: more at once would not fit."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return REAL_ENGINES.name if f"/{REAL_ENGINES.name}/" in file else file

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Threads, child processes, descriptors (memfds and sockets among them) and /dev/shm are as before the test."""
    before = _held()
    yield
    deadline = time.monotonic() + SETTLE_S
    pause = threading.Event()
    while leaked := _held() - before:
        if time.monotonic() > deadline:
            pytest.fail(f"leaked: {', '.join(sorted(leaked))}", pytrace=False)
        gc.collect()
        pause.wait(0.01)


def _held() -> set[str]:
    return _threads() | _children() | _descriptors() | _shared_memory()


def _threads() -> set[str]:
    return {f"thread {thread.name} {thread.ident}" for thread in threading.enumerate()}


def _children() -> set[str]:
    named = {pid: _name_of(pid) for pid in _children_of("self")}
    lasting = {pid for pid, name in named.items() if any(word in name for word in LASTING)}
    named |= {forked: _name_of(forked) for pid in lasting for forked in _children_of(pid)}
    return {f"process {pid} {name}" for pid, name in named.items() if pid not in lasting}


def _children_of(pid: str) -> set[str]:
    pids: set[str] = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids.update(children.read_text().split())
        except OSError:  # the thread ended while we looked
            continue
    return pids


def _name_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    except OSError:
        return "?"


def _descriptors() -> set[str]:
    held = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            held.add(f"descriptor {number} {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:  # the one that listed the folder
            continue
    return held


def _shared_memory() -> set[str]:
    """Arenas that this process maps. (Those of other processes: see `no_arena_outlives_the_tests`.)"""
    maps = Path("/proc/self/maps").read_text()
    return {line.split()[0] for line in maps.splitlines() if "memfd:pdx" in line}


@pytest.fixture(scope="session", autouse=True)
def no_arena_outlives_the_tests() -> Iterator[None]:
    """Daemons may be detached: look at every process that was started from here, once, when all is over."""
    mark = f"TESTED_BY={secrets.token_hex(8)}"
    os.environ.update([mark.split("=")])
    yield
    deadline = time.monotonic() + ARENAS_GONE_S
    pause = threading.Event()
    while left := _mapping_processes(mark.encode()):
        assert time.monotonic() < deadline, f"processes {left} still map an arena"
        pause.wait(0.1)


@pytest.fixture(scope="session", autouse=True)
def daemons_are_forked(no_arena_outlives_the_tests: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with forkserver(tmp_path_factory.mktemp("forks")):
        yield


def _mapping_processes(mark: bytes) -> set[str]:
    """By what they have inherited: other tests may run on this machine, whose arenas are no leaks of ours."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            inherits = entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0")
            if inherits and "memfd:pdx" in (entry / "maps").read_text():
                found.add(entry.name)
        except OSError:  # it ended while we looked
            continue
    return found
