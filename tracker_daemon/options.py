"""What several commands' options share: texts, and sizes in bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    Type = click.ParamType[int]  # generic for the type checker alone: in older releases it is not
else:
    Type = click.ParamType

DATABASE: Final = "postgresql:…, a conninfo, or embedded:DIR."
_SIZE: Final = re.compile(r"(\d+)\s*(?:([kmg])ib|b)?", re.IGNORECASE)
_UNITS: Final = {None: 0, "k": 10, "m": 20, "g": 30}


class Size(Type):
    """Bytes, as a number or with KiB, MiB or GiB behind it; at least *least*."""

    name = "size"

    def __init__(self, least: int = 1) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return *value* in bytes."""
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"must be bytes, or with KiB, MiB or GiB (64MiB), got {value!r}", param, ctx)
        unit = found[2] and found[2].lower()
        size = int(found[1]) << _UNITS[unit]
        if size < self._least:
            self.fail(f"must be at least {self._least} bytes, got {value!r}", param, ctx)
        return size
