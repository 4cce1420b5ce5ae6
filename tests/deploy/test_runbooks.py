"""The runbooks: one for each alert, and every command and query in them does what it says on a running daemon."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.deploy.queries import missing
from tests.deploy.test_prometheus import ALERTS, RECORDED
from tests.deploy.tools import DEPLOY, ROOT, curl

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploy.conftest import Daemon, Samples

pytestmark = pytest.mark.artefact("deploy/runbooks", "tracker-daemon", "curl")
FOLDER = DEPLOY / "runbooks"
BOOKS = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
PARTS = ("Means", "At risk", "Look at", "Do", "Over")
# What only a machine with systemd has: here it says what it was asked.
SHAMS = ("journalctl", "systemctl")


def _text(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def _blocks(text: str, language: str) -> list[str]:
    pattern = rf"^( *)```{language}\n(.*?)^ *```$"
    return [block for _, block in re.findall(pattern, text, re.DOTALL | re.MULTILINE)]


def _every(language: str) -> list[tuple[str, str]]:
    return [(name, block) for name in [*BOOKS, "README"] for block in _blocks(_text(name), language)]


def test_one_for_each_alert() -> None:
    """Each alert has its runbook, and each runbook its alert; the list of them leads to all."""
    assert set(BOOKS) == set(ALERTS)
    assert re.findall(r"^\| \[(\w+)\]\(\1\.md\)", _text("README"), re.MULTILINE) == list(ALERTS)


@pytest.mark.parametrize("name", BOOKS)
def test_parts(name: str) -> None:
    """A runbook says what it means, what is at risk, what to look at, what to do and when it is over, in that order."""
    text = _text(name)
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^\*\*(Means|At risk|Look at|Do|Over)\b", text, re.MULTILINE) == list(PARTS)


def test_links() -> None:
    """Every link leads to a file."""
    links = [(name, link) for name in [*BOOKS, "README"] for link in re.findall(r"\]\(([^)#]+)\)", _text(name))]
    assert [(name, link) for name, link in links if not (FOLDER / link).exists()] == []


def test_queries(samples: Samples) -> None:
    """Every query names what a daemon with a journal, or a recording rule, has."""
    queries = _every("promql")
    assert queries
    assert [fault for _, query in queries for fault in missing(query, samples, RECORDED)] == []


def test_statements(daemon: Daemon) -> None:
    """Every statement runs on the tables as they are."""
    statements = _every("sql")
    assert statements
    with psycopg.connect(daemon.database) as connection:
        for _, statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize("format_", ["text", "json"])
def test_patterns_find_either_format(format_: str) -> None:
    """What a runbook looks for in the log finds the line of each of its events, and not one that only mentions it."""
    patterns = [found for name in BOOKS for found in re.findall(r"--grep '([^']+)'", _text(name))]
    assert len(patterns) > 10
    searched = [(pattern, event) for pattern in patterns for event in pattern.rpartition("(")[2].rstrip(")").split("|")]
    code = (
        "import sys; from tracker_daemon.daemon.log import log_to_stderr; from tracker_daemon.logs import get_logger\n"
        "log_to_stderr('info', sys.argv[1])\n"
        "for event in sys.argv[2:]: get_logger().warning(event); get_logger().warning('other', error=event)"
    )
    command = [sys.executable, "-c", code, format_, *(event for _, event in searched)]
    lines = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True).stderr.splitlines()
    assert len(lines) == 2 * len(searched)
    for (pattern, event), line, other in zip(searched, lines[::2], lines[1::2], strict=True):
        assert event in line
        assert event in other
        assert re.search(pattern, line)
        assert not re.search(pattern, other)


@pytest.mark.parametrize(
    ("name", "metric", "label"),
    [
        ("TrackerCallsLost", "tracker_calls_lost_total", "reason"),
        ("TrackerDeadLetters", "tracker_calls_dead_lettered_total", "reason"),
        ("TrackerFlushErrors", "tracker_database_errors_total", "class"),
    ],
)
def test_every_reason_is_explained(name: str, metric: str, label: str, samples: Samples) -> None:
    """The table of a runbook has each value of the label that its alert names."""
    rows = "".join(re.findall(r"^(\| `.*?) \|", _text(name), re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) - {label} == samples[metric][label]


def test_nothing_secret_in_a_command() -> None:
    """No runbook has the database's URL or the stream's, which have a password, among a command's arguments."""
    assert [name for name in [*BOOKS, "README"] if re.search("--(database|stream)[ =`]", _text(name))] == []


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with the program of this checkout, and shams of what needs systemd."""
    (tmp_path / "tracker-daemon").write_text(f'#!/bin/sh\nexec {sys.executable} -m tracker_daemon "$@"\n')
    (tmp_path / "tracker-daemon").chmod(0o755)
    for name in SHAMS:
        (tmp_path / name).write_text(
            f'#!/bin/sh\ncase " $* " in *" tracker-daemon "* | *" tracker-consumer "*) echo {name} ;; *) exit 1 ;; esac\n'
        )
        (tmp_path / name).chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize("name", [*BOOKS, "README"])
def test_commands(name: str, daemon: Daemon, path: str, tmp_path: Path) -> None:
    """Every command ends well against a daemon that runs, its database and its journal."""
    curl()
    file = tmp_path / "database"
    file.write_text(daemon.database)
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "TRACKER_DATABASE_FILE": str(file)}
    environment["TRACKER_LISTEN"] = f"unix:{daemon.socket}"
    for block in _blocks(_text(name), "sh"):
        script = block.replace("/etc/tracker-daemon/database", str(file))
        script = script.replace("/run/tracker-daemon/tracker.sock", str(daemon.socket))
        script = script.replace("/var/lib/tracker-daemon/journal", str(daemon.journal))
        got = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script],
            env=environment,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
        assert got.returncode == 0, got.stdout
