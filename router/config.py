"""What operators set of a router: one frozen object, and where each of its values came from.

Command line > PDX_ROUTER_* variables > YAML file > what pdx itself is told (PDX_KEY_FILE, budgets) > defaults.
Every key is a flag, a variable and a YAML key of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from pdx.config import Config, is_loopback, load, parse_size, router_environ
from pdx.errors import ConfigError
from pdx.layered import Source, read_yaml, resolve
from pdx.router.choice.policy import PolicyName
from pdx.router.request.settings import JourneyName

POLICIES: dict[PolicyName, str] = {
    "prefix": "by the first token that is predicted to come soonest, from what each host keeps of the prompt, what "
    "its engines have to do, and how fast they and the links are",
    "round_robin": "in turns",
    "least_loaded": "the one with the fewest requests",
    "power_of_two": "the less loaded of two drawn at random",
    "affinity": "the same for all requests of one x-session-id, prompt_cache_key or user, until it has a quarter more "
    "than its share",
}
JOURNEYS = {
    "auto": "seeded where the request allows it, else paired",
    "seeded": "the same",
    "paired": "both engines are asked at once, every token comes from decode",
    "after": "decode is asked when prefill has answered, every token comes from decode",
}
COMMAND_LINE = "command line"
SECRETS = ("api_key",)

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=0, le=1 << 30)]
Seconds = Annotated[float, Meta(gt=0, lt=1e6)]


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. A field's description is its flag's help."""

    host: Annotated[str, Meta(description="address to serve HTTP on")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="port, 0 for a free one")] = 8000
    control: Annotated[
        str, Meta(description="where daemons announce their engines; port 0 for a free one", title="ENDPOINT")
    ] = "tcp://127.0.0.1:5700"
    admin_host: Annotated[str, Meta(description="address of the admin port", title="HOST")] = "127.0.0.1"
    admin_port: Annotated[
        Port | None,
        Meta(description="serve the operators' verbs there, see pdx kv --help; 0 for a free one (default: not at all)"),
    ] = None
    publish: Annotated[str, Meta(description="write {http, control, admin} as JSON when listening", title="FILE")] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="how much is said on stderr")
    ] = "info"
    request_log: Annotated[
        str, Meta(description="write a line of JSON for each request there; - is stdout (default: none)", title="FILE")
    ] = ""
    public_metrics: Annotated[
        bool, Meta(description="/metrics for everybody at the front; else only at the admin port")
    ] = True

    workers: Annotated[
        int, Meta(ge=1, le=64, description="processes that serve the port together; limits are per worker", title="N")
    ] = 1
    prefill: Annotated[
        list[str],
        Meta(description="a prefill engine to wait for: its pdxd must announce it, else /readyz names it", title="URL"),
    ] = []
    decode: Annotated[
        list[str],
        Meta(
            description="an engine that may know nothing of pdx: it serves whole requests, and pairs once its pdxd "
            "announces it",
            title="URL",
        ),
    ] = []

    policy: Annotated[
        PolicyName,
        Meta(description="how engines are chosen: " + "; ".join(f"{name}: {what}" for name, what in POLICIES.items())),
    ] = "prefix"
    journey: Annotated[
        JourneyName,
        Meta(
            description="how a pair answers; seeded: prefill's first token is streamed at once and decode continues "
            "from it. " + "; ".join(f"{name}: {what}" for name, what in JOURNEYS.items())
        ),
    ] = "auto"
    max_waiting: Annotated[
        Count,
        Meta(
            description="a prefill engine is full with N requests of this router in line, a decode engine when it says "
            "that N requests wait in it; 0 is no limit. Requests wait in the router while every fitting engine is full",
            title="N",
        ),
    ] = 32
    max_wait_s: Annotated[
        float,
        Meta(
            ge=0,
            description="a request is turned away at once, with 429 and Retry-After, while every engine that could "
            "take it is predicted to begin with it only so many seconds later, by what this worker has sent to it; "
            "0 is no limit",
            title="S",
        ),
    ] = 0.0
    max_in_flight_prefill: Annotated[
        Count, Meta(description="a prefill engine is also full with N calls of this router; 0 is no limit", title="N")
    ] = 0
    max_in_flight_decode: Annotated[Count, Meta(description="the same of other engines; 0 is no limit", title="N")] = 0
    queue_size: Annotated[
        Count, Meta(description="so many requests wait; beyond that 429 and Retry-After", title="N")
    ] = 100
    queue_timeout_s: Annotated[
        Seconds, Meta(description="504 for who has waited so long; x-pdx-ttl-secs shortens it")
    ] = 60.0
    request_timeout_s: Annotated[Seconds, Meta(description="for a whole request")] = 600.0
    prefill_timeout_s: Annotated[Seconds, Meta(description="for prefill's part of it")] = 120.0
    retries: Annotated[
        Count,
        Meta(description="a request that failed before its first byte is repeated on so many other engines", title="N"),
    ] = 2
    cb_failure_threshold: Annotated[
        Count, Meta(description="failures in a row after which an engine is not asked any more; 0: never", title="N")
    ] = 10
    cb_success_threshold: Annotated[
        Count, Meta(description="successes in a row after which it is asked as before", title="N")
    ] = 3
    cb_timeout_s: Annotated[Seconds, Meta(description="for so long it is not asked, then one request at a time")] = 60.0
    cb_window_s: Annotated[Seconds, Meta(description="failures further apart are no row")] = 120.0
    drain_s: Annotated[
        Seconds, Meta(description="at SIGTERM, what is under way gets so long; a second signal ends it at once")
    ] = 30.0
    handoff_grant_s: Annotated[Seconds | None, Meta(description="of a handoff: from RESERVE to GRANT")] = None
    handoff_slab_s: Annotated[Seconds | None, Meta(description="of a handoff: between two slabs")] = None
    handoff_total_s: Annotated[Seconds | None, Meta(description="of a handoff: from RESERVE to COMMIT")] = None
    handoff_claim_s: Annotated[Seconds | None, Meta(description="of a handoff: until decode owns the pages")] = None

    key_file: Annotated[str, Meta(description="the cluster key (mode 0600); needed off loopback", title="FILE")] = ""
    api_key: Annotated[
        list[str], Meta(description="a key that clients may bring; a file keeps it from ps", title="KEY")
    ] = []
    api_key_file: Annotated[str, Meta(description="lines of NAME KEY or NAME KEY TENANT (mode 0600)", title="FILE")] = (
        ""
    )
    pass_api_key: Annotated[
        bool, Meta(description="also give the clients' keys to the engines (without keys here they get them anyway)")
    ] = False
    cors_origin: Annotated[
        list[str], Meta(description="web pages of this origin may ask; * is all (default: none)", title="ORIGIN")
    ] = []
    max_body: Annotated[str, Meta(description="largest body of a request, e.g. 64MiB", title="SIZE")] = "32MiB"
    max_bodies: Annotated[
        str,
        Meta(description="bodies of all requests under way; beyond that 503, but one always has room", title="SIZE"),
    ] = "1GiB"
    keep_alive_s: Annotated[
        Seconds, Meta(description="a connection without a whole request head for so long is closed")
    ] = 60.0

    def __post_init__(self) -> None:
        control = urlsplit(self.control)
        if control.scheme != "tcp" or not control.netloc:
            raise ConfigError(f"--control {self.control}: write e.g. tcp://127.0.0.1:5700")
        for url in (*self.prefill, *self.decode):
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
                raise ConfigError(f"{url}: an engine's address begins with http://")
        hosts = (("--host", self.host), ("--control", control.hostname or ""), ("--admin-host", self.admin_host))
        for name, host in hosts:
            if not is_loopback(host) and not self.key_file:
                raise ConfigError(
                    f"{name} {host} is not loopback and no cluster key is set: write 32 random bytes to a 0600 file on "
                    "every host and pass it with --key-file"
                )
        if parse_size(self.max_body, key="max_body") < 1024:
            raise ConfigError(f"max_body {self.max_body}: no request is as small")
        parse_size(self.max_bodies, key="max_bodies")


