"""`pdx serve`: vLLM servers of one role on this host, attached to the host's pdxd.

What it starts is in engine.py, how it ends in supervise.py. The engines find or start the daemon themselves.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pdx import config
from pdx.errors import ConfigError, PdxError
from pdx.launch import beforehand, engine
from pdx.launch.engine import EngineSpec
from pdx.launch.gpus import visible_gpus
from pdx.launch.guard import parse_cpus
from pdx.launch.outlive import serve_on
from pdx.launch.ports import answers, free_ports, ports_from
from pdx.launch.publish import publish, published
from pdx.launch.shares import shares
from pdx.launch.supervise import Interrupted, Supervisor
from pdx.whole import check_place

READY_S = 600.0  # a large model's weights from a slow disk; --ready-timeout-s for more
USAGE = "pdx serve MODEL --kv-role prefill|decode|both [options] [engine flags]"
EXAMPLES = """Every flag not listed here goes to vLLM unchanged (see vLLM's own help for them).

examples:
  pdx serve ./model --kv-role prefill --router tcp://127.0.0.1:5700 --enforce-eager
  pdx serve ./model --kv-role decode --replicas 2 --router tcp://127.0.0.1:5700 --max-model-len 4096
  pdx serve ./model --kv-role decode --router tcp://10.0.0.1:5700 --router tcp://10.0.0.2:5700
  pdx serve ./model --kv-role both --port 8000 --cpus 0-3"""
SETTINGS = (*config.FLAGS, *(name for name in config.ENGINE_FLAGS if name != "router"))
KEPT_FROM_LOGS = ("key_file", "tls_key")  # vLLM logs its command line


def main(argv: list[str] | None = None) -> int:
    """Serves until a signal (exit status 0) or until no engine is left (1). 2: the command line can't work."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        absent = (parse_cpus(options.cpus) if options.cpus else set()) - os.sched_getaffinity(0)
        if absent:
            raise ConfigError(f"--cpus: there is no core {min(absent)} here, or this process may not use it")
        beforehand.check_model(options.model)
        beforehand.check_engines(config.load(options.settings))
        specs = plan(options, ports=_ports(options), gpus=visible_gpus())
    except PdxError as error:
        print(f"pdx serve: {error}", file=sys.stderr)
        return 2
    return _run(specs, options)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; unknown flags are in `engine_flags`. Raises ConfigError."""
    parser = _parser()
    if not argv or {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    model, rest = engine.split_model(argv, usage=USAGE)
    options, flags = parser.parse_known_args(rest)
    options.model, options.engine_flags = model, engine.checked_flags(flags)
    if options.replicas < 1:
        raise ConfigError(f"--replicas must be positive, not {options.replicas}")
    if options.cpus:
        try:
            parse_cpus(options.cpus)
        except ValueError as error:
            raise ConfigError(f"--cpus: {options.cpus!r} is not a list of cores; write e.g. 0-3,6") from error
    if options.publish:
        check_place(options.publish, flag="--publish")
    options.router = ",".join(options.router) if options.router else None
    options.settings = {
        name: getattr(options, name) for name in (*SETTINGS, "router") if getattr(options, name) is not None
    }
    # A wrong size or PDX_* key is told now, in one line, not by every engine; and PDX_HOST is the engines' host too.
    options.host = config.load(options.settings).host
    return options


def plan(options: argparse.Namespace, *, ports: Sequence[int], gpus: Sequence[str] = ()) -> list[EngineSpec]:
    """The engines to start, one per port. Several of them divide the GPUs, or the memory."""
    role, several = engine.ROLES[options.kv_role], len(ports) > 1
    base = options.name or role
    if not config.is_loopback(options.host):
        base += f"-{options.host}"
    shared = shares(gpus if several else (), len(ports))
    memory = engine.memory_flags(options.engine_flags, gpus=len(gpus), engines=len(ports)) if several else ()
    settings = {key: value for key, value in options.settings.items() if key not in KEPT_FROM_LOGS}
    return [
        EngineSpec(
            # With host and port, a name is unique among a router's engines, however many have started them.
            name=f"{base}-{port}" if several or not options.name else options.name,
            role=role,
            model=options.model,
            host=options.host,
            port=port,
            cpus=options.cpus,
            gpus=",".join(share),
            settings=settings,
            flags=(*memory, *options.engine_flags),
        )
        for port, share in zip(ports, shared, strict=True)
    ]


def _run(specs: Sequence[EngineSpec], options: argparse.Namespace) -> int:
    settings = options.settings
    secrets = {f"PDX_{name.upper()}": settings[name] for name in KEPT_FROM_LOGS if name in settings}
    supervisor = Supervisor(echo=True)
    try:
        with supervisor, published(options.publish):
            for spec in specs:
                supervisor.start(
                    spec.name, engine.command(spec), env=engine.environment(spec) | secrets, cpus=spec.cpus
                )
            probes = {spec.name: answers(f"{spec.url}/health") for spec in specs}
            supervisor.wait_ready(probes, deadline_s=options.ready_timeout_s)
            for spec in specs:
                supervisor.say(f"{spec.name} ({spec.role}) serves {spec.served_name} at {spec.url}")
            if options.publish:
                publish(options.publish, {"engines": [_published(spec) for spec in specs]}, say=supervisor.say)
            serve_on(supervisor, specs, needed=engine.ROLES[options.kv_role])
    except Interrupted:
        supervisor.say(str(supervisor.stopped))
        return 0
    except PdxError as error:
        supervisor.say(f"{error}\npdx: {supervisor.stopped}")
        return 1
    return 0


def _published(spec: EngineSpec) -> dict[str, str]:
    return {"name": spec.name, "role": spec.role, "url": spec.url, "model": spec.served_name}


def _ports(options: argparse.Namespace) -> list[int]:
    if options.port:
        return ports_from(options.port, options.replicas, host=options.host)
    return free_ports(options.replicas, host=options.host)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdx serve", usage=USAGE, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, description="Starts vLLM servers of one role on this host.",
    )  # fmt: skip
    add = parser.add_argument
    add("--kv-role", required=True, choices=sorted(engine.ROLES), metavar="ROLE",
        help="prefill, decode or both (also kv_producer, kv_consumer, kv_both)")  # fmt: skip
    add("--replicas", type=int, default=1, metavar="N", help="how many servers (default 1)")
    add("--router", action="append", metavar="ENDPOINT",
        help="a router's control endpoint, e.g. tcp://127.0.0.1:5700; say it again for each of several")  # fmt: skip
    add("--port", type=int, metavar="PORT", help="HTTP port of the first server (default: free ones)")
    add("--name", default="", help="engine name in logs and metrics (default: the role, host and port)")
    add("--cpus", default="", metavar="CORES", help="pin every process and OpenMP thread, e.g. 0-3")
    add("--publish", type=Path, metavar="FILE", help="write names and URLs to this JSON file when ready")
    add("--ready-timeout-s", type=beforehand.seconds, default=READY_S, metavar="S", help=f"default {READY_S:.0f}")
    of_daemon = parser.add_argument_group("settings of the host's pdxd, if these engines start it, and of their own")
    for name in SETTINGS:
        config.add_flag(of_daemon, name)
    return parser
