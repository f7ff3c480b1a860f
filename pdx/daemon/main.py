"""pdxd: the per-host daemon. This file only wires; start reading at `service`."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import signal
import sys
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

from pdx import config
from pdx.errors import ConfigError, PdxError, TierBroken
from pdx.limits import raise_descriptor_limit
from pdx.whole import write_whole
from pdx.wire import version

if TYPE_CHECKING:
    from pdx.tiers.disk import DiskTier

STDOUT, STDERR = 1, 2
LOG_BYTES_MAX = 16 << 20  # then it is kept as pdxd.log.1, and a new one begins
DISK_DRAIN_S = 5.0  # for blocks that are on their way to the disk when the daemon ends

log = logging.getLogger("pdxd")

EXAMPLES = """examples:
  pdxd                                        one daemon for this user, 1 GiB arena
  pdxd --arena 16GiB --linger-s 3600          more room, outlives its last engine by an hour
  PDX_KEY_FILE=/etc/pdx.key pdxd --host 10.0.0.5   reachable by other hosts

Every flag is also a variable (PDX_ARENA) and a key of the YAML file (arena).
Engines start a daemon by themselves when none runs; start one by hand to choose its size."""
OTHERS = "Variables and keys that only engines read (flags of pdx serve and, but for the first and last, pdx up):"


def main(argv: list[str] | None = None) -> int:
    """Runs a daemon until a signal, or until it has lingered alone. Returns the exit status."""
    options = vars(_parser().parse_args(argv))
    lock_fd, level, yaml_file = (options.pop(name) for name in ("lock_fd", "log_level", "config"))
    try:
        settings = config.load(options, yaml_file=yaml_file)
        _log_to(settings.run_path / config.LOG_NAME if lock_fd is not None else None, level)
        return _serve(settings, lock_fd)
    except PdxError as error:
        print(f"pdxd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    others = [f"  PDX_{name.upper():<13} {config.help_of(name)}" for name in config.ENGINE_FLAGS]
    parser = argparse.ArgumentParser(
        prog="pdxd", description="pdx's per-host daemon.", epilog="\n".join([EXAMPLES, "", OTHERS, *others]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings (default: PDX_CONFIG)")
    for name in config.FLAGS:
        config.add_flag(parser, name)
    parser.add_argument("--lock-fd", type=int, help=argparse.SUPPRESS)  # the lock of the client that starts us
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


class _BoundedLog(RotatingFileHandler):
    """What the process says beside it, a traceback or a library's line, goes where the log goes."""

    def doRollover(self) -> None:
        super().doRollover()
        assert self.stream is not None
        for descriptor in (STDOUT, STDERR):
            os.dup2(self.stream.fileno(), descriptor)


def _log_to(path: Path | None, level: str) -> None:
    """To stderr; or, where a client has put us into the background and nobody looks after it, to this file."""
    bounded = _BoundedLog(path, maxBytes=LOG_BYTES_MAX, backupCount=1) if path else None
    logging.basicConfig(
        level=level.upper(), format="%(levelname)s %(asctime)s [pdxd %(process)d] %(message)s",
        handlers=[bounded or logging.StreamHandler()],
    )  # fmt: skip


def _serve(settings: config.Config, lock_fd: int | None) -> int:
    run_dir = config.ensure_run_dir(settings.run_path)
    with os.fdopen(lock_fd, "a") if lock_fd is not None else (run_dir / config.LOCK_NAME).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"a pdxd runs already in {run_dir}; use it, or choose another --run-dir") from None
        _run_locked(settings, run_dir)
    return 0


def _run_locked(settings: config.Config, run_dir: Path) -> None:
    # Imported here so that --help stays light.
    from pdx.buffer.arena import Arena
    from pdx.buffer.policies import POLICIES
    from pdx.buffer.quota import Quotas
    from pdx.buffer.store import Store
    from pdx.daemon.service import Service
    from pdx.keys import split_namespace
    from pdx.layout import CONTROL_BYTES
    from pdx.transport.rdma import rdma_here
    from pdx.transport.registry import open_lane, open_lanes
    from pdx.transport.tls import lane_tls

    raise_descriptor_limit()
    key = config.cluster_key(settings)
    log.info("configuration:\n%s", config.shown(settings))
    lanes, why_no_better = open_lanes(
        settings.host, port=settings.lane_port, transport=settings.transport, require_rdma=settings.require_rdma,
        rdma=rdma_here(),
        open_one=partial(open_lane, key=key, tls=lane_tls(settings), name=str(run_dir)),
    )  # fmt: skip
    arena: Arena | None = None
    tier = None
    try:
        arena = Arena.create(CONTROL_BYTES + settings.arena_bytes)  # on top, or the last extent would not fit
        tier = _open_disk(settings, key)
        store = Store(
            arena,
            extent_bytes=settings.extent_bytes,
            handoff_share=settings.handoff_share,
            poison=settings.poison,
            policy=POLICIES[settings.eviction](),
            quotas=Quotas(default_bytes=settings.tenant_bytes),
            tenant_of=lambda namespace: split_namespace(namespace)[1],
        )
        service = Service(settings, store, lanes, why_no_better=why_no_better, run_dir=run_dir, key=key, tier=tier)
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: service.stop())
            write_whole(run_dir / config.FLAGS_NAME, json.dumps(config.flags_of(settings)).encode())
            me = service.me
            endpoints = [offer.endpoint for offer in me.lanes]
            info = {"pid": os.getpid(), "daemon_id": me.daemon_id, "control": me.control, "lanes": endpoints}
            write_whole(run_dir / config.INFO_NAME, json.dumps(info).encode())
            log.info("serving: arena %d MiB, control %s, lanes %s", settings.arena_bytes >> 20, me.control,
                     ", ".join(endpoints))  # fmt: skip
            # For who starts it by hand: an engine that starts it comes at once.
            log.info("waits %g s for its first engine, and after its last: --linger-s changes that", settings.linger_s)
            why = service.run()
            service.leave()
            service.flush()
        finally:
            service.close()
            for name in (config.INFO_NAME, config.FLAGS_NAME):
                (run_dir / name).unlink(missing_ok=True)
    finally:
        for lane in lanes:
            lane.close(drain_s=0.0)
        if tier is not None:
            tier.close(drain_s=DISK_DRAIN_S)
        if arena is not None:
            arena.close()
    log.info("gone: %s", why)


def _open_disk(settings: config.Config, key: bytes) -> DiskTier | None:
    """Its files carry a MAC of the cluster key, so that nobody without it can put words into an engine's mouth."""
    if not settings.disk:
        return None
    from pdx.tiers.disk import DiskTier

    secret = hashlib.blake2b(key, digest_size=32, person=b"pdx-disk").digest()
    try:
        tier = DiskTier.open(Path(settings.disk), cap_bytes=settings.disk_cap_bytes, secret=secret)
    except TierBroken as error:  # a disk that dies must not take the daemon with it; a wrong setting must be told
        return DiskTier.off(error, cap_bytes=settings.disk_cap_bytes)
    log.info("disk tier %s: %d blocks from earlier lives", settings.disk, tier.stats().blocks)
    return tier


if __name__ == "__main__":
    sys.exit(main())
