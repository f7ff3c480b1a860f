"""`pdx up`: a router, daemons and engines on this machine with one command, and their end with one Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pdx import config
from pdx.errors import ConfigError, PdxError
from pdx.launch import beforehand, engine
from pdx.launch.engine import EngineSpec
from pdx.launch.fleet import DaemonSpec, Fleet, Ground, Wish, design
from pdx.launch.gpus import visible_gpus
from pdx.launch.outlive import serve_on
from pdx.launch.ports import answers, free_ports
from pdx.launch.publish import publish, published
from pdx.launch.supervise import GRACE_S, Interrupted, Supervisor
from pdx.whole import check_place

READY_S = 600.0
ROUTER_READY_S = 60.0
# What is given to all that is started, and what only one daemon of several could have.
SET_HERE = ("run_dir", "linger_s", "router", "start_daemon", "control")
ONE_DAEMONS = ("host", "control_port", "lane_port", "tls_cert", "tls_key", "tls_ca")
SETTINGS = tuple(name for name in config.FLAGS | config.ENGINE_FLAGS if name not in SET_HERE + ONE_DAEMONS)
USAGE = "pdx up MODEL [options] [engine flags]"
EXAMPLES = """Every flag not listed here goes to every engine unchanged.

examples:
  pdx up ./model --prefill 1 --decode 1 --enforce-eager
  pdx up ./model --daemons 2 --arena 512MiB --max-model-len 4096  handoffs over TCP, as between two hosts
  pdx up ./model --disk ./kept --key-file pdx.key                 kept for the next time, with the same key
  pdx up ./model --port 9000 --logs                               see the engines' logs"""


