"""The kill soak in its short form."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.soak_journal import KillSoak


@pytest.mark.parametrize(("kills", "forks"), [(24, 0), (24, 4)])
def test_kills_in_short(kills: int, forks: int) -> None:
    """Kills at random instants: each call that was noted as accepted counts once, and no other.

    With forks those of children as well, whose dying is taken over from while their parent lives.
    """
    words: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tracker-kills-") as name:
        Path(name).chmod(0o755)
        soak = KillSoak(Path(name), kills, seed=3, say=words.append, forks=forks)
        assert soak.run(), "\n".join(words)
    assert soak.met["kills"] >= 0.8 * kills
