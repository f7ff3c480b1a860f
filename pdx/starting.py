"""How a client reaches the host's pdxd: by its socket in the run directory, starting one where none runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from pdx import config as configuration
from pdx.config import Config
from pdx.errors import ConfigError, DaemonGone

LAST_BYTES = 64 << 10  # of a log: its last line is in them
CONNECT_RETRY_S = 0.05
TOUCHED_BYTES_PER_S = 100 << 20  # half of what a slow host was seen to do
TOUCHED_S_MAX = 3600.0


def connect(run_dir: Path, config: Config, deadline: float, *, start: bool, again: bool) -> socket.socket:
    """Connects to the daemon's socket, starting the daemon at most once.

    One that is being started touches each page of its arena before it listens: `deadline` is later by so long.
    """
    started = False
    touched_by = deadline + min(TOUCHED_S_MAX, config.arena_bytes / TOUCHED_BYTES_PER_S)
    pause = select.poll()
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        connection.settimeout(max(0.1, deadline - time.monotonic()))  # behind a daemon that accepts nothing
        try:
            connection.connect(str(run_dir / configuration.SOCKET_NAME))
        except OSError:
            connection.close()
        else:
            return connection
        ends_at = deadline
        if start:
            with (run_dir / configuration.LOCK_NAME).open("a") as lock:
                if _locked(lock):
                    # Nobody is a daemon here, or about to be one.
                    if started:
                        raise ConfigError(f"pdxd could not start: {_last_line(run_dir / configuration.LOG_NAME)}")
                    left = configuration.left_flags(run_dir) if again else None
                    _start_daemon(run_dir, configuration.flags_of(config) if left is None else left, lock)
                    started = True
                ends_at = touched_by
        if time.monotonic() > ends_at:
            raise DaemonGone(f"no pdxd answers in {run_dir} ({configuration.chooser_of(run_dir)})")
        pause.poll(CONNECT_RETRY_S * 1000)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _start_daemon(run_dir: Path, flags: list[str], lock: IO[str]) -> None:
    """Starts a daemon that is no child of ours and inherits the lock, so that nobody else starts one meanwhile."""
    place = [f"--run-dir={run_dir}", f"--lock-fd={lock.fileno()}"]
    command = [sys.executable, "-m", "pdx.daemon.main", *place, *flags]
    with (run_dir / configuration.LOG_NAME).open("ab") as log_file:
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _DETACH, _cores(), *command],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                cwd="/",
                env=_daemon_environment(),
                pass_fds=[lock.fileno()],
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise DaemonGone(f"no process for pdxd could be started: {error}") from error


# Forks, so that the daemon is adopted by init and an engine has no zombie to reap; leaves the terminal's session.
_DETACH = (
    "import os, sys; os.fork() and os._exit(0); os.setsid(); "
    "os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); os.execv(sys.argv[2], sys.argv[2:])"
)


def _cores() -> str:
    """Those of our parent, beside ours. vLLM pins its CPU workers, which compute and spin: a daemon that had only the
    core of one of them was seen to wait for minutes with something to do."""
    cores = os.sched_getaffinity(0)
    with contextlib.suppress(ProcessLookupError):  # our parent has ended
        cores |= os.sched_getaffinity(os.getppid())
    return ",".join(map(str, sorted(cores)))


_WORKERS_OWN = ("LD_PRELOAD", "OMP_", "GOMP_", "KMP_")


def _daemon_environment() -> dict[str, str]:
    """The environment, with a path by which the child finds this very package, and without what a CPU worker has set
    for its own threads: a preloaded libgomp binds the daemon to the core on which that worker spins."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_WORKERS_OWN)}
    if environment.get("PDX_CONFIG"):  # a daemon is started from another directory
        environment["PDX_CONFIG"] = str(Path(environment["PDX_CONFIG"]).absolute())
    return environment | configuration.import_path()


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1].removeprefix("pdxd: ") if lines else "empty log"