class Resolved(msgspec.Struct, frozen=True):
    """A router's settings, where they came from, and pdx's own with them in it (run directory, key file, budgets)."""

    config: RouterConfig
    origins: dict[str, str]
    pdx: Config


def resolved(flags: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Resolved:
    """`flags`: key -> value or None, and "config", the YAML file's name. Raises ConfigError naming source and key."""
    given = dict(flags)
    variables = router_environ(environ)
    path = given.pop("config", None) or variables.pop("config", None)
    variables.pop("config", None)
    pdx = load(environ=environ)
    sources = [
        Source("pdx", _of_pdx(pdx)),
        *([Source(path, _of_today(read_yaml(path)))] if path else []),
        Source("environment", _of_today(variables)),
        Source(COMMAND_LINE, given),
    ]
    config, origins = resolve(RouterConfig, sources, secrets=SECRETS)
    wanted = {field: getattr(config, f"handoff_{field}") for field in ("grant_s", "slab_s", "total_s", "claim_s")}
    budgets = msgspec.structs.replace(pdx.budgets, **{k: v for k, v in wanted.items() if v is not None})
    pdx = msgspec.structs.replace(pdx, host=config.host, key_file=config.key_file, budgets=budgets)
    return Resolved(config, origins, pdx)


def dumped(found: Resolved) -> str:
    """As YAML that gives the same router again, each value with where it came from. Secrets are not in it."""
    values: dict[str, Any] = msgspec.to_builtins(found.config)
    for field, budget in msgspec.to_builtins(found.pdx.budgets).items():
        values[f"handoff_{field}"] = budget
    lines = []
    for key, value in values.items():
        origin = found.origins[key]
        if key in SECRETS and value:
            value, origin = [], f"{origin}: {len(value)} that are not shown"
        lines.append(f"{key}: {msgspec.json.encode(value).decode()}  # {origin}")
    return "\n".join(lines)


def _of_today(values: Mapping[str, Any]) -> dict[str, Any]:
    """By what their keys are called now: what ends with _s has ended with _secs."""
    return {key[:-3] if str(key).endswith("_secs") else key: value for key, value in values.items()}


def _of_pdx(pdx: Config) -> dict[str, Any]:
    """What this host's pdx is told that routers have too, if it is told anything."""
    default = Config()
    said = {"key_file": pdx.key_file or None}
    for field in ("grant_s", "slab_s", "total_s", "claim_s"):
        value = getattr(pdx.budgets, field)
        said[f"handoff_{field}"] = value if value != getattr(default.budgets, field) else None
    return said
