"""Texts between the processes of one router: whoever connects to a Unix socket gets one, and the connection's end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path

ASK_S = 2.0
TEXT_BYTES_MAX = 16 << 20
PART_BYTES = 64 << 10
END = b"# EOF\n"  # as OpenMetrics has it: of a process that was killed half a text may come, with half a number


async def serve_text(stack: AsyncExitStack, path: Path, text: Callable[[], bytes]) -> None:
    """Whoever connects gets the text, and the end of the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError):
            writer.write(text() + END)
            await writer.drain()

    await stack.enter_async_context(await asyncio.start_unix_server(answer, path))


async def read_text(path: Path, deadline_s: float = ASK_S) -> bytes | None:
    """What is served there; nothing if nobody is there. None: whoever is there does not answer in time."""
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_unix_connection(path)
            with closing(writer):
                return await _whole(reader)
    except TimeoutError:
        return None
    except OSError:
        return b""


async def _whole(reader: asyncio.StreamReader) -> bytes:
    """Up to its end; nothing if that is missing, or too far."""
    parts = bytearray()
    while part := await reader.read(PART_BYTES):
        parts += part
        if len(parts) > TEXT_BYTES_MAX:
            return b""
    return bytes(parts).removesuffix(END) if parts.endswith(END) else b""
