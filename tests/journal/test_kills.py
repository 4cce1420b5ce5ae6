"""The kill soak in its short form."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.soak_journal import KillSoak


def test_kills_in_short() -> None:
    """50 kills at random instants: each call that was noted as accepted counts once, and no other."""
    words: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tracker-kills-") as name:
        Path(name).chmod(0o755)
        soak = KillSoak(Path(name), 50, seed=3, say=words.append)
        assert soak.run(), "\n".join(words)
    assert soak.met["kills"] >= 40
