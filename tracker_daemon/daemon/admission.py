"""How much of the daemon one client may take, so that none starves the others.

Rules:
1. Bytes are admitted as they come, and given back when the request has its answer: who announces much and sends
   little takes little.
2. One client has at most a quarter; who asks for more is told to come again (429), who finds all taken as well (503).
"""

from __future__ import annotations

from collections import Counter

_SHARE = 4


class Admission:
    """Counts the bytes under way, in all and by client.

    Args:
        limit: bytes under way at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: Counter[str] = Counter()
        self._total = 0

    def admit(self, client: str, size: int) -> int | None:
        """Take *size* bytes for *client*; return the status that refuses them, or `None`.

        A client with nothing under way is refused only when the whole is taken.
        """
        mine = self._taken[client]
        if mine and mine + size > self._limit // _SHARE:
            return 429
        if self._total and self._total + size > self._limit:
            return 503
        self._taken[client] += size
        self._total += size
        return None

    def release(self, client: str, size: int) -> None:
        """Give back what was taken."""
        self._total -= size
        self._taken[client] -= size
        if self._taken[client] <= 0:
            del self._taken[client]
