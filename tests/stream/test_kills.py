"""Exactness while consumers, brokers, publishers and the database come and go."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.stream.kills import Kills


def test_kills_in_short() -> None:
    """Each of them killed, a consumer stopped past its lease: nothing missing, nothing doubled, and trouble was met."""
    words: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="trk-"))
    folder.chmod(0o755)
    try:
        kills = Kills(folder, 5, seed=3, say=words.append)
        assert kills.run(), "\n".join(words)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for trouble in (
        "consumer killed",
        "consumer stopped past its lease",
        "leading broker killed",
        "all brokers killed",
        "publisher killed",
        "Postgres stopped hard",
    ):
        assert kills.injected[trouble], words
    assert kills.met["published twice"], words
    assert kills.met["published again late"], words
