"""`pdx-router`: flags to options, and nothing else. Imports the server only when it is about to run."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pdx.errors import ConfigError

if TYPE_CHECKING:
    from pdx.config import Config
    from pdx.router.service import Options

EXIT_CONFIG = 2

_EXAMPLES = """\
examples:
  pdx-router                                  serve on 127.0.0.1:8000, hear daemons on tcp://127.0.0.1:5700
  pdx-router --port 0 --control tcp://127.0.0.1:0 --publish router.json
                                              take free ports and write them down
  pdx-router --host 0.0.0.0 --control tcp://10.0.0.1:5700 --key-file cluster.key
                                              serve other hosts; they need the same key file
  pdx-router --admin-port 8001                lookup, pin, clear … on the loopback: pdx kv --router
  curl localhost:8000/readyz                  which engines have joined, and what is missing
"""
_POLICIES = {
    "prefix": "by the first token that is predicted to come soonest, from what each host keeps of the prompt, what "
    "its engines have to do, and how fast they and the links are",
    "round_robin": "in turns",
    "least_loaded": "the one with the fewest requests",
    "power_of_two": "the less loaded of two drawn at random",
    "affinity": "the same for all requests of one x-session-id, prompt_cache_key or user, until it has a quarter more "
    "than its share",
}
_JOURNEYS = {
    "auto": "seeded where the request allows it, else paired",
    "seeded": "the same",
    "paired": "both engines are asked at once, every token comes from decode",
    "after": "decode is asked when prefill has answered, every token comes from decode",
}
_JOURNEYS_HELP = (
    "how a pair answers; seeded: prefill's first token is streamed at once and decode continues from it. "
    + "; ".join(f"{name}: {what}" for name, what in _JOURNEYS.items())
    + " (default: %(default)s)"
)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after SIGINT or SIGTERM, 1 after a failure, 2 if the configuration can't work."""
    flags = _parser().parse_args(argv)
    logging.basicConfig(level=flags.log_level.upper(), format="%(asctime)s pdx-router %(levelname)s %(message)s")
    try:
        config = _config(flags)
        if flags.dump_config:
            _dump(flags, config)
            return 0
        return _run(_options(flags, config))
    except ConfigError as error:
        print(f"pdx-router: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdx-router",
        description="The front door of pdx: an OpenAI-compatible server that pairs prefill and decode engines.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve HTTP on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port, 0 for a free one (default: %(default)s)")
    parser.add_argument(
        "--control",
        default="tcp://127.0.0.1:5700",
        metavar="ENDPOINT",
        help="where daemons announce their engines; port 0 for a free one (default: %(default)s)",
    )
    parser.add_argument("--admin-host", default="127.0.0.1", metavar="HOST", help="(default: %(default)s)")
    parser.add_argument(
        "--admin-port",
        type=_port,
        metavar="PORT",
        help="serve the operators' verbs there, see pdx kv --help; 0 for a free one (default: not at all)",
    )
    parser.add_argument(
        "--policy",
        choices=tuple(_POLICIES),
        default="prefix",
        help="how engines are chosen: "
        + "; ".join(f"{name}: {what}" for name, what in _POLICIES.items())
        + " (default: %(default)s)",
    )
    parser.add_argument("--journey", choices=tuple(_JOURNEYS), default="auto", help=_JOURNEYS_HELP)
    _add_queue(parser)
    parser.add_argument("--request-timeout-secs", type=_seconds, default=600.0, metavar="S", help="(default: 600)")
    parser.add_argument("--prefill-timeout-secs", type=_seconds, default=120.0, metavar="S", help="(default: 120)")
    _add_failures(parser)
    budgets = parser.add_argument_group("budgets of a handoff, in seconds")
    budgets.add_argument("--handoff-grant-s", type=_seconds, metavar="S", help="from RESERVE to GRANT")
    budgets.add_argument("--handoff-slab-s", type=_seconds, metavar="S", help="between two slabs")
    budgets.add_argument("--handoff-total-s", type=_seconds, metavar="S", help="from RESERVE to COMMIT")
    budgets.add_argument("--handoff-claim-s", type=_seconds, metavar="S", help="until decode owns the pages")
    parser.add_argument("--key-file", metavar="FILE", help="the cluster key (mode 0600); needed off loopback")
    parser.add_argument("--publish", default="", metavar="FILE", help="write {http, control} as JSON when listening")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--dump-config", action="store_true", help="print the resolved configuration and exit")
    return parser


def _add_queue(parser: argparse.ArgumentParser) -> None:
    queue = parser.add_argument_group("room: requests wait in the router while every fitting engine is full")
    add = queue.add_argument
    add("--max-waiting", type=_count, default=32, metavar="N",
        help="a prefill engine is full with N requests of this router in line, a decode engine when it says that N "
        "requests wait in it; 0 is no limit (default: %(default)s)")  # fmt: skip
    add(
        "--max-in-flight-prefill",
        type=_count,
        default=0,
        metavar="N",
        help="a prefill engine is also full with N calls of this router; 0 is no limit (default: %(default)s)",
    )
    add("--max-in-flight-decode", type=_count, default=0, metavar="N",
        help="the same of other engines; 0 is no limit (default: %(default)s)")  # fmt: skip
    add("--queue-size", type=_count, default=100, metavar="N",
        help="so many requests wait; beyond that 429 and Retry-After (default: %(default)s)")  # fmt: skip
    add("--queue-timeout-secs", type=_seconds, default=60.0, metavar="S",
        help="504 for who has waited so long; x-pdx-ttl-secs shortens it (default: %(default)g)")  # fmt: skip


