"""Calls as lines of JSON: read, checked, all or none.

Rules:
1. Pure: bytes in, records or every line's error out. Nothing of a request with an error is taken.
2. The same checks as at the door: `calls`.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from tracker_daemon import calls
from tracker_daemon.batch import Batch
from tracker_daemon.errors import InvalidCall, shown
from tracker_daemon.generation import Generation, ensure, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from uuid import UUID

    from tracker_daemon.generation import Record

_FIELDS: Final = {
    "ensure_conversation": {"thread_id"},
    "record_turn": {"thread_id", "agent_name", "tokens", "cost"},
    "resolve": {"thread_id", "resolution_type"},
}
_NEEDED: Final = {"thread_id", "resolution_type"}
_MOST_ERRORS: Final = 20
_RFC_3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
# Year 1 to 9999 in UTC, what readers of the table can hold; Postgres holds more.
_FIRST: Final = -62_135_596_800
_LAST: Final = 253_402_300_799
_NANOSECONDS: Final = 1_000
_EMPTY_LINES: Final = re.compile(rb"\s*\n")


class Refused(Exception):  # noqa: N818 - says what is the case
    """Lines were wrong; *errors* says which and why, the first twenty."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(errors)
        self.errors = errors


def read_calls(body: bytes, *, now: int, max_line: int, max_calls: int) -> list[Record]:
    """Return the calls in *body*, NDJSON.

    Args:
        body: a JSON object a line; empty lines are passed over.
        now: nanoseconds since 1970, for calls without an `at`.
        max_line: bytes in a line.
        max_calls: calls in a body.

    Raises:
        Refused: a line is wrong.
    """
    records: list[Record] = []
    errors: list[dict[str, Any]] = []
    for number, line in _lines(body, max_line):
        if len(records) >= max_calls:
            errors.append({"line": number, "error": f"more than {max_calls} calls in one request"})
            break
        try:
            if len(line) > max_line:
                raise _Wrong(f"the line has more than {max_line} bytes")
            records.append(_call(line, now))
        except (_Wrong, InvalidCall) as error:
            errors.append({"line": number, "error": str(error)})
            if len(errors) >= _MOST_ERRORS:
                break
    if errors:
        raise Refused(errors)
    return records


def _lines(body: bytes, max_line: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line that is not empty, with its number; of one that is too long as much as shows that it is.

    One at a time, and empty ones at once: a body may be millions of them.
    """
    start, number = 0, 1
    while start < len(body):
        if blank := _EMPTY_LINES.match(body, start):
            number += body.count(b"\n", start, blank.end())
            start = blank.end()
        end = body.find(b"\n", start)
        end = len(body) if end < 0 else end
        line = body[start : min(end, start + max_line + 1)]
        if line.strip():
            yield number, line
        start, number = end + 1, number + 1


class _Wrong(ValueError):  # noqa: N818 - says what is the case
    """A line is no call."""


def _call(line: bytes, now: int) -> Record:
    try:
        # Costs as the decimals that stand there; integers of any length would take quadratic time.
        value = json.loads(line, parse_float=Decimal, parse_int=_integer, parse_constant=_no_number)
    except (ValueError, RecursionError, ArithmeticError) as error:
        why = error if isinstance(error, ValueError) else "too deep, or with too large a number"
        raise _Wrong(f"not JSON: {why}") from None
    if not isinstance(value, dict):
        raise _Wrong(f"must be a JSON object, got {shown(value)}")
    kind = value.pop("call", None)
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise _Wrong(f"call must be one of {', '.join(_FIELDS)}, got {shown(kind)}")
    at = _instant(value.pop("at", None), now)
    if unknown := sorted(set(value) - _FIELDS[kind]):
        raise _Wrong(f"{kind} has no {shown(unknown[0])}")
    for key in _NEEDED & _FIELDS[kind]:
        if key not in value:
            raise _Wrong(f"{key} is missing")
    thread_id = calls.name("thread_id", value["thread_id"])
    if kind == "ensure_conversation":
        return ensure(thread_id, at)
    if kind == "resolve":
        return resolve(thread_id, calls.name("resolution_type", value["resolution_type"]), at)
    return (
        thread_id,
        calls.optional_name("agent_name", value.get("agent_name")),
        calls.tokens(value.get("tokens", 0)),
        calls.cost(_cost(value.get("cost", 0))),
        at,
    )


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _Wrong(f"a number of {len(text)} digits")
    return int(text)


def _no_number(text: str) -> None:
    raise _Wrong(f"{text} is no number in JSON")


_MOST_DIGITS: Final = 2_000


def _cost(value: Any) -> Any:
    """Return a cost in a string, which keeps every digit, as a number."""
    if not isinstance(value, str):
        return value
    if len(value) > _MOST_DIGITS:
        raise _Wrong(f"cost: a number of {len(value)} digits")
    try:
        return Decimal(value)
    except ArithmeticError:
        raise _Wrong(f"cost must be a decimal number, got {shown(value)}") from None


def _instant(value: Any, now: int) -> int:
    if value is None:
        return now
    if isinstance(value, str):
        try:
            when = datetime.fromisoformat(value.upper()) if _RFC_3339.fullmatch(value) else None
        except ValueError:
            when = None
        if when is not None and when.tzinfo is not None:
            try:
                seconds = int(when.replace(microsecond=0).timestamp())
            except (OverflowError, OSError, ValueError):
                seconds = _FIRST - 1
            if not _FIRST <= seconds <= _LAST:
                raise _Wrong(f"at is out of range, got {shown(value)}")
            return (seconds * 1_000_000 + when.microsecond) * _NANOSECONDS
    raise _Wrong(f"at must be an instant with its offset (RFC 3339), got {shown(value)}")


def batch_of(producer: UUID, sequence: int, records: Iterable[Record], *, create_missing: bool) -> Batch:
    """Return *records* as the batch of a client without lives.

    Raises:
        Refused: a thread is ensured after other calls on it, which would find no row with *create_missing* off; a batch
            holds a thread once.
    """
    generation = Generation(create_missing=create_missing)
    for record in records:
        generation.fold(record)
    if late := next(iter(generation.followers), None):
        fault = f"ensure_conversation of {shown(late)} must come before its other calls, or in a later request"
        raise Refused([{"line": None, "error": fault}])
    return Batch(producer, 0, 0, sequence, tuple(generation.all()), create_missing)
