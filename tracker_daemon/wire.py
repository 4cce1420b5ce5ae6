"""What a tracker and a daemon say to each other: a sink's port over HTTP.

    POST   /v1/producers                  open      JSON: producer, lane, known, after -> epoch, applied_sequence
    POST   /v1/batches                    apply     headers: the identity; body: deltas as the journal has them
    POST   /v1/batches/recall             recall    the same
    DELETE /v1/producers/PRODUCER/LANE    aclose    ?epoch=…&sequence=…

Rules:
1. An exception of the port is an answer with its name and its arguments, and is raised again on the other side.
2. Pure: values in, bytes out, and back.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import UUID

from tracker_daemon.batch import Batch
from tracker_daemon.errors import Fenced, SchemaError, TrackerError
from tracker_daemon.journal.records import FRAME, Damaged, Sum, decode, encode_sum, payload_at
from tracker_daemon.sink import (
    DEAD_REASONS,
    FAULT_KINDS,
    Applied,
    DeadLetter,
    LedgerMissing,
    LedgerRegressed,
    Opened,
    SinkFault,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tracker_daemon.delta import ThreadDelta

BATCH_TYPE: Final = "application/vnd.tracker-daemon.batch"
# What the port raises, by the status that answers it.
STATUS: Final = {Fenced: 409, LedgerMissing: 409, LedgerRegressed: 409, SchemaError: 503, SinkFault: 503}
_FINAL: Final = {"Fenced": Fenced, "LedgerMissing": LedgerMissing, "LedgerRegressed": LedgerRegressed}


class Malformed(ValueError):  # noqa: N818 - says what is the case
    """What came is not what was agreed on; the message says where."""


# -- a batch ---------------------------------------------------------------------------------------


def batch_headers(batch: Batch) -> dict[str, str]:
    """Return the headers that name *batch*."""
    return {
        "content-type": BATCH_TYPE,
        "tracker-producer": str(batch.producer),
        "tracker-lane": str(batch.lane),
        "tracker-epoch": str(batch.epoch),
        "tracker-sequence": str(batch.sequence),
        "tracker-create-missing": str(batch.create_missing).lower(),
    }


def encode_deltas(deltas: Sequence[ThreadDelta]) -> bytes:
    """Return the body for *deltas*."""
    return b"".join(encode_sum(delta) for delta in deltas)


def decode_batch(headers: Mapping[str, str], body: bytes, *, create_missing: bool) -> Batch:
    """Return the batch that headers and body make; *create_missing*: what holds for a sender that does not say.

    Raises:
        Malformed: a header is missing or wrong, a record is damaged, or a thread stands twice.
    """
    identity = [_integer(headers, name, most) for name, most in _NUMBERS]
    deltas: dict[str, ThreadDelta] = {}
    offset = 0
    while offset < len(body):
        try:
            payload = payload_at(body, offset, len(body))
            item = None if payload is None else decode(payload)
        except Damaged as damaged:
            raise Malformed(f"byte {offset} of the body: {damaged}") from damaged
        if payload is None or not isinstance(item, Sum):
            raise Malformed(f"byte {offset} of the body: no delta")
        delta = item.delta
        if item.more and delta.thread_id in deltas:
            deltas[delta.thread_id].use(delta.agents)
        elif delta.thread_id in deltas or item.more:
            raise Malformed(f"byte {offset} of the body: the thread stands in the batch twice")
        else:
            deltas[delta.thread_id] = delta
        offset += FRAME.size + len(payload)
    lane, epoch, sequence = identity
    said = headers.get("tracker-create-missing", str(create_missing).lower())
    if said not in ("true", "false"):
        raise Malformed(f"Tracker-Create-Missing must be true or false, got {said[:80]!r}")
    return Batch(producer(headers), lane, epoch, sequence, tuple(deltas.values()), said == "true")


_NUMBERS: Final = (("tracker-lane", 2**15), ("tracker-epoch", 2**31), ("tracker-sequence", 2**63))


def producer(headers: Mapping[str, str]) -> UUID:
    """Return the producer that the headers name.

    Raises:
        Malformed: none, or no UUID.
    """
    try:
        return UUID(headers["tracker-producer"])
    except KeyError:
        raise Malformed("the header Tracker-Producer is missing") from None
    except ValueError:
        raise Malformed(f"Tracker-Producer must be a UUID, got {headers['tracker-producer'][:80]!r}") from None


def _integer(headers: Mapping[str, str], name: str, below: int) -> int:
    text = headers.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < below):
        raise Malformed(f"{name.title()} must be an integer from 0 to {below - 1}, got {text[:80]!r}")
    return int(text)


def sequence(headers: Mapping[str, str]) -> int:
    """Return the sequence that the headers name: at least 1.

    Raises:
        Malformed: it is none.
    """
    found = _integer(headers, "tracker-sequence", 2**63)
    if found < 1:
        raise Malformed("Tracker-Sequence must be at least 1")
    return found


# -- answers ---------------------------------------------------------------------------------------


def applied_json(applied: Applied) -> dict[str, Any]:
    """Return *applied* as JSON; of a dead letter only what names it, the tracker has the delta."""
    return {
        "rows": applied.rows,
        "skipped": applied.skipped,
        "duplicate": applied.duplicate,
        "dead_letters": [
            {
                "thread_id": letter.delta.thread_id,
                "reason": letter.reason,
                "sqlstate": letter.sqlstate,
                "error": letter.error,
            }
            for letter in applied.dead_letters
        ],
    }


def applied_from(value: Any, batch: Batch) -> Applied:
    """Return what `applied_json` wrote of *batch*."""
    deltas = {delta.thread_id: delta for delta in batch.deltas}
    letters = tuple(
        DeadLetter(
            deltas[letter["thread_id"]],
            letter["reason"] if letter["reason"] in DEAD_REASONS else "data",
            str(letter["sqlstate"]),
            str(letter["error"]),
        )
        for letter in value["dead_letters"]
    )
    return Applied(int(value["rows"]), int(value["skipped"]), bool(value["duplicate"]), letters)


def opened_json(opened: Opened) -> dict[str, int]:
    """Return *opened* as JSON."""
    return {"epoch": opened.epoch, "applied_sequence": opened.applied_sequence, "database": opened.database}


def opened_from(value: Any) -> Opened:
    """Return what `opened_json` wrote."""
    return Opened(int(value["epoch"]), int(value["applied_sequence"]), int(value.get("database", 0)))


def error_json(error: TrackerError) -> dict[str, Any]:
    """Return an exception of the port as JSON."""
    return {"error": str(error), "raised": type(error).__name__, "arguments": list(error.args)}


def error_from(status: int, body: bytes) -> TrackerError:
    """Return the exception that an answer which is no success stands for."""
    try:
        value = json.loads(body)
        name, text, arguments = value.get("raised", ""), str(value["error"]), value.get("arguments", [])
    except (ValueError, KeyError, TypeError, AttributeError):
        name, text, arguments = "", "no reason given", []
    if status == 409 and name in _FINAL:
        return cast("TrackerError", _FINAL[name](*arguments))
    if name == "SchemaError":
        return SchemaError(f"the daemon: {text}")
    if name == "SinkFault" and arguments and arguments[0] in FAULT_KINDS:
        return SinkFault(arguments[0], f"the daemon: {text}")
    kind = {401: "auth", 403: "auth", 404: "schema", 413: "other", 429: "capacity", 503: "capacity"}.get(status)
    if kind is None:
        kind = "connection" if status >= 500 else "other"
    return SinkFault(kind, f"the daemon answered {status}: {text}")  # type: ignore[arg-type]


def open_request(body: bytes) -> tuple[UUID, int, Opened | None, int]:
    """Return what a request to open asks for: producer, lane, known, after.

    Raises:
        Malformed: it is none.
    """
    try:
        value = json.loads(body)
        known = value["known"]
        asked = UUID(value["producer"]), int(value["lane"]), None if known is None else opened_from(known)
        after = int(value["after"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise Malformed(f"the body is no request to open: {error!r}"[:200]) from None
    seen = asked[2] or Opened(0, 0)
    if not (0 <= asked[1] < 2**15 and 0 <= after < 2**63 and 0 <= seen.epoch < 2**31 - 1):
        raise Malformed("lane, after or known is out of range")
    return *asked, after


def closed_at(query: Mapping[str, str]) -> Opened:
    """Return where a client says that its ledger stands.

    Raises:
        Malformed: epoch or sequence is missing or no integer.
    """
    epoch, applied = query.get("epoch", ""), query.get("sequence", "")
    if not (epoch.isdigit() and applied.isdigit() and len(epoch) < 10 and len(applied) < 19):
        raise Malformed("epoch and sequence must be integers")
    return Opened(int(epoch), int(applied))
