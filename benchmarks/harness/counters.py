"""Counters of what is measured, from Prometheus' text."""

from __future__ import annotations

import re
import urllib.request

METRICS_S = 10.0


def scraped(url: str, name: str, label: str = "") -> int:
    """See `counted`; `url` is that of the metrics."""
    with urllib.request.urlopen(url, timeout=METRICS_S) as reply:
        return counted(reply.read().decode(), name, label)


def counted(metrics: str, name: str, label: str = "") -> int:
    """The sum of a counter over all its labels, or over those lines that have `label` ('source="cache"')."""
    found = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
    return int(sum(float(value) for labels, value in found if label in labels))
