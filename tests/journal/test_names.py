"""Files under another's name, or without the header that they had: damage, never a call twice or gone in silence."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.journal.rig import Calls, Rig, recovered, small_files
from tracker_daemon import MemorySink

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
