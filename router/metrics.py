"""The router's Prometheus metrics, `pdx_router_*`, in a registry of its own."""

from __future__ import annotations

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pdx.router.policy import Snapshot

# vLLM's edges for time_to_first_token_seconds, so that the two histograms can be laid over each other.
TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip


class Metrics:
    """Counters and gauges. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prefix = "pdx_router"
        self.requests = Counter(
            f"{prefix}_requests", "Answered requests", ["model", "code"], registry=registry
        )  # exposed as pdx_router_requests_total
        self.ttft_s = Histogram(
            f"{prefix}_ttft_seconds",
            "From the request's arrival to the first byte of the answer",
            ["model"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge(f"{prefix}_inflight", "Requests under way", registry=registry)
        self.handoffs = Counter(f"{prefix}_handoffs", "Handoffs by how they ended", ["outcome"], registry=registry)
        self.alone = Counter(f"{prefix}_alone", "Requests served without a handoff", ["reason"], registry=registry)
        self.journeys = Counter(
            f"{prefix}_journeys", "Requests by the way that their answer was made", ["way"], registry=registry
        )
        self.unseeded = Counter(
            f"{prefix}_unseeded", "Requests of a pair whose first token came from decode", ["reason"], registry=registry
        )
        self.queued_s = Histogram(
            f"{prefix}_queue_seconds",
            "How long requests waited that found no room at once",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.queued = Gauge(f"{prefix}_queued", "Requests that wait for an engine with room", registry=registry)
        self.spared = Gauge(
            f"{prefix}_breakers_open", "Engines not asked, or only to see, because they kept failing", registry=registry
        )
        self.unpaired = Gauge(
            f"{prefix}_pairs_off", "Pairs of daemons not used because handoffs kept failing", registry=registry
        )
        self.repeats = Counter(f"{prefix}_retries", "Requests asked again of another engine", registry=registry)
        self.held_back = Counter(
            f"{prefix}_retries_refused", "Requests not repeated because too many were", registry=registry
        )
        self.stripped = Counter(
            f"{prefix}_stripped_params", "Requests whose private fields were stripped", registry=registry
        )
        self.bad_frames = Counter(f"{prefix}_bad_frames", "Malformed control frames, dropped", registry=registry)
        self.undelivered = Counter(
            f"{prefix}_undelivered", "Control messages whose daemon could not be reached", registry=registry
        )
        self.engines = Gauge(f"{prefix}_engines", "Routable engines", ["role"], registry=registry)
        self.reservations_waiting = Gauge(
            f"{prefix}_reservations_waiting", "Handoffs waiting for room in some arena", registry=registry
        )

        self.brought = Counter(
            f"{prefix}_brought",
            "Prompts whose blocks were to come from another host first, by how waiting for them ended",
            ["outcome"],
            registry=registry,
        )
        self.known_blocks = Gauge(
            f"{prefix}_known_blocks", "Blocks that some daemon is known to keep", registry=registry
        )

    def render(self, snapshot: Snapshot, reservations_waiting: int, known_blocks: int = 0) -> bytes:
        """The exposition text, with the gauges of this moment."""
        self.known_blocks.set(known_blocks)
        roles = Tally(candidate.info.role for candidate in snapshot)
        for role in ("prefill", "decode", "both"):
            self.engines.labels(role=role).set(roles[role])
        self.reservations_waiting.set(reservations_waiting)
        return generate_latest(self.registry)
