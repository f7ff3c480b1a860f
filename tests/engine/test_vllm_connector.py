"""The connector in vLLM's own scheduler, with vLLM's own types; the forward pass alone is ours. Starts no server."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: the connector is not tested against it")
pytestmark = pytest.mark.vllm

from markdown_tables import rows_under  # noqa: E402
from memory_connector import MemoryConnector, the_daemon  # noqa: E402
from prometheus_client import Counter, Gauge, Histogram  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA  # noqa: E402
from vllm.entrypoints.generate.base.protocol import validate_cache_salt  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402
from vllm_engine import (  # noqa: E402
    BLOCK_TOKENS,
    BLOCKS,
    LAYERS,
    Engine,
    kv_cache_config,
    vllm_config,
)

from pdx.engine.vllm import compat, plugin, settings  # noqa: E402
from pdx.engine.vllm.connector import PdxConnector  # noqa: E402
from pdx.engine.vllm.metadata import ReportMetadata, StepMetadata  # noqa: E402
from pdx.engine.vllm.stats import COUNTERS, PdxStats  # noqa: E402
from pdx.engine.vllm.steps import LoadResult, Report, Save, Step  # noqa: E402
from pdx.errors import ConfigError, Refused  # noqa: E402
from pdx.layout import Place  # noqa: E402
from pdx.router.front.access import Caller  # noqa: E402
from pdx.wire import Keep, LookUp, OpenSend  # noqa: E402


@pytest.fixture
def prefill(model_dir: Path, fresh_daemon: None) -> Engine:
    return Engine(model_dir, "kv_producer")


@pytest.fixture
def decode(model_dir: Path, fresh_daemon: None) -> Engine:
    return Engine(model_dir, "kv_consumer")


def tokens_of(count: int) -> list[int]:
    return [(5 * n + n * n) % 251 for n in range(count)]


def sending(number: int = 1) -> dict[str, Any]:
    return {"do_remote_decode": True, "pdx_handle": the_daemon().handle(number)}


def loading(number: int = 1) -> dict[str, Any]:
    return {"do_remote_prefill": True, "pdx_handle": the_daemon().handle(number)}


@pytest.mark.parametrize("count", [20, 64, 150])
def test_a_handoff_between_two_schedulers(prefill: Engine, decode: Engine, count: int) -> None:
    prefill.add("p", tokens_of(count), sending())
    prefill.run()
    blocks = -(-count // BLOCK_TOKENS)
    result = prefill.outputs[-1].kv_transfer_params
    assert result == {"pdx": {"handoff": (1).to_bytes(16, "big").hex(), "pages": blocks * LAYERS}}
    json.dumps(result)

    request = decode.add("d", tokens_of(count), loading(), max_tokens=3)
    first = decode.step()
    assert first.total_num_scheduled_tokens == 0
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert decode.holds(request, count)
    counts = [s.total_num_scheduled_tokens for s in decode.run()]
    assert counts == [1, 1, 1, 0]
    ends = [m for m in the_daemon().let_go if m.side == "load"]
    assert [(m.ok, m.pages) for m in ends] == [(True, blocks * LAYERS)]


def test_layers_have_hooks_in_steps_that_save_and_in_no_others(prefill: Engine, decode: Engine) -> None:
    prefill.add("p", tokens_of(150), sending())  # three steps of 64 tokens
    prefill.run()
    assert prefill.hooked == 3 * LAYERS
    decode.add("d", tokens_of(150), loading(), max_tokens=4)
    decode.run()
    assert decode.hooked == 0


@pytest.mark.parametrize("count", [20, 31, 32, 64, 150])
def test_decode_goes_on_behind_prefill_s_first_token(prefill: Engine, decode: Engine, count: int) -> None:
    """With blocks of 32: the seed opens a block, lies in the tail, or makes the tail a full block."""
    prefill.add("p", tokens_of(count), sending())
    prefill.run()
    request = decode.add("d", [*tokens_of(count), 7], loading() | {"pdx_tokens": count}, max_tokens=2)
    assert decode.step().total_num_scheduled_tokens == 0
    assert decode.holds(request, count)
    assert [s.total_num_scheduled_tokens for s in decode.run()] == [1, 1, 0]
    ends = [m for m in the_daemon().let_go if m.side == "load"]
    assert [(m.ok, m.pages) for m in ends] == [(True, -(-count // BLOCK_TOKENS) * LAYERS)]
    again = decode.add("again", [*tokens_of(count), 7, 7], {}, max_tokens=2)
    decode.step()
    assert decode.holds(again, count + 2), "blocks that were loaded in part are right in decode's own cache"
    decode.run()


def test_an_early_request_takes_no_blocks_before_the_first_page(prefill: Engine, decode: Engine) -> None:
    request = decode.add("d", tokens_of(150), loading() | {"pdx_early": True}, max_tokens=2)
    free = decode.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    for _ in range(3):
        decode.step()
    assert (request.status, free()) == (RequestStatus.WAITING, BLOCKS - 1)
    prefill.add("p", tokens_of(150), sending())
    prefill.step()
    decode.step()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    prefill.run()
    decode.step()
    assert decode.holds(request, 150)
    assert [s.total_num_scheduled_tokens for s in decode.run()] == [1, 1, 0]


def test_an_early_request_keeps_leading_blocks_of_a_handoff_that_failed(prefill: Engine, decode: Engine) -> None:
    request = decode.add("d", tokens_of(150), loading() | {"pdx_early": True}, max_tokens=1)
    decode.step()
    prefill.add("p", tokens_of(150), sending())
    prefill.step()
    decode.step()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    line = decode.scheduler.connector._scheduler_side._link.client()  # type: ignore[union-attr]
    the_daemon().end_load(line, (1).to_bytes(16, "big"), "prefill died")
    assert [s.total_num_scheduled_tokens for s in decode.run()] == [0, 64, 150 - 2 * 64, 0]
    assert [m.pages for m in the_daemon().let_go if m.side == "load"] == [64 // BLOCK_TOKENS * LAYERS]


def test_a_prefix_hit_on_prefill_is_sent_too(prefill: Engine, decode: Engine) -> None:
    prefill.add("warm", tokens_of(70), {})
    prefill.run()
    prefill.add("p", tokens_of(100), sending())
    assert prefill.step().total_num_scheduled_tokens == 100 - 64
    request = decode.add("d", tokens_of(100), loading(), max_tokens=2)
    decode.step()
    assert decode.holds(request, 100)


def test_a_preempted_send_continues(prefill: Engine, decode: Engine) -> None:
    request = prefill.add("p", tokens_of(150), sending())
    prefill.step()
    prefill.scheduler.running.remove(request)
    prefill.scheduler._preempt_request(request, 0.0)
    prefill.run()
    received = decode.add("d", tokens_of(150), loading(), max_tokens=2)
    decode.step()
    assert decode.holds(received, 150)
    assert [m.ok for m in the_daemon().let_go if m.side == "send"] == [True]


def test_a_bad_page_is_recomputed_from_its_block_on(prefill: Engine, decode: Engine) -> None:
    prefill.add("p", tokens_of(150), sending())
    prefill.run()
    place = the_daemon().handoffs[(1).to_bytes(16, "big")].places[1]
    the_daemon().arena.memory[place.page_offset(the_daemon().layout, 2)] ^= 1
    request = decode.add("d", tokens_of(150), loading(), max_tokens=2)
    assert decode.scheduler.recompute_kv_load_failures
    scheduled = decode.run()
    assert [s.total_num_scheduled_tokens for s in scheduled] == [0, 64, 150 - 32 - 64, 1, 0]
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED


def test_answers_to_one_prompt_share_a_handle_and_all_come(prefill: Engine, decode: Engine) -> None:
    the_daemon().hold_back = True  # as one in another process: its answers are not there at once
    sent = [prefill.add(f"{n}_p", tokens_of(70), sending()) for n in range(2)]
    loaded = [decode.add(f"{n}_d", tokens_of(70), loading()) for n in range(2)]
    the_daemon().hold_back = False
    prefill.run()
    decode.run()
    assert {request.status for request in (*sent, *loaded)} == {RequestStatus.FINISHED_LENGTH_CAPPED}
    assert [(letting.side, letting.ok) for letting in the_daemon().let_go] == [("send", True), ("load", True)]


def test_without_vllm_s_prefix_caching_only_handoffs_are_carried(
    model_dir: Path, fresh_daemon: None, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = (Engine(model_dir, role, prefix_caching=False) for role in ("kv_producer", "kv_consumer"))
    assert "prefix caching is off" in caplog.text
    prefill.add("p", tokens_of(150), sending())
    prefill.run()
    decode.add("d", tokens_of(150), loading(), max_tokens=40)
    assert [s.total_num_scheduled_tokens for s in decode.run()] == [0, *[1] * 40, 0]
    for engine in (prefill, decode):
        engine.add("again", tokens_of(150), {})
        assert [s.total_num_scheduled_tokens for s in engine.run()] == [64, 64, 22, 0]
    prefill.add("q", tokens_of(150), sending(2))
    prefill.run()
    decode.add("e", tokens_of(150), loading(2), max_tokens=40)
    assert [s.total_num_scheduled_tokens for s in decode.run()] == [0, *[1] * 40, 0]
    received = the_daemon().received
    assert not any(isinstance(message, Keep | LookUp) for message in received)
    named = [{*message.block_hashes, message.tail_hash} for message in received if isinstance(message, OpenSend)]
    assert len(named) == 2 and not named[0] & named[1], "blocks of one handoff may serve another"


def test_loads_that_fail_inside_of_vllm_s_multi_connector_are_recomputed_too(
    model_dir: Path, fresh_daemon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KVConnectorFactory._registry, plugin.NAME, lambda: MemoryConnector)
    config = vllm_config(model_dir, connectors=[{"kv_connector": plugin.NAME, "kv_role": "kv_both"}])
    assert config.kv_transfer_config is not None
    config.kv_transfer_config.kv_connector, config.kv_transfer_config.kv_connector_module_path = "MultiConnector", None
    scheduler = Scheduler(
        config, kv_cache_config(), StructuredOutputManager(config), BLOCK_TOKENS, hash_block_size=BLOCK_TOKENS
    )
    assert the_daemon().clients
    assert scheduler.recompute_kv_load_failures


def test_an_abort_while_loading_is_clean(prefill: Engine, decode: Engine) -> None:
    prefill.add("p", tokens_of(150), sending())
    prefill.step()
    request = decode.add("d", tokens_of(150), loading())
    decode.step()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    decode.scheduler.finish_requests("d", RequestStatus.FINISHED_ABORTED)
    decode.run()
    assert not decode.scheduler.requests
    assert decode.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1
    assert [m.ok for m in the_daemon().let_go if m.side == "load"] == [False]


def test_a_dead_daemon_means_recompute(prefill: Engine, decode: Engine) -> None:
    prefill.add("p", tokens_of(150), sending())
    prefill.step()
    request = decode.add("d", tokens_of(150), loading(), max_tokens=2)
    decode.step()
    the_daemon().die()
    decode.run()
    prefill.run()
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED


def test_new_weights_find_nothing_in_vllm_s_own_cache_and_are_told(prefill: Engine) -> None:
    """Nobody has reset it: blocks of before are of no use to whoever comes, those of who is there neither."""
    long = prefill.add("long", tokens_of(150), {}, max_tokens=40)
    for _ in range(5):
        prefill.step()
    old = set(prefill.scheduler.kv_cache_manager.get_block_ids("long")[0])
    prefill.weights = "0e" * 16
    prefill.worker.watch.mark()
    prefill.step()
    assert prefill.scheduler.connector._scheduler_side._epoch.name == "0e" * 16  # type: ignore[union-attr]
    prefill.add("new", tokens_of(150), {}, max_tokens=2)
    prefill.step()
    assert not old & set(prefill.scheduler.kv_cache_manager.get_block_ids("new")[0])
    prefill.run()
    assert long.status == RequestStatus.FINISHED_LENGTH_CAPPED
    prefill.add("again", list(long.all_token_ids)[:190], {}, max_tokens=2)
    assert prefill.step().num_scheduled_tokens == {"again": 190 - 4 * BLOCK_TOKENS}, "behind what the new one computed"
    prefill.run()


def test_vllm_s_reset_reaches_the_daemon(prefill: Engine) -> None:
    prefill.add("a", tokens_of(70), {})
    prefill.run()
    assert prefill.scheduler.reset_prefix_cache(reset_connector=True)
    prefill.add("p", tokens_of(70), sending())
    assert [step.total_num_scheduled_tokens for step in prefill.run()] == [0, 64, 6, 0], (
        "the weights are looked at first"
    )
    assert the_daemon().kept == {}
    assert the_daemon().handoffs[(1).to_bytes(16, "big")].let_go["send"].ok


def test_stats_reach_prometheus(prefill: Engine, model_dir: Path) -> None:
    prefill.add("p", tokens_of(20), sending())
    scheduled = prefill.step()
    assert scheduled is not None
    rebuilt = PdxConnector.build_kv_connector_stats({"pages_saved": 3, "loads_failed": 1})
    assert isinstance(rebuilt, PdxStats)
    assert not rebuilt.is_empty()
    assert rebuilt.aggregate(PdxStats({"pages_saved": 2})).reduce() == {"pages_saved": 5, "loads_failed": 1}
    metric_types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    metrics = PdxConnector.build_prom_metrics(vllm_config(model_dir), metric_types, ["engine"], {0: ["0"]})
    assert metrics is not None
    metrics.observe({"pages_saved": 5})
    assert metrics._counters["pages_saved"][0]._value.get() == 5
    assert set(metrics._counters) == set(COUNTERS)
    listed = [name.strip("`") for name, _ in rows_under("Exported by vLLM", page="docs/metrics.md")]
    assert listed == [f"vllm:pdx_{name}_total" for name in COUNTERS]


def test_hooks_have_vllm_s_signatures() -> None:
    ours = {name: value for name, value in vars(PdxConnector).items() if not name.startswith("_")}
    for name, value in ours.items():
        base = inspect.getattr_static(SupportsHMA if hasattr(SupportsHMA, name) else KVConnectorBase_V1, name)
        assert type(value) is type(base), name
        if isinstance(value, property):
            continue
        functions = [getattr(f, "__func__", f) for f in (value, base)]
        mine, theirs = (inspect.signature(f).parameters.values() for f in functions)
        assert [(p.name, p.kind, p.default) for p in mine] == [(p.name, p.kind, p.default) for p in theirs], name
    assert not PdxConnector.__abstractmethods__
    assert PdxConnector.get_required_kvcache_layout(None) == "LBHNC"  # type: ignore[arg-type]
    assert PdxConnector.requires_piecewise_for_cudagraph({})


def test_the_plugin_registers_once_and_imports_nothing_early() -> None:
    plugin.register()
    plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name("PdxConnector") is PdxConnector


def test_metadata_survives_pickling() -> None:
    step = Step(3, 9, 5, saves=[Save(b"h", [(0, (4, 7), Place(8192, 1, 0, 4096, 2))], last=True, pages=3)])
    report = Report(3, {"r": LoadResult(True, 3, 5)})
    for value in (StepMetadata(step), ReportMetadata(report)):
        assert pickle.loads(pickle.dumps(value)) == value


def test_what_ranks_report_is_joined() -> None:
    first = Report(3, {"r": LoadResult(True, 3, 9), "s": LoadResult(True, 3, 5)})
    second = Report(3, {"r": LoadResult(False, 1, 7, "differ", [2]), "t": LoadResult(True, 3, 6)})
    joined = ReportMetadata(first).aggregate(ReportMetadata(second)).report
    assert joined == Report(
        3,
        {
            "r": LoadResult(False, 4, 9, "differ", [2], ranks=2),
            "s": LoadResult(True, 3, 5),
            "t": LoadResult(True, 3, 6),
        },
    )


def test_data_parallel_ranks_have_names_of_their_own(model_dir: Path) -> None:
    config = vllm_config(model_dir, engine_id="E")
    alone = settings.read(config)
    assert (alone.engine_id, alone.data_parallel_rank) == ("E", None)
    parallel = config.parallel_config
    parallel.data_parallel_rank_local, parallel.data_parallel_index = 1, 3
    assert config.kv_transfer_config is not None
    config.kv_transfer_config.engine_id = "an-id_dp3"  # as vLLM does in each of its engines
    shared = settings.read(config)
    assert (shared.engine_id, shared.data_parallel_rank) == ("E_dp3", 3)
    parallel.data_parallel_external_lb = True  # each server knows its own ranks only, and counts them from 0
    assert settings.read(config).data_parallel_rank == 1


def test_settings_are_typed_and_unknown_keys_refused(model_dir: Path) -> None:
    chosen = settings.read(
        vllm_config(model_dir, "kv_producer", url="http://127.0.0.1:1", engine_id="e", chunk_tokens=64)
    )
    assert (chosen.role, chosen.url, chosen.engine_id, chosen.config.chunk_tokens) == (
        "prefill", "http://127.0.0.1:1", "e", 64,
    )  # fmt: skip
    assert settings.read(vllm_config(model_dir)).engine_id  # vLLM's own
    assert settings.read(vllm_config(model_dir)).reasoning_parser == ""
    thinking = vllm_config(model_dir)
    thinking.structured_outputs_config.reasoning_parser = "deepseek_r1"
    assert settings.read(thinking).reasoning_parser == "deepseek_r1"
    with pytest.raises(ConfigError, match="did you mean 'chunk_tokens'"):
        settings.read(vllm_config(model_dir, chunk_token=64))
    with pytest.raises(ConfigError):
        settings.read(vllm_config(model_dir, chunk_tokens=0))


def test_other_versions_of_vllm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.check_version().startswith("0.32")
    monkeypatch.setattr("vllm.__version_tuple__", (0, 33, 1))
    with pytest.raises(Refused, match=r"supports vLLM 0\.32\.x"):
        compat.check_version()


def test_random_hash_seeds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert compat.hash_seed("sha256") == "vllm-none-hash"
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert compat.hash_seed("sha256_cbor") == "0"


@pytest.mark.parametrize(
    "own", ["conversation-7", "a" * 63, "a" * 300, "a/b", "@", "\\", "\0", "x" * 43 + "=", "\u00e9", ""]
)
def test_every_tenants_salt_is_one_for_vllm(own: str) -> None:
    body = {"cache_salt": own}
    Caller("alice", "t" * 64).salted(body)
    validate_cache_salt(body["cache_salt"])
