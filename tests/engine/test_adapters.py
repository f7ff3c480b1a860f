"""LoRA adapters: named by their files, and by nothing where these are not what the engine was started with."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: its adapters can't be asked for")
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("fresh_daemon")]

from daemon.fleet import until  # noqa: E402
from memory_connector import the_daemon  # noqa: E402
from vllm.config import LoRAConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm_engine import BLOCK_TOKENS, LAYERS, Engine, kv_cache_config, vllm_config, write_model  # noqa: E402

from pdx.engine.vllm import asking, settings  # noqa: E402
from pdx.engine.vllm.adapters import NO_ADAPTER, SETTLED_S, Adapters  # noqa: E402
from pdx.errors import ConfigError, Refused  # noqa: E402


def write_adapter(folder: Path, weights: bytes = b"weights") -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("read me")
    return str(folder)


def asked(name: str, path: str, *, inplace: bool = False) -> LoRARequest:
    return LoRARequest(name, 1, path, load_inplace=inplace)


def test_an_adapter_is_named_by_its_path_and_files(tmp_path: Path) -> None:
    one, other = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "other")
    adapters = Adapters({"a": one, "b": one, "c": other})
    assert adapters.salt(None) == NO_ADAPTER
    assert adapters.digests["a"] == adapters.digests["b"] != adapters.digests["c"]
    assert adapters.salt(asked("a", one)).hex() == adapters.digests["a"] == Adapters({"a": one}).digests["a"]
    (tmp_path / "one" / "README.md").write_text("changed")
    assert adapters.salt(asked("a", one))
    for name, path, inplace in (("new", one, False), ("a", other, False), ("a", one, True)):
        with pytest.raises(Refused, match="none that this engine was started with"):
            adapters.salt(asked(name, path, inplace=inplace))


def test_an_adapter_of_which_vllm_applies_a_part_is_another_one(model_dir: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "one")
    assert Adapters({"a": path}, modules=["v", "q"]).digests == Adapters({"a": path}, modules=["q", "v"]).digests
    seen = set()
    for lora in (None, LoRAConfig(), LoRAConfig(target_modules=["q_proj"]), LoRAConfig(target_modules=["v_proj"])):
        config = vllm_config(model_dir, adapters={"a": path})
        config.lora_config = lora
        connector = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, kv_cache_config())
        seen.add(connector._adapters.digests["a"])
        connector.shutdown()
    assert len(seen) == 3


@pytest.mark.parametrize("change", ["same length and times", "removed", "dangling", "another file"])
def test_an_adapter_that_changed_has_no_name(tmp_path: Path, change: str) -> None:
    path = write_adapter(tmp_path / "one")
    adapters = Adapters({"a": path})
    file = tmp_path / "one" / "adapter_model.safetensors"
    match change:
        case "same length and times":
            before = file.stat()
            file.write_bytes(b"WEIGHTS")
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "removed":
            shutil.rmtree(path)
        case "dangling":
            file.unlink()
            file.symlink_to(tmp_path / "nowhere")
        case "another file":
            (tmp_path / "one" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(Refused, match="have changed"):
        adapters.salt(asked("a", path))
    if change not in ("removed", "dangling"):
        assert Adapters({"a": path}).digests != adapters.digests


def test_a_folder_is_listed_only_if_other_files_may_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is asked for in every step."""
    path = write_adapter(tmp_path / "one")
    adapters, listings = Adapters({"a": path}), []
    monkeypatch.setattr(
        Path, "iterdir", lambda folder, listed=Path.iterdir: (listings.append(folder), listed(folder))[1]
    )
    for _ in range(2):
        assert adapters.salt(asked("a", path))
    assert len(listings) == 2, "it changed a moment ago, and may have again"
    later = time.time() + 2 * SETTLED_S
    monkeypatch.setattr(time, "time", lambda: later)
    for _ in range(3):
        assert adapters.salt(asked("a", path))
    assert len(listings) == 3
    (tmp_path / "one" / "notes").write_bytes(b"")
    assert adapters.salt(asked("a", path))
    assert len(listings) == 4
    (tmp_path / "one" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(Refused, match="have changed"):
        adapters.salt(asked("a", path))


@pytest.mark.parametrize("change", ["in place", "renamed", "removed"])
def test_a_file_that_changed_in_a_folder_that_did_not_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = write_adapter(tmp_path / "one")
    adapters, later = Adapters({"a": path}), time.time() + 2 * SETTLED_S
    monkeypatch.setattr(time, "time", lambda: later)
    assert adapters.salt(asked("a", path))
    file = tmp_path / "one" / "adapter_model.safetensors"
    match change:
        case "in place":
            file.write_bytes(b"WEIGHTS")
        case "renamed":
            (tmp_path / "other").write_bytes(b"weights")
            (tmp_path / "other").rename(file)
        case "removed":
            file.unlink()
    with pytest.raises(Refused, match="have changed"):
        adapters.salt(asked("a", path))


def test_only_adapters_that_compute_in_a_step_are_looked_at(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {name: write_adapter(tmp_path / name) for name in ("a", "b")}
    engine = Engine(model_dir, "kv_both", adapters=paths)
    for name in paths:
        engine.add(name, list(range(200)), {}, adapter=asked(name, paths[name]))
    looked: list[str] = []
    monkeypatch.setattr(Adapters, "_has_changed", lambda _, adapter: looked.append(adapter.path))
    computing = engine.step().num_scheduled_tokens
    assert len(computing) < len(paths), "the first has all of this step's tokens"
    assert looked == [paths[name] for name in computing]
    engine.run()


def test_a_file_system_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows what is there: nothing is used or saved, and only the first question waits."""
    path = write_adapter(tmp_path / "one")
    monkeypatch.setattr(asking, "LOCAL", ())
    adapters, hangs, asks = Adapters({"a": path}), threading.Event(), threading.Semaphore(0)

    def hang(*_: object) -> bool:
        asks.release()
        assert hangs.wait(60)
        return False

    monkeypatch.setattr(Adapters, "_has_changed", hang)
    try:
        with pytest.raises(Refused, match="can't be looked at"):
            adapters.salt(asked("a", path))
        assert asks.acquire(timeout=60)
        for _ in range(3):
            assert adapters.changed(["a"]) == {"a"}
            with pytest.raises(Refused, match="can't be looked at"):
                adapters.salt(asked("a", path))
        assert not asks.acquire(blocking=False)
    finally:
        hangs.set()
    until(lambda: not adapters.changed(["a"]), "it answers again")


def test_files_that_are_linked_from_elsewhere_are_asked_for_where_they_lie(tmp_path: Path) -> None:
    here, proc = str(tmp_path / "here"), str(tmp_path / "there")
    Path(here).touch()
    Path(proc).symlink_to("/proc/self/status")
    assert not asking.all_local([proc])
    assert not asking.all_local([here, proc])
    with pytest.raises(OSError, match="nowhere"):
        asking.all_local([here, str(tmp_path / "nowhere")])


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path), str(tmp_path / "nowhere"), "hub/adapter"):
        with pytest.raises(Refused, match=r"has no adapter_config\.json"):
            Adapters({"a": path})
    with pytest.raises(ConfigError, match="adapters must be"):
        settings.read(vllm_config(write_model(tmp_path), adapters=["a"]))


@pytest.mark.parametrize("count", [20, 150])
def test_a_handoff_with_an_adapter(model_dir: Path, tmp_path: Path, count: int) -> None:
    """Of 20 tokens there is only the tail."""
    path = write_adapter(tmp_path / "one")
    prefill, decode = (Engine(model_dir, role, adapters={"a": path}) for role in ("kv_producer", "kv_consumer"))
    tokens, adapter = list(range(count)), asked("a", path)
    handle = the_daemon().handle()
    prefill.add("p", tokens, {"do_remote_decode": True, "pdx_handle": handle}, adapter=adapter)
    prefill.run()
    loading = {"do_remote_prefill": True, "pdx_handle": handle}
    plain = decode.add("plain", tokens, loading, max_tokens=2)
    assert decode.step().total_num_scheduled_tokens > 0, "the model itself computes something else"
    decode.run()
    assert plain.is_finished()
    decode.add("d", tokens, loading, max_tokens=2, adapter=adapter)
    assert decode.step().total_num_scheduled_tokens == 0
    decode.run()
    loads = [m for m in the_daemon().let_go if m.side == "load"]
    assert [(m.ok, m.pages) for m in loads] == [(True, -(-count // BLOCK_TOKENS) * LAYERS)]


def test_blocks_are_kept_for_the_adapter_that_made_them(model_dir: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "one")
    before, tokens, adapter = Engine(model_dir, "kv_both", adapters={"a": path}), list(range(150)), asked("a", path)
    before.add("warm", tokens, {}, max_tokens=3, adapter=adapter)
    before.run()
    assert len(the_daemon().kept) == 4
    again = Engine(model_dir, "kv_both", adapters={"a": path})
    again.add("again", tokens, {}, adapter=adapter)
    assert again.step().total_num_scheduled_tokens == 0
    again.run()
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"retrained")
    for engine in (again, Engine(model_dir, "kv_both", adapters={"a": path})):
        engine.scheduler.kv_cache_manager.reset_prefix_cache()
        engine.add("retrained", tokens, {}, adapter=adapter)
        assert engine.step().total_num_scheduled_tokens > 0, "what the old weights made is not found"
        engine.run()
    assert len(the_daemon().kept) == 8, "the new engine keeps, the old one does not know which weights it has"


def test_an_adapter_that_changes_under_a_request_ends_what_is_saved_of_it(model_dir: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "one")
    engine = Engine(model_dir, "kv_producer", adapters={"a": path})
    sending = {"do_remote_decode": True, "pdx_handle": the_daemon().handle()}
    engine.add("p", list(range(150)), sending, adapter=asked("a", path))
    engine.step()
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"retrained")
    engine.run()
    assert [(m.ok, m.reason) for m in the_daemon().let_go] == [(False, "its adapter's files have changed")]
