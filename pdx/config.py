"""All settings of pdx, in one frozen object. The only module that reads PDX_* variables.

Precedence: command line > PDX_* variables > YAML file > default. An empty variable says nothing. Unknown keys are
errors that suggest the nearest known one. Secrets come from a file named by PDX_KEY_FILE (mode 0600), never from a flag
or kv_transfer_config.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from pdx import keys
from pdx.addresses import authority
from pdx.errors import ConfigError
from pdx.layered import Source, read_yaml, resolve
from pdx.wire import Budgets

KEY_BYTES_MIN, KEY_BYTES_MAX = 16, 64 << 10
BARE_BYTES_MIN = 1 << 20  # a smaller size is told with its unit
ADMIN_URL = "http://127.0.0.1:8001"  # where operators look for a router unless told
LOOKUP_S = 0.02  # pdxd answers in some 0.2 ms
# Names in the run directory on which a daemon and its clients must agree.
SOCKET_NAME = "pdxd.sock"
LOCK_NAME = "pdxd.lock"
INFO_NAME = "pdxd.json"  # where the daemon is, for people and tests
KEY_NAME = "cluster.key"  # of a daemon that is given none
LOG_NAME = "pdxd.log"  # of a daemon that a client has started
KINDS_NAME = "pdxd.kinds"  # kinds of blocks that a daemon with a disk has met, for its next lives
FLAGS_NAME = "pdxd.flags"  # of the daemon that runs, or was killed: whoever misses it starts it anew as it was
PREFIX, ROUTER_PREFIX = "PDX_", "PDX_ROUTER_"  # the second: of variables that only a router reads
NO_SETTINGS = ("config", "admin")  # PDX_CONFIG, PDX_ADMIN
# What Kubernetes tells the pods of a namespace that has a Service called pdx, or pdx-router.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_PORT = ("tcp://", "udp://", "sctp://")  # what its ..._PORT begins with: never a number, as ours are
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*$", re.IGNORECASE)
Offload = Literal["off", "prompts", "all"]
DiskWrite = Literal["through", "back"]
Eviction = Literal["lru", "s3fifo"]
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one host's daemon and of the engines that attach to it."""

    run_dir: str = ""  # sockets, lock and log of the host's pdxd; `load` fills in a per-user directory
    arena: str = "1GiB"  # shared memory for KV; checked against the machine before it is taken
    extent: str = ""  # size of an extent; default: an eighth of the arena, 64 MiB at most
    chunk_tokens: int = 256  # unit of space and transfer
    host: str = "127.0.0.1"  # address that peers reach this host by
    control_port: int = 0  # TCP port on which other daemons speak to this one; 0: any that is free
    lane_port: int = 0  # the same for the bytes: of the first lane, the port after it of the second
    transport: str = "auto"  # the lane to other hosts: by itself nixl or ucx where both have RDMA, else tcp
    require_rdma: bool = False  # no other lane, whatever fails
    router: str = ""  # zmq endpoint of the router, e.g. tcp://127.0.0.1:5700; of several, with commas between
    key_file: str = ""  # cluster key; required off loopback
    tls_cert: str = ""  # certificate of this host, for TLS 1.3 between daemons' tcp lanes; with tls_key and tls_ca
    tls_key: str = ""
    tls_ca: str = ""  # the authority of all hosts' certificates
    start_daemon: bool = True  # an engine that finds no pdxd starts one; false: somebody else sees to that
    linger_s: float = 60.0  # pdxd exits this long after its last engine has left
    lease_s: float = 30.0  # an engine that renews nothing for so long loses its leases (to quarantine)
    handoff_share: float = 0.9  # a prompt needing more of the arena than this is refused
    pin_share: float = 0.25  # of the arena: what operators may pin
    tenant_share: float = 1.0  # of the arena: what one cache_salt may take; those without one are a tenant together
    digest_mode: bool = False  # blake3 of every page on both sides of a handoff; for proofs
    offload: Offload = "all"  # blocks of requests outside handoffs that engines keep in the arena, and look up
    return_answers: bool = True  # kept blocks of answers go to the host whose prefill engine had the prompt
    lookup_s: float = LOOKUP_S  # an engine whose look-up takes longer computes
    disk: str = ""  # folder of the disk tier, on a file system of this host; empty: none
    disk_cap: str = "10GiB"  # bytes that it may take there, never more
    disk_write: DiskWrite = "through"  # blocks are written when they are whole, or when they are about to be evicted
    disk_flush_s: float = 5.0  # a daemon that is told to stop goes on writing for so long
    eviction: Eviction = "lru"  # what leaves the arena first
    low_water: float | None = None  # of the arena: with less free, room is made ahead of claims; see low_water_share
    high_water: float = 0.1  # of the arena: until so much is free
    poison: bool = False  # fill freed slots with 0xDB; for tests
    budgets: Budgets = Budgets()

    def __post_init__(self) -> None:
        for key in ("arena", "extent", "disk_cap"):
            _check_unit(getattr(self, key), key=key)
        if not 0 < 2 * self.extent_bytes <= self.arena_bytes:
            extent = self.extent or "its default, an eighth"
            raise ConfigError(
                f"an arena of {self.arena!r} has no room for extents of {extent}: write sizes with their units, as in "
                "512MiB, and an extent of at most half of the arena"
            )
        if not (self.linger_s >= 0 and self.lease_s > 0):
            raise ConfigError(
                f"linger_s must be at least 0 and lease_s above it, not {self.linger_s} and {self.lease_s}"
            )
        if not 0.05 <= self.handoff_share <= 1.0:
            raise ConfigError(f"handoff_share must be between 0.05 and 1, not {self.handoff_share}")
        if not 0.0 < self.tenant_share <= 1.0:
            raise ConfigError(f"tenant_share must be above 0 and at most 1, not {self.tenant_share}")
        if not 0.0 <= self.pin_share <= 1.0:
            raise ConfigError(f"pin_share must be between 0 and 1, not {self.pin_share}")
        if not 0.0 <= self.low_water_share <= self.high_water < 1.0:
            raise ConfigError(
                f"low_water is at least 0 and at most high_water, which is below 1; not {self.low_water_share} and "
                f"{self.high_water}"
            )
        if not self.disk_flush_s >= 0:
            raise ConfigError(f"disk_flush_s must be at least 0, not {self.disk_flush_s}")
        if self.disk and self.disk_write == "back" and not self.low_water_share:
            raise ConfigError("disk_write back writes when there is less room than low_water: that can't be 0")
        if len({bool(self.tls_cert), bool(self.tls_key), bool(self.tls_ca)}) > 1:
            raise ConfigError("TLS needs all of tls_cert, tls_key and tls_ca: the peers prove themselves to each other")
        if self.require_rdma and self.transport == "tcp":
            raise ConfigError("require_rdma can't be met by transport tcp: choose auto, nixl or ucx")
        for name, port in (("control_port", self.control_port), ("lane_port", self.lane_port)):
            if not 0 <= port < 1 << 16:
                raise ConfigError(f"{name} is a port from 1 to 65535, or 0 for any that is free, not {port}")
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be positive, not {self.chunk_tokens}")

    @property
    def arena_bytes(self) -> int:
        return parse_size(self.arena, key="arena")

    @property
    def extent_bytes(self) -> int:
        if self.extent:
            return parse_size(self.extent, key="extent")
        return min(64 << 20, self.arena_bytes // 8)

    @property
    def low_water_share(self) -> float:
        """Room that is made early is cache that is not kept: only what must be written before it goes is worth that."""
        if self.low_water is not None:
            return self.low_water
        return 0.05 if self.disk and self.disk_write == "back" else 0.0

    @property
    def tenant_bytes(self) -> int | None:
        """None: no limit."""
        return None if self.tenant_share == 1.0 else int(self.arena_bytes * self.tenant_share)

    @property
    def disk_cap_bytes(self) -> int:
        return parse_size(self.disk_cap, key="disk_cap")

    @property
    def control_endpoint(self) -> str:
        return f"tcp://{authority(self.host, self.control_port)}"

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir)


