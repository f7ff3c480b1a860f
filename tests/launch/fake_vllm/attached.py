"""What an engine tells its daemon of itself, by pdx's own client: one rank, whose KV nobody asks for."""

from __future__ import annotations

from typing import Any

from pdx.client import Attachment
from pdx.config import load
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.layout import PageLayout
from pdx.wire import Attach, EngineInfo

ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}
PAGES = PageLayout(layers=3, page_bytes=8192, chunk_blocks=2)
HELD: list[Attachment] = []


def attach(transfer: dict[str, Any], model: str) -> None:
    """Its scheduler and its worker, until the process ends: they find the next daemon when this one has died."""
    extra = dict(transfer["kv_connector_extra_config"])
    info = EngineInfo(
        engine_id=extra.pop("engine_id"), url=extra.pop("url"), role=ROLES[transfer["kv_role"]], model=model,
        content=ContentFingerprint(
            model=model, weights="w", weight_epoch="", dtype="bf16", block_tokens=16, hash_algorithm="sha"
        ),
        layout=LayoutFingerprint(
            engine="fake 1", attention="none", layers=PAGES.layers, page_bytes=PAGES.page_bytes, block_tokens=16,
            packing="L", kv_groups=1, ranks=1, chunk_blocks=PAGES.chunk_blocks,
        ),
    )  # fmt: skip
    settings = load(extra)
    scheduler = Attachment(settings, Attach(kind="scheduler", engine=info, router=settings.router))
    worker = Attachment(settings, Attach(kind="worker", engine=info, pages=PAGES))
    for each in (scheduler, worker):
        each.client()
        HELD.append(each)
    worker.let_go()
