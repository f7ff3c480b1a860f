"""The command line of a router: a flag for every setting, other routers' names for them, and what to use instead.

Whoever comes from vllm-router finds the flags that mean the same under the same names (`ALIASES` has those that are
spelled otherwise), and for the others a sentence (`ELSEWHERE`) instead of a guess.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Literal, NoReturn, get_args, get_origin

from pdx.config import also_named
from pdx.layered import bare, converted, is_list, nearest, types_of
from pdx.router.config import RouterConfig
from pdx.wire import Budgets, version

EXAMPLES = """\
examples:
  pdx-router                                  serve on 127.0.0.1:8000, hear daemons on tcp://127.0.0.1:5700
  pdx-router --port 0 --control tcp://127.0.0.1:0 --publish router.json
                                              take free ports and write them down
  pdx-router --host 0.0.0.0 --control tcp://10.0.0.1:5700 --key-file cluster.key --api-key-file clients.keys
                                              serve other hosts, which need the same cluster key, and clients with keys
  pdx-router --config router.yaml --dump-config
                                              what it would run with, and where each value came from
  pdx-router --admin-port 8001                lookup, pin, clear … on the loopback: pdx kv --admin
  curl localhost:8000/readyz                  which engines have joined, and what is missing

Every flag is also a key of the YAML file (--max-waiting: max_waiting) and a variable (PDX_ROUTER_MAX_WAITING).
"""
ALIASES = {
    "cors_origin": ("--cors-allowed-origins",),
    "max_body": ("--max-payload-size",),
    "retries": ("--retry-max-retries",),
    "request_timeout_s": ("--request-timeout-secs",),
    "queue_timeout_s": ("--queue-timeout-secs",),
    "cb_timeout_s": ("--cb-timeout-duration-secs",),
    "cb_window_s": ("--cb-window-duration-secs",),
}

_JOIN = "engines join through their daemons: start them with pdx serve --router"
_KNOWN = "daemons say exactly what they hold, so there is nothing to set"
_AT_ONCE = "a request is repeated at once, on another engine, within a budget of all requests"
_HEALTH = "/health of each engine is asked every 5 s, and whatever fails counts as well"
_TLS = "this router speaks HTTP without TLS: put what ends TLS before it"
ELSEWHERE = {
    **dict.fromkeys(("--ssl-certfile", "--ssl-keyfile", "--tls-cert-path", "--tls-key-path"), _TLS),
    "--vllm-pd-disaggregation": "engines that fit are paired without being told",
    "--worker-urls": "name engines that know nothing of pdx with --decode",
    "--kv-connector": "engines bring pdx's own connector",
    "--vllm-discovery-address": _JOIN,
    "--service-discovery": _JOIN,
    "--service-discovery-port": _JOIN,
    "--service-discovery-namespace": _JOIN,
    "--selector": _JOIN,
    "--prefill-selector": _JOIN,
    "--decode-selector": _JOIN,
    "--worker-startup-timeout-secs": "a router starts without engines, and takes them as they come",
    "--worker-startup-check-interval": "a router starts without engines, and takes them as they come",
    "--intra-node-data-parallel-size": "each data-parallel rank announces itself",
    "--prefill-policy": "pairs are chosen as pairs: use --policy",
    "--decode-policy": "pairs are chosen as pairs: use --policy",
    "--cache-threshold": _KNOWN,
    "--balance-abs-threshold": _KNOWN,
    "--balance-rel-threshold": _KNOWN,
    "--eviction-interval-secs": _KNOWN,
    "--max-tree-size": _KNOWN,
    "--kv-event-source": _KNOWN,
    "--kv-event-replay-source": _KNOWN,
    "--kv-event-block-size": _KNOWN,
    "--kv-event-model": _KNOWN,
    "--pd-kv-events": _KNOWN,
    "--disable-circuit-breaker": "--cb-failure-threshold 0 is none",
    "--disable-retries": "--retries 0 is none",
    "--retry-initial-backoff-ms": _AT_ONCE,
    "--retry-max-backoff-ms": _AT_ONCE,
    "--retry-backoff-multiplier": _AT_ONCE,
    "--retry-jitter-factor": _AT_ONCE,
    "--health-failure-threshold": _HEALTH,
    "--health-success-threshold": _HEALTH,
    "--health-check-timeout-secs": _HEALTH,
    "--health-check-interval-secs": _HEALTH,
    "--health-check-endpoint": _HEALTH,
    "--prometheus-port": "metrics are at /metrics of the front and of the admin port",
    "--prometheus-host": "metrics are at /metrics of the front and of the admin port",
    "--request-id-headers": "a request's id is in X-Request-Id",
    "--log-dir": "logs go to stderr, requests to --request-log",
}


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Values by key, None where nothing was said; `config` and `dump_config` beside them. Exits with 2 if it can't."""
    parser = _parser()
    flags, unknown = parser.parse_known_args(argv)
    for word in unknown:
        _refuse(parser, word.partition("=")[0])
    return flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdx-router",
        description="The front door of pdx: an OpenAI-compatible server that pairs prefill and decode engines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings")
    parser.add_argument("--dump-config", action="store_true", help="print the settings as YAML, with origins, and exit")
    for key, wanted in types_of(RouterConfig).items():
        _add(parser, key, wanted)
    return parser


def _add(parser: argparse.ArgumentParser, key: str, wanted: Any) -> None:
    names = [f"--{key.replace('_', '-')}", *ALIASES.get(key, ())]
    metas = getattr(wanted, "__metadata__", ())
    text = next((meta.description for meta in metas if meta.description), "")
    title = next((meta.title for meta in metas if meta.title), None)
    default, plain = _default_of(key), bare(wanted)
    if "(default" not in text and default not in ("", None, []):
        text += f" (default: {str(default).lower() if plain is bool else default})"
    text = text.replace("%", "%%")
    if plain is bool:
        parser.add_argument(*names, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif get_origin(plain) is Literal:
        parser.add_argument(*names, choices=get_args(plain), help=text)
    elif is_list(wanted):
        parser.add_argument(*names, action="append", metavar=title, help=text)
    else:
        shown = title or ("S" if plain is float else key.split("_")[-1].upper())
        action = parser.add_argument(*names, type=_reader(wanted), metavar=shown, help=text)
        longer = f"{names[0]}ecs"  # what is -s has been -secs
        if plain is float and longer not in names:
            also_named(parser, action, longer)


def _reader(wanted: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return converted(text, wanted)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    return read


def _default_of(key: str) -> Any:
    return getattr(Budgets(), key.removeprefix("handoff_"), getattr(RouterConfig(), key))


def _refuse(parser: argparse.ArgumentParser, flag: str) -> NoReturn:
    if flag in ELSEWHERE:
        parser.error(f"{flag} is not a flag of this router: {ELSEWHERE[flag]}")
    if not flag.startswith("--"):
        parser.error(f"{flag!r} belongs to no flag")
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    known = [name for action in shown for name in action.option_strings if name.startswith("--")]
    parser.error(f"unknown flag {flag}{nearest(flag, known, known='flags')}")
