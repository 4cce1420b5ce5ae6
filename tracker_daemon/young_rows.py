"""New rows and the garbage collector, which lets go of each when it first meets it.

A call that is folded makes a row and frees a record, so the collector's count stands still while rows pile up that it
has not met. In the end it would look at all of them in one go, for 3 to 17 ms, in whichever thread that happens.
So the worker has it look at a thousand at a time: less often than their number alone would bring it about.
"""

from __future__ import annotations

import gc
from typing import Final

_ENOUGH: Final = 1_000


class YoungRows:
    """Counts rows made since the collector was last asked to look."""

    def __init__(self) -> None:
        self._made = 0

    def made(self, number: int, held: int, *, hurry: bool) -> None:
        """Note *number* rows more; have those looked at that wait, if they are many.

        Args:
            number: made since the last time.
            held: rows of the window, of which no more than these can be left.
            hurry: calls come as fast as they can: most rows are replaced before they are ever looked at. Not now.

        A host that has switched the collector off, by a threshold of 0 too, or lets it look more rarely, has it so.
        """
        self._made += number
        threshold = gc.get_threshold()[0]
        if hurry or not (threshold and gc.isenabled()) or min(self._made, held) <= max(_ENOUGH, threshold):
            return
        gc.collect(0)
        self._made = 0
