"""pdx settings as an engine gets them, in kv_connector_extra_config: the keys of pdx.config and three of its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdx import config as configuration
from pdx.config import Config, Offload
from pdx.engine.vllm import compat
from pdx.errors import ConfigError
from pdx.wire import Role

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger("vllm.pdx")

_ROLES: dict[str, Role] = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


@dataclass(frozen=True)
class EngineSettings:
    config: Config
    role: Role
    engine_id: str
    url: str  # the engine's HTTP server, for the router; empty: not to be routed to
    data_parallel_rank: int | None  # behind that server
    adapters: dict[str, str]  # paths of those that the engine is started with, by name
    reasoning_parser: str  # by its name; empty: none
    context_tokens: int
    sampling_defaults: dict[str, float]


def read(vllm_config: VllmConfig) -> EngineSettings:
    """Raises ConfigError for unknown keys and wrong values."""
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    extra = dict(transfer.kv_connector_extra_config)
    engine_id = extra.pop("engine_id", "")
    rank = compat.data_parallel_rank(vllm_config)
    url = extra.pop("url", "")
    adapters = extra.pop("adapters", {})
    if not isinstance(engine_id, str) or not isinstance(url, str):
        raise ConfigError("kv_connector_extra_config: engine_id and url must be text")
    if not isinstance(adapters, dict) or not all(isinstance(text, str) for pair in adapters.items() for text in pair):
        raise ConfigError("kv_connector_extra_config: adapters must be names and their paths")
    if not engine_id:
        engine_id = transfer.engine_id
    elif rank is not None:  # one name for all ranks: each is an engine by itself, as vLLM's own names have it
        engine_id = f"{engine_id}_dp{vllm_config.parallel_config.data_parallel_index}"
    if transfer.kv_role not in _ROLES:
        raise ConfigError(f"kv_role must be one of {', '.join(_ROLES)}, not {transfer.kv_role!r}")
    parser = vllm_config.structured_outputs_config.reasoning_parser or ""
    model = vllm_config.model_config
    return EngineSettings(
        config=configuration.load(extra),
        role=_ROLES[transfer.kv_role],
        engine_id=engine_id,
        url=url,
        data_parallel_rank=rank,
        adapters=adapters,
        reasoning_parser=parser,
        context_tokens=model.max_model_len,
        sampling_defaults={k: float(v) for k, v in model.get_diff_sampling_param().items()},
    )


def shares(vllm_config: VllmConfig) -> bool:
    """Whether a block of one prompt may stand for that of another which begins alike: vLLM's prefix caching is on.

    The operator may have switched it off, or vLLM has: attention that looks ahead, or a kernel of which vLLM knows that
    it takes a prompt in one piece only, makes other KV for the same tokens in a longer prompt. vLLM decides in the
    scheduler's process at the latest, before it makes the connector there.
    """
    return bool(vllm_config.cache_config.enable_prefix_caching)


def offload_of(config: Config, vllm_config: VllmConfig) -> Offload:
    """What is kept and looked up of requests outside handoffs: nothing where blocks are not shared."""
    if config.offload == "off" or shares(vllm_config):
        return config.offload
    log.warning(
        "vLLM's prefix caching is off: only handoffs are carried, each for its own request, nothing else is kept or "
        "looked up (offload=%s is not done)",
        config.offload,
    )
    return "off"
