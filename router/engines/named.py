"""Engines that an operator has named (--decode, --prefill) instead of, or before, a daemon announcing them.

A named decode engine may be any OpenAI-compatible server: it is asked for its models and then serves whole requests,
until a daemon announces the same address and it can pair. A named prefill engine is of no use without its daemon: it is
only missed. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec

from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.router.engines.directory import Directory
from pdx.router.engines.upstream import Upstream
from pdx.wire import EngineInfo

ASK_S = 5.0  # between two looks at its models
MODELS_MAX = 64


class Named:
    """The addresses, and what has become of them."""

    def __init__(self, directory: Directory, *, prefills: Sequence[str] = (), decodes: Sequence[str] = ()) -> None:
        self._directory = directory
        self._prefills = [url.rstrip("/") for url in prefills]
        self._decodes = [url.rstrip("/") for url in decodes]

    def missing(self) -> list[str]:
        """One sentence for each engine that has not come."""
        announced, known = self._directory.urls(announced=True), self._directory.urls()
        prefills = [
            f"no daemon has announced the prefill engine {url}" for url in self._prefills if url not in announced
        ]
        return prefills + [
            f"the decode engine {url} has not said what it serves" for url in self._decodes if url not in known
        ]

    async def run(self, upstream: Upstream) -> None:
        """Looks after the named decode engines for ever."""
        async with asyncio.TaskGroup() as tasks:
            for url in self._decodes:
                tasks.create_task(self._look_after(url, upstream))

    async def _look_after(self, url: str, upstream: Upstream) -> None:
        while True:
            models = _models(await upstream.page(f"{url}/v1/models"))
            if models:
                self._directory.on_named(_info(url, models), time.monotonic())
            await asyncio.sleep(ASK_S if models else 1.0)


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


_decode = msgspec.json.Decoder(_Models).decode


def _models(page: bytes) -> list[_Model]:
    try:
        return _decode(page).data[:MODELS_MAX]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return []


def _info(url: str, models: list[_Model]) -> EngineInfo:
    """Its content is like nobody's, so that it is never paired, nor goes on with another's token ids."""
    content = ContentFingerprint(
        model=models[0].id, weights=f"named: {url}", weight_epoch="", dtype="", block_tokens=0, hash_algorithm=""
    )
    layout = LayoutFingerprint(
        engine="",
        attention="",
        layers=0,
        page_bytes=0,
        block_tokens=0,
        packing=f"named: {url}",
        kv_groups=0,
        ranks=0,
        chunk_blocks=0,
    )
    return EngineInfo(
        engine_id=f"named-{url.partition('//')[2]}",
        role="decode",
        model=models[0].id,
        url=url,
        context_tokens=models[0].max_model_len or 0,
        adapters={model.id: f"named: {url}" for model in models[1:]},
        content=content,
        layout=layout,
    )
