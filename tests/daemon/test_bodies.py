"""Any body: valid lines are accepted, others refused in words, by the checks of the in-process door; never a 500."""

from __future__ import annotations

import json
from decimal import Decimal
from math import isfinite
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import _database
from tests.daemon.harness import Daemon, serving
from tests.strategies import any_costs, names
from tracker_daemon import InvalidCall, MemorySink, Tracker
from tracker_daemon.daemon import ingest
from tracker_daemon.generation import ensure

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("ensure_conversation", "record_turn", "resolve")
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
ANY_NAME = st.one_of(names(), st.sampled_from(["", "\0", "a\0b", "\ud800", "x" * 513, "é" * 257]), st.text(max_size=5))
ANY_VALUE = st.one_of(
    ANY_NAME, st.none(), st.booleans(), st.integers(), st.floats(), st.just([]), st.just({}), st.integers(2**62, 2**65)
)


@st.composite
def objects(draw: st.DrawFn) -> dict[str, Any]:
    """Objects that are mostly calls."""
    found: dict[str, Any] = {"call": draw(st.one_of(st.sampled_from(KINDS), ANY_VALUE))}
    fields = {
        "thread_id": ANY_NAME,
        "agent_name": ANY_NAME,
        "tokens": ANY_VALUE,
        "cost": ANY_VALUE,
        "resolution_type": ANY_NAME,
    }
    wanted = {
        KINDS[0]: ["thread_id"],
        KINDS[1]: ["thread_id", "agent_name", "tokens", "cost"],
        KINDS[2]: ["thread_id", "resolution_type"],
    }
    kind = found["call"]
    chosen = wanted.get(kind, []) if isinstance(kind, str) else []
    for name in chosen if draw(st.booleans()) else draw(st.lists(st.sampled_from(sorted(fields)), unique=True)):
        found[name] = draw(st.one_of(fields[name], ANY_VALUE) if draw(st.booleans()) else fields[name])
    return found


@pytest.fixture(scope="module")
def daemon(postgres, template) -> Iterator[Daemon]:
    """A daemon for the module."""
    database = _database(postgres, template)
    with serving(next(database), "--flush-interval", "0.05") as found:
        yield found
        assert "request_failed" not in found.log
        assert "Traceback" not in found.log
    next(database, None)


def check(status: int, value: Any) -> None:
    """An answer of `/v1/calls` is one of two, and says no more than it should."""
    assert status in (202, 400), value
    if status == 202:
        assert list(value) == ["accepted"]
        return
    assert list(value) == ["errors"]
    assert 1 <= len(value["errors"]) <= 20
    for error in value["errors"]:
        assert set(error) == {"line", "error"}
        assert error["error"]
        assert "Traceback" not in error["error"]
        assert ".py" not in error["error"]
        assert len(error["error"]) < 500


@EXAMPLES
@given(st.one_of(st.binary(max_size=300), st.lists(objects().map(json.dumps)).map("\n".join).map(str.encode)))
def test_any_body(daemon: Daemon, body: bytes) -> None:
    """An answer is 202 with the number of calls, or 400 with the lines; nothing of it is a stack trace."""
    reply = daemon.post(body)
    check(reply.status, reply.json)


@EXAMPLES
@given(st.dictionaries(st.sampled_from(["Tracker-Producer", "Tracker-Sequence", "Tracker-Lane", "Tracker-Epoch", "Content-Type"]), st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)), st.binary(max_size=100), st.sampled_from(["/v1/batches", "/v1/batches/recall", "/v1/producers", "/v1/calls"]))  # fmt: skip
def test_any_headers(daemon: Daemon, headers: dict[str, str], body: bytes, path: str) -> None:
    """Whatever stands in the headers and the body, it is refused in words."""
    reply = daemon.request("POST", path, body, headers)
    assert reply.status == 202 or 400 <= reply.status < 500, reply
    assert list(reply.json) in (["error"], ["errors"], ["accepted"])


def test_batches_that_are_none(daemon: Daemon) -> None:
    """A request to open, to apply or to close that is none is a 400 in words."""
    producer = str(uuid4())
    headers = {
        "content-type": "application/vnd.tracker-daemon.batch",
        "tracker-producer": producer,
        "tracker-lane": "0",
        "tracker-epoch": "1",
        "tracker-sequence": "1",
    }
    for wrong in (b"x", b"\x00" * 100, b"\xff" * 100, b"\x10\x00\x00\x00" + b"x" * 20):
        reply = daemon.request("POST", "/v1/batches", wrong, headers)
        assert (reply.status, list(reply.json)) == (400, ["error"]), wrong
    for name in list(headers)[1:]:
        for text in ("", "-1", "x", "9" * 30):
            assert daemon.request("POST", "/v1/batches", b"", {**headers, name: text}).status == 400, (name, text)
    assert daemon.request("POST", "/v1/batches", b"", {**headers, "tracker-epoch": "0"}).status == 400
    reply = daemon.request("POST", "/v1/batches", b"", headers)
    assert (reply.status, reply.json["raised"]) == (409, "LedgerMissing")
    good = {"producer": producer, "lane": 0, "known": None, "after": 0}
    for change in (
        {"producer": "x"},
        {"lane": -1},
        {"lane": 2**15},
        {"after": -1},
        {"after": 2**63},
        {"known": 5},
        {"lane": None},
        {"known": {"epoch": 2**40, "applied_sequence": 2**70}},
        {"lane": 1e400},
    ):
        reply = daemon.request("POST", "/v1/producers", json.dumps({**good, **change}))
        assert (reply.status, list(reply.json)) == (400, ["error"]), change
    for query in (
        "",
        "?epoch=1",
        "?epoch=x&sequence=1",
        "?epoch=²&sequence=1".encode().decode("latin-1"),
        "?epoch=999999999999&sequence=1",
    ):
        reply = daemon.request("DELETE", f"/v1/producers/{producer}/0{quote(query, safe='?=&')}")
        assert reply.status == 400, query
    assert daemon.request("DELETE", f"/v1/producers/{producer}/99999?epoch=1&sequence=1").status == 400


