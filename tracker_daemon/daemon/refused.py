"""How many requests were refused, by the status that answered them, for the metrics.

Of many of them nobody knows how many calls they held: they were refused before they were read.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.registry import CollectorRegistry

STATUSES: Final = (400, 401, 408, 409, 413, 415, 429, 500, 503)


class RefusedRequests(Collector):
    """Counts, and shows every status from the first scrape on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counts: Counter[int] = Counter()
        registry.register(self)

    def count(self, status: int) -> None:
        """Count the answer to a request; one that took it is left out."""
        if status >= 400:
            self._counts[status] += 1

    def collect(self) -> Iterator[CounterMetricFamily]:
        """See `Collector.collect`."""
        text = "Requests to /v1/ that were refused, by the status that answered them."
        family = CounterMetricFamily("tracker_requests_refused", text, labels=["status"])
        for status in STATUSES:
            family.add_metric([str(status)], self._counts[status])
        yield family
