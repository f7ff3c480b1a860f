"""A daemon's life: found or started, alone or shared, lingering, dying, coming back."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from daemon.fleet import DEADLINE_S, PAGES, Daemon, Fleet, prompt_of, until
from wire_samples import ENGINE

from pdx.client import Attachment, DaemonClient
from pdx.config import LOG_NAME, SOCKET_NAME, Config, load
from pdx.daemon.main import LOG_BYTES_MAX
from pdx.errors import ConfigError, DaemonGone, Refused
from pdx.launch.ports import free_ports
from pdx.wire import Ask, Attach

TOOL = Attach(kind="tool")
WORKER = Attach(kind="worker", engine=ENGINE, pages=PAGES)
SCHEDULER = Attach(kind="scheduler", engine=ENGINE)
ANOTHER = Attach(kind="scheduler", engine=msgspec.structs.replace(ENGINE, engine_id="another"))


@pytest.fixture
def fleet(unchecked_fleet: Fleet) -> Fleet:
    return unchecked_fleet


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Config]:
    """Settings of a run directory in which nobody runs; whatever was started there is gone afterwards."""
    config = load({"run_dir": str(tmp_path / "run"), "arena": "4MiB", "linger_s": "0.2"}, environ={})
    yield config
    until(lambda: not daemons_in(config), "the started daemon lingers out")


def daemons_in(config: Config) -> list[psutil.Process]:
    def ours(process: psutil.Process) -> bool:
        try:
            return f"--run-dir={config.run_path}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    return [process for process in psutil.process_iter() if ours(process)]


def kill_daemon(config: Config) -> psutil.Process:
    """The only one there."""
    (daemon,) = daemons_in(config)
    daemon.kill()
    return daemon


def test_the_first_client_starts_a_detached_daemon_and_the_others_share_it(settings: Config) -> None:
    with DaemonClient.attach(settings, WORKER) as first, DaemonClient.attach(settings, SCHEDULER) as second:
        assert first.attached.daemon == second.attached.daemon
        (daemon,) = daemons_in(settings)
        assert os.getsid(daemon.pid) == daemon.pid, "a session of its own: no terminal's Ctrl-C reaches it"
        assert stat.S_IMODE(settings.run_path.stat().st_mode) == 0o700


def test_its_log_tells_who_came_and_who_left(settings: Config) -> None:
    log = settings.run_path / LOG_NAME
    with DaemonClient.attach(settings, WORKER), DaemonClient.attach(settings, SCHEDULER):
        until(lambda: f"engine {ENGINE.engine_id} ({ENGINE.role}) is here" in log.read_text(), "it is told")
    until(lambda: f"the last process of engine {ENGINE.engine_id} has left" in log.read_text(), "its end is told")


def test_it_lingers_for_an_engine_that_comes_back_then_exits_and_cleans_up(settings: Config) -> None:
    DaemonClient.attach(settings, WORKER).close()
    with DaemonClient.attach(settings, ANOTHER, start=False) as again:
        assert again.alive
    until(lambda: not daemons_in(settings), "it exits")
    log = (settings.run_path / LOG_NAME).read_text()
    assert "waits 0.2 s for its first engine" in log
    assert log.endswith("gone: no engine for 0.2 s\n")
    assert not {"pdxd.sock", "pdxd.ipc", "pdxd.json"} & set(os.listdir(settings.run_path))


def test_it_stays_for_engines_and_not_for_those_who_look_at_it(settings: Config) -> None:
    with DaemonClient.attach(settings, WORKER) as engine, DaemonClient.attach(settings, TOOL) as tool:
        assert tool.ask(Ask(verb="health")).body
        engine.close()
        log = settings.run_path / LOG_NAME
        until(lambda: log.read_text().endswith("gone: no engine for 0.2 s\n"), "it exits")
        assert not tool.alive


@pytest.mark.parametrize("accepted", [False, True])
def test_a_client_that_meets_a_daemon_which_is_leaving_gets_the_next_one(settings: Config, accepted: bool) -> None:
    settings.run_path.mkdir(mode=0o700)
    path = settings.run_path / SOCKET_NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as leaving:
        leaving.bind(str(path))
        leaving.listen()

        def leave() -> None:
            select.select([leaving], [], [], DEADLINE_S)
            path.unlink()
            if accepted:
                leaving.accept()[0].close()
            leaving.close()

        thread = threading.Thread(target=leave)
        thread.start()
        with DaemonClient.attach(settings, SCHEDULER) as client:
            assert client.ask(Ask(verb="health"))
        thread.join()


def test_who_asks_for_other_settings_than_the_daemon_has_is_told(
    settings: Config, caplog: pytest.LogCaptureFixture
) -> None:
    larger = msgspec.structs.replace(settings, arena="16MiB")
    with DaemonClient.attach(settings, WORKER):
        assert not caplog.messages
        with DaemonClient.attach(larger, Attach(kind="scheduler", engine=ENGINE)):
            (warning,) = caplog.messages
            assert "was started without --arena=16MiB" in warning
            assert "--arena=4MiB" in warning


def test_a_daemon_listens_where_it_is_told(fleet: Fleet) -> None:
    control, first, second = free_ports(3)
    daemon = fleet.daemon(control_port=str(control), lane_port=str(first))
    assert daemon.ref.control == f"tcp://127.0.0.1:{control}"
    assert [offer.endpoint for offer in daemon.ref.lanes] == [f"tcp://127.0.0.1:{first}"]
    flags = [f"--run-dir={daemon.run_dir}-2", "--arena=4MiB", f"--control-port={control}", f"--lane-port={second}"]
    done = subprocess.run(
        [sys.executable, "-m", "pdx.daemon.main", *flags], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (done.returncode, "--control-port" in done.stderr) == (2, True), done.stderr


def test_clients_racing_to_start_make_one_daemon(settings: Config) -> None:
    code = """
