"""Imports run one way, from what a user calls down to plain values."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import tracker_daemon

PACKAGE = Path(tracker_daemon.__file__).parent

# Top to bottom. A module imports only from floors below its own; modules of one floor do not know each other.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"stream_command"},
    {"serve_command", "journal_command", "comparison"},
    {"journal_operations"},
    {"daemon.serve", "daemon.consume", "daemon.health", "demo.run", "demo.drive", "operations"},
    {"daemon.process"},
    {"daemon.app", "daemon.connections"},
    {"daemon.consuming"},
    {"daemon.service", "daemon.notify", "stream.metrics"},
    {"daemon.watched"},
    {"daemon.relay", "daemon.options", "daemon.bearer", "daemon.ingest", "daemon.refused", "daemon.log"},
    {"daemon.admission", "daemon.relay_books"},
    {"demo.driving"},
    {"demo.screen", "demo.verdict", "demo.traffic", "demo.signals"},
    {"demo.terminal"},
    {"demo.count", "demo.figures"},
    {"__init__"},
    {"conversation_trackers"},
    {"tracker", "daemon.history"},
    {"stream.consumer", "stream.operations"},
    {"collector", "sinks", "host", "exits", "stream.partition", "postgres.leases"},
    {"families"},
    {"postgres.partitions", "stream.sink"},
    {"front_door", "readings", "worker", "embedded_sink", "http_sink", "postgres.lanes", "postgres.many"},
    {"stream.broker"},
    {"stream.driver"},
    {"stream.messages", "stream.facts", "stream.faults", "stream.shares"},
    {"flusher", "embedded", "postgres.sink", "wire"},
    {"recovery"},
    {"applier"},
    {"postgres.dead_letters", "postgres.apart", "postgres.doubts", "server_binaries", "server_probes"},
    {"postgres.session"},
    {"postgres.schema", "postgres.encoding", "postgres.faults", "postgres.connection", "postgres.write_through"},
    {"journal_keeper"},
    {"mending", "barriers"},
    {"backlog", "postgres.names"},
    {"intake", "sealed"},
    {"journal.journal", "journal.repair", "call_queue"},
    {"journal.inspection", "journal.degradation"},
    {"journal.retention"},
    {"journal.directory"},
    {"journal.lives", "journal.place"},
    {"journal.segment_queue", "journal.windows", "journal.lock"},
    {"journal.segment"},
    {"journal.records"},
    {"books", "waiting"},
    {"generation"},
    {
        "postgres.statements",
        "flush_numbers",
        "free_lock",
        "memory_sink",
        "settings",
        "logs",
        "backoff",
        "late_executor",
        "stream.address",
    },
    {"sink", "clock"},
    {"batch"},
    {"delta"},
    {"calls"},
    {
        "errors",
        "breath",
        "young_rows",
        "options",
        "postgres.__init__",
        "demo.__init__",
        "daemon.__init__",
        "journal.__init__",
        "stream.__init__",
    },
]
LEVEL = {module: level for level, floor in enumerate(FLOORS) for module in floor}


def modules() -> dict[str, Path]:
    """Return every module of the package by its name below `tracker_daemon`."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Return the package's own modules that a file imports, at the top, in functions and for types."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tracker_daemon":
            inside = (node.module or "").partition(".")[2]
            for alias in node.names:
                name = f"{inside}.{alias.name}".lstrip(".")
                found.add(next(n for n in (name, inside, f"{inside}.__init__".lstrip(".")) if n in known))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                head, _, inside = alias.name.partition(".")
                if head == "tracker_daemon":
                    found.add(inside or "__init__")
    return found


def test_every_module_has_a_floor() -> None:
    """A new file must be given its place; a file that is gone gives its up."""
    assert set(modules()) == set(LEVEL)


def test_imports_point_down() -> None:
    """No module imports from its own floor or from above, not even inside a function."""
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imports(path)
        if LEVEL[other] <= LEVEL[name] and other != name
    ]
    assert wrong == []


def test_no_name_of_the_standard_library() -> None:
    """A module named like one of the standard library breaks running a file from its folder."""
    assert [name for name in modules() if name.rpartition(".")[2] in sys.stdlib_module_names] == []


def test_public_names() -> None:
    """`__all__` is exactly the contract's list, and every name is there."""
    assert tracker_daemon.__all__ == sorted(tracker_daemon.__all__)
    assert set(tracker_daemon.__all__) == {
        "Tracker",
        "ConversationTrackerProtocol",
        "NoOpConversationTracker",
        "PostgresConversationTracker",
        "WriteBehindConversationTracker",
        "ThreadDelta",
        "TrackerStats",
        "DrainReport",
        "Sink",
        "MemorySink",
        "TrackerError",
        "InvalidCall",
        "QueueFull",
        "TrackerClosed",
        "FlushTimeout",
        "SchemaError",
        "JournalError",
        "Fenced",
    }
    assert all(hasattr(tracker_daemon, name) for name in tracker_daemon.__all__)
