"""Sets of byte ranges and whether they cover another. Integers only; knows nothing of memory or peers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from pdx.transport.api import Span


class SpanSet:
    """Immutable union of spans. Touching spans are merged, so a range may run across several of them."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for span in sorted(spans, key=lambda span: span.offset):
            if span.length == 0:
                continue
            end = span.offset + span.length
            if self._ends and span.offset <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(span.offset)
                self._ends.append(end)

    def spans(self) -> list[Span]:
        """The same bytes, in order and as few."""
        return [Span(start, end - start) for start, end in zip(self._starts, self._ends, strict=True)]

    def covers(self, span: Span) -> bool:
        """Whether every byte of a non-empty `span` lies in this set."""
        index = bisect_right(self._starts, span.offset) - 1
        return index >= 0 and span.offset + span.length <= self._ends[index]


def check_inside(spans: Iterable[Span], region_bytes: int) -> None:
    """Raises ValueError unless every span lies inside a region of `region_bytes`."""
    for span in spans:
        if span.offset < 0 or span.length < 0 or span.offset + span.length > region_bytes:
            raise ValueError(f"span {span.offset}+{span.length} lies outside the region of {region_bytes} bytes")