PATHS = ("run_dir", "key_file", "disk", "tls_cert", "tls_key", "tls_ca")
# Command-line flags of the programs that take settings; the names are Config's.
FLAGS = {
    "run_dir": "directory of this host's sockets, lock and log, 0700 (default: $XDG_RUNTIME_DIR/pdx or /tmp/pdx-UID)",
    "arena": "shared memory for KV, e.g. 512MiB or 16GiB",
    "extent": "size of an extent (default: an eighth of the arena, 64MiB at most)",
    "host": "address that peers reach this host by",
    "control_port": "TCP port for other hosts' daemons (default: any that is free)",
    "lane_port": "TCP port for KV from other hosts; a second lane takes the next (default: any that are free)",
    "transport": "lane to other hosts: auto, tcp, nixl, ucx, or one that another package brings",
    "require_rdma": "only lanes over RDMA; start nothing where there are none",
    "key_file": "file with the cluster key, mode 0600; required off loopback",
    "tls_cert": "PEM certificate of this host: lanes speak TLS 1.3, with peers of the same authority only",
    "tls_key": "its private key, a file of mode 0600",
    "tls_ca": "PEM certificate of the authority that signed all hosts'",
    "linger_s": "seconds to stay after the last engine has left",
    "lease_s": "seconds until a silent engine loses its leases",
    "handoff_share": "largest part of the arena that one prompt may take",
    "pin_share": "largest part of the arena that pins may take",
    "tenant_share": "largest part of the arena that one cache_salt may take",
    "disk": "folder in which blocks survive the daemon (default: none)",
    "disk_cap": "bytes that they may take there",
    "disk_write": "through: each block when it is whole; back: when it is about to leave the arena",
    "disk_flush_s": "seconds in which a stopping daemon writes what has yet to be written",
    "eviction": "what leaves the arena first: lru, or s3fifo, which long prompts that come once can't wash out",
    "low_water": "with less of the arena free, room is made before it is asked for (default: 0.05 with back, else 0)",
    "high_water": "until so much of it is free",
    "return_answers": "kept answers go to the hosts of their prompts, and those of other hosts are taken",
    "digest_mode": "blake3 of every page on both sides of a handoff",
    "poison": "overwrite freed slots (for tests)",
}
# What only engines read: flags of who starts them, and variables and YAML keys like all others.
ENGINE_FLAGS = {
    "router": "control endpoint of a router, e.g. tcp://127.0.0.1:5700; of several, with commas between",
    "offload": "what engines keep of requests outside handoffs: all, prompts, or off",
    "lookup_s": "seconds after which an engine that waits for a look-up computes",
    "chunk_tokens": "unit of space and transfer",
    "start_daemon": "an engine that finds no pdxd starts one",
}