def door(value: dict[str, Any]) -> bool:
    """Say whether the in-process door takes the call."""
    value = dict(value)
    kind = value.pop("call", None)
    if not isinstance(kind, str) or kind not in KINDS:
        return False
    tracker = Tracker(MemorySink())
    try:
        getattr(tracker, kind)(**value)
    except (InvalidCall, TypeError):
        return False
    finally:
        tracker.close(0)
    return True


@EXAMPLES
@given(objects())
def test_same_checks_as_the_door(value: dict[str, Any]) -> None:
    """A line is accepted exactly if the call is in process; a cost in a string counts as the number that it names."""
    line = json.dumps(value)
    read = {**value, "cost": Decimal(repr(value["cost"]))} if isinstance(value.get("cost"), float) else value
    numbers = [each for each in value.values() if isinstance(each, float)]
    if isinstance(value.get("cost"), str) or not all(map(isfinite, numbers)):
        read = {**value, "call": None}  # no number of JSON's, or one in a string: looked at elsewhere
        if isinstance(value.get("cost"), str):
            return
    try:
        records = ingest.read_calls(line.encode(), now=1, max_line=10**6, max_calls=10)
    except ingest.Refused:
        records = []
    assert bool(records) == door(read), line


@EXAMPLES
@given(any_costs())
def test_costs_in_strings(cost: Any) -> None:
    """Every cost that the door takes is taken in a string, to the last digit."""
    text = str(Decimal(repr(cost)) if isinstance(cost, float) else cost)
    if len(text) > 2_000:
        return
    line = json.dumps({"call": "record_turn", "thread_id": "t", "cost": text})
    [record] = ingest.read_calls(line.encode(), now=1, max_line=10**6, max_calls=10)
    assert record[3] == Decimal(text)


@pytest.mark.parametrize(
    "cost", ["1e99999999999999999999", "-1e99999999999999999999", "1e2000", "1e-20000", "9" * 3_000, "NaN", "Infinity"]
)
def test_numbers_too_large(daemon: Daemon, cost: str) -> None:
    """A number that nothing can hold is the line's error, in a string or bare."""
    for text in (cost, f'"{cost}"'):
        reply = daemon.post(f'{{"call": "record_turn", "thread_id": "t", "cost": {text}}}')
        check(reply.status, reply.json)
        assert reply.status == 400


def test_a_body_of_empty_lines() -> None:
    """Empty lines are passed over without a list of them, and counted."""
    body = b"\n" * 3_000_000 + b" \r\n" * 3 + b"x"
    with pytest.raises(ingest.Refused) as found:
        ingest.read_calls(body, now=1, max_line=100, max_calls=1)
    assert [each["line"] for each in found.value.errors] == [3_000_004]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"call": "record_turn"}', "thread_id is missing"),
        ('{"call": "resolve", "thread_id": "t"}', "resolution_type is missing"),
        ('{"call": "record_turn", "thread_id": null}', "thread_id must be a str"),
        *(
            (f'{{"call": "ensure_conversation", "thread_id": "t", "at": "{at}"}}', error)
            for at, error in (
                ("0001-01-01T00:00:00+10:00", "at is out of range"),
                ("9999-12-31T23:59:59-10:00", "at is out of range"),
                ("2026-W05-6T12:00:00Z", "RFC 3339"),
                ("20260131T120000Z", "RFC 3339"),
                ("2026-01-31T12:00:00", "RFC 3339"),
                ("2026-02-30T12:00:00Z", "RFC 3339"),
            )
        ),
    ],
)
def test_what_is_wrong_is_named(line: str, error: str) -> None:
    """A key that is missing is said to be; an instant must be RFC 3339, and one that readers of the table can hold."""
    with pytest.raises(ingest.Refused) as refused:
        ingest.read_calls(line.encode(), now=0, max_line=1_000, max_calls=1)
    [found] = refused.value.errors
    assert error in found["error"]


@pytest.mark.parametrize(
    ("at", "nanoseconds"),
    [
        ("1970-01-01t00:00:01.5z", 1_500_000_000),
        ("1970-01-01 02:00:00+02:00", 0),
        ("0001-01-01T00:00:00Z", -62_135_596_800 * 10**9),
        ("9999-12-31T23:59:59.999999Z", 253_402_300_799_999_999 * 1_000),
    ],
)
def test_instants(at: str, nanoseconds: int) -> None:
    """Every form of RFC 3339, from the first instant to the last one."""
    line = f'{{"call": "ensure_conversation", "thread_id": "t", "at": "{at}"}}'
    assert ingest.read_calls(line.encode(), now=0, max_line=1_000, max_calls=1) == [ensure("t", nanoseconds)]
