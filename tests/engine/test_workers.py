"""How vLLM's workers are watched: which of their methods say that weights may have changed, and when nobody looks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: it has no workers to watch")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402
from vllm.model_executor.layers import utils  # noqa: E402
from vllm.v1.worker.cpu_worker import CPUWorker  # noqa: E402
from vllm.v1.worker.gpu_worker import Worker  # noqa: E402
from vllm.v1.worker.worker_base import WorkerBase  # noqa: E402

from pdx.engine.vllm import plugin, workers  # noqa: E402
from pdx.engine.vllm.live_weights import digest_of  # noqa: E402
from pdx.errors import Refused  # noqa: E402


class Extension:
    """As operators write them to update weights in their own way."""

    def update_named_param(self) -> str:
        return "done"


class Seen:
    def __init__(self) -> None:
        self.marks = 0
        self.digests: list[str | None] = []

    def mark(self) -> None:
        self.marks += 1

    def begin(self, digest: workers.Digest) -> None:
        self.digests.append(digest())


def made(base: type = WorkerBase, **methods: Any) -> type:
    """A worker class of its own, whose methods do nothing."""
    names = {"initialize_from_config", *workers.CHANGES, "execute_model"}
    nothing = dict.fromkeys(names, lambda self, *_: None)
    model = torch.nn.Linear(2, 2)
    return type("Made", (base, Extension), nothing | {"get_model": lambda self: model} | methods)


def instance(kind: type, quantization: str | None = None) -> Any:
    worker = object.__new__(kind)
    worker.vllm_config = SimpleNamespace(model_config=SimpleNamespace(quantization=quantization))
    return worker


def test_vllm_has_what_is_wrapped() -> None:
    for kind in (Worker, CPUWorker):
        for name in (workers.STARTS, "get_model", *workers.CHANGES):
            assert callable(getattr(kind, name))


def test_changes_and_extensions_mark_and_steps_do_not() -> None:
    seen, kind = Seen(), made()
    for _ in range(2):
        workers._watch_class(kind, seen.begin, seen.mark)
    worker = instance(kind)
    worker.initialize_from_config(None)
    assert seen.digests == [digest_of(worker.get_model())]
    worker.execute_model()
    assert seen.marks == 0
    for name in workers.CHANGES:
        getattr(worker, name)()
    assert worker.update_named_param() == "done"
    assert seen.marks == len(workers.CHANGES) + 1, "each once"


def test_half_an_update_counts() -> None:
    def fails(self: object) -> None:
        raise RuntimeError("the trainer is gone")

    seen, kind = Seen(), made(update_weights=fails)
    workers._watch_class(kind, seen.begin, seen.mark)
    with pytest.raises(RuntimeError):
        instance(kind).update_weights()
    assert seen.marks == 1


def test_a_worker_without_one_of_them_is_refused() -> None:
    with pytest.raises(Refused, match=r"Made has no finish_weight_update\(\)"):
        workers._watch_class(made(finish_weight_update=None), Seen().begin, Seen().mark)


def test_quantized_layers_of_a_cpu_can_t_be_seen() -> None:
    seen, kind = Seen(), made()
    workers._watch_class(kind, seen.begin, seen.mark)
    instance(kind, "awq").initialize_from_config(None)
    assert seen.digests == [None]


def test_what_a_cpu_packs_is_noted_and_noted_anew() -> None:
    """Its linear layers keep an empty parameter."""
    workers._note_what_is_packed()
    workers._note_what_is_packed()
    digests = []
    for value in (1.0, 1.0, 2.0):
        layer = torch.nn.Linear(64, 64, bias=False)
        layer.weight = torch.nn.Parameter(torch.full((64, 64), value, dtype=torch.bfloat16), requires_grad=False)
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        digests.append(digest_of(torch.nn.Sequential(layer)))
        assert layer.weight.numel() == 0 or digests[-1]
    assert None not in digests
    assert digests[0] == digests[1] != digests[2]


def test_only_engines_with_our_connector_are_watched() -> None:
    def config(name: str, **extra: Any) -> Any:
        return SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra)
        )  # fmt: skip

    assert plugin.NAME in workers.connector_names(config("PdxConnector"))
    assert plugin.NAME in workers.connector_names(config("MultiConnector", connectors=[{"kv_connector": plugin.NAME}]))
    assert plugin.NAME not in workers.connector_names(config("NixlConnector"))
    assert plugin.NAME not in workers.connector_names(SimpleNamespace(kv_transfer_config=None))  # type: ignore[arg-type]


def test_a_worker_without_the_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    workers.check_watched()
    monkeypatch.setattr(WorkerBase, "__init__", lambda self: None)
    with pytest.raises(Refused, match="VLLM_PLUGINS"):
        workers.check_watched()
