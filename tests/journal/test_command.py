"""`tracker-daemon journal inspect | recover` on what a killed process left."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry

from tests.conftest import run_migrate
from tests.helpers import turns
from tracker_daemon import MemorySink, Tracker
from tracker_daemon.cli import program
from tracker_daemon.journal.records import FRAME, HEADER_SIZE, SYNCED_AT, WORD, word
from tracker_daemon.journal.windows import open_name
from tracker_daemon.sink import Opened, SinkFault

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

THREADS, CALLS = 40, 200


class Away(MemorySink):
    """A database that is not there."""

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        raise SinkFault("connection", f"{producer}/{lane} {known} {after}: nobody is there")


def leave(directory: Path) -> None:
    """Have a process accept calls and die."""
    pid = os.fork()
    if not pid:
        tracker = Tracker(Away(), journal=directory, registry=CollectorRegistry(), flush_interval=60)
        for number in range(CALLS):
            tracker.record_turn(f"t-{number % THREADS}", "a", 1, 0.001)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def call(*arguments: object) -> tuple[int, str, str]:
    """Run the command; return its status, output and errors."""
    result = CliRunner().invoke(program, ["journal", *map(str, arguments)], prog_name="tracker-daemon")
    return result.exit_code, result.stdout, result.stderr


def flip(directory: Path) -> Path:
    """Change a bit in the second record of the only file, which is said to be on the disk."""
    (path,) = directory.glob("*.journal")
    data = bytearray(path.read_bytes())
    second = HEADER_SIZE + FRAME.size + FRAME.unpack_from(data, HEADER_SIZE)[0]
    data[second + FRAME.size + 3] ^= 1
    WORD.pack_into(data, SYNCED_AT, word(len(data)))
    path.write_bytes(data)
    return path


def tokens(conninfo: str) -> int:
    """Return the sum of the table."""
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("SELECT coalesce(sum(total_tokens), 0)::bigint FROM conversations").fetchone()
    assert row is not None
    return int(row[0])


def test_inspect_and_recover(tmp_path: Path, empty_database: str) -> None:
    """What is left is shown, applied once, and a second time finds it applied."""
    run_migrate(empty_database)
    leave(tmp_path)
    status, out, _ = call("inspect", tmp_path, "--json")
    (window,) = map(json.loads, out.splitlines())
    assert (status, window["calls"], window["sealed"], window["damage"]) == (0, CALLS, False, None)
    status, out, err = call("recover", tmp_path, "--database", empty_database)
    assert (status, err) == (0, "")
    assert f"applied {CALLS} calls" in out
    assert tokens(empty_database) == CALLS
    assert call("recover", tmp_path, "--database", empty_database)[0] == 0
    assert tokens(empty_database) == CALLS


def test_damage(tmp_path: Path, empty_database: str) -> None:
    """Damage is named by file and byte and stops the recovery; passed over, all but the damaged call is applied."""
    run_migrate(empty_database)
    leave(tmp_path)
    path = flip(tmp_path)
    status, out, err = call("inspect", tmp_path)
    assert status == 1
    assert f"{path} is damaged at byte" in err
    status, out, err = call("recover", tmp_path, "--database", empty_database)
    assert status == 1
    assert "is damaged at byte" in err
    assert tokens(empty_database) == 0
    status, out, err = call("recover", tmp_path, "--database", empty_database, "--skip-damage")
    assert status == 0, err
    assert f"applied {CALLS - 1} calls" in out
    assert "passed over" in err
    assert tokens(empty_database) == CALLS - 1


def test_no_directory_and_one_in_use(tmp_path: Path) -> None:
    """Each is one line that names the directory."""
    assert call("inspect", tmp_path / "none")[0] == 1
    with Tracker(MemorySink(), journal=tmp_path, registry=CollectorRegistry()):
        assert call("inspect", tmp_path)[0] == 0
        status, _, err = call("recover", tmp_path, "--database", "postgresql:///none")
    assert status == 1
    assert f"in use by process {os.getpid()}" in err


@pytest.mark.parametrize("command", ["inspect", "recover"])
def test_help(command: str) -> None:
    """Both are there."""
    assert call(command, "--help")[0] == 0


def test_recover_tells_of_a_place_that_cannot_be_opened(database: str, tmp_path: Path) -> None:
    """What stands there is not applied: it is no success, and what stands elsewhere is applied all the same."""
    leave(tmp_path)
    lock = tmp_path / "forks" / "0" / "lock"
    lock.mkdir(parents=True)  # as nobody may open it, not even root
    (lock.parent / open_name(uuid4(), 1)).touch()
    status, _, errors = call("recover", tmp_path, "--database", database)
    assert status == 1
    assert f"{lock.parent} cannot be looked at: " in errors
    assert "cannot be opened: Is a directory" in errors
    assert turns(database) == CALLS
