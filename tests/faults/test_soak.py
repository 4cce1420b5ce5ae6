"""The soak run in its short form."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.soak import Soak


def test_soak_in_short() -> None:
    """A quarter of a minute of every kind of fault: nothing lost, nothing doubled, and each kind of trouble was really met."""
    words: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tracker-soak-") as name:
        Path(name).chmod(0o755)
        soak = Soak(Path(name), 15, seed=7, say=words.append)
        assert soak.run(), "\n".join(words)
    assert len(soak.faults) >= 10
