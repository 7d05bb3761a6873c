"""What the server has done, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters that add up: every request is answered, refused, cancelled or failed, or in flight."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()  # not the default one, which tells the versions of this machine
        self.requests = Counter(
            "sightline_requests",
            "Requests by route and outcome: answered, refused (4xx, 503), cancelled (by the client), failed (500).",
            ("route", "outcome"),
            registry=own,
        )
        self.received = Counter("sightline_received", "Requests that have begun.", ("route",), registry=own)
        self.flying = Gauge("sightline_in_flight", "Requests that are neither answered nor refused yet.", registry=own)
        self.seconds = Histogram(
            "sightline_request_seconds",
            "Time to an answer.",
            ("route",),
            buckets=_SECONDS,
            registry=own,
        )
        self.images = Counter("sightline_images", "Images computed.", ("model", "kind"), registry=own)
        self.batches = Histogram(
            "sightline_batch_images", "Images computed together.", ("model",), buckets=_IMAGES, registry=own
        )
        self.queued = Gauge("sightline_queued_images", "Images that wait.", ("model",), registry=own)
        self.ready = Gauge("sightline_ready", "1 where a process stands by.", ("model",), registry=own)
        self.restarts = Counter("sightline_worker_restarts", "Processes that died.", ("model",), registry=own)
        self.reloads = Counter("sightline_reloads", "Models loaded anew.", ("model", "outcome"), registry=own)
        self.connections = Gauge("sightline_connections", "Open connections.", registry=own)
        self.cut = Counter("sightline_connections_cut", "Connections cut off, and why.", ("reason",), registry=own)

    def computed(self, model: str, kind: str, images: int, batch: int | None) -> None:
        """Notes that a process has answered; `batch` counts the images of all requests, at the first of them."""
        self.images.labels(model, kind).inc(images)
        if batch is not None:
            self.batches.labels(model).observe(batch)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
