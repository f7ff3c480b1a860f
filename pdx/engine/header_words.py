"""Checksums, watermarks and generations of many blocks at once, while other threads want the interpreter.

Same words and same rules as `buffer.headers`, which reads and writes them one by one at some 2 us a page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pdx.engine.copier import Fault
from pdx.layout import CHECKSUM_BYTES, HEADER_FIXED_BYTES, PageLayout, Place


class HeaderWords:
    """An arena's headers as arrays. Any thread; one writer per word."""

    def __init__(self, memory: memoryview) -> None:
        self._words = np.frombuffer(memory, np.uint32)
        self._longs = np.frombuffer(memory, np.uint64)

    def filled(self, places: Sequence[Place], layer: int, digests: Sequence[int], layout: PageLayout) -> None:
        """These pages are in their slots: writes their checksums, then raises watermarks over what has no gap.

        `layer`, here and below: as the slots count them; the watermark is that of its shard.
        """
        headers = _headers(places)
        checksums = _checksums(headers, layer)
        self._longs[checksums] = np.asarray(digests, np.uint64)
        shard = layer // layout.shard_layers
        first = layout.slot_layer(shard, 0)
        watermarks = (headers >> 2) + 1 + shard
        raised = self._words[watermarks]
        # Layers come in order from hooks; those swept after the step fill gaps, which the checksums show.
        rising = np.flatnonzero(raised == layer - first)
        while rising.size:
            raised[rising] += 1
            layer += 1
            if layer == first + layout.shard_layers:
                break
            rising = rising[self._longs[_checksums(headers[rising], layer)] != 0]
        self._words[watermarks] = raised

    def faults(self, places: Sequence[Place], layer: int, digests: Sequence[int]) -> list[tuple[int, Fault]]:
        """Of copies of these pages that are done and had these digests: (index, why) of those not to be used."""
        headers = _headers(places)
        wrong = self._longs[_checksums(headers, layer)] != np.asarray(digests, np.uint64)
        # Read last: if it is still ours now, so were the bytes and the checksum read before.
        generations = np.fromiter((place.generation for place in places), np.uint32, len(places))
        changed = self._words[headers >> 2] != generations
        return [(int(n), Fault.GENERATION if changed[n] else Fault.CHECKSUM) for n in np.flatnonzero(changed | wrong)]


def _headers(places: Sequence[Place]) -> npt.NDArray[np.int64]:
    return np.fromiter((place.header_offset for place in places), np.int64, len(places))


def _checksums(headers: npt.NDArray[np.int64], layer: int) -> npt.NDArray[np.int64]:
    return (headers + (HEADER_FIXED_BYTES + layer * CHECKSUM_BYTES)) >> 3
