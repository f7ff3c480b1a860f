"""`pdx kv`: what daemons keep, and the verbs that steer it. Asks this host's daemon or a router; starts nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdx import config
from pdx.commands.asking import add_admin_flags
from pdx.errors import PdxError, Refused

if TYPE_CHECKING:
    from pdx.admin import Report
    from pdx.kv import Kv

EXAMPLES = """examples:
  pdx kv stats                                     slots, index, pins, disk, handoffs and engines of this host
  pdx kv check                                     do slots, leases and index add up?
  pdx kv health --run-dir /run/pdx                 addresses of the daemon with that run directory
  pdx kv lookup --text "The manual begins"         how many tokens would a request get that began so?
  pdx kv lookup --chat chat.json --format json     the same for a chat: a JSON list of messages, - is stdin
  pdx kv lookup --tokens 1,2,3 --salt alice        and for token ids, of one tenant
  pdx kv pin manual --text "The manual begins" --ttl-s 600
                                                   nothing evicts it for ten minutes
  pdx kv unpin manual
  pdx kv clear --text "The manual begins"          the blocks of one prompt, in memory and on disk
  pdx kv clear --salt alice --dry-run              what would go of one tenant's; "" is who has no cache_salt
  pdx kv clear --tier disk --older-s 86400         files older than a day
  pdx kv clear --everything
  pdx kv stats --admin http://127.0.0.1:8001       of all daemons that a router knows, by its admin port"""
QUESTIONS = {
    "stats": "slots, index, pins, disk, handoffs and engines",
    "health": "the daemon's process id and addresses",
    "check": "do slots, leases and index add up?",
}


def main(argv: list[str] | None = None) -> int:
    """0: answered; 1: a daemon found something wrong, or could not answer; 2: nobody can be asked, or not that."""
    options = _parser().parse_args(argv)
    try:
        report = _asked(options)
    except PdxError as error:
        print(f"pdx kv: {error}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:  # bytes on the command line that are no text
        print(f"pdx kv: {error.object!a} is not UTF-8", file=sys.stderr)
        return 2
    # msgspec and rich load here, so that --help stays light.
    from pdx.commands.kv_table import as_json, as_table

    print(as_json(report) if options.format == "json" else as_table(report))
    for error_line in report.errors:
        print(f"pdx kv: {error_line}", file=sys.stderr)
    return 1 if report.errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdx kv", description="Asks and steers what daemons keep.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--run-dir", metavar="DIR", help=config.help_of("run_dir"))
    add_admin_flags(everywhere, help_text="ask a router by its admin port, not this host's daemon (default: PDX_ADMIN)")
    everywhere.add_argument("--format", choices=("table", "json"), default="table", help="(default: %(default)s)")
    prompt = argparse.ArgumentParser(add_help=False)
    prompt.add_argument("--model", default="", help="may be left out where there is only one")
    prompt.add_argument(
        "--salt", default=None, metavar="SALT",
        help="the requests' cache_salt: an API key's TENANT or TENANT:SALT; :SALT of a key that has no tenant, where "
        "others have one",
    )  # fmt: skip
    way = prompt.add_mutually_exclusive_group()
    way.add_argument("--text", help="a prompt as in /v1/completions")
    way.add_argument("--chat", metavar="FILE", help="messages as in /v1/chat/completions, as a JSON list; - is stdin")
    way.add_argument("--tokens", metavar="IDS", help="token ids, with commas between; - is stdin")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for question, text in QUESTIONS.items():
        verbs.add_parser(question, parents=[everywhere], help=text)
    verbs.add_parser("lookup", parents=[everywhere, prompt], help="what a request would get that came now")
    pin = verbs.add_parser("pin", parents=[everywhere, prompt], help="keep what there is of a prompt")
    pin.add_argument("name")
    pin.add_argument("--ttl-s", type=float, default=3600.0, metavar="S", help="(default: an hour)")
    unpin = verbs.add_parser("unpin", parents=[everywhere], help="end the pins of a name")
    unpin.add_argument("name")
    unpin.add_argument("--salt", default=None, metavar="SALT", help="the cache_salt of the prompt that was pinned")
    clear = verbs.add_parser("clear", parents=[everywhere, prompt], help="make blocks unreachable")
    clear.add_argument("--tier", choices=("all", "arena", "disk"), default="all", help="(default: %(default)s)")
    clear.add_argument("--older-s", type=float, default=0.0, metavar="S", help="kept there for at least so long")
    clear.add_argument("--everything", action="store_true", help="must be said where nothing else is")
    clear.add_argument("--dry-run", action="store_true", help="count only")
    return parser


def _asked(options: argparse.Namespace) -> Report:
    """Raises PdxError."""
    import msgspec

    from pdx import admin
    from pdx.kv import LocalKv

    settings = config.load({"run_dir": options.run_dir, "key_file": options.key_file})
    kinds = {"lookup": admin.LookupRequest, "pin": admin.PinRequest, "clear": admin.ClearRequest}
    try:
        request = msgspec.convert(_fields(options), kinds[options.verb]) if options.verb in kinds else None
        if options.verb == "unpin":
            request = msgspec.convert({"name": options.name, "cache_salt": options.salt or ""}, admin.UnpinRequest)
    except msgspec.ValidationError as error:
        raise Refused(str(error)) from error
    admin_url = options.admin or (config.admin_url() if options.run_dir is None else "")
    if admin_url:
        return _do(_router(admin_url, settings), options.verb, request)
    with LocalKv.open(settings) as kv:
        return _do(kv, options.verb, request)


def _do(kv: Kv, verb: str, request: Any) -> Report:
    if verb in QUESTIONS:
        return kv.ask(verb)  # type: ignore[arg-type]
    report: Report = getattr(kv, verb)(request)
    return report


def _router(url: str, settings: config.Config) -> Kv:
    from pdx.kv import RouterKv

    return RouterKv(url, token=config.admin_token(settings))


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """What was said, by the request's names. Raises Refused for files that can't be read."""
    import msgspec

    fields: dict[str, Any] = {"model": options.model, "text": options.text}
    try:
        if options.chat is not None:
            fields["messages"] = msgspec.json.decode(_read(options.chat))
        if options.tokens is not None:
            given = _read("-") if options.tokens == "-" else options.tokens
            fields["tokens"] = [int(token) for token in given.replace(",", " ").split()]
    except (ValueError, msgspec.DecodeError, OSError, RecursionError) as error:  # the last of lists in lists
        raise Refused(f"the prompt can't be read: {error}") from error
    if options.verb == "clear" or options.salt is not None:
        fields["cache_salt"] = options.salt
    for name in ("name", "ttl_s", "tier", "older_s", "everything", "dry_run"):
        if name in vars(options):
            fields[name] = vars(options)[name]
    return fields


def _read(path: str) -> str:
    return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
