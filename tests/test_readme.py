"""The README's code runs as it stands, and what it lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import psycopg

import tracker_daemon
from tests.test_metrics import NAMES
from tracker_daemon.settings import Settings

if TYPE_CHECKING:
    import pytest

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def code(number: int) -> str:
    """Return the README's Python block *number*."""
    return re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[number]


def test_first_example(database: str) -> None:
    """The ten-line example leaves its conversation in the table."""
    names: dict[str, object] = {}
    exec(code(0).replace('"postgresql:///chat"', repr(database)), names)  # noqa: S102 - it is the point
    anyio.run(names["main"])  # type: ignore[arg-type]
    with psycopg.connect(database) as connection:
        row = connection.execute("SELECT turn_count, total_tokens, resolution_type FROM conversations").fetchone()
    assert row == (1, 812, "resolved_by_agent")


def test_application(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ASGI example takes a turn and has it in the table when it has stopped."""
    names: dict[str, object] = {"__name__": "app"}
    source = code(1).replace('"postgresql:///chat"', repr(database))
    monkeypatch.setattr("prometheus_client.registry.REGISTRY._names_to_collectors", {})
    exec(source, names)  # noqa: S102 - it is the point
    app: Any = names["app"]

    async def use() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://a") as client,
        ):
            assert (await client.post("/turn/t-1")).json() == {"accepted": True}

    anyio.run(use)
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT thread_id, turn_count FROM conversations").fetchall() == [("t-1", 1)]


def test_every_metric_is_listed() -> None:
    """Each family that a scrape has stands in the README."""
    assert [name for name in NAMES if f"`{name}" not in TEXT] == []


def test_every_setting_is_listed() -> None:
    """Each setting stands in the table with its default."""
    for name in Settings.__dataclass_fields__:
        if name != "journal":
            assert f"| `{name}` |" in TEXT, name


def test_every_public_name_is_told() -> None:
    """Nothing is public that the README does not mention."""
    told = [name for name in tracker_daemon.__all__ if name not in TEXT]
    assert set(told) <= {"TrackerError", "TrackerStats", "ThreadDelta", "JournalError", "ConversationTrackerProtocol"}


def test_the_promises_tests_exist() -> None:
    """Every test that the table of promises names is there."""
    root = Path(__file__).parent.parent
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT):
        source = (root / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source or f"class {name}(" in source, f"{file}::{name}"
