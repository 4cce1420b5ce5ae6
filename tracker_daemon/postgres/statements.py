"""The SQL files, with the names of one set of tables filled in.

Rules:
1. SQL stands in `sql/*.sql` and `migrations/*.sql`, one statement or step a file; here names are filled in, no more.
2. Every name goes through `psycopg.sql.Identifier`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracker_daemon.batch import Batch

_NOTHING = sql.SQL("")
_ONE = sql.SQL("1")
_HERE = "tracker_daemon.postgres"
_PARAMETER = re.compile(r"%\((\w+)\)s")
_SLICE = "[tracker_row:tracker_row]"
_WHOLE = dict.fromkeys(("agent_lists", "resolutions"), "")
_EXISTING = "_existing"


@cache
def _text(name: str) -> str:
    text = files(_HERE).joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--")).strip()


def migrations() -> Iterator[tuple[int, str, str]]:
    """Yield the number, name and text of every migration, in order."""
    found = sorted(files(_HERE).joinpath("migrations").iterdir(), key=lambda file: file.name)
    for file in found:
        if file.name.endswith(".sql"):
            number, _, name = file.name.removesuffix(".sql").partition("_")
            yield int(number), name, file.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Statements:
    """Every statement of the flush, for one table of conversations.

    Attributes:
        schema, table: where the conversations are; the ledger and the dead letters are in the same schema.
    """

    schema: str
    table: str
    names: dict[str, sql.Composable] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = {
            "table": sql.Identifier(self.schema, self.table),
            "ledger": sql.Identifier(self.schema, "tracker_ledger"),
            "dead_letters": sql.Identifier(self.schema, "tracker_dead_letters"),
            "partitions": sql.Identifier(self.schema, "tracker_partitions"),
            "consumers": sql.Identifier(self.schema, "tracker_consumers"),
            "migrations": sql.Identifier(self.schema, "tracker_migrations"),
            "schema": sql.Identifier(self.schema),
        }
        object.__setattr__(self, "names", names)
        moved = sql.SQL("EXISTS (SELECT FROM moved)")
        composed = {}
        for kind, only in (("", None), (_EXISTING, self._fill("only_existing"))):
            composed["flush_arrays" + kind] = self._merge(
                "rows_arrays",
                moved=sql.SQL("moved AS ({}), ").format(self._fill("advance")),
                moved_count=sql.SQL("(SELECT count(*) FROM moved)"),
                where=[moved, only],
            )
            composed["merge_arrays" + kind] = self._merge("rows_arrays", where=[only])
            composed["merge_stage" + kind] = self._merge("rows_stage", where=[only])
            composed["one_by_one" + kind] = self._one_by_one(only)
        object.__setattr__(self, "_composed", composed)

    def __getitem__(self, name: str) -> sql.Composed:
        """Return the statement *name*: one of the files, or a form of merge.sql (see `__post_init__`)."""
        composed: dict[str, sql.Composed] = self._composed  # type: ignore[attr-defined]
        if name not in composed:
            composed[name] = self._fill(name)
        return composed[name]

    def merging(self, name: str, batch: Batch) -> sql.Composed:
        """Return a form of merge.sql for *batch*: as it wants it with missing rows."""
        return self[name if batch.create_missing else name + _EXISTING]

    def _fill(self, name: str) -> sql.Composed:
        return sql.SQL(_text(name)).format(**self.names)

    def _one_by_one(self, only: sql.Composable | None) -> sql.Composed:
        merge = self._merge("rows_arrays", where=[only]).as_string()
        # A DO has no parameters: of each column the element of the row at hand, of the distinct names all.
        merge = _PARAMETER.sub(lambda found: f"tracker_{found[1]}{_WHOLE.get(found[1], _SLICE)}", merge)
        body = sql.SQL(_text("one_by_one")).format(merge=sql.SQL(merge.replace("%%", "%"))).as_string()
        return sql.SQL("DO {}").format(sql.Literal(body))

    def _merge(
        self,
        rows: str,
        *,
        moved: sql.Composable = _NOTHING,
        moved_count: sql.Composable = _ONE,
        where: list[sql.Composable | None],
    ) -> sql.Composed:
        conditions = [condition for condition in where if condition is not None]
        clause = sql.SQL("WHERE ") + sql.SQL(" AND ").join(conditions) if conditions else sql.SQL("")
        return sql.SQL(_text("merge")).format(
            moved=moved, moved_count=moved_count, rows=self._fill(rows), where=clause, **self.names
        )
