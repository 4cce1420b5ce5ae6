"""The Grafana dashboard: made by its script, and every query in it asks for something that is there."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.deploy.queries import missing, names
from tests.deploy.tools import DEPLOY, ROOT, promtool, run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploy.conftest import Samples

pytestmark = pytest.mark.artefact("deploy/grafana", "grafana-foundation-sdk", "promql-parser")
FILE = DEPLOY / "grafana" / "dashboard.json"
BOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_is_what_the_script_makes() -> None:
    """The file is what the script prints: whoever changes the one makes the other anew."""
    got = run(sys.executable, FILE.with_suffix(".py"))
    assert got.returncode == 0, got.stdout
    assert got.stdout == FILE.read_text(encoding="utf-8"), "make dashboard"


def test_every_query_exists(samples: Samples) -> None:
    """Every query parses; its metrics, labels and values are in the `/metrics` of a daemon with a journal."""
    assert len(QUERIES) > 30
    assert [fault for query in QUERIES for fault in missing(query, samples)] == []


def test_every_metric_is_shown(samples: Samples) -> None:
    """No metric of the tracker is left out."""
    shown = {name for query in QUERIES for name in names(query)}
    families = {name.removesuffix("_count").removesuffix("_sum").removesuffix("_bucket") for name in samples}
    ours = {name for name in families if name.startswith("tracker_")}
    told = {name for name in ours if any(each.startswith(name) for each in shown)}
    # When a flush last committed is on the status page; here the oldest pending call says more.
    assert ours - told == {"tracker_last_success_timestamp_seconds"}


def test_panels() -> None:
    """Each panel has a number of its own, a title, a description, a unit, and asks the data source that is chosen."""
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"$datasource"}
        assert all('{job=~"$job", instance=~"$instance"' in target["expr"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    """No two panels take the same place of the grid."""
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


@pytest.mark.artefact("deploy/grafana", "prometheus", "matplotlib")
def test_drawn_from_a_demo_run(tmp_path: Path) -> None:
    """A daemon, consumers of a stream, traffic, a Prometheus that scrapes all of them: each panel's query has an answer there, and is drawn."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: `make test-deploy` has it")
    program = promtool().resolve().with_name("prometheus")
    if not program.exists():
        pytest.skip("no prometheus beside promtool")
    data, picture = tmp_path / "data.json", tmp_path / "picture.png"
    command = (sys.executable, DEPLOY / "grafana/demo_run.py", "--seconds", "16", "--away", "2", "--data", data)
    done = run(
        "env", f"PATH={program.parent}:{os.environ['PATH']}", f"PYTHONPATH={ROOT}", *command, "--output", picture
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(data.read_text())
    assert found["board"] == BOARD
    asked = {f"{panel['id']} {target['refId']}": panel["title"] for panel in PANELS for target in panel["targets"]}
    assert found["answers"].keys() == asked.keys()
    assert [asked[key] for key, series in found["answers"].items() if not series] == []
    assert picture.read_bytes().startswith(b"\x89PNG")
