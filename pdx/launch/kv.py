"""`pdx kv`: questions to this host's daemon. Never starts one."""

from __future__ import annotations

import argparse
import json
import sys

from pdx import config
from pdx.errors import DaemonGone, PdxError

EXAMPLES = """examples:
  pdx kv stats                       slots, index, handoffs and engines, as JSON
  pdx kv check                       do slots, leases and index add up?
  pdx kv health --run-dir /run/pdx   addresses of the daemon with that run directory"""
VERBS = ("stats", "health", "check")
ATTACH_S = 2.0


def main(argv: list[str] | None = None) -> int:
    """0: answered; 1: the daemon found something wrong; 2: there is no daemon, or it can't be asked."""
    parser = argparse.ArgumentParser(
        prog="pdx kv", description="Asks this host's daemon.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--run-dir", metavar="DIR", help=config.FLAGS["run_dir"])
    options = parser.parse_args(argv)
    # zmq loads here, so that --help stays light.
    from pdx.client import DaemonClient
    from pdx.wire import Ask, Attach

    try:
        settings = config.load({"run_dir": options.run_dir})
        if not settings.run_path.is_dir():
            raise DaemonGone(f"no daemon runs in {settings.run_path}")
        with DaemonClient.attach(settings, Attach(kind="tool"), deadline_s=ATTACH_S, start=False) as client:
            answer = client.ask(Ask(verb=options.verb))
    except PdxError as error:
        print(f"pdx kv: {error}", file=sys.stderr)
        return 2
    if answer.error:
        print(f"pdx kv: {answer.error}", file=sys.stderr)
        return 1
    print(json.dumps(answer.body, indent=2))
    return 0
