"""What the pages, units and manifests tell an operator to run, to set and to look for is what there is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner

from tests.deploy.command_lines import (
    PAGES,
    UNITS,
    CommandLine,
    mentions,
    of_files_of_compose,
    of_kubernetes,
    of_pages,
    of_scripts,
    of_units,
)
from tests.deploy.manifests import DEPLOY, ROOT
from tests.deploy.test_prometheus import RECORDED
from tracker_daemon.cli import program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deploy.conftest import Samples

pytestmark = pytest.mark.artefact("docs, runbooks, units, manifests", "tracker-daemon")

# The changelog also has names that are gone.
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md"}
SOURCES = [path for kind in ("*.py", "*.sql") for path in sorted((ROOT / "tracker_daemon").rglob(kind))]
CODE = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
SECRETS = {
    "TRACKER_DATABASE_FILE": "postgresql:///chat\n",
    "TRACKER_STREAM_FILE": "nats://n1,n2,n3/chat\n",
    "TRACKER_TOKEN_FILE": "a token of this test's\n",
}
# Options and names in the pages that are of other programs, of PostgreSQL, of CPython and of a benchmark.
OTHERS = {"--cascade", "--from-file", "--help", "--no-owner", "--previous", "--target", "--workers"}
ELSEWHERE = {
    "default_transaction_read_only",
    "pg_dump",
    "loop_lag",
    "write_row",
    "unicodekeys_lookup_unicode",
    "process_start_time_seconds",
}


def leaves(group: click.Group) -> Iterator[click.Command]:
    """Yield every command that does something."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from leaves(command)
        else:
            yield command


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program's own way from arguments and environment to a command's settings; no command does anything."""
    for command in leaves(program):
        monkeypatch.setattr(command, "callback", lambda **_: None)
    for name, text in SECRETS.items():
        (tmp_path / name).write_text(text)

    def run(line: CommandLine) -> str:
        """Return what is wrong with *line*, or nothing."""
        given = {name: str(tmp_path / name) if name in SECRETS else value for name, value in line.environment}
        # A list of commands, or of options, is asked for.
        result = CliRunner().invoke(program, line.words, env=given)
        return f"{line}: {result.output.strip().splitlines()[-1]}" if result.exit_code else ""

    return run


@pytest.mark.parametrize(
    ("lines", "least"),
    [
        pytest.param(of_pages, 30, id="pages"),
        pytest.param(of_scripts, 3, id="examples"),
        pytest.param(of_units, 2, id="units"),
        pytest.param(of_files_of_compose, 5, id="compose"),
        pytest.param(of_kubernetes, 10, id="kubernetes"),
    ],
)
def test_command_lines(parse: Any, lines: Any, least: int) -> None:
    """Every command line is one that the program takes, with the environment that stands beside it."""
    found = lines()
    assert len(found) >= least
    assert [fault for line in found if (fault := parse(line))] == []


def test_commands_in_sentences() -> None:
    """Every command that a sentence mentions is there, and has the options that it is mentioned with."""
    found = mentions()
    assert len(found) > 40
    assert [fault for line in found if (fault := fault_of(line))] == []


def fault_of(line: CommandLine) -> str:
    """Return what is wrong with a mention, of which the end may be missing."""
    command: click.Command = program
    words = list(line.words)
    while isinstance(command, click.Group) and words:
        name = words.pop(0)
        if name not in command.commands:
            return f"{line}: no command {name!r}"
        command = command.commands[name]
    parser = command.make_parser(click.Context(command))
    try:
        parser.parse_args([*words])
    except click.BadOptionUsage:
        pass  # the value is not told
    except click.UsageError as error:
        return f"{line}: {error.format_message()}"
    return ""


def test_options_in_sentences() -> None:
    """Every option that stands alone in a sentence is one of a command."""
    known = {flag for command in leaves(program) for option in command.params for flag in option.opts}
    text = "\n".join(TEXTS.values())
    named = set(re.findall(r"`(--[a-z-]+)", text)) - OTHERS
    assert len(named) > 15
    assert named <= known


def test_variables() -> None:
    """Every variable that a page, a unit or a manifest names is a setting, or the file of one."""
    settings = {str(option.envvar) for command in leaves(program) for option in command.params if option.envvar}
    known = settings | {"TRACKER_DATABASE_FILE", "TRACKER_STREAM_FILE", "TRACKER_TOKEN"}
    known |= {"TRACKER_DAEMON_PORT"}  # what Kubernetes would set of a Service of this name
    files = [*TEXTS, *UNITS, *(path for path in DEPLOY.rglob("*") if path.suffix in (".yml", ".yaml", ".env", ".tpl"))]
    named = {name for file in files for name in re.findall(r"\bTRACKER_[A-Z_]*[A-Z]", file.read_text(encoding="utf-8"))}
    assert len(named) > 15
    assert named <= known


def test_metrics(samples: Samples) -> None:
    """Everything called `tracker_…` is a metric of `/metrics`, a recorded series, a table, or this package."""
    known = {*samples, *(re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in samples)}
    known |= {part for name in RECORDED for part in name.split(":")} | {"tracker_daemon"}
    known |= set(re.findall(r'"(tracker_[a-z_]+)"', CODE))  # tables, by whatever schema is put before them
    named = {
        (page.name, name) for page, text in TEXTS.items() for name in re.findall(r"\btracker_[a-z_]*[a-z]\b(?!…)", text)
    }
    assert len(named) > 60
    assert {(page, name) for page, name in named if name not in known} == set()


def test_events_of_the_log() -> None:
    """Every line of the log that a page speaks of is one that the code tells."""
    named = {
        event
        for text in TEXTS.values()
        for found in re.findall(r"(?:event=|\)\()([a-z_][a-z_|]+)", text)
        for event in found.split("|")
    }
    assert len(named) > 10
    assert {event for event in named if f'"{event}"' not in CODE} == set()


def test_names_in_code() -> None:
    """Every_name_like_this in a page's code is one of this program's."""
    known = {*re.findall(r"\w+", CODE), *ELSEWHERE}
    named = {
        (page.name, name)
        for page, text in TEXTS.items()
        for code in re.findall(r"`([^`\n]+)`", text)
        for name in re.findall(r"(?<![\w/.-])[a-z]+(?:_[a-z0-9]+)+(?![\w/.])", code)
        if not name.startswith(("tracker_", "test_"))
    }
    assert len(named) > 60
    assert {(page, name) for page, name in named if name not in known} == set()
