"""A real run for the dashboard's picture: daemon, traffic, Prometheus; the database is away for a while.

    python deploy/grafana/demo_run.py --output docs/dashboard.png      (or: make dashboard-picture)

Needs the extras `embedded` and `deploy`, and `prometheus` on PATH. Everything listens on the loopback, in a temporary
folder, and is ended at the end. The picture is drawn by `draw.py`; `--data FILE` keeps what Prometheus answered.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from draw import draw, fetch

from tracker_daemon.embedded import EmbeddedPostgres

RULES = Path(__file__).parents[1] / "prometheus/rules.yml"
SCRAPE = 2
TRACKER = [sys.executable, "-m", "tracker_daemon"]


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _started(stack: ExitStack, *command: str | Path, log: Path) -> subprocess.Popen[bytes]:
    """Run a program for as long as the stack; it is ended by SIGTERM."""
    file = stack.enter_context(log.open("wb"))
    process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file)

    def end() -> None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()

    stack.callback(end)
    return process


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{url} does not answer:\n{log.read_text(errors='replace')[-2000:]}")


def _post(path: Path, rate: float, stop: threading.Event) -> None:
    """Post calls as another language would, ten in a request, in waves."""
    numbers = random.Random(7)  # noqa: S311 - traffic is not cryptography
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://daemon", timeout=60) as client:
        while not stop.wait(10 / rate * numbers.uniform(0.3, 1.7)):
            calls: list[dict[str, Any]] = [
                {
                    "call": "record_turn",
                    "thread_id": f"post-{numbers.randrange(400)}",
                    "agent_name": numbers.choice(["billing", "search", "triage"]),
                    "tokens": numbers.randrange(50, 2_000),
                    "cost": f"{numbers.uniform(0.0001, 0.02):.6f}",
                }
                for _ in range(9)
            ]
            calls.append(
                {"call": "resolve", "thread_id": calls[0]["thread_id"], "resolution_type": "resolved_by_agent"}
            )
            client.post("/v1/calls", content="\n".join(map(json.dumps, calls)))


def run(folder: Path, seconds: float, away: float) -> dict[str, Any]:
    """Run for *seconds*, with the database away for *away* of them in the middle; return what Prometheus has of it."""
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        raise SystemExit("no prometheus on PATH (Debian: apt-get install prometheus)")
    daemon_port, traffic_port, port = _port(), _port(), _port()
    path = folder / "tracker.sock"
    config = folder / "prometheus.json"  # JSON is YAML
    jobs = {"tracker-daemon": daemon_port, "chat-server": traffic_port}
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"},
                "rule_files": [str(RULES)],
                "scrape_configs": [
                    {
                        "job_name": job,
                        "static_configs": [{"targets": [f"127.0.0.1:{each}"], "labels": {"instance": job}}],
                    }
                    for job, each in jobs.items()
                ],
            }
        )
    )
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedPostgres(folder / "postgres"))
        subprocess.run([*TRACKER, "migrate", "--database", server.conninfo], check=True, stdout=subprocess.DEVNULL)
        listen = ["--listen", f"unix:{path}", "--listen", f"127.0.0.1:{daemon_port}"]
        serve = [*TRACKER, "serve", "--database", server.conninfo, *listen, "--journal", str(folder / "journal")]
        daemon = _started(stack, *serve, log=folder / "daemon.log")
        _wait(f"http://127.0.0.1:{daemon_port}/readyz", daemon, folder / "daemon.log")
        web = [f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        scraper = _started(stack, prometheus, f"--config.file={config}", *web, log=folder / "prometheus.log")
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/-/ready", scraper, folder / "prometheus.log")
        began = time.time()
        drive = ["--daemon", f"unix:{path}", "--metrics", f"127.0.0.1:{traffic_port}"]
        drive += ["--seconds", str(seconds + 30), "--rate", "400", "--threads", "300"]
        _started(stack, *TRACKER, "demo", *drive, log=folder / "traffic.log")
        stop = threading.Event()
        poster = threading.Thread(target=_post, args=(path, 150.0, stop))
        poster.start()
        try:
            time.sleep((seconds - away) * 0.6)
            server.stop("immediate")
            time.sleep(away)
            server.start()
            time.sleep((seconds - away) * 0.4)
            return fetch(url, began + 4 * SCRAPE, time.time(), SCRAPE)
        finally:
            stop.set()
            poster.join()


def main() -> None:
    """Run, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/dashboard.png"))
    parser.add_argument("--data", type=Path, help="keep what Prometheus answered in this file, as JSON")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--away", type=float, default=25.0, help="of these the database is away")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tracker-demo-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        found = run(folder, options.seconds, options.away)
    if options.data is not None:
        options.data.write_text(json.dumps(found), encoding="utf-8")
    draw(found, options.output)


if __name__ == "__main__":
    main()
