"""Recovery of many calls in its short form: in bounded memory, and going on where a kill has ended it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.soak_recovery import MIB, Recovery


def test_recovery_in_short() -> None:
    """100,000 calls in many windows: applied once through a kill in the middle, in memory for one window."""
    words: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tracker-recovery-") as name:
        Path(name).chmod(0o755)
        settings = {"max_pending": 8_000, "max_queue_size": 1_000, "max_batch_size": 500}
        soak = Recovery(Path(name), 100_000, 20_000, settings, words.append, patience=60)
        assert soak.run(), "\n".join(words)
    assert soak.grown < 48 * MIB, "\n".join(words)
