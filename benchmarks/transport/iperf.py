"""What iperf3 gets through the same network: one TCP stream, its receiver's figure."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence

WAIT_S = 30.0


def rate(
    *,
    cpus: tuple[int, int],
    seconds: int,
    address: str = "127.0.0.1",
    within: tuple[Sequence[str], Sequence[str]] = ((), ()),
    streams: int = 1,
) -> float | None:
    """Payload bytes per second; None where it is not installed. `cpus` and `within`: the client's and the server's."""
    if shutil.which("iperf3") is None:
        return None
    # Port 0 can't be asked of it; its own port is as free as any in a namespace, and on loopback it says if it is not.
    server = subprocess.Popen(
        [*within[1], "taskset", "-c", str(cpus[1]), "iperf3", "-s", "-1", "-B", address, "--forceflush"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if "listening" in line:
                break
        else:
            raise SystemExit("iperf3's server does not start")
        done = subprocess.run(
            [*within[0], "taskset", "-c", str(cpus[0]), "iperf3", "-c", address, "-t", str(seconds), "-O", "1",
             "-P", str(streams), "-J"],
            capture_output=True, text=True, timeout=seconds + WAIT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"iperf3: {json.loads(done.stdout).get('error')}")
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8
    finally:
        server.kill()
        server.wait(10)
        if server.stdout is not None:
            server.stdout.close()
