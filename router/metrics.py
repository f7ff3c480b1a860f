"""The router's Prometheus metrics, `pdx_router_*`, in a registry of its own. docs/metrics.md lists them (tested).

Labels are bounded: by what operators have configured (models, keys) or what this code says (reasons, ways, outcomes).
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pdx.router.latencies import Latencies

# vLLM's edges for the histograms of the same names, so that the two can be laid over each other.
TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
E2E_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
MODELS_MAX = 256  # a fleet with more names (adapters, say) has the rest of them counted as one
OTHER_MODELS = "other"
PREFIX = "pdx_router_"


class Moment(NamedTuple):
    """What the gauges show: the state of the other parts when somebody asks."""

    roles: Sequence[str] = ()  # of the routable engines
    reservations_waiting: int = 0
    known_blocks: int = 0


class Metrics:
    """Counters, gauges and histograms. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._models: set[str] = set()
        # What was answered. A counter is exposed with _total behind its name.
        self.requests = self._counter(
            "requests", "Answered requests; model is empty for those refused", "model", "code"
        )
        self.refused = self._counter("refused", "Requests that were refused before any engine was chosen", "reason")
        self.malformed = self._counter("malformed", "What came to the HTTP port and was no HTTP", "code")
        self.stripped = self._counter("stripped_params", "Requests whose private fields were stripped")
        self.key_requests = self._counter("key_requests", "Requests by the name of their API key", "key")
        self.in_flight = self._gauge("inflight", "Requests under way")
        self.ttft_s = self._latencies("ttft", "From the request's arrival to the answer's first byte", TTFT_BUCKETS_S)
        self.itl_s = self._latencies("itl", "Between two pieces of a stream, of mostly one token each", ITL_BUCKETS_S)
        self.handover_s = self._latencies(
            "handover",
            "From prefill's answer to the first piece of decode's stream, of pairs that went",
            TTFT_BUCKETS_S,
        )
        self.e2e_s = self._latencies("e2e", "From the request's arrival to the answer's last byte", E2E_BUCKETS_S)
        self.queued = self._gauge("queued", "Requests waiting in the router for an engine with room")
        self.queued_s = Histogram(
            f"{PREFIX}queue_seconds",
            "How long requests waited that found no room at once",
            buckets=TTFT_BUCKETS_S,
            registry=self.registry,
        )
        # How it was answered.
        self.journeys = self._counter("journeys", "Requests by the way that their answer was made", "way")
        self.handoffs = self._counter("handoffs", "Handoffs by how they ended", "outcome")
        self.alone = self._counter("alone", "Requests served without a handoff", "reason")
        self.unseeded = self._counter("unseeded", "Requests of a pair whose first token came from decode", "reason")
        self.repeats = self._counter("retries", "Requests asked again of another engine")
        self.held_back = self._counter("retries_refused", "Requests not repeated because too many were")
        # With whom.
        self.engines = self._gauge("engines", "Routable engines", "role")
        self.ejected = self._gauge("breakers_open", "Engines not asked, or only to see, because they kept failing")
        self.unpaired = self._gauge("pairs_off", "Pairs of daemons not used because handoffs kept failing")
        self.reservations_waiting = self._gauge("reservations_waiting", "Handoffs waiting for room in some arena")
        self.brought = self._counter(
            "brought",
            "Prompts whose blocks were to come from another host first, by how waiting for them ended",
            "outcome",
        )
        self.prompts = self._counter(
            "prompts", "Prompts by where their token ids, by which the router finds who has them, are from", "ids"
        )
        self.known_blocks = self._gauge("known_blocks", "Blocks that some daemon is known to keep")
        self.bad_frames = self._counter("bad_frames", "Malformed control frames, dropped")
        self.refused_peers = self._counter("refused_peers", "Who came to the control socket without the cluster's keys")
        self.undelivered = self._counter("undelivered", "Control messages whose daemon could not be reached")

    def model(self, name: str) -> str:
        """The label for a model."""
        if name not in self._models:
            if len(self._models) >= MODELS_MAX:
                return OTHER_MODELS
            self._models.add(name)
        return name

    def render(self, moment: Moment) -> bytes:
        """The exposition text."""
        roles = Tally(moment.roles)
        for role in ("prefill", "decode", "both"):
            self.engines.labels(role=role).set(roles[role])
        self.known_blocks.set(moment.known_blocks)
        self.reservations_waiting.set(moment.reservations_waiting)
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, what, labels, registry=self.registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, what, labels, registry=self.registry)

    def _latencies(self, name: str, what: str, edges: Sequence[float]) -> Latencies:
        return Latencies(f"{PREFIX}{name}_seconds", what, edges, registry=self.registry)
