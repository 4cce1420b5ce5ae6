"""New rows and the garbage collector, which lets go of each when it first meets it.

A call that is folded makes a row and frees a record, so the collector's count stands still while rows pile up that it
has not met. In the end it would look at all of them in one go, for as long as 10 ms, in whichever thread that happens.
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
        """Note *number* rows more, of which at most *held* are there still; have them looked at if they are many.

        Not in a hurry: where calls come as fast as they can, most rows are replaced before they are ever looked at.
        A host that has switched the collector off, or lets it look more rarely, has it so.
        """
        self._made += number
        if hurry or min(self._made, held) <= max(_ENOUGH, gc.get_threshold()[0]):
            return
        if gc.isenabled():
            gc.collect(0)
            self._made = 0
