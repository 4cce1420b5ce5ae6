"""`tracker-daemon journal inspect | recover`, on a real Postgres."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from click.testing import CliRunner, Result
from prometheus_client import CollectorRegistry

from tests.helpers import ledger, query, turns
from tests.journal.forgetful import told
from tests.journal.rig import Calls, Rig, small_files
from tests.journal.test_repair import offsets, spoil
from tracker_daemon import MemorySink, Tracker
from tracker_daemon.batch import Batch
from tracker_daemon.cli import program
from tracker_daemon.generation import ensure
from tracker_daemon.journal.lives import life_of
from tracker_daemon.journal.records import FRAME
from tracker_daemon.memory_sink import MemoryRow
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from pathlib import Path

    from tracker_daemon.generation import Record


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)


KEPT = (
    "{} windows that are applied stay there for journal_retain, in case the database forgets them; the next tracker "
    "deletes them then"
)


def cli(*arguments: object, **environment: str) -> Result:
    """Run a command on a journal."""
    words = ["journal", *map(str, arguments)]
    result = CliRunner().invoke(program, words, env=environment, prog_name="tracker-daemon")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


class Left:
    """What a life left: two sealed windows of three batches and of one, and an open one."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory, self.calls = directory, Calls()
        rig = Rig(directory, MemorySink(), **options)
        self.producer = rig.journal.producer
        for thread_ids in (["t0", "t1", "t2", "t3", "t4", "t0"], ["t1", "t1"]):
            for thread_id in thread_ids:
                rig.call(self.calls.next(thread_id))
            rig.seal()
        rig.call(self.calls.next("t9"))
        rig.sync()
        rig.crash()

    def apply(self, database: str, batches: int) -> None:
        """Apply some batches of the first window, as the process did before it died."""
        paths = sorted(self.directory.glob("*.journal"))
        [window, *_] = life_of(self.producer, paths).windows

        async def apply() -> None:
            sink = PostgresSink(Connector(database), (None, "conversations"))
            opened = await sink.open(self.producer, 0)
            for sequence, deltas in list(enumerate(window.load().batches(2), 1))[:batches]:
                await sink.apply(Batch(self.producer, 0, opened.epoch, sequence, deltas))
            await sink.aclose(self.producer, 0, clean=False)

        anyio.run(apply)

    @property
    def first_file(self) -> Path:
        """The file of the first window."""
        return min(self.directory.glob("*-0000000000000001-*.journal"))

    def counted(self, database: str) -> set[tuple[str, int]]:
        """Return the calls in the table; fail if one is there twice."""
        rows = query(database, "SELECT thread_id, total_tokens, turn_count FROM conversations")
        return Calls.counted(
            {name: MemoryRow(0, 0, turn_count=int(n), total_tokens=int(sum_)) for name, sum_, n in rows}
        )


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect(tmp_path: Path) -> None:
    """A table: the life, its windows, their sequences, files, bytes and calls."""
    left = Left(tmp_path)
    result = cli("inspect", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"journal {tmp_path}: not in use"
    assert lines[1] == "pending is ? because the ledger was not asked: give --database URL"
    assert lines[3].startswith(f"life {left.producer.hex} begun 20")
    assert lines[3].endswith(f"epoch 0, in {tmp_path}")
    size = left.first_file.stat().st_size
    assert [line.split() for line in lines[4:]] == [
        ["sequences", "state", "files", "bytes", "calls", "pending", "torn"],
        ["1-3", "sealed", "1", str(size), "6", "?", "0"],
        ["4-4", "sealed", "1", lines[6].split()[3], "2", "?", "0"],
        ["5-", "open", "1", lines[7].split()[3], "1", "?", "0"],
    ]


def test_inspect_json(tmp_path: Path) -> None:
    """The same for a program, each file by itself."""
    left = Left(tmp_path)
    at = offsets(left.first_file)[2]
    spoil(left.first_file, at + FRAME.size + 1)
    result = cli("inspect", tmp_path, "--json")
    assert result.exit_code == 1, "something is damaged"
    windows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(window["first"], window["last"]) for window in windows] == [(1, 3), (4, 4), (5, None)]
    window = windows[0]
    assert (window["directory"], window["holder"]) == (str(tmp_path), "")
    assert (window["producer"], window["lane"], window["epoch"], window["ledger"]) == (left.producer.hex, 0, 0, None)
    assert datetime.fromisoformat(window["begun_at"]).tzinfo == UTC, "as the other commands have instants"
    assert (window["first"], window["last"], window["sealed"], window["calls"]) == (1, 3, True, 5)
    [fault] = window["damage"]
    assert (fault["file"], fault["offset"]) == (str(left.first_file), at)
    assert [file["name"] for file in window["files"]] == [left.first_file.name]
    assert windows[1]["damage"] is None
    assert f"{left.first_file} is damaged at byte {at}: a checksum" in cli("inspect", tmp_path).stderr


