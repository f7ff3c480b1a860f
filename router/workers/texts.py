"""Texts between the processes of one router: whoever connects to a Unix socket gets one, and the connection's end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path

ASK_S = 2.0
TEXT_BYTES_MAX = 16 << 20
PART_BYTES = 64 << 10


async def serve_text(stack: AsyncExitStack, path: Path, text: Callable[[], bytes]) -> None:
    """Whoever connects gets the text, and the end of the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError):
            writer.write(text())
            await writer.drain()

    await stack.enter_async_context(await asyncio.start_unix_server(answer, path))


async def read_text(path: Path) -> bytes:
    """What is served there; nothing if nobody answers within ASK_S."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(ASK_S):
            reader, writer = await asyncio.open_unix_connection(path)
            with closing(writer):
                return await _whole(reader)
    return b""


async def _whole(reader: asyncio.StreamReader) -> bytes:
    """Up to the end of the connection; nothing if that is too much."""
    parts = bytearray()
    while part := await reader.read(PART_BYTES):
        parts += part
        if len(parts) > TEXT_BYTES_MAX:
            return b""
    return bytes(parts)
