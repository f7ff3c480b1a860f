"""Adds up the metrics of several processes, texts in and a text out, so that no counter ever falls.

Of a process that has ended its last counters stay, folded into one; its gauges go with it. Knows Prometheus' text
format as prometheus_client writes it; nothing of sockets or processes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

# Of a state that all workers see alike, the sum would be wrong.
SEEN_BY_ALL = frozenset(f"pdx_router_{gauge}" for gauge in ("engines", "reservations_waiting", "known_blocks"))

_log = logging.getLogger(__name__)


class Totals:
    """Texts by process, as they were heard last."""

    def __init__(self) -> None:
        self._alive: dict[str, bytes] = {}
        self._ended = b""
        self._complained = False

    def heard(self, texts: Mapping[str, bytes]) -> None:
        """What the processes say that there are now, each by name. One that says nothing is only slow, and its last
        text stands, as it does where what it says now can't be added; one that is not named has ended."""
        for name in set(self._alive) - set(texts):
            self._ended = added([self._ended, self._alive.pop(name)], gauges=False)
        self._alive.update({name: text for name, text in texts.items() if text and self._can_be_added(name, text)})

    def added(self, own: bytes) -> bytes:
        return added([own, *self._alive.values(), self._ended])

    def _can_be_added(self, name: str, text: bytes) -> bool:
        try:
            added([text])
        except (ValueError, LookupError):
            if not self._complained:
                self._complained = True
                _log.exception("the metrics of %s can't be added up; this is said once", name)
            return False
        return True


def added(texts: Iterable[bytes], *, gauges: bool = True) -> bytes:
    """One text for several. Of gauges that all see alike the largest value, without `gauges` none at all."""
    heads: dict[str, list[str]] = {}  # metric -> its comments
    values: dict[str, dict[str, float]] = {}  # metric -> sample -> value
    kinds: dict[str, str] = {}
    for text in texts:
        metric = ""
        for line in text.decode().split("\n"):  # a label may have what else would end a line
            if line.startswith("# "):
                _, word, metric, *rest = line.split(" ", 3)
                if word == "TYPE":
                    kinds[metric] = rest[0]
                comments = heads.setdefault(metric, [])
                if line not in comments:
                    comments.append(line)
            elif line:
                sample, _, value = line.rpartition(" ")
                samples = values.setdefault(metric, {})
                before = samples.get(sample, 0.0)
                samples[sample] = max(before, float(value)) if metric in SEEN_BY_ALL else before + float(value)
    lines = []
    for metric, comments in heads.items():
        # The library's _created are gauges too: times, which have no sum.
        if metric.endswith("_created") or (not gauges and kinds.get(metric) == "gauge"):
            continue
        lines += [*comments, *(f"{sample} {value}" for sample, value in values.get(metric, {}).items())]
    return "".join(f"{line}\n" for line in lines).encode()
