"""Where vLLM's workers take new weights: their methods are wrapped, so that a change is noticed before the next step.

Only workers of engines with our connector are touched, and only in their own process. What is run in a worker from
outside, as a function, and writes weights there, goes unnoticed until the next reset.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pdx.engine.vllm.live_weights import PACKED, digest_of, tensor_digest
from pdx.errors import Refused

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.worker.worker_base import WorkerBase

Digest = Callable[[], "str | None"]
WATCHED = "pdx_watched"

STARTS = "initialize_from_config"  # makes the connector; the model is loaded by then
CHANGES = (
    "load_model", "reload_weights", "reset_weights", "start_weight_update", "start_draft_weight_update",
    "update_weights", "finish_weight_update", "sleep", "wake_up", "discard", "apply_model",
)  # fmt: skip


def watch(connector: str, *, begin: Callable[[Digest], None], mark: Callable[[], None]) -> None:
    """In workers of engines with a connector of this name: `begin` with a digest of the live weights once they are
    there, and `mark` whenever they may have changed. Safe to call again."""
    from vllm.v1.worker.worker_base import WorkerBase

    made = WorkerBase.__init__
    if hasattr(made, WATCHED):
        return

    @functools.wraps(made)
    def make(self: WorkerBase, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if connector in connector_names(self.vllm_config):
            _watch_class(type(self), begin, mark)

    setattr(make, WATCHED, True)
    WorkerBase.__init__ = make


def check_watched() -> None:
    """Raises Refused in a process where nobody has called `watch`: new weights would go unnoticed."""
    from vllm.v1.worker.worker_base import WorkerBase

    if not hasattr(WorkerBase.__init__, WATCHED):
        raise Refused("vLLM has not loaded pdx's plugin in this worker: name `pdx` in VLLM_PLUGINS, or leave it unset")


def connectors() -> list[KVConnectorBase_V1]:
    """This worker process's, and those inside of it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return []
    group = get_kv_transfer_group()
    return [group, *getattr(group, "_connectors", ())]


def connector_names(config: VllmConfig) -> Iterator[str]:
    """An engine's, and those inside of it."""
    transfer = config.kv_transfer_config
    if transfer is not None:
        yield str(transfer.kv_connector)
        for inner in transfer.kv_connector_extra_config.get("connectors", ()):  # MultiConnector's
            yield str(inner.get("kv_connector"))


def _watch_class(worker: type[WorkerBase], begin: Callable[[Digest], None], mark: Callable[[], None]) -> None:
    if WATCHED in vars(worker):
        return
    missing = [name for name in (STARTS, "get_model", *CHANGES) if not callable(getattr(worker, name, None))]
    if missing:
        raise Refused(f"vLLM's {worker.__name__} has no {missing[0]}(): pdx could not tell when its weights change")
    started = getattr(worker, STARTS)

    @functools.wraps(started)
    def start(self: WorkerBase, *args: Any, **kwargs: Any) -> None:
        started(self, *args, **kwargs)
        hidden = _hides_weights(self.vllm_config)
        begin(lambda: None if hidden else digest_of(self.get_model()))

    setattr(worker, STARTS, start)
    for name in (*CHANGES, *_extensions(worker)):
        setattr(worker, name, _marking(getattr(worker, name), mark))
    _note_what_is_packed()
    setattr(worker, WATCHED, True)


def _extensions(worker: type[WorkerBase]) -> list[str]:
    """What the operator has added (`--worker-extension-cls`): who updates weights in his own way does it there."""
    from vllm.v1.worker.worker_base import WorkerBase

    added = [base for base in worker.__mro__ if not issubclass(base, WorkerBase) and base not in WorkerBase.__mro__]
    return [
        name
        for base in added
        for name, value in vars(base).items()
        if isinstance(value, types.FunctionType) and not name.startswith("__")
    ]


def _marking(method: Callable[..., Any], mark: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def marked(self: WorkerBase, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:  # half an update is a change, too
            mark()

    return marked


def _hides_weights(config: VllmConfig) -> bool:
    """Quantized layers of a CPU keep theirs in the kernels' own objects."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and config.model_config.quantization is not None


def _note_what_is_packed() -> None:
    """A CPU's linear layers pack their weights into their kernels' memory and drop the parameter."""
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    packing = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if packing is None:
        raise Refused("vLLM has no dispatch_cpu_unquantized_gemm(): pdx could not see a CPU engine's weights")
    if hasattr(packing, WATCHED):
        return

    @functools.wraps(packing)
    def pack(layer: torch.nn.Module, remove_weight: bool) -> None:
        noted = tensor_digest(layer.weight)
        packing(layer, remove_weight)
        setattr(layer, PACKED, None if layer.weight.numel() else noted)

    setattr(pack, WATCHED, True)
    utils.dispatch_cpu_unquantized_gemm = pack
