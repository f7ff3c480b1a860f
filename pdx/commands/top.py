"""`pdx top`: the router's live feed in a terminal. Asks its admin port once a second; starts and changes nothing."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from pdx import config
from pdx.commands.asking import ADMIN_HELP, add_admin_flags, admin_of
from pdx.errors import ConfigError, PdxError

if TYPE_CHECKING:
    from rich.console import Console

    from pdx.commands.watched import Watched

EXAMPLES = """examples:
  pdx top                                          a router of this host, at http://127.0.0.1:8001; Ctrl-C ends it
  pdx top --admin http://10.0.0.1:8001 --key-file pdx.key
                                                   one that wants the token of the cluster key
  pdx top --once                                   one picture, for a log or a pipe
  pdx top --print-token --key-file pdx.key         the token, for the same in a browser: http://10.0.0.1:8001/dashboard"""


def main(argv: list[str] | None = None) -> int:
    """0: shown until Ctrl-C, or once; 2: the router can't be asked, or not so."""
    options = _parser().parse_args(argv)
    try:
        if options.print_token:
            print(_token(options, needed=True))
            return 0
        return _show(options)
    except PdxError as error:
        print(f"pdx top: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdx top", description="Watches a router by its admin port.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_admin_flags(parser, help_text=ADMIN_HELP)
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    parser.add_argument("--every-s", type=float, default=1.0, metavar="S", help="(default: a second)")
    parser.add_argument("--print-token", action="store_true", help="print the token of the cluster key and end")
    return parser


def _token(options: argparse.Namespace, *, needed: bool = False) -> str:
    settings = config.load({"key_file": options.key_file})
    if not settings.key_file and needed:
        raise ConfigError("name the cluster key: --key-file FILE, or PDX_KEY_FILE")
    return config.admin_token(settings)


def _show(options: argparse.Namespace) -> int:
    if not 0.1 <= options.every_s <= 3600:
        raise ConfigError("--every-s takes 0.1 to 3600 seconds")
    from rich.console import Console

    from pdx.commands.top_frame import frame
    from pdx.commands.watched import Watched

    watched = Watched(admin_of(options), _token(options))
    watched.look()
    console = Console()
    if options.once:
        console.print(frame(watched, width=console.width, height=None))
        return 0
    _watch(watched, console, options.every_s)
    return 0


def _watch(watched: Watched, console: Console, every_s: float) -> None:
    """Until Ctrl-C. A router that does not answer is asked again, and what it said stays."""
    from rich.live import Live as Screen

    from pdx.commands.top_frame import frame
    from pdx.errors import DaemonGone, Refused

    with Screen(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            screen.update(frame(watched, width=console.width, height=console.height), refresh=True)
            time.sleep(every_s)
            try:
                watched.look()
                watched.lost_at = None
            except (DaemonGone, Refused):
                watched.lost_at = watched.lost_at or time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