def _add_failures(parser: argparse.ArgumentParser) -> None:
    failures = parser.add_argument_group("failures")
    add = failures.add_argument
    add(
        "--retries",
        "--retry-max-retries",
        type=_count,
        default=2,
        metavar="N",
        help="a request that failed before its first byte is repeated on so many other engines (default: %(default)s)",
    )
    add(
        "--cb-failure-threshold",
        type=_count,
        default=10,
        metavar="N",
        help="failures in a row after which an engine is not asked any more; 0: never (default: %(default)s)",
    )
    add("--cb-success-threshold", type=_count, default=3, metavar="N",
        help="successes in a row after which it is asked as before (default: %(default)s)")  # fmt: skip
    add("--cb-timeout-secs", "--cb-timeout-duration-secs", type=_seconds, default=60.0, metavar="S",
        help="for so long it is not asked, then one request at a time (default: %(default)g)")  # fmt: skip
    add("--cb-window-secs", "--cb-window-duration-secs", type=_seconds, default=120.0, metavar="S",
        help="failures further apart are no row (default: %(default)g)")  # fmt: skip
    add(
        "--drain-secs",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="at SIGTERM, what is under way gets so long; a second signal ends it at once (default: %(default)g)",
    )


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of requests")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _config(flags: argparse.Namespace) -> Config:
    import msgspec

    from pdx.config import is_loopback, load

    control = urlsplit(flags.control)
    if control.scheme != "tcp" or not control.netloc:
        raise ConfigError(f"--control {flags.control}: write e.g. tcp://127.0.0.1:5700")
    config = load({"host": flags.host, "key_file": flags.key_file})
    hosts = (("--host", flags.host), ("--control", control.hostname or ""), ("--admin-host", flags.admin_host))
    for name, host in hosts:
        if not is_loopback(host) and not config.key_file:
            raise ConfigError(
                f"{name} {host} is not loopback and no cluster key is set: write 32 random bytes to a 0600 file on "
                "every host and pass it with --key-file"
            )
    given = {
        "grant_s": flags.handoff_grant_s,
        "slab_s": flags.handoff_slab_s,
        "total_s": flags.handoff_total_s,
        "claim_s": flags.handoff_claim_s,
    }
    budgets = msgspec.structs.replace(config.budgets, **{k: v for k, v in given.items() if v is not None})
    return msgspec.structs.replace(config, budgets=budgets)


def _options(flags: argparse.Namespace, config: Config) -> Options:
    from pdx.config import cluster_key
    from pdx.keys import admin_token
    from pdx.router.breaker import BreakerSettings
    from pdx.router.journey import Settings
    from pdx.router.service import Options

    settings = Settings(
        cluster_key=cluster_key(config),
        policy=flags.policy,
        journey=flags.journey,
        max_waiting=flags.max_waiting,
        max_in_flight_prefill=flags.max_in_flight_prefill,
        max_in_flight_decode=flags.max_in_flight_decode,
        retries=flags.retries,
        budgets=config.budgets,
        prefill_timeout_s=flags.prefill_timeout_secs,
    )
    return Options(
        settings=settings,
        host=flags.host,
        port=flags.port,
        control=flags.control,
        request_timeout_s=flags.request_timeout_secs,
        queue_size=flags.queue_size,
        queue_timeout_s=flags.queue_timeout_secs,
        breaker=BreakerSettings(
            failure_threshold=flags.cb_failure_threshold,
            success_threshold=flags.cb_success_threshold,
            timeout_s=flags.cb_timeout_secs,
            window_s=flags.cb_window_secs,
        ),
        drain_s=flags.drain_secs,
        publish=flags.publish,
        admin_host=flags.admin_host,
        admin_port=flags.admin_port,
        admin_token=admin_token(settings.cluster_key) if config.key_file else "",
    )


def _dump(flags: argparse.Namespace, config: Config) -> None:
    import msgspec

    shown = {k: v for k, v in vars(flags).items() if not k.startswith("handoff_") and k != "dump_config"}
    shown |= {"key_file": config.key_file, "run_dir": str(config.run_path)}
    shown |= {f"handoff_{k}": v for k, v in msgspec.to_builtins(config.budgets).items()}
    for key, value in shown.items():
        print(f"  {key} = {value}")


def _run(options: Options) -> int:
    import uvloop

    from pdx.router.service import serve

    try:
        uvloop.run(serve(options))
    except KeyboardInterrupt:
        pass  # it came before the signal handlers stood
    return 0


if __name__ == "__main__":
    sys.exit(main())