def test_inspect_beside_a_tracker(tmp_path: Path) -> None:
    """It names the process, changes nothing, and takes no lock that the next tracker would find."""
    with Tracker(MemorySink(), journal=tmp_path, flush_interval=60, registry=CollectorRegistry()) as tracker:
        assert tracker.record_turn("t", "a", 1, 0.5)
        before = {path: path.stat().st_size for path in tmp_path.iterdir()}
        result = cli("inspect", tmp_path)
        assert result.exit_code == 0
        assert result.stdout.splitlines()[0] == f"journal {tmp_path}: in use by process {os.getpid()}"
        assert result.stdout.splitlines()[-1].split()[:2] == ["1-", "open"]
        assert result.stdout.splitlines()[-1].split()[4] == "1"
        assert {path: path.stat().st_size for path in tmp_path.iterdir()} == before
    assert cli("inspect", tmp_path).stdout.splitlines()[0].endswith("not in use")


def test_inspect_with_a_database(tmp_path: Path, database: str) -> None:
    """It says where the ledger stands, and how many calls of each window it does not have."""
    left = Left(tmp_path)
    left.apply(database, 2)
    result = cli("inspect", tmp_path, "--database", database)
    assert result.exit_code == 0
    assert "ledger at 2" in result.stdout
    assert [line.split()[5] for line in result.stdout.splitlines()[4:]] == ["1", "2", "1"]
    assert [row[1] for row in ledger(database)] == [1], "its epoch is as it was"


@pytest.mark.parametrize("command", ["inspect", "recover"])
def test_no_directory(command: str, tmp_path: Path) -> None:
    """One that is not there is not made."""
    result = cli(command, tmp_path / "none", "--database", "host=/nowhere")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: journal {tmp_path / 'none'}: there is no such directory\n"
    assert not (tmp_path / "none").exists()


def test_an_empty_directory(tmp_path: Path, database: str) -> None:
    """Nothing is left in it, and nothing to apply."""
    assert cli("inspect", tmp_path).stdout == f"journal {tmp_path}: not in use\nnothing is left in it\n"
    result = cli("recover", tmp_path, "--database", database)
    assert (result.exit_code, result.stdout) == (0, "nothing is left to apply\n")


def test_files_that_do_not_count(tmp_path: Path) -> None:
    """A file that a loss of power has left blank is named, and stops nothing."""
    left = Left(tmp_path)
    blank = tmp_path / f"{left.producer.hex}-open-00000099.journal"
    blank.write_bytes(b"\0" * 500)
    result = cli("inspect", tmp_path)
    assert result.exit_code == 0
    assert f"  {blank.name} does not count: 500 bytes, torn 0" in result.stdout.splitlines()


# -- recover ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", range(4))
def test_recover(applied: int, tmp_path: Path, database: str) -> None:
    """What the ledger does not have is applied, once; the second time there is nothing to do."""
    left = Left(tmp_path)
    if applied:
        left.apply(database, applied)
    before = len(left.counted(database))
    result = cli("recover", tmp_path, "--database", database)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"life {left.producer.hex}: applied {9 - before} calls, {before} were already in the database",
        KEPT.format(3),
    ]
    assert left.counted(database) == left.calls.made
    again = cli("recover", tmp_path, "--database", database)
    assert again.exit_code == 0
    assert f"{left.producer.hex}: applied 0 calls, 9 were already in the database" in again.stdout
    lines = cli("inspect", tmp_path, "--database", database).stdout.splitlines()
    assert lines[1] == "what is applied is kept for journal_retain, in case the database forgets it"
    assert [line.split()[1] for line in lines[5:]] == ["applied"] * 3
    assert turns(database) == 9


