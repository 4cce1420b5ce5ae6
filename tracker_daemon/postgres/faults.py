"""What kind of fault an exception of the driver is: the one place that classifies.

Source: PostgreSQL manual, "PostgreSQL Error Codes"; errors of the driver and of sockets as psycopg 3 raises them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import psycopg

from tracker_daemon.errors import one_line
from tracker_daemon.sink import SinkFault

if TYPE_CHECKING:
    from tracker_daemon.sink import DeadReason, FaultKind

_BY_STATE: Final[dict[str, FaultKind]] = {
    "57014": "timeout",  # query_canceled: statement_timeout, or somebody's cancel
    "25006": "readonly",
    "55P03": "lock",  # lock_not_available
    "55006": "lock",  # object_in_use
    "40P01": "lock",  # deadlock_detected
    "40001": "lock",  # serialization_failure
    "57P05": "connection",  # idle_session_timeout
    "25P03": "connection",  # idle_in_transaction_session_timeout
    "25P04": "timeout",  # transaction_timeout
    "3D000": "auth",  # the database does not exist
    "3F000": "schema",  # the schema does not exist
    "0A000": "schema",  # feature_not_supported: a view, a rule
    "58030": "capacity",  # io_error
    "58P01": "capacity",
}
_BY_CLASS: Final[dict[str, FaultKind]] = {
    "08": "connection",
    "21": "data",
    "22": "data",
    "23": "data",
    "44": "data",  # with_check_option_violation
    "P0": "data",  # of a trigger in PL/pgSQL
    "54": "data",  # program_limit_exceeded: an index row too long
    "28": "auth",
    "42": "schema",
    "53": "capacity",
    "57": "connection",
}
IN_DOUBT: Final[tuple[FaultKind, ...]] = ("schema", "other")
"""What a table raises that is not as it should be, and as well a trigger of it for one row only."""
_RAISED: Final = "exec_stmt_raise"
_ROW_REFUSED: Final = "ExecWithCheckOptions"
# A connection that is refused has no SQLSTATE in libpq, only the server's words.
_BY_WORDS: Final[tuple[tuple[str, FaultKind], ...]] = (
    ("read-only", "readonly"),
    ("authentication failed", "auth"),
    ("no password supplied", "auth"),
    ("pg_hba.conf", "auth"),
    ("permission denied", "auth"),
    ("does not exist", "auth"),
    ("too many clients", "capacity"),
    ("too many connections", "capacity"),
    ("connection slots", "capacity"),
    ("no more connections allowed", "capacity"),
    ("timeout expired", "timeout"),
)


def kind_of(error: BaseException) -> FaultKind:
    """Return what kind of fault *error* is."""
    if isinstance(error, psycopg.Error):
        return _kind_of_driver(error)
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, OSError):
        return "connection"
    if isinstance(error, UnicodeError | OverflowError):
        return "data"
    return "other"


def _kind_of_driver(error: psycopg.Error) -> FaultKind:
    state = error.sqlstate
    if isinstance(error, psycopg.errors.InsufficientPrivilege) and error.diag.source_function == _ROW_REFUSED:
        return "data"  # row-level security refuses this row, not the table
    if state and error.diag.source_function == _RAISED:
        return "data"  # RAISE in a trigger, under whatever SQLSTATE its author chose
    if state:
        return _BY_STATE.get(state) or _BY_CLASS.get(state[:2], "other")
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return "timeout"
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        words = str(error)
        # "No such file or directory" of a socket is a server that is not there, not a name that is wrong.
        return next((kind for part, kind in _BY_WORDS if part in words), "connection")
    return "data" if isinstance(error, psycopg.DataError) else "other"


def may_be_of_a_row(error: Exception, connection: psycopg.AsyncConnection[Any], doubts: list[Exception] | None) -> bool:
    """Say whether to look for a row that raises *error*; one that may be about the table goes into *doubts*.

    Without *doubts* such a one is not looked into.
    """
    kind = kind_of(error)
    if connection.broken or (kind != "data" and (doubts is None or kind not in IN_DOUBT)):
        return False
    if doubts is not None and kind != "data":
        doubts.append(error)
    return True


def fault(error: BaseException, context: str) -> SinkFault:
    """Return *error* as the port's exception; *context* says what was being done."""
    text = one_line(str(error)) or type(error).__name__
    state = getattr(error, "sqlstate", None)
    hint = _hint(error)
    return SinkFault(kind_of(error), f"{context}: {text}{f' [{state}]' if state else ''}{hint}")


def _hint(error: BaseException) -> str:
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return "; grant the role INSERT, SELECT and UPDATE on the tables (and DELETE on tracker_ledger)"
    return ""


def dead_reason(error: BaseException) -> DeadReason:
    """Return the reason under which a delta that raised *error* is counted."""
    return reason_of_state(getattr(error, "sqlstate", None) or "")


def reason_of_state(state: str) -> DeadReason:
    """Return the reason for a SQLSTATE, "" for an error of the driver's own."""
    if state == "22003":
        return "overflow"
    if state.startswith("P0"):
        return "raised"
    if state.startswith("23"):
        return "constraint"
    return "data" if state else "driver"