import sys
from pdx.client import DaemonClient
from pdx.config import load
from pdx.wire import Attach
settings = load({"run_dir": sys.argv[1], "arena": "4MiB"}, environ={})
with DaemonClient.attach(settings, Attach(kind="tool")) as client:
    print(client.attached.daemon.daemon_id)
"""
    command = [sys.executable, "-c", code, str(settings.run_path)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    outputs = [racer.communicate(timeout=DEADLINE_S) for racer in racers]
    assert len({out for out, _ in outputs}) == 1, outputs
    kill_daemon(settings)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing to be pinned to")
def test_a_daemon_that_a_pinned_worker_starts_is_not_pinned(settings: Config) -> None:
    """vLLM pins its CPU workers, which spin; beside one of them a daemon would starve."""
    code = """
import os, sys
from pdx.client import DaemonClient
from pdx.config import load
from pdx.wire import Attach
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
settings = load({"run_dir": sys.argv[1], "arena": "4MiB"}, environ={})
DaemonClient.attach(settings, Attach(kind="tool"), deadline_s=90).close()
"""
    # Whoever is pinned may wait long for its core: that is the point.
    subprocess.run([sys.executable, "-c", code, str(settings.run_path)], check=True, timeout=100)
    (daemon,) = daemons_in(settings)
    assert os.sched_getaffinity(daemon.pid) == os.sched_getaffinity(0)
    kill_daemon(settings)


def test_a_daemon_does_not_inherit_what_binds_a_workers_threads(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("OMP_NUM_THREADS", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
    for name in names:
        monkeypatch.setenv(name, "0")
    with DaemonClient.attach(settings, SCHEDULER):
        (daemon,) = daemons_in(settings)
        assert not set(names) & set(daemon.environ())


def test_settings_in_a_file_of_a_relative_name_are_the_daemons_too(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pdx.yaml").write_text("arena: 6MiB\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDX_CONFIG", "pdx.yaml")
    with DaemonClient.attach(load({"run_dir": str(settings.run_path), "linger_s": "0.2"}), SCHEDULER) as client:
        assert client.attached.arena_bytes >= 6 << 20


def test_a_daemon_that_cannot_start_says_why_to_its_client(settings: Config, tmp_path: Path) -> None:
    huge = load({"run_dir": str(tmp_path / "run"), "arena": "900TiB"}, environ={})
    with pytest.raises(ConfigError, match=r"could not start: an arena of .* does not fit"):
        DaemonClient.attach(huge, TOOL, deadline_s=10)


def test_the_log_of_a_daemon_that_was_started_for_us_is_bounded(settings: Config) -> None:
    log = settings.run_path / LOG_NAME
    settings.run_path.mkdir(mode=0o700)
    log.touch()
    os.truncate(log, LOG_BYTES_MAX)
    with DaemonClient.attach(settings, SCHEDULER):
        assert log.with_name(f"{LOG_NAME}.1").stat().st_size >= LOG_BYTES_MAX
        assert "serving: arena 4 MiB" in log.read_text()
        (daemon,) = daemons_in(settings)
        for descriptor in (1, 2):
            assert os.readlink(f"/proc/{daemon.pid}/fd/{descriptor}") == str(log), "its last words go there too"


def test_of_a_large_log_only_the_end_is_read(settings: Config) -> None:
    log = settings.run_path / LOG_NAME
    settings.run_path.mkdir(mode=0o700)
    log.touch()
    os.truncate(log, 1 << 40)
    with log.open("ab") as file:
        file.write(b"\n")
    elsewhere = msgspec.structs.replace(settings, host="10.1.2.3")
    with pytest.raises(ConfigError, match=r"could not start: host 10\.1\.2\.3 is not loopback and no cluster key"):
        DaemonClient.attach(elsewhere, TOOL, deadline_s=10)


def test_no_daemon_and_none_to_be_started(settings: Config) -> None:
    with pytest.raises(DaemonGone, match=r"no pdxd answers in .* \(--run-dir or a file of settings chose it\)"):
        DaemonClient.attach(settings, TOOL, deadline_s=0.1, start=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arena", "900TiB"], "does not fit"),
        (["--arena", "16"], "arena: 16 would be bytes: write sizes with their units, as in 16MiB"),
        (["--arena", "lots"], "arena: 'lots' is not a size; write e.g. 512MiB"),
        (["--host", "10.1.2.3"], "PDX_KEY_FILE"),
        (["--disk-write", "sideways"], "command line: disk_write is one of through, back, not 'sideways'"),
        (["--low-water", "0.2"], "low_water is at least 0 and at most high_water, which is below 1; not 0.2 and 0.1"),
        (["--disk", "d", "--disk-write", "back", "--low-water", "0"], "less room than low_water: that can't be 0"),
        (["--eviction", "mru"], "command line: eviction is one of lru, s3fifo, not 'mru'"),
        (["--run-dir", "/"], "run directory / is open to others"),
    ],
)
def test_bad_settings_get_one_clear_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "pdx.daemon.main", "--run-dir", str(tmp_path / "r"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("pdxd: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_daemon_in_the_same_place_is_refused(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    command = [sys.executable, "-m", "pdx.daemon.main", "--run-dir", str(daemon.run_dir), "--arena", "4MiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert "a pdxd runs already" in done.stderr


def test_an_engine_name_is_taken_once(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    with DaemonClient.attach(daemon.config, WORKER):
        with pytest.raises(Refused, match="attached already"):
            DaemonClient.attach(daemon.config, WORKER)
    until(lambda: "prefill-0" not in daemon.stats()["engines"], "the name is free again")
    DaemonClient.attach(daemon.config, WORKER).close()


def test_a_client_cannot_shrink_grow_or_unseal_the_arena(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    with DaemonClient.attach(daemon.config, WORKER) as client:
        assert client.arena is not None
        for size in (0, 4096, client.attached.arena_bytes * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(client.arena.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(client.arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    daemon.check()


@pytest.mark.parametrize("hello", [b"", b"hello", b"PDX\x07xx", b"PDX\x02\xc1", b"PDX\x02" + bytes(60_000)])
def test_strangers_at_the_door_hurt_nobody(fleet: Fleet, hello: bytes) -> None:
    daemon = fleet.daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(daemon.run_dir / "pdxd.sock"))
        stranger.send(hello)
        stranger.settimeout(DEADLINE_S)
        stranger.recv(1000)
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    silent.connect(str(daemon.run_dir / "pdxd.sock"))
    assert daemon.tool.ask(Ask(verb="health")).body["daemon"] == daemon.ref.daemon_id
    silent.close()
    daemon.check()


def test_an_attachment_survives_the_daemon(settings: Config) -> None:
    attachment = Attachment(settings, SCHEDULER)
    try:
        first = attachment.client()
        assert first is not None
        killed = kill_daemon(settings)
        # Nobody calls client() meanwhile: an idle engine takes no steps, and must come back all the same.
        until(lambda: [d for d in daemons_in(settings) if d.pid != killed.pid], "the next daemon is started")
        second = until(lambda: attachment.client(), "attached again")
        assert isinstance(second, DaemonClient)
        assert second.attached.daemon.incarnation != first.attached.daemon.incarnation
        with pytest.raises(DaemonGone):
            first.send(Ask(verb="health"))
    finally:
        attachment.close()


def test_an_idle_engine_gives_a_dead_daemon_s_arena_back(settings: Config) -> None:
    """There may be no memory for the next daemon's beside it."""
    attachment = Attachment(settings, WORKER)
    try:
        first = attachment.client()
        assert first is not None
        kill_daemon(settings)
        until(lambda: not attachment._arrived.empty(), "attached again")
        assert first.arena is not None, "a step may be under way"
        attachment.let_go()
        assert first.arena is None
        second = attachment.client()
        assert second is not None
        assert second is not first
        attachment.hold()
        attachment.let_go()
        assert second.arena is not None
        kill_daemon(settings)
        until(lambda: second.arena is None, "given back by nobody's step")
    finally:
        attachment.close()


