"""The README's code runs as it stands, and what it lists is what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import anyio
import httpx
import psycopg
import pytest

import tracker_daemon
from tests.daemon.harness import serving
from tests.test_metrics import NAMES
from tracker_daemon.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = PAGES[ROOT / "README.md"]


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
    source = code(2).replace('"postgresql:///chat"', repr(database))
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
            refused = await client.post(f"/turn/{'x' * 513}")
            assert refused.status_code == 422
            assert refused.json()["detail"].startswith("thread_id must")

    anyio.run(use)
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT thread_id, turn_count FROM conversations").fetchall() == [("t-1", 1)]


def test_tables_without_the_command_line(empty_database: str) -> None:
    """The program that makes the tables makes them."""
    exec(code(1).replace('"postgresql:///chat"', repr(empty_database)), {})  # noqa: S102 - it is the point
    with psycopg.connect(empty_database) as connection:
        assert connection.execute("SELECT count(*) FROM conversations, tracker_ledger").fetchall() == [(0,)]


@pytest.mark.parametrize("page", ["README.md", "docs/daemon.md"])
def test_calls_with_curl(database: str, page: str) -> None:
    """The page's request is answered once its calls are in the table."""
    if shutil.which("curl") is None:
        pytest.skip("no curl on PATH")
    (block,) = re.findall(r"```sh\n(curl .*?)```", PAGES[ROOT / page], re.DOTALL)
    with serving(database) as daemon:
        script = block.replace("/run/tracker-daemon/tracker.sock", daemon.path)
        got = subprocess.run(["sh", "-ec", script], check=True, capture_output=True, text=True, timeout=60)
    assert got.stdout.strip() == '{"accepted":2}'
    with psycopg.connect(database) as connection:
        row = connection.execute("SELECT turn_count, total_tokens, resolution_type FROM conversations").fetchone()
    assert row == (1, 812, "resolved_by_agent")


def test_every_metric_is_listed() -> None:
    """Each family that a scrape has stands in docs/metrics.md."""
    text = PAGES[ROOT / "docs" / "metrics.md"]
    assert [name for name in NAMES if f"`{name}" not in text] == []


def test_every_setting_is_listed() -> None:
    """Each setting stands in the table with its default."""
    for name in Settings.__dataclass_fields__:
        if name != "journal":
            assert f"| `{name}` |" in TEXT, name


def test_every_public_name_is_told() -> None:
    """Nothing is public that the README or a page beside it does not mention."""
    text = "".join(PAGES.values())
    told = [name for name in tracker_daemon.__all__ if name not in text]
    assert set(told) <= {"TrackerError", "TrackerStats", "ThreadDelta", "JournalError", "ConversationTrackerProtocol"}


def test_the_promises_tests_exist() -> None:
    """Every test that the list of proofs names is there."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGES[ROOT / "docs" / "proofs.md"])
    assert len(named) > 40
    for file, name in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source or f"class {name}(" in source, f"{file}::{name}"


def test_links_lead_somewhere() -> None:
    """Every file that a page links to is there, and every page is linked to from the README or one that it links to."""
    linked = set()
    for page, text in PAGES.items():
        for link in re.findall(r"(?:\]\(|^\[\w+\]: )([^)#\s]+)", text, re.MULTILINE):
            if "://" not in link:
                target = (page.parent / link).resolve()
                assert target.exists(), f"{page.name}: {link}"
                linked.add(target)
    assert set(PAGES) - linked <= {ROOT / "README.md"}


def test_lines_are_short() -> None:
    """The README can be read in a terminal: 120 columns are enough."""
    assert [line for line in TEXT.splitlines() if len(line) > 120] == []
