"""`pdx-router`: settings to options, and nothing else. Imports the server only when it is about to run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pdx.config import is_loopback
from pdx.errors import ConfigError
from pdx.limits import raise_descriptor_limit
from pdx.router.config import Resolved, RouterConfig, dumped, resolved
from pdx.router.flags import parsed

if TYPE_CHECKING:
    from pdx.router.service import Options

EXIT_CONFIG = 2

_log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after SIGINT or SIGTERM, 1 after a failure, 2 if the configuration can't work."""
    flags = vars(parsed(argv))
    dump = flags.pop("dump_config")
    try:
        found = resolved(flags)
        if dump:
            print(dumped(found))
            return 0
        logging.basicConfig(
            level=found.config.log_level.upper(), format="%(asctime)s pdx-router %(levelname)s %(message)s"
        )
        warn_of_no_keys(found.config)
        raise_descriptor_limit()
        return _run(options_of(found))
    except ConfigError as error:
        print(f"pdx-router: {error}", file=sys.stderr)
        return EXIT_CONFIG


def warn_of_no_keys(config: RouterConfig) -> None:
    """The cluster key is for daemons and routers; clients have theirs, if the operator thinks of it."""
    if not (is_loopback(config.host) or config.api_key or config.api_key_file):
        _log.warning("no API keys: whoever reaches %s is answered (see --api-key-file)", config.host)


def options_of(found: Resolved) -> Options:
    """How the server is to run. Reads the key files. Raises ConfigError."""
    from pdx.config import cluster_key, parse_size
    from pdx.keys import admin_token
    from pdx.router.front.access import Origins, read_keys
    from pdx.router.front.app import Door
    from pdx.router.request.settings import Settings
    from pdx.router.service import Options
    from pdx.router.standing.breaker import BreakerSettings
    from pdx.whole import check_place

    config = found.config
    if config.publish:
        check_place(Path(config.publish), flag="--publish")
    settings = Settings(
        cluster_key=cluster_key(found.pdx),
        policy=config.policy,
        journey=config.journey,
        max_waiting=config.max_waiting,
        max_wait_s=config.max_wait_s,
        max_in_flight_prefill=config.max_in_flight_prefill,
        max_in_flight_decode=config.max_in_flight_decode,
        retries=config.retries,
        budgets=found.pdx.budgets,
        prefill_timeout_s=config.prefill_timeout_s,
    )
    door = Door(
        keys=read_keys(config.api_key, config.api_key_file),
        pass_keys=config.pass_api_key,
        origins=Origins(config.cors_origin),
        body_bytes_max=parse_size(config.max_body, key="max_body"),
        bodies_bytes_max=parse_size(config.max_bodies, key="max_bodies"),
        request_timeout_s=config.request_timeout_s,
        public_metrics=config.public_metrics,
    )
    return Options(
        settings=settings,
        door=door,
        host=config.host,
        port=config.port,
        control=config.control,
        queue_size=config.queue_size,
        queue_timeout_s=config.queue_timeout_s,
        breaker=BreakerSettings(
            failure_threshold=config.cb_failure_threshold,
            success_threshold=config.cb_success_threshold,
            timeout_s=config.cb_timeout_s,
            window_s=config.cb_window_s,
        ),
        drain_s=config.drain_s,
        workers=config.workers,
        idle_s=config.keep_alive_s,
        prefills=tuple(config.prefill),
        decodes=tuple(config.decode),
        publish=config.publish,
        request_log=config.request_log,
        admin_host=config.admin_host,
        admin_port=config.admin_port,
        admin_token=admin_token(settings.cluster_key) if config.key_file else "",
    )


def _run(options: Options) -> int:
    import uvloop

    from pdx.router.service import serve
    from pdx.router.workers.supervisor import lead

    try:
        if options.workers > 1:
            return lead(options, options.workers)
        uvloop.run(serve(options))
    except KeyboardInterrupt:
        pass  # it came before anybody waited for signals
    return 0


if __name__ == "__main__":
    sys.exit(main())