def test_the_next_daemon_knows_the_weights_of_an_engine_that_idles(settings: Config) -> None:
    worker, scheduler = Attachment(settings, WORKER), Attachment(settings, SCHEDULER)
    try:
        for attachment in (worker, scheduler):
            attachment.client()
        scheduler.at("new")
        kill_daemon(settings)
        until(lambda: not (worker._arrived.empty() or scheduler._arrived.empty()), "attached again")
        with DaemonClient.attach(settings, TOOL) as tool:
            (info,) = tool.ask(Ask(verb="spaces")).body["spaces"]
        assert info["content"]["weight_epoch"] == "new"
    finally:
        worker.close()
        scheduler.close()


def test_an_attachment_survives_a_run_directory_that_is_away_for_a_while(settings: Config) -> None:
    """As where a user's session has ended and its engines have not."""
    attachment = Attachment(settings, SCHEDULER)
    try:
        assert attachment.client() is not None
        (daemon,) = daemons_in(settings)
        away = settings.run_path.with_name("away")
        settings.run_path.rename(away)
        settings.run_path.touch()  # no directory can be made here
        daemon.kill()
        until(lambda: attachment.client() is None, "the daemon's death is noticed")
        assert attachment._keeper is not None
        attachment._keeper.join(2.0)  # several tries
        settings.run_path.unlink()
        away.rename(settings.run_path)
        until(lambda: attachment.client(), "attached again")
    finally:
        attachment.close()


