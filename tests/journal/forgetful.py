"""A sink that forgets commits, rows and ledger together; and what was told of it."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from tracker_daemon import MemorySink

if TYPE_CHECKING:
    import pytest

    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied


class ForgetfulSink(MemorySink):
    """Before its *at*-th commit it goes back to where it was after the *back_to*-th, once.

    `forgotten` are the batches that this undid.
    """

    def __init__(self, at: int = 0, back_to: int = 0) -> None:
        super().__init__()
        self.at, self.back_to = at, back_to
        self.forgotten: list[Batch] = []
        self._then: tuple[Any, ...] | None = None

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        if self.at and len(self.batches) == self.at - 1:
            self.at = 0
            self.forget()
        applied = await super().apply(batch)
        if len(self.batches) == self.back_to:
            self._then = deepcopy((self.rows, self.ledger, self.batches))
        return applied

    def forget(self) -> None:
        """Go back now."""
        assert self._then is not None
        self.forgotten = self.batches[self.back_to :]
        self.rows, self.ledger, self.batches = deepcopy(self._then)

    @property
    def sums(self) -> dict[str, int]:
        """Tokens by thread."""
        return {thread_id: row.total_tokens for thread_id, row in self.rows.items()}


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    """Return the fields of each time that *event* was logged."""
    fields = [record.tracker for record in caplog.records if hasattr(record, "tracker")]
    return [each for each in fields if each.get("event") == event]
