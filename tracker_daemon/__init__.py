"""Write-behind conversation tracking for chat servers: calls in memory, sums in Postgres, exactly once."""

from tracker_daemon.books import DrainReport, TrackerStats
from tracker_daemon.conversation_trackers import (
    ConversationTrackerProtocol,
    NoOpConversationTracker,
    PostgresConversationTracker,
    WriteBehindConversationTracker,
)
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.errors import (
    Fenced,
    FlushTimeout,
    InvalidCall,
    JournalError,
    QueueFull,
    SchemaError,
    TrackerClosed,
    TrackerError,
)
from tracker_daemon.memory_sink import MemorySink
from tracker_daemon.sink import Sink
from tracker_daemon.tracker import Tracker

__all__ = [
    "ConversationTrackerProtocol",
    "DrainReport",
    "Fenced",
    "FlushTimeout",
    "InvalidCall",
    "JournalError",
    "MemorySink",
    "NoOpConversationTracker",
    "PostgresConversationTracker",
    "QueueFull",
    "SchemaError",
    "Sink",
    "ThreadDelta",
    "Tracker",
    "TrackerClosed",
    "TrackerError",
    "TrackerStats",
    "WriteBehindConversationTracker",
]