def main(argv: list[str] | None = None) -> int:
    """Serves until a signal (exit status 0), or the death of what it can't do without (1). 2: a wrong command line."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        beforehand.check_model(options.wish.model)
        beforehand.check_daemon(config.load({**options.wish.settings, "key_file": options.key_file}))
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
    if options.publish:
        check_place(options.publish, flag="--publish")
    settings = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    loaded = config.load(settings)
    for name in ("control_port", "lane_port"):
        if options.hosts > 1 and getattr(loaded, name):
            raise ConfigError(f"PDX_{name.upper()} names one port, and each of two daemons needs its own: unset it")
    options.key_file = loaded.key_file
    settings.pop("key_file", None)
    if loaded.disk:
        settings["disk"] = loaded.disk
    options.wish = Wish(
        model=model,
        prefill=options.prefill,
        decode=options.decode,
        hosts=options.hosts,
        settings=settings,
        flags=engine.checked_flags(flags, set_here=SET_HERE),
    )
    return options


def _run(options: argparse.Namespace, base: Path) -> int:
    (base / "logs").mkdir()
    wish: Wish = options.wish
    supervisor = Supervisor(log_dir=base / "logs", echo=options.logs)
    try:
        fleet = design(wish, _ground(base, engines=wish.prefill + wish.decode, pin=not options.no_pin))
        with supervisor, published(options.publish):
            environ = {**config.import_path(), "PDX_KEY_FILE": options.key_file or str(_write_key(base))}
            _start(supervisor, fleet, options, environ)
            supervisor.say(f"logs:  {base / 'logs'}, kept if all this ends with an error")
            restart = {daemon.name: partial(_start_daemon, supervisor, daemon, environ) for daemon in fleet.daemons}
            serve_on(supervisor, fleet.engines, needed="decode", restart=restart)
    except Interrupted:
        supervisor.say(str(supervisor.stopped))
        return 0
    except PdxError as error:
        supervisor.say(f"{error}\npdx: {supervisor.stopped}")
        return 1
    return 0


def _start(supervisor: Supervisor, fleet: Fleet, options: argparse.Namespace, environ: dict[str, str]) -> None:
    supervisor.say(f"starting {fleet}")
    router = _start_router(supervisor, fleet, options, environ)
    url = router["http"]
    for daemon in fleet.daemons:
        _start_daemon(supervisor, daemon, environ)
    supervisor.wait_ready(
        {daemon.name: (daemon.run_dir / config.INFO_NAME).exists for daemon in fleet.daemons},
        deadline_s=options.ready_timeout_s,  # each page of the arena is touched first
    )
    engines = [replace(spec, settings={**spec.settings, "router": router["control"]}) for spec in fleet.engines]
    for spec in engines:
        supervisor.start(spec.name, engine.command(spec), env=engine.environment(spec) | environ, cpus=spec.cpus)
    probes = {spec.name: answers(f"{spec.url}/health") for spec in engines}
    probes["router"] = answers(f"{url}/readyz?engines={len(engines)}")
    supervisor.wait_ready(probes, deadline_s=options.ready_timeout_s)
    if options.publish:
        told = _published(supervisor, router, environ["PDX_KEY_FILE"], fleet.daemons, engines)
        publish(options.publish, told, say=supervisor.say)
    supervisor.say(f"ready: {url}")
    body = json.dumps({"model": engines[0].served_name, "prompt": "The capital of France is", "max_tokens": 8})
    ask = ["curl", "-s", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    supervisor.say(f"try:   {shlex.join(ask)}")
    for daemon in fleet.daemons:
        ask = ["pdx", "kv", "stats", "--run-dir", str(daemon.run_dir)]
        supervisor.say(f"keeps: {shlex.join(ask)}")
    watch = ["pdx", "top", "--admin", router["admin"], "--key-file", environ["PDX_KEY_FILE"]]
    supervisor.say(f"watch: {shlex.join(watch)}")


def _start_daemon(supervisor: Supervisor, daemon: DaemonSpec, environ: dict[str, str]) -> None:
    (daemon.run_dir / config.INFO_NAME).unlink(missing_ok=True)  # of one that was killed
    grace_s = GRACE_S + config.load(daemon.settings).disk_flush_s  # it writes what is nowhere else
    supervisor.start(daemon.name, daemon.command(), env=environ, cpus=daemon.cpus, outlives=True, grace_s=grace_s)


def _start_router(
    supervisor: Supervisor, fleet: Fleet, options: argparse.Namespace, environ: dict[str, str]
) -> dict[str, str]:
    """Starts the router and returns where it listens: `http`, `control`, `admin`."""
    published = fleet.base / "router.json"
    command = [
        *(sys.executable, "-m", "pdx.router.main", "--host", options.host, "--port", str(options.port)),
        *("--control", "tcp://127.0.0.1:0", "--publish", str(published), "--admin-port", str(options.admin_port)),
    ]
    supervisor.start("router", command, env=environ, cpus=fleet.router_cpus)
    supervisor.wait_ready({"router": published.exists}, deadline_s=ROUTER_READY_S)
    where: dict[str, str] = json.loads(published.read_text(encoding="utf-8"))
    return where


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
    supervisor: Supervisor,
    router: dict[str, str],
    key_file: str,
    daemons: Sequence[DaemonSpec],
    engines: Sequence[EngineSpec],
) -> dict[str, object]:
    return {
        "url": router["http"],
        "control": router["control"],
        "admin": router["admin"],
        "key_file": key_file,
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
    daemons = add("--daemons", dest="hosts", type=int, default=1, choices=(1, 2),
                  help="2: prefill and decode get a daemon each, as on two hosts (default 1)")  # fmt: skip
    config.also_named(parser, daemons, "--hosts")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="the router's HTTP address (default 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="PORT", help="the router's HTTP port; 0: a free one (default 8000)")
    add("--admin-port", type=int, default=0, metavar="PORT",
        help="the operators' port, on the loopback, for pdx top, drain, kv --admin (default: a free one)")  # fmt: skip
    add("--logs", action="store_true", help="show all logs, prefixed, which go to files anyway")
    add("--no-pin", action="store_true", help="do not pin engines to cores")
    add("--publish", type=Path, metavar="FILE", help="write all addresses to this JSON file when ready")
    add("--ready-timeout-s", type=beforehand.seconds, default=READY_S, metavar="S", help=f"default {READY_S:.0f}")
    of_daemons = parser.add_argument_group("settings of the daemons, and of their engines")
    for name in SETTINGS:
        config.add_flag(of_daemons, name)
    return parser
