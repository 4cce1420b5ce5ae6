"""A real Prometheus scrapes the daemon, and `promtool` has nothing to remark."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.daemon.harness import serving, turn
from tests.helpers import refusing_port, wait_until

if TYPE_CHECKING:
    from pathlib import Path

_WHERE = os.pathsep.join([*os.environ.get("PROMETHEUS_PATH", "").split(os.pathsep), os.environ.get("PATH", "")])
PROMETHEUS, PROMTOOL = shutil.which("prometheus", path=_WHERE), shutil.which("promtool", path=_WHERE)
pytestmark = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None,
    reason="no prometheus and promtool on PATH or PROMETHEUS_PATH (Debian: apt-get install prometheus)",
)


@pytest.fixture
def port() -> int:
    """A port that was free just now."""
    with refusing_port() as found:
        return found


def test_promtool(database: str) -> None:
    """`promtool check metrics` has no complaint about what this project names."""
    with serving(database, "--journal", "journal") as daemon:
        daemon.post(turn(), wait=True)
        text = daemon.get("/metrics").body
    ours = b"".join(line for line in text.splitlines(keepends=True) if b"tracker_" in line)
    checked = subprocess.run([str(PROMTOOL), "check", "metrics"], input=ours, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_scraped(database: str, port: int, tmp_path: Path) -> None:
    """The target is up, and what Prometheus stores is what happened."""
    with serving(database, "--listen", f"127.0.0.1:{port}") as daemon, refusing_port() as own:
        assert daemon.post(turn() * 7, wait=True).status == 200
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{"job_name": "tracker", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        ui = own + 1 if own < 65_000 else own - 1
        process = subprocess.Popen(
            [
                str(PROMETHEUS),
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{ui}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:

            def value(expression: str) -> float | None:
                with suppress(OSError):
                    url = f"http://127.0.0.1:{ui}/api/v1/query?query={quote(expression)}"
                    with urllib.request.urlopen(url, timeout=5) as answer:
                        result: list[Any] = json.load(answer)["data"]["result"]
                        return float(result[0]["value"][1]) if result else None
                return None

            wait_until(lambda: value("up") == 1, "the target up", 60)
            wait_until(lambda: value('tracker_calls_applied_total{call="record_turn"}') == 7, "the calls")
            assert value("sum(tracker_calls_accepted_total)") == 7
            assert value("tracker_queue_calls") == 0
            assert value("tracker_flush_rows_count") == 1
            assert value("histogram_quantile(0.99, tracker_commit_lag_seconds_bucket)") is not None
            assert value("tracker_build_info") == 1
        finally:
            process.terminate()
            process.wait(30)
