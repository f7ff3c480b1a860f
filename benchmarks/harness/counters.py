"""Counters of what is measured, from Prometheus' text."""

from __future__ import annotations

import re
import urllib.request

from pdx.errors import PdxError

METRICS_S = 10.0


def scraped(url: str, name: str, label: str = "", *, late: bool = False) -> int:
    """See `counted`; `url` is that of the metrics."""
    with urllib.request.urlopen(url, timeout=METRICS_S) as reply:
        return counted(reply.read().decode(), name, label, late=late)


def counted(metrics: str, name: str, label: str = "", *, late: bool = False) -> int:
    """The sum of a counter over all its labels, or over those lines that have `label` ('source="cache"').

    Raises PdxError if there is no such line: a counter that was renamed is no 0. `late`: it is 0, for whoever counts
    writes no line before the first event.
    """
    found = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
    values = [float(value) for labels, value in found if label in labels]
    if not values and not late:
        raise PdxError(f"no counter {name}{f' with {label}' if label else ''} among the metrics")
    return int(sum(values))