def test_recover_beside_a_tracker(tmp_path: Path, database: str) -> None:
    """It is refused, with the process that has the directory."""
    with Tracker(MemorySink(), journal=tmp_path, registry=CollectorRegistry()):
        result = cli("recover", tmp_path, "--database", database)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"is in use by process {os.getpid()}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_recover_what_is_damaged(tmp_path: Path, database: str) -> None:
    """Without being asked to it passes over nothing: file, offset and what to do are said; asked to it does."""
    left = Left(tmp_path)
    path = left.first_file
    at, end = offsets(path)[3:5]
    spoil(path, at + FRAME.size + 1)
    result = cli("recover", tmp_path, "--database", database)
    assert result.exit_code == 1
    assert "9 calls" not in result.stdout
    assert "8 calls are not applied" in result.stdout
    assert f"{path} is damaged at byte {at}: a checksum that does not match" in result.stderr
    assert "add --skip-damage" in result.stderr
    assert turns(database) == 0
    result = cli("recover", tmp_path, "--database", database, "--skip-damage")
    assert result.exit_code == 0
    assert f"life {left.producer.hex}: applied 8 calls, 0 were already in the database\n" in result.stdout
    assert result.stderr == f"passed over {end - at} bytes at byte {at} of {path}\nkept {path}.damaged\n"
    assert left.counted(database) == left.calls.made - {("t3", 0)}
    assert cli("inspect", tmp_path).exit_code == 0


def test_recover_what_is_damaged_and_partly_applied(tmp_path: Path, database: str) -> None:
    """Where the damage hides which calls were applied it says so, and applies none of them."""
    left = Left(tmp_path)
    left.apply(database, 1)
    path = left.first_file
    spoil(path, offsets(path)[1] + FRAME.size + 1)
    result = cli("recover", tmp_path, "--database", database, "--skip-damage")
    assert result.exit_code == 0
    assert "left out 3 calls that can be read" in result.stderr
    assert "it cannot be exact" in result.stderr
    # The first batch, and the windows behind.
    assert left.counted(database) == {("t0", 0), ("t0", 1), ("t1", 0), ("t1", 1), ("t1", 2), ("t9", 0)}
    assert cli("inspect", tmp_path, "--database", database).exit_code == 0


def test_recover_what_is_damaged_and_applied(tmp_path: Path, database: str) -> None:
    """A window of which everything is applied is not in the way, whatever became of its file."""
    left = Left(tmp_path)
    left.apply(database, 3)
    spoil(left.first_file, offsets(left.first_file)[1] + FRAME.size + 1)
    result = cli("recover", tmp_path, "--database", database)
    assert (result.exit_code, result.stderr) == (0, "")
    assert left.counted(database) == left.calls.made


def test_recover_a_life_that_creates_no_rows(tmp_path: Path, database: str) -> None:
    """Whether a turn may create its row was decided when it was made."""
    calls = Calls()
    rig = Rig(tmp_path, MemorySink(), create_missing=False)
    made: list[Record] = [calls.next("missing"), ensure("there", 1_700_000_000_000_000_000), calls.next("there")]
    for call in made:
        rig.call(call)
    rig.crash()
    other = Rig(tmp_path / "other", MemorySink())
    other.call(calls.next("made"))
    other.crash()
    for path in (tmp_path / "other").glob("*.journal"):
        path.rename(tmp_path / path.name)
    assert cli("recover", tmp_path, "--database", database).exit_code == 0
    assert sorted(query(database, "SELECT thread_id FROM conversations")) == [("made",), ("there",)]


def test_recover_without_a_row_in_the_ledger(tmp_path: Path, database: str) -> None:
    """A life that was registered, and is not any more: whether it was applied must not be guessed."""
    calls, sink = Calls(), MemorySink()
    rig = Rig(tmp_path, sink)
    rig.call(calls.next("t0"))
    rig.flush()
    rig.call(calls.next("t0"))
    rig.sync()
    rig.crash()
    result = cli("recover", tmp_path, "--database", database)
    assert result.exit_code == 1
    assert "the ledger row of producer" in result.stderr
    assert turns(database) == 0


def forgotten(directory: Path) -> tuple[Rig, Calls]:
    """Be a life of five windows of which the first is not kept any more, and the others were applied where nobody knows."""
    calls = Calls()
    rig = Rig(directory, MemorySink())
    for _ in range(2):
        for thread_id in ("t0", "t1", "t2"):
            rig.call(calls.next(thread_id))
        rig.flush()
    rig.sync()
    rig.journal.forget(rig.journal.retained(rig.journal.producer)[0])
    calls.made = {(thread_id, digit) for thread_id, digit in calls.made if digit == 1}
    rig.call(calls.next("t0"))
    rig.sync()
    rig.crash()
    return rig, calls


