"""Conformance between two network namespaces; to be started in one: unshare -rnm python namespace_checks.py SCHEME."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from lane_pairs import KEY, open_any
from process_lane import ProcessPair

from pdx.transport import conformance, conformance_death

NEAR, FAR = "10.99.0.1", "10.99.0.2"
# UCX finds network devices in /sys, which shows those of the namespace that mounted it.
OWN_SYSFS = 'mount -t sysfs none /sys && exec "$@"'
CHECKS: tuple[Callable[..., None], ...] = (
    conformance.check_bytes_land_exactly,
    conformance.check_concurrent,
    conformance_death.check_killed_reader,
    conformance_death.check_killed_writer,
    conformance_death.check_stopped_writer,
)


def ip(*words: str, within: tuple[str, ...] = ()) -> None:
    subprocess.run([*within, "ip", *words], check=True, timeout=30)


@contextmanager
def other_namespace() -> Iterator[tuple[str, ...]]:
    """A command prefix that enters a second namespace, joined to ours by one wire."""
    with subprocess.Popen(["unshare", "-n", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdin.write(b".")  # answered once the namespace is there
            holder.stdin.flush()
            assert holder.stdout.read(1) == b"."
            within = ("nsenter", f"--net=/proc/{holder.pid}/ns/net")
            ip("link", "set", "lo", "up")
            ip("link", "add", "near", "type", "veth", "peer", "name", "far")
            ip("link", "set", "far", "netns", str(holder.pid))
            ip("addr", "add", f"{NEAR}/24", "dev", "near")
            ip("link", "set", "near", "up")
            ip("addr", "add", f"{FAR}/24", "dev", "far", within=within)
            ip("link", "set", "far", "up", within=within)
            ip("link", "set", "lo", "up", within=within)
            yield (*within, "unshare", "-m", "sh", "-c", OWN_SYSFS, "sh")
        finally:
            holder.kill()


@contextmanager
def namespace_pair(scheme: str, within: tuple[str, ...]) -> Iterator[ProcessPair]:
    near = open_any(f"{scheme}://{NEAR}:0", key=KEY, name="near")
    try:
        pair = ProcessPair(near, within=within, far_host=FAR)
        try:
            yield pair
        finally:
            pair.abort()
    finally:
        near.abort()


def main() -> None:
    scheme = sys.argv[1]
    subprocess.run(["mount", "-t", "sysfs", "none", "/sys"], check=True, timeout=30)
    with other_namespace() as within:
        for check in CHECKS:
            if (scheme, check) == ("ucx", conformance_death.check_killed_writer):
                continue  # it emulates writes here, and aborts: see pdx.transport.ucx
            print(check.__name__, flush=True)
            check(partial(namespace_pair, scheme, within))


if __name__ == "__main__":
    main()
