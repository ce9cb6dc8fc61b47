"""What `/metrics` shows: numbers about requests, batches and verdicts, in Prometheus' format.

Labels are routes, statuses, tiers and verdicts: never an id, a name or a text that a client sent.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "ServingMetrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


class ServingMetrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            "promedical_requests", "Requests answered.", ["route", "status"], registry=own
        )
        self.seconds = Histogram(
            "promedical_request_seconds",
            "Seconds from a request's first byte to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=own,
        )
        self.rejected = Counter(
            "promedical_rejected",
            "Requests refused, by reason.",
            ["reason"],
            registry=own,
        )
        self.failures = Counter(
            "promedical_failures",
            "What failed: a judgment (verdict error), a request (500), a batch (tried again).",
            ["kind"],
            registry=own,
        )
        self.cancelled = Counter(
            "promedical_cancelled",
            "Requests whose client went away.",
            registry=own,
        )
        self.verdicts = Counter(
            "promedical_verdicts", "Verdicts given.", ["tier", "verdict"], registry=own
        )
        self.accepted = Gauge(
            "promedical_accepted_requests", "Requests accepted and not yet answered.", registry=own
        )
        self.queue_requests = Gauge(
            "promedical_queue_requests", "Requests waiting for the model.", registry=own
        )
        self.queue_tokens = Gauge(
            "promedical_queue_tokens", "Unique tokens waiting for the model.", registry=own
        )
        self.batch_tokens = Histogram(
            "promedical_batch_tokens", "Unique tokens of a batch.", buckets=TOKENS, registry=own
        )
        self.batch_requests = Histogram(
            "promedical_batch_requests", "Requests in a batch.", buckets=COUNTS, registry=own
        )
        self.batch_seconds = Histogram(
            "promedical_batch_seconds", "Seconds a batch took.", buckets=SECONDS, registry=own
        )

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