def help_of(name: str) -> str:
    """What one of FLAGS or ENGINE_FLAGS is for, and its default."""
    text, default = (FLAGS | ENGINE_FLAGS)[name], getattr(Config(), name)
    if "(default" in text or default in ("", None):
        return text
    if isinstance(default, bool):
        return f"{text} (default: {'true; else --no-' + name.replace('_', '-') if default else 'false'})"
    return f"{text} (default: {f'{default:g}' if isinstance(default, float) else default})"


def add_flag(parser: argparse._ActionsContainer, name: str) -> None:
    """One of FLAGS or ENGINE_FLAGS. What is true or false may be said without a value, or as --no-NAME."""
    flag = name.replace("_", "-")
    if not isinstance(getattr(Config(), name), bool):
        parser.add_argument(f"--{flag}", dest=name, metavar="VALUE", help=help_of(name))
        return
    parser.add_argument(f"--{flag}", dest=name, nargs="?", const="true", metavar="true|false", help=help_of(name))
    parser.add_argument(f"--no-{flag}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS)


def also_named(parser: argparse.ArgumentParser, action: argparse.Action, *names: str) -> None:
    """Names that a flag has had: they work, and no help shows them."""
    former = copy.copy(action)
    former.option_strings, former.help = names, argparse.SUPPRESS
    parser._add_action(former)


def load(
    overrides: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    yaml_file: str | None = None,
) -> Config:
    """The resolved configuration. Raises ConfigError naming the source and key that is wrong."""
    environ = os.environ if environ is None else environ
    yaml_file = yaml_file or environ.get("PDX_CONFIG")
    sources = [Source(yaml_file, read_yaml(yaml_file))] if yaml_file else []
    sources += [Source("environment", _from_environ(environ)), Source("command line", overrides or {})]
    config, _ = resolve(Config, sources)
    _check_host(config.host)  # here, for a router, which tells nobody, puts its own in later
    paths = {name: getattr(config, name) for name in PATHS} | {"run_dir": config.run_dir or default_run_dir(environ)}
    # Daemons are started from another directory.
    return msgspec.structs.replace(config, **{name: os.path.abspath(path) for name, path in paths.items() if path})


def flags_of(config: Config) -> list[str]:
    """The command line that gives a pdxd these settings, but for its run directory. (Not those of PDX_* alone.)

    What is as by default is said too: the environment that it inherits may say otherwise, and has been overruled.
    """
    values = {name: getattr(config, name) for name in FLAGS if name != "run_dir"}
    return [
        f"--{name.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in values.items()
        if value is not None
    ]


def left_flags(run_dir: Path) -> list[str] | None:
    """Those of a pdxd that was killed in this run directory; None if none was."""
    try:
        return msgspec.json.decode((run_dir / FLAGS_NAME).read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError):
        return None


def router_environ(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What PDX_ROUTER_* variables say, by lower-case key. (PDX_ROUTER itself tells daemons where a router is.)"""
    return _variables(os.environ if environ is None else environ, ROUTER_PREFIX)


def admin_url() -> str:
    """What PDX_ADMIN says: where a router's admin port is. Empty: it is not set."""
    return os.environ.get("PDX_ADMIN", "")


def import_path() -> dict[str, str]:
    """PYTHONPATH by which a child finds this very package, be it installed or a bare clone."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def shown(config: Config) -> str:
    """The resolved configuration for logs, one key a line."""
    values = msgspec.to_builtins(config)
    return "\n".join(f"  {key} = {value}" for key, value in values.items())


def parse_size(text: str, *, key: str) -> int:
    """Bytes of "512MiB", "1.5G", "4096". Raises ConfigError."""
    match = _SIZE.match(str(text))
    if not match:
        raise ConfigError(f"{key}: {text!r} is not a size; write e.g. 512MiB or 4GiB")
    try:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    except OverflowError as error:
        raise ConfigError(f"{key}: a number of {len(match[1])} digits is no size of anything here") from error


def _check_unit(text: str, *, key: str) -> None:
    """Whoever writes 16 does not mean bytes. Raises ConfigError, as for what is no size."""
    if text and parse_size(text, key=key) < BARE_BYTES_MIN and not text.strip()[-1].isalpha():
        raise ConfigError(f"{key}: {text} would be bytes: write sizes with their units, as in {text.strip()}MiB")


def default_run_dir(environ: Mapping[str, str]) -> str:
    """One per user: all engines of a user's host share a daemon without being told."""
    base = environ.get("XDG_RUNTIME_DIR")
    return f"{base}/pdx" if base else f"/tmp/pdx-{os.getuid()}"  # noqa: S108 - made 0700 and owner-checked


def chooser_of(run_dir: Path, environ: Mapping[str, str] | None = None) -> str:
    """Which setting has chosen this run directory, for who finds nobody there."""
    environ = os.environ if environ is None else environ
    if environ.get("PDX_RUN_DIR") and os.path.abspath(environ["PDX_RUN_DIR"]) == str(run_dir):
        return "PDX_RUN_DIR chose it"
    if str(run_dir) == os.path.abspath(default_run_dir(environ)):
        base = "by XDG_RUNTIME_DIR" if environ.get("XDG_RUNTIME_DIR") else "XDG_RUNTIME_DIR is unset here"
        return f"the default, {base}; --run-dir or PDX_RUN_DIR name another"
    return "--run-dir or a file of settings chose it"


def ensure_run_dir(path: Path) -> Path:
    """Makes the run directory 0700. Raises ConfigError if it belongs to, or is open to, somebody else."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status, link = path.stat(), path.lstat()
    except OSError as error:
        raise ConfigError(f"no run directory {path}: {error.strerror}; set PDX_RUN_DIR to one of your own") from error
    if status.st_uid != os.getuid():
        raise ConfigError(f"run directory {path} belongs to uid {status.st_uid}; set PDX_RUN_DIR to one of your own")
    if link.st_uid not in (0, os.getuid()):  # in /tmp anybody makes links, and may have them point elsewhere later
        raise ConfigError(f"run directory {path} is a link of uid {link.st_uid}; set PDX_RUN_DIR to one of your own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"run directory {path} is open to others: chmod 700 {path}")
    return path


def cluster_key(config: Config) -> bytes:
    """The key that signs handles. Off loopback it must come from a file; on loopback the run directory keeps one."""
    if config.key_file:
        return _read_key(Path(config.key_file))
    if not is_loopback(config.host):
        raise ConfigError(
            f"host {config.host} is not loopback and no cluster key is set: write 32 random bytes to a 0600 file on "
            "every host and set PDX_KEY_FILE"
        )
    return _read_key(_local_key_file(ensure_run_dir(config.run_path)))


def admin_token(config: Config) -> str:
    """What the admin port of a router with this key file wants; empty: without one it asks for none."""
    return keys.admin_token(cluster_key(config)) if config.key_file else ""


def is_loopback(host: str) -> bool:
    """Of an address, or the one name that always is. (127.0.0.1.example.com is somebody else's.)"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_host(host: str) -> None:
    """Raises ConfigError for what stands for all addresses of a host: to others it would mean their own."""
    try:
        unspecified = host in ("", "*") or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return
    if unspecified:
        raise ConfigError(f"host {host!r} is nobody in particular: give the address at which peers reach this host")


def _local_key_file(run_dir: Path) -> Path:
    path = run_dir / KEY_NAME
    if path.exists():
        return path
    # Several processes may come here at once: each writes its own file, one link wins, nobody reads half a key.
    # Not by their numbers: in containers that share the directory two may have the same.
    temporary = run_dir / f"{KEY_NAME}.{secrets.token_hex(8)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()
    return path


def _read_key(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # no wait for the writer of a pipe
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            key = file.read(KEY_BYTES_MAX + 1) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise ConfigError(f"cluster key {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"cluster key {path} is no regular file")
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"cluster key {path} is readable by others: chmod 600 {path}")
    if len(key) > KEY_BYTES_MAX:
        raise ConfigError(f"cluster key {path} has more than {KEY_BYTES_MAX} bytes, and so is none")
    if len(key) < KEY_BYTES_MIN:
        raise ConfigError(f"cluster key {path} has {len(key)} bytes; write at least {KEY_BYTES_MIN} random ones")
    return key


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    others = {name: value for name, value in environ.items() if not name.startswith(ROUTER_PREFIX)}
    return {key: value for key, value in _variables(others, PREFIX).items() if key not in NO_SETTINGS}


def _variables(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Those with this prefix, by lower-case key, less empty ones and what is said of Services of such a name."""
    return {
        name.removeprefix(prefix).lower(): value
        for name, value in environ.items()
        if name.startswith(prefix) and value and not _is_service_link(name, value)
    }


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.search(name)) or (name.endswith("_PORT") and value.startswith(_SERVICE_PORT))
