"""Something happens in the middle of a call: before the n-th instruction of the journal's code, for every n."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_WHERE: Final = "/tracker_daemon/journal/"


class Interruption:
    """Does *what* once, before instruction *number* of the package's journal, as a signal handler would.

    Attributes:
        happened: whether it came to that.
    """

    def __init__(self, number: int, what: Callable[[], object]) -> None:
        self._left, self._what = number, what
        self.happened = False

    def during(self, do: Callable[[], object]) -> None:
        """Run *do* with it."""
        before = sys.gettrace()
        gc.disable()  # what the collector would finalize meanwhile is of others
        sys.settrace(self._trace)
        try:
            do()
        finally:
            sys.settrace(before)
            gc.enable()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if _WHERE not in frame.f_code.co_filename or self.happened:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if not self._left:
                self.happened = True
                sys.settrace(None)
                self._what()
                return None
            self._left -= 1
        return self._trace
