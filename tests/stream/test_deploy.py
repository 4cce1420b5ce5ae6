"""What deploy/stream has: the brokers' configuration makes a cluster, and the consumers' settings are settings."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stream.cluster import _free_ports, program
from tests.stream.conftest import make_stream
from tracker_daemon.cli import _variables
from tracker_daemon.cli import program as command_line
from tracker_daemon.sink import SinkFault

FOLDER = Path(__file__).parent.parent.parent / "deploy" / "stream"


def test_the_brokers_configuration_makes_a_cluster(tmp_path: Path) -> None:
    """Three servers with the configuration as it stands take a stream of three replicas, and only from who may."""
    shutil.copytree(FOLDER, tmp_path / "conf")
    ports = _free_ports(6)
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports[3:])
    started = []
    try:
        for number in range(3):
            options = ["--config", tmp_path / "conf" / "nats.conf", "--name", f"n{number}", "--addr", "127.0.0.1"]
            options += ["--port", str(ports[number]), "--store_dir", tmp_path / f"n{number}"]
            options += ["--cluster", f"nats://127.0.0.1:{ports[3 + number]}", "--routes", routes]
            with (tmp_path / f"n{number}.log").open("wb") as log:
                started.append(subprocess.Popen([program(), *options], stdout=log, stderr=log))
        servers = ",".join(f"127.0.0.1:{port}" for port in ports[:3])
        deadline = time.monotonic() + 60
        while True:
            try:
                assert len(make_stream(f"nats://tracker:example@{servers}/chat", 2)) == 2
                break
            except SinkFault:
                assert time.monotonic() < deadline, (tmp_path / "n0.log").read_text()
        with pytest.raises(SinkFault) as refused:
            make_stream(f"nats://{servers}/chat", 2)
        assert refused.value.kind == "auth"
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_an_acknowledgement_is_on_disks() -> None:
    """The brokers sync every write."""
    assert "\n  sync_interval: always\n" in (FOLDER / "nats.conf").read_text()


def _environment(document: Any) -> set[str]:
    """Return the names of the settings that a document gives."""
    if isinstance(document, dict):
        found = {name for name in document if isinstance(name, str) and name.startswith("TRACKER_")}
        name = document.get("name")
        found |= {name} if isinstance(name, str) and name.startswith("TRACKER_") else set()
        return found.union(*map(_environment, document.values()))
    return set().union(*map(_environment, document)) if isinstance(document, list) else set()


@pytest.mark.parametrize("name", ["compose.yml", "consumers.yaml"])
def test_settings(name: str) -> None:
    """Every TRACKER_ variable is a setting of the command line, or the file of one that is secret."""
    known = set(_variables(command_line).values())
    given = _environment(list(yaml.safe_load_all((FOLDER / name).read_text())))
    assert given
    assert {each.removesuffix("_FILE") for each in given} <= known
