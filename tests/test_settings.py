"""Wrong options fail when the tracker is made, with a message that names them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from psycopg_pool import ConnectionPool

from tracker_daemon import MemorySink, Tracker, TrackerError, sinks
from tracker_daemon.errors import ConfigError
from tracker_daemon.settings import split_table

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("flush_interval", 0),
        ("flush_interval", 10**400),
        ("flush_interval", -1),
        ("flush_interval", float("nan")),
        ("flush_interval", float("inf")),
        ("flush_interval", "1"),
        ("flush_interval", True),
        ("flush_interval", None),
        ("shutdown_timeout", -0.1),
        ("shutdown_timeout", "ten"),
        ("max_batch_size", 0),
        ("max_batch_size", 1.5),
        ("max_batch_size", 100_001),
        ("max_batch_size", 10**400),
        ("max_queue_size", -1),
        ("max_queue_size", True),
        ("max_pending", 0),
        ("max_pending", "many"),
        ("overflow", "block"),
        ("overflow", None),
        ("create_missing", 1),
        ("create_missing", None),
        ("table", ""),
        ("table", "a.b.c"),
        ("table", "a."),
        ("table", "1a"),
        ("table", 'open"'),
        ("table", '"open'),
        ("table", "with space"),
        ("table", "x" * 64),
        ("table", 7),
        ("table", "conversations; DROP TABLE users"),
        ("registry", object()),
        ("on_error", "print"),
        ("journal", 7),
        ("journal", ""),
        ("journal", "a\0b"),
        ("journal_sync", -1),
        ("journal_retain", "600"),
        ("journal_quota", 1_000),
        ("journal_quota", 1e9),
    ],
)
def test_wrong_setting(setting: str, value: object) -> None:
    """The message names the setting and shows the value."""
    options: dict[str, Any] = {setting: value}
    with pytest.raises(TrackerError, match=setting) as caught:
        Tracker(MemorySink(), **options)
    assert isinstance(caught.value, ValueError)
    assert repr(value)[:20] in str(caught.value)


def test_the_largest_batch(registry: CollectorRegistry) -> None:
    """The bound itself is taken; what is above is refused with the bound in the message."""
    Tracker(MemorySink(), registry=registry, max_batch_size=100_000).close()
    with pytest.raises(ConfigError, match="max_batch_size must be at most 100000, got 100001"):
        Tracker(MemorySink(), registry=registry, max_batch_size=100_001)


def test_unknown_setting() -> None:
    """A misspelt option is a TypeError, as in any call."""
    with pytest.raises(TypeError, match="flush_intervall"):
        Tracker(MemorySink(), flush_intervall=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "sink",
    [
        "",
        "conversations",
        "mysql://localhost",
        "http://",
        "http://user:secret@localhost:1",
        "http://localhost:1/path",
        "unix:",
        "unix:/run/x?token=abc",
        "unix:/" + 107 * "x",
        "nats://localhost",
        "nats://localhost/x y",
        "nats://user@localhost/x",
        "nats://localhost:0/x",
        "nats://localhost/x?token=abc",
        "nats:x",
        "embedded:",
        7,
        None,
        object(),
    ],
)
def test_wrong_sink(sink: Any) -> None:
    """What names no sink is refused."""
    with pytest.raises(TrackerError, match="sink"):
        Tracker(sink)


def test_a_sink_whose_extra_is_missing(monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry) -> None:
    """The message says what to install; it comes when the tracker is made."""
    monkeypatch.setattr(sinks, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[embedded\]' in a checkout"):
        Tracker("embedded:somewhere", registry=registry)
    monkeypatch.setitem(sys.modules, "tracker_daemon.stream.sink", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[nats\]' in a checkout"):
        Tracker("nats://localhost/chat", registry=registry)
    monkeypatch.setitem(sys.modules, "tracker_daemon.postgres.connection", None)
    with pytest.raises(ConfigError, match=r"pip install 'psycopg\[binary\]'"):
        Tracker("postgresql:///chat", registry=registry)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:secret@host:port/db",
        "postgresql:// bad secret",
        "postgresql:///x\0y",
        "postgresql:///\ud800",
        "host=x secret=1",
        "user:secret@host",
    ],
)
def test_a_malformed_url_is_refused_without_its_password(url: str) -> None:
    """A conninfo that libpq cannot read fails at once; a secret in it is not repeated by our message."""
    with pytest.raises(TrackerError, match="sink") as caught:
        Tracker(url)
    assert "user:secret" not in str(caught.value)


def test_a_pool_of_the_wrong_kind() -> None:
    """A synchronous pool cannot serve the worker's loop."""
    with pytest.raises(TrackerError, match="AsyncConnectionPool"):
        Tracker(ConnectionPool("dbname=x", open=False))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ("conversations", (None, "conversations")),
        ("Chat.Conversations", ("chat", "conversations")),
        ('"Chat"."Conver""sations"', ("Chat", 'Conver"sations')),
        ('"with space"', (None, "with space")),
        ('chat."x.y"', ("chat", "x.y")),
        ("gespräche", (None, "gespräche")),
    ],
)
def test_table_names(table: str, parts: tuple[str | None, str]) -> None:
    """Names fold and quote as in SQL."""
    assert split_table(table) == parts


def test_nothing_starts_by_making_one(registry: CollectorRegistry) -> None:
    """A tracker that is made and dropped has started nothing."""
    tracker = Tracker("postgresql://nowhere.invalid/x", registry=registry)
    assert "not started" in repr(tracker)
    report = tracker.close()
    assert (report.applied, report.lost) == (0, 0)
    assert "closed" in repr(tracker)
