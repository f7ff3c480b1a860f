"""`pdx up`: a router, daemons and engines on this machine with one command, and their end with one Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pdx import config
from pdx.errors import ConfigError, PdxError
from pdx.launch import engine
from pdx.launch.engine import EngineSpec
from pdx.launch.fleet import DaemonSpec, Fleet, Ground, Wish, design
from pdx.launch.gpus import visible_gpus
from pdx.launch.ports import answers, free_ports
from pdx.launch.publish import check_place, publish
from pdx.launch.supervise import ChildDied, Interrupted, Supervisor

READY_S = 600.0
ROUTER_READY_S = DAEMON_READY_S = 60.0  # the arena's pages are touched once: a minute is good for 12 GiB on a slow host
SETTINGS = ("arena", "transport", "require_rdma")  # of the daemons
USAGE = "pdx up MODEL [options] [engine flags]"
EXAMPLES = """Every flag not listed here goes to every engine unchanged.

examples:
  pdx up ./model --prefill 1 --decode 1 --enforce-eager
  pdx up ./model --hosts 2 --arena 512MiB --max-model-len 4096    handoffs over TCP, as between two hosts
  pdx up ./model --port 9000 --logs                               see the engines' logs"""


def main(argv: list[str] | None = None) -> int:
    """Serves until a signal (exit status 0) or until a process dies (1). 2: the command line can't work."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
    except PdxError as error:
        print(f"pdx up: {error}", file=sys.stderr)
        return 2
    base = Path(tempfile.mkdtemp(prefix="pdx-up-"))
    code = 1
    try:
        code = _run(options, base)
    finally:
        if code == 0:
            shutil.rmtree(base, ignore_errors=True)
        else:
            print(f"pdx: logs are in {base / 'logs'}", file=sys.stderr)
    return code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; what goes into the fleet is in `wish`. Raises ConfigError."""
    parser = _parser()
    if not argv or {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    model, rest = engine.split_model(argv, usage=USAGE)
    options, flags = parser.parse_known_args(rest)
    if options.prefill < 0 or options.decode < 1:
        raise ConfigError("at least one decode engine is needed: --decode 1")
    check_place(options.publish)
    settings = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    config.load(settings)
    options.wish = Wish(
        model=model,
        prefill=options.prefill,
        decode=options.decode,
        hosts=options.hosts,
        settings=settings,
        flags=engine.checked_flags(flags),
    )
    return options


def _run(options: argparse.Namespace, base: Path) -> int:
    (base / "logs").mkdir()
    wish: Wish = options.wish
    supervisor = Supervisor(log_dir=base / "logs", echo=options.logs)
    try:
        fleet = design(wish, _ground(base, engines=wish.prefill + wish.decode, pin=not options.no_pin))
        with supervisor:
            _start(supervisor, fleet, options, base)
            _serve(supervisor, fleet)
    except Interrupted:
        supervisor.say(str(supervisor.stopped))
        return 0
    except PdxError as error:
        supervisor.say(f"{error}\npdx: {supervisor.stopped}")
        return 1
    return 0


def _serve(supervisor: Supervisor, fleet: Fleet) -> None:
    """Until a signal. Engines may die while a decode engine is left; without router or daemons nothing can go on."""
    alive = {spec.name: spec.role for spec in fleet.engines}
    while True:
        try:
            supervisor.wait()
        except ChildDied as died:
            alive.pop(died.name, None)
            if died.name not in {spec.name for spec in fleet.engines} or "decode" not in alive.values():
                raise
            supervisor.bury(died.name)
            supervisor.say(f"{str(died).partition(';')[0]}; the others serve on: {', '.join(alive)}")


def _start(supervisor: Supervisor, fleet: Fleet, options: argparse.Namespace, base: Path) -> None:
    environ = {**engine.import_path(), "PDX_KEY_FILE": str(_write_key(base))}
    supervisor.say(f"starting {fleet}")
    url, control = _start_router(supervisor, fleet, options, base, environ)
    for daemon in fleet.daemons:
        supervisor.start(daemon.name, daemon.command(), env=environ, cpus=daemon.cpus)
    supervisor.wait_ready(
        {daemon.name: (daemon.run_dir / config.INFO_NAME).exists for daemon in fleet.daemons}, deadline_s=DAEMON_READY_S
    )
    engines = [replace(spec, settings={**spec.settings, "router": control}) for spec in fleet.engines]
    for spec in engines:
        supervisor.start(spec.name, engine.command(spec), env=engine.environment(spec) | environ, cpus=spec.cpus)
    probes = {spec.name: answers(f"{spec.url}/health") for spec in engines}
    probes["router"] = answers(f"{url}/readyz?engines={len(engines)}")
    supervisor.wait_ready(probes, deadline_s=options.ready_timeout_s)
    if options.publish:
        publish(options.publish, _published(supervisor, url, control, fleet.daemons, engines))
    supervisor.say(f"ready: {url}")
    supervisor.say(
        f"try:   curl -s {url}/v1/completions -H 'Content-Type: application/json' "
        f"-d '{json.dumps({'model': options.wish.model, 'prompt': 'The capital of France is', 'max_tokens': 8})}'"
    )


def _start_router(
    supervisor: Supervisor, fleet: Fleet, options: argparse.Namespace, base: Path, environ: dict[str, str]
) -> tuple[str, str]:
    """Starts the router and returns its URL and its control endpoint."""
    published = base / "router.json"
    command = [
        *(sys.executable, "-m", "pdx.router.main", "--host", options.host, "--port", str(options.port)),
        *("--control", "tcp://127.0.0.1:0", "--publish", str(published)),
    ]
    if options.admin_port is not None:
        command += ["--admin-port", str(options.admin_port)]
    supervisor.start("router", command, env=environ, cpus=fleet.router_cpus)
    supervisor.wait_ready({"router": published.exists}, deadline_s=ROUTER_READY_S)
    where = json.loads(published.read_text(encoding="utf-8"))
    return where["http"], where["control"]


def _ground(base: Path, *, engines: int, pin: bool) -> Ground:
    gpus = visible_gpus()
    return Ground(
        base=base,
        # On GPU hosts an engine's CPU threads wait for its device: pinning them would only get in the way.
        cores=tuple(sorted(os.sched_getaffinity(0))) if pin and not gpus else (),
        gpus=gpus,
        ports=tuple(free_ports(engines)),
    )


def _write_key(base: Path) -> Path:
    """One key for everything this command starts: its daemons have run directories of their own."""
    path = base / "cluster.key"
    path.touch(mode=0o600)
    path.write_bytes(secrets.token_bytes(32))
    return path


def _published(
    supervisor: Supervisor, url: str, control: str, daemons: Sequence[DaemonSpec], engines: Sequence[EngineSpec]
) -> dict[str, object]:
    return {
        "url": url,
        "control": control,
        "run_dirs": [str(daemon.run_dir) for daemon in daemons],
        "engines": [
            {"name": spec.name, "role": spec.role, "url": spec.url, "session": supervisor.session_of(spec.name)}
            for spec in engines
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdx up", usage=USAGE, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, description="Starts a router, daemons and engines on this machine.",
    )  # fmt: skip
    add = parser.add_argument
    add("--prefill", type=int, default=1, metavar="N", help="prefill engines (default 1)")
    add("--decode", type=int, default=1, metavar="N", help="decode engines (default 1)")
    add("--hosts", "--daemons", dest="hosts", type=int, default=1, choices=(1, 2),
        help="2: prefill and decode get a daemon each, as on two hosts (default 1)")  # fmt: skip
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="the router's HTTP address (default 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="PORT", help="the router's HTTP port; 0: a free one (default 8000)")
    add("--admin-port", type=int, metavar="PORT", help="the operators' port on the loopback, for pdx kv --router")
    for name in SETTINGS:
        config.add_flag(parser, name)
    add("--logs", action="store_true", help="show all logs, prefixed; they are kept in files in any case")
    add("--no-pin", action="store_true", help="do not pin engines to cores")
    add("--publish", type=Path, metavar="FILE", help="write all addresses to this JSON file when ready")
    add("--ready-timeout-s", type=float, default=READY_S, metavar="S", help=f"default {READY_S:.0f}")
    return parser
