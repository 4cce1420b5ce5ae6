"""Files under another's name, or without the header that they had: damage, never a call twice or gone in silence."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from tests.journal.rig import Calls, Rig, recovered, small_files
from tracker_daemon import MemorySink
from tracker_daemon.journal.records import SYNCED_AT, WORD, word
from tracker_daemon.journal.repair import repair

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a life has left: three sealed windows and an open one, all of it on the disk."""
    small_files(monkeypatch)
    rig, calls = Rig(tmp_path, MemorySink()), Calls()
    for number in range(4):
        rig.call(calls.next("t0"))
        if number < 3:
            rig.seal()
    rig.sync()
    rig.crash()
    return tmp_path


def sealed(directory: Path) -> list[Path]:
    """Return the files of the sealed windows."""
    return sorted(path for path in directory.glob("*.journal") if "open" not in path.name)


def is_damage(directory: Path, words: str) -> None:
    """Assert that nothing of the life is applied, and it is told why."""
    sink = MemorySink()
    after = recovered(directory, sink)
    assert sink.rows == {}
    [told] = after.told
    assert words in str(told)
    assert after.journal.errors == {"damage": 1}


def test_whole(left: Path) -> None:
    """As it was left all of it is applied."""
    sink = MemorySink()
    assert recovered(left, sink).told == []
    assert sink.rows["t0"].turn_count == 4


def test_a_copy_of_an_open_file(left: Path) -> None:
    """Under a further number it would be one more part of the window."""
    [path] = left.glob("*-open-*")
    shutil.copy(path, path.with_name(path.name.replace("-open-0000000", "-open-0000001")))
    is_damage(left, "another's name")


def test_a_copy_of_a_sealed_file(left: Path) -> None:
    """Under a further sequence it would be one more window."""
    path = sealed(left)[2]
    shutil.copy(path, path.with_name(path.name.replace("-0000000000000003-", "-0000000000000009-")))
    is_damage(left, "another's name")


def test_a_copy_as_another_part(left: Path) -> None:
    """Under a further part it would be read behind itself."""
    path = sealed(left)[2]
    shutil.copy(path, path.with_name(path.name.replace("-0000.journal", "-0001.journal")))
    is_damage(left, "the same file as")


def test_of_another_life(left: Path) -> None:
    """Under another producer's name."""
    path = sealed(left)[0]
    path.rename(path.with_name("0" * 32 + path.name[32:]))
    sink = MemorySink()
    after = recovered(left, sink)
    assert "another's name" in str(after.told[0])


@pytest.mark.parametrize("size", [0, 64, 127])
@pytest.mark.parametrize("number", [0, 1])
def test_cut_short(number: int, size: int, left: Path) -> None:
    """A file that was on the disk, as a later one tells, is cut within its header."""
    path = sealed(left)[number]
    path.write_bytes(path.read_bytes()[:size])
    is_damage(left, "no header, where there was one")


# -- passed over when it is asked for --------------------------------------------------------------


def passed_over(directory: Path, aside: Path, missing: set[int]) -> None:
    """Assert that a repair sets *aside* away, and that of the four calls all but *missing* are applied, each once."""
    paths: dict[UUID, list[Path]] = {}
    for path in sorted(directory.glob("*.journal")):
        paths.setdefault(UUID(path.name[:32]), []).append(path)
    for producer, files in paths.items():
        done = repair(producer, files, 0)
        assert done.aside == ([f"{aside}.damaged"] if aside.name.startswith(producer.hex) else [])
        assert len(done.skipped) == len(done.aside)
    sink = MemorySink()
    assert recovered(directory, sink).told == []
    assert Calls.counted(sink.rows) == {("t0", digit) for digit in range(4) if digit not in missing}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-0000000000000003-", "-0000000000000009-"),
        ("-0000000000000003-", "-0000000000000001-"),
        ("-0000.journal", "-0001.journal"),
        ("-0000000000000003-0000", "-open-00000009"),
    ],
)
@pytest.mark.parametrize("synced", [True, False])
def test_a_copy_is_passed_over(before: str, after: str, synced: bool, left: Path) -> None:
    """The file that bears its own name counts, whichever comes first by name, also when none was ever on the disk."""
    path = sealed(left)[2]
    if not synced:
        data = bytearray(path.read_bytes())
        WORD.pack_into(data, SYNCED_AT, word(0))
        path.write_bytes(data)
    if after.endswith("0001-"):
        sealed(left)[0].unlink()  # of the window that was applied long ago
    copy = path.with_name(path.name.replace(before, after))
    shutil.copy(path, copy)
    passed_over(left, copy, {0} if after.endswith("0001-") else set())


def test_a_renamed_file_is_passed_over(left: Path) -> None:
    """It is kept under its new name; the other windows are applied."""
    path = sealed(left)[1]
    other = path.rename(path.with_name(path.name.replace("-0000000000000002-", "-0000000000000009-")))
    passed_over(left, other, {1})


def test_what_is_of_another_life_is_passed_over(left: Path) -> None:
    """A file that bears another producer's name."""
    path = sealed(left)[0]
    passed_over(left, path.rename(path.with_name("0" * 32 + path.name[32:])), {0})


@pytest.mark.parametrize("size", [0, 64, 127])
@pytest.mark.parametrize("number", [0, 1])
def test_cut_short_is_passed_over(number: int, size: int, left: Path) -> None:
    """A file cut within its header: what it held is lost, the rest is applied."""
    path = sealed(left)[number]
    path.write_bytes(path.read_bytes()[:size])
    passed_over(left, path, {number})
