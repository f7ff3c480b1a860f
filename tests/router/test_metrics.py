"""The metrics, the page that lists them and the dashboard that draws them agree; labels and cost are bounded."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_tables import ROOT, rows_under
from prometheus_client.parser import text_string_to_metric_families

from pdx.router import metrics as code
from pdx.router.metrics import MODELS_MAX, Metrics, Moment

SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def exported() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> (kind, labels), from the registry itself."""
    found = {}
    for held in vars(Metrics()).values():
        if not hasattr(held, "describe"):
            continue
        for family in held.describe():
            labels = getattr(held, "_labelnames", ("model",))  # the library tells them nowhere else
            found[family.name + ("_total" if family.type == "counter" else "")] = (family.type, tuple(labels))
    return found


def test_the_page_lists_what_is_exported() -> None:
    listed = {}
    for name, kind, labels, _ in rows_under("Exported", page="docs/metrics.md"):
        listed[name.strip("`")] = (kind, tuple(filter(None, labels.split(", "))))
    assert listed == exported()


def test_what_is_registered_is_rendered() -> None:
    metrics = Metrics()
    metrics.ttft_s.of("m").observe(0.02)
    text = metrics.render(Moment(reservations_waiting=3)).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    shown = {name for name in families if not name.endswith("_created")}  # the library's own
    assert {name.removesuffix("_total") for name in exported()} == shown
    assert "pdx_router_reservations_waiting 3.0" in text


def test_a_histogram_counts_as_prometheus_does() -> None:
    metrics = Metrics()
    series = metrics.ttft_s.of("m")
    for value in (0.0, 0.001, 0.0011, 5000.0):
        series.observe(value)
    rows = {
        sample.labels["le"]: sample.value
        for family in metrics.ttft_s.collect()
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }
    assert (rows["0.001"], rows["0.005"], rows["2560.0"], rows["+Inf"]) == (2, 3, 3, 4)
    text = metrics.render(Moment()).decode()
    assert 'pdx_router_ttft_seconds_count{model="m"} 4.0' in text
    assert 'pdx_router_ttft_seconds_sum{model="m"} 5000.0021' in text


def test_vllms_edges() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed: pip install 'pdx-kv[cpu]'")
    # The one file: all of vLLM takes seconds to import.
    edges = runpy.run_path(str(Path(found.origin).parent / "v1" / "metrics" / "buckets.py"))
    assert code.TTFT_BUCKETS_S == edges["TIME_TO_FIRST_TOKEN_BUCKETS"]
    assert code.ITL_BUCKETS_S == edges["INTER_TOKEN_LATENCY_BUCKETS"]
    assert code.E2E_BUCKETS_S == edges["REQUEST_LATENCY_BUCKETS"]


def test_no_flood_of_models_becomes_a_flood_of_series() -> None:
    metrics = Metrics()
    labels = {metrics.model(f"m{n}") for n in range(10 * MODELS_MAX)}
    assert len(labels) == MODELS_MAX + 1
    assert metrics.model("m0") == "m0"


def queries(panel: Any) -> list[str]:
    if isinstance(panel, list):
        return [query for each in panel for query in queries(each)]
    if isinstance(panel, dict):
        return [v for k, v in panel.items() if k == "expr"] + [q for v in panel.values() for q in queries(v)]
    return []


def everything() -> dict[str, tuple[str, set[str]]]:
    """Name -> (kind, labels) of all that is exposed. (That the page is right about daemons and engines others test.)"""
    found = {name: (kind, set(labels)) for name, (kind, labels) in exported().items()}
    for name, kind, labels, _ in rows_under("Exported by the admin port", page="docs/metrics.md"):
        found[name.strip("`")] = (kind, set(labels.split(", ")))
    for name, _ in rows_under("Exported by vLLM", page="docs/metrics.md"):
        found[name.strip("`")] = ("counter", {"engine", "model_name"})
    return found


def told(name: str, kind: str) -> list[str]:
    return [name.removesuffix("_total") + suffix for suffix in SUFFIXES[kind]]


def series_in(query: str) -> set[str]:
    """Those that it names. All of them exist, and it uses no other labels than they have."""
    labels = {
        series: {*labels, *(["le"] if series.endswith("_bucket") else [])}
        for name, (kind, labels) in everything().items()
        for series in told(name, kind)
    }
    names = set(re.findall(r"(?:vllm:)?pdx_\w+", query))
    assert names, query
    used = set(re.findall(r"by \(([^)]*)\)", query)) | set(re.findall(r"(\w+)\s*(?:=~?|!=|!~)\s*\"", query))
    used = {label.strip() for group in used for label in group.split(",")} - {"instance", "job"}
    for name in names:
        assert name in labels, f"{name} in {query}"
        assert used <= labels[name], f"{used - labels[name]} in {query}"
    assert query.count("(") == query.count(")"), query
    return names


def test_the_dashboard_asks_for_nothing_that_does_not_exist() -> None:
    board = json.loads((ROOT / "docs" / "grafana-router.json").read_text())
    seen = {name for query in queries(board["panels"]) for name in series_in(query)}
    untold = {name for name, (kind, _) in everything().items() if not seen & set(told(name, kind))}
    ours = {name for name in untold if not name.startswith("vllm:")}
    assert ours <= {"pdx_router_stripped_params_total"}, "every metric is drawn somewhere"
    assert any(name.startswith("vllm:") for name in seen)


def test_an_alert_asks_for_what_exists_and_says_what_to_do() -> None:
    (group,) = yaml.safe_load((ROOT / "docs" / "alerts.yml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names) >= 8
    for rule in group["rules"]:
        assert series_in(rule["expr"])
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert all(rule["annotations"][words].endswith(".") for words in ("summary", "runbook")), rule["alert"]