@pytest.mark.parametrize("spelled", ["hex", "urn"])
def test_again(spelled: str, tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a restored backup forgot as a whole is applied when it is asked for by name; from then on exactly once."""
    rig, calls = forgotten(tmp_path)
    producer = rig.journal.producer
    refused = cli("recover", tmp_path, "--database", database)
    assert refused.exit_code == 1
    assert f"--again {producer.hex} applies all of them" in refused.stderr
    assert (
        "applied 0 calls, 3 are noted as applied, the ledger has no row\n  1 calls are not applied\n" in refused.stdout
    )
    assert turns(database) == 0
    named = {"hex": producer.hex, "urn": str(producer)}[spelled]
    result = cli("recover", tmp_path, "--database", database, "--again", named)
    assert result.exit_code == 0
    assert told(caplog, "batches_missing") == [], "it begins right before the first window that is here"
    assert result.stderr == (
        f"life {producer.hex}: registered anew at sequence 2; all that its 2 windows hold is applied, as if none of it "
        "had been\n"
    )
    assert f"life {producer.hex}: applied 4 calls, 0 were already in the database" in result.stdout
    # Digits that are not there have no place in the sum: the rest is each there once.
    rows = query(database, "SELECT thread_id, total_tokens::int FROM conversations ORDER BY 1")
    assert rows == [("t0", 4 + 16), ("t1", 4), ("t2", 4)]
    again = cli("recover", tmp_path, "--database", database, "--again", named)
    assert (again.exit_code, again.stdout) == (1, "")
    assert f"the ledger has producer {producer.hex}, at sequence 5" in again.stderr
    assert cli("recover", tmp_path, "--database", database).exit_code == 0
    assert query(database, "SELECT thread_id, total_tokens::int FROM conversations ORDER BY 1") == rows
    assert len(calls.made) == 4


def test_again_cut_short(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after some batch, it is gone on with as with any life: each call once."""
    rig, calls = forgotten(tmp_path)
    apply, done = PostgresSink.apply, list[Batch]()

    async def apply_one(sink: PostgresSink, batch: Batch) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(batch)
        return await apply(sink, batch)

    monkeypatch.setattr(PostgresSink, "apply", apply_one)
    words = ["journal", "recover", str(tmp_path), "--database", database, "--again", rig.journal.producer.hex]
    assert CliRunner().invoke(program, words).exit_code != 0
    monkeypatch.undo()
    assert [batch.sequence for batch in done] == [3]
    assert [(producer, sequence) for producer, _, sequence in ledger(database)] == [(str(rig.journal.producer), 3)]
    assert cli("recover", tmp_path, "--database", database).exit_code == 0
    assert turns(database) == len(calls.made) == 4


def test_again_of_somebody_unknown(tmp_path: Path, database: str) -> None:
    """A producer of whom nothing is there, and a word that is none: nothing is done."""
    Left(tmp_path)
    result = cli("recover", tmp_path, "--database", database, "--again", "0" * 32)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"has nothing of producer {'0' * 32}" in result.stderr
    assert cli("recover", tmp_path, "--database", database, "--again", "x").exit_code == 2
    assert turns(database) == 0
    assert ledger(database) == []


def test_recover_without_a_database(tmp_path: Path) -> None:
    """It says so at once, and keeps nothing locked."""
    Left(tmp_path)
    result = cli("recover", tmp_path, "--database", "host=/nowhere")
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "not in use" in cli("inspect", tmp_path).stdout


def test_settings_from_the_environment(tmp_path: Path, database: str) -> None:
    """The directory and every setting; what is of one run alone is none, and stops it."""
    left = Left(tmp_path)
    spoil(left.first_file, offsets(left.first_file)[3] + FRAME.size + 1)
    environment = {"TRACKER_JOURNAL": str(tmp_path), "TRACKER_DATABASE": database}
    assert json.loads(cli("inspect", "--json", **environment).stdout.splitlines()[0])["ledger"] is None
    assert cli("recover", **environment).exit_code == 1
    refused = cli("recover", TRACKER_SKIP_DAMAGE="1", **environment)
    assert refused.exit_code == 2
    assert "TRACKER_SKIP_DAMAGE is no setting" in refused.stderr
    assert cli("recover", TRACKER_AGAIN=left.producer.hex, **environment).exit_code == 2
    assert cli("inspect", TRACKER_JSON="1", **environment).exit_code == 2
    assert cli("recover", "--skip-damage", **environment).exit_code == 0
    assert turns(database) == 8