def test_a_daemon_that_was_killed_comes_back_as_the_operator_had_started_it(fleet: Fleet, tmp_path: Path) -> None:
    """Its clients start it anew, and know nothing of its disk."""
    first = fleet.daemon(disk=str(tmp_path / "disk"), linger_s="2")
    attachment = Attachment(load({"run_dir": str(first.run_dir), "arena": "4MiB"}, environ={}), SCHEDULER)
    try:
        client = attachment.client()
        assert client is not None
        first.kill()
        until(lambda: attachment.client() not in (None, client), "attached to the daemon that comes next")
        fresh = attachment.client()
        assert fresh is not None
        assert fresh.ask(Ask(verb="stats")).body["disk"], "the one that it was given"
    finally:
        attachment.close()
    until(lambda: not daemons_in(first.config), "the started daemon lingers out")


def test_clients_of_a_dead_daemon_are_not_taken_for_its_successors(fleet: Fleet) -> None:
    """They may outlive it for a while, with session numbers that the next daemon gives out again."""
    first = fleet.daemon()
    old = [DaemonClient.attach(first.config, TOOL, start=False) for _ in range(5)]
    first.kill()
    (first.run_dir / "pdxd.json").unlink()
    second = fleet.daemon_in(first.run_dir)
    for client in [DaemonClient.attach(second.config, TOOL, start=False) for _ in range(5)] + old:
        assert client.alive == (client not in old)
        if client.alive:
            assert client.ask(Ask(verb="health")).body["daemon"] == second.ref.daemon_id
        client.close()


def test_pages_survive_the_engine_that_computed_them(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
    prompt = prompt_of(64)
    handle = fleet.handle(prefill, decode)
    prefill.prefill(prompt, handle)
    assert decode.load(prompt, handle) == 4
    daemon.wait_unleased()
    prefill.close()
    reborn = fleet.engine(daemon, "P2")
    opened = reborn.open_send(prompt, fleet.handle(reborn, decode))
    assert opened.places == [None] * 4
    reborn.let_go(opened.handoff_id, "send")


def test_stop_by_signal_is_clean(fleet: Fleet) -> None:
    daemon: Daemon = fleet.daemon()
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.process.wait(5) == 0
    assert (daemon.run_dir / "log").read_text().endswith("gone: told to stop\n")
    assert not {"pdxd.sock", "pdxd.ipc", "pdxd.json"} & set(os.listdir(daemon.run_dir))
