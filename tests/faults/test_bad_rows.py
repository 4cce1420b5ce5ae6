"""Batches of which many rows are bad: each is set aside alone, all others commit, at a bounded cost."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.test_errors_in_doubt import NOW, Life, life, turn
from tracker_daemon.batch import Batch
from tracker_daemon.sink import Applied

if TYPE_CHECKING:
    from collections.abc import Sequence

    import psycopg

    from tracker_daemon.delta import ThreadDelta

COLUMNS = "thread_id, started_at, last_activity, turn_count, agents_used, total_tokens, total_cost_usd, resolution_type, ended_at"
# What refuses a thread whose name ends in "bad", and the SQLSTATE of it. The last two are not told apart in the server.
REFUSALS = {
    "check": ("", "23514"),
    "raise": ("RAISE EXCEPTION 'not this one';", "P0001"),
    "overflow": ("NEW.turn_count := 2147483647 + NEW.turn_count;", "22003"),
    "raise with a state of its own": ("RAISE EXCEPTION 'not this one' USING ERRCODE = 'ZZ001';", "ZZ001"),
    "raise with a state of the schema's": ("RAISE EXCEPTION 'not this one' USING ERRCODE = '42P01';", "42P01"),
}


def refuse(admin: psycopg.Connection[Any], kind: str) -> None:
    """Have the table refuse every thread whose name ends in "bad"."""
    statement = REFUSALS[kind][0]
    if not statement:
        admin.execute("ALTER TABLE conversations ADD CONSTRAINT not_bad CHECK (thread_id NOT LIKE '%bad')")
        return
    body = f"BEGIN IF NEW.thread_id LIKE '%bad' THEN {statement} END IF; RETURN NEW; END"
    admin.execute(f"CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")  # type: ignore[call-overload]
    admin.execute("CREATE TRIGGER act BEFORE INSERT OR UPDATE ON conversations FOR EACH ROW EXECUTE FUNCTION act()")


def send(one: Life, deltas: Sequence[ThreadDelta], sequence: int = 1, **options: Any) -> Applied:
    """Apply a batch of *deltas*."""
    found = one.send(Batch(one.producer, 0, one.opened.epoch, sequence, tuple(deltas), **options))
    assert isinstance(found, Applied), found
    return found


def deltas_of(random: Random, bad: Sequence[bool]) -> list[ThreadDelta]:
    """Return deltas with everything in them, of threads whose names say whether they are bad."""
    made = []
    for number, is_bad in enumerate(bad):
        delta = turn(f'{number:04} "\\%{{}} {"bad" if is_bad else "good"}', random.randrange(10**6))
        for _ in range(random.randrange(3)):
            agent = random.choice([None, 'a"g', "\\", f"agent {number}", "%s"])
            delta.turn(agent, random.randrange(100), random.randrange(10**6), NOW + random.randrange(10**6))
        if random.random() < 0.5:
            delta.resolve(random.choice(["done", "%(left)s", f"so {number}"]), NOW + random.randrange(10**6))
        made.append(delta)
    random.shuffle(made)
    return made


def some_bad(random: Random, rows: int) -> list[bool]:
    """Return which rows are bad: stretches, each of a density of its own."""
    bad: list[bool] = []
    while len(bad) < rows:
        density = random.choice([0, 0, 0.02, 0.1, 0.3, 0.9, 1])
        bad += [random.random() < density for _ in range(random.choice([1, 10, 50, 200]))]
    return bad[:rows]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", REFUSALS)
def test_any_mixture(database: str, admin: psycopg.Connection[Any], kind: str, seed: int) -> None:
    """In whatever density bad rows stand: exactly those are set aside with their reason, the rest is as without them."""
    random = Random(f"{kind} {seed}")
    admin.execute("CREATE TABLE expected (LIKE conversations INCLUDING ALL)")
    refuse(admin, kind)
    bad = some_bad(random, 400)
    deltas = deltas_of(random, bad)
    good = [delta for delta in deltas if delta.thread_id.endswith("good")]
    with life(database) as one, life(database, table=(None, "expected")) as other:
        for sequence in (1, 2):  # of rows that are new, and of rows that are there
            found = send(one, deltas, sequence)
            assert (found.rows, found.skipped) == (len(good), 0)
            assert send(other, good, sequence).rows == len(good)
            letters = {letter.delta.thread_id: letter for letter in found.dead_letters}
            assert len(letters) == len(found.dead_letters)
            assert letters.keys() == {delta.thread_id for delta in deltas} - {delta.thread_id for delta in good}
            assert {letter.sqlstate for letter in letters.values()} <= {REFUSALS[kind][1]}
    difference = "(TABLE conversations EXCEPT TABLE expected) UNION ALL (TABLE expected EXCEPT TABLE conversations)"
    assert admin.execute(difference).fetchall() == []
    [[count]] = admin.execute("SELECT count(*) FROM tracker_dead_letters").fetchall()
    assert count == 2 * sum(bad)


def test_every_row_bad(database: str, admin: psycopg.Connection[Any]) -> None:
    """A thousand bad rows, and nothing else, cost a few dozen statements, and each letter tells the whole reason."""
    refuse(admin, "check")
    with life(database) as one:
        found = send(one, [turn(f"{number:04} bad") for number in range(1_000)])
        merges = one.did["merges"] + one.did["in server"]
    assert (found.rows, found.skipped, len(found.dead_letters)) == (0, 0, 1_000)
    assert merges <= 40
    assert {letter.reason for letter in found.dead_letters} == {"constraint"}
    for letter in found.dead_letters:
        assert "not_bad" in letter.error
        assert f"DETAIL: Failing row contains ({letter.delta.thread_id}," in letter.error
    errors = admin.execute("SELECT thread_id, error FROM tracker_dead_letters").fetchall()
    assert dict(errors) == {letter.delta.thread_id: letter.error for letter in found.dead_letters}


def test_every_other_row_bad(database: str, admin: psycopg.Connection[Any]) -> None:
    """It need not be all of them: of a thousand rows each second one bad costs as little."""
    refuse(admin, "check")
    with life(database) as one:
        found = send(one, [turn(f"{number:04} {('bad', 'good')[number % 2]}") for number in range(1_000)])
        merges = one.did["merges"] + one.did["in server"]
    assert (found.rows, len(found.dead_letters)) == (500, 500)
    assert merges <= 80


def test_good_rows_behind_bad_ones(database: str, admin: psycopg.Connection[Any]) -> None:
    """Behind a stretch of bad rows the good ones go by the hundred again."""
    refuse(admin, "check")
    names = [f"{number:04} {'bad' if number < 50 else 'good'}" for number in range(2_000)]
    with life(database) as one:
        found = send(one, [turn(name) for name in names])
        in_server = one.did["in server"]
    assert (found.rows, len(found.dead_letters)) == (1_950, 50)
    assert 1 <= in_server <= 10


def test_rows_that_are_only_skipped(database: str, admin: psycopg.Connection[Any]) -> None:
    """With `create_missing=False` one by one too a row without its conversation changes nothing, and is counted."""
    admin.execute("INSERT INTO conversations (thread_id) SELECT format('%s bad', n) FROM generate_series(0, 99) AS n")
    admin.execute("INSERT INTO conversations (thread_id) VALUES ('500 good')")
    admin.execute("ALTER TABLE conversations ADD CHECK (turn_count = 0 OR thread_id NOT LIKE '%bad')")
    names = [f"{number} {kind}" for number in range(100) for kind in ("bad", "good")]
    with life(database) as one:
        found = send(one, [turn(name) for name in [*names, "500 good"]], create_missing=False)
        assert one.did["in server"]
    assert (found.rows, found.skipped, len(found.dead_letters)) == (1, 100, 100)


def test_settings_end_with_the_transaction(database: str, admin: psycopg.Connection[Any]) -> None:
    """The rows stand in settings of the transaction: after it the connection has none of them."""
    refuse(admin, "check")
    with life(database) as one:
        send(one, [turn(f"{number:03} bad") for number in range(50)])
        assert one.did["in server"]
        session = one.sink._session
        assert session is not None
        query = "SELECT current_setting('tracker_daemon.thread_ids', true)"
        row = one.runner.run(_one_row(session.connection, query))
    assert row in ((None,), ("",))


async def _one_row(connection: psycopg.AsyncConnection[Any], query: Any) -> Any:
    return await (await connection.execute(query)).fetchone()
