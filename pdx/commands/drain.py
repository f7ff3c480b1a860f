"""`pdx drain`: takes an engine or a router out of service and says when it is idle. Asks the router's admin port."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from pdx import config
from pdx.commands.asking import ADMIN_HELP, add_admin_flags, admin_of
from pdx.errors import PdxError, Refused

if TYPE_CHECKING:
    from pdx.admin import Drained

LOOK_S = 0.5
EXAMPLES = """examples:
  pdx drain                                what is drained, and what is still under way there
  pdx drain d0                             engine d0 gets nothing new; what it has goes on
  pdx drain d0 --wait-s 120                the same, and return when it is idle: then it can be stopped
  pdx drain d0 --undo                      it is asked again
  pdx drain --all --wait-s 120             the router answers 503 from now on
  pdx drain d0 --admin http://10.0.0.1:8001 --key-file pdx.key
                                           by a router elsewhere; of several, tell each"""


def main(argv: list[str] | None = None) -> int:
    """0: told, and idle if that was waited for; 1: not idle in time; 2: the router can't be asked, or not that."""
    options = _parser().parse_args(argv)
    try:
        return _drain(options)
    except PdxError as error:
        print(f"pdx drain: {error}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:  # bytes on the command line that are no text
        print(f"pdx drain: {error.object!a} is not UTF-8", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdx drain", description="Takes an engine or a router out of service.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("engine", nargs="?", default="", help="an engine's id, as in /readyz")
    what.add_argument("--all", action="store_true", help="the router itself")
    add_admin_flags(parser, help_text=ADMIN_HELP)
    parser.add_argument("--undo", action="store_true", help="put it into service again")
    wait = parser.add_argument("--wait-s", type=float, default=0.0, metavar="S", help="return when idle, or by then")
    config.also_named(parser, wait, "--wait-secs")
    return parser


def _drain(options: argparse.Namespace) -> int:
    import msgspec

    from pdx.admin import DrainRequest
    from pdx.kv import bearer

    if (options.undo or options.wait_s) and not (options.engine or options.all):
        raise Refused("say whom: an engine's id, or --all for the router itself")
    router = admin_of(options)
    headers = bearer(config.admin_token(config.load({"key_file": options.key_file})))
    if not options.engine and not options.all:
        print(_words(_asked(router, "drain", None, headers)))
        return 0
    request = msgspec.json.encode(DrainRequest(engine_id=options.engine))
    report = _asked(router, "undrain" if options.undo else "drain", request, headers)
    ends_at = time.monotonic() + options.wait_s
    while not options.undo and report.left(options.engine) and time.monotonic() < ends_at:
        time.sleep(LOOK_S)
        report = _asked(router, "drain", None, headers)
        if not report.drains(options.engine):
            what = f"engine {options.engine}" if options.engine else "the router"
            print(f"pdx drain: {what} is drained no more: that was undone, or it has left", file=sys.stderr)
            return 1
    print(_words(report))
    return 1 if options.wait_s and not options.undo and report.left(options.engine) else 0


def _asked(router: str, verb: str, body: bytes | None, headers: dict[str, str]) -> Drained:
    from pdx import admin
    from pdx.kv import post

    url = f"{router.rstrip('/')}/admin/{verb}"
    return admin.parsed(post(url, body, headers), admin.Drained, what=f"{url} gave no report")


def _words(report: Drained) -> str:
    state = "drains" if report.router else "serves"
    lines = [f"router {state}, {report.under_way} requests under way"]
    return "\n".join([*lines, *(f"engine {e.engine_id} is drained, {e.in_flight} under way" for e in report.engines)])
