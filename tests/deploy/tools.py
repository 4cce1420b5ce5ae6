"""The tools that the artefacts in `deploy/` are for: found on PATH, or fetched from Debian's packages."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
_CACHE = ROOT / ".cache" / "deploy"


def run(*command: str | Path, cwd: Path = ROOT, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; both outputs in `stdout`."""
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        timeout=seconds,
        check=False,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@cache
def _from_debian(package: str, program: str) -> tuple[Path | None, str]:
    """Return *program* out of Debian's *package*, unpacked beside the tests, or why it cannot be had."""
    folder = _CACHE / package
    found = folder / program
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found.exists():
            return found, ""
        if shutil.which("apt-get") is None:
            return None, "no apt-get"
        run("apt-get", "update", "-qq")
        try:
            got = run("apt-get", "download", "-qq", package, cwd=folder)
        except subprocess.TimeoutExpired:
            return None, f"apt-get download {package} took too long"
        archives = sorted(folder.glob("*.deb"))
        if got.returncode or not archives:
            return None, f"apt-get download {package}: {got.stdout.strip()[-200:]}"
        unpacked = run("dpkg", "-x", archives[-1], folder)
        for archive in archives:
            archive.unlink()
        return (found, "") if found.exists() else (None, f"dpkg -x: {unpacked.stdout.strip()[-200:]}")


def promtool() -> Path:
    """Return promtool, or skip the test with the reason."""
    if path := shutil.which("promtool"):
        return Path(path)
    found, reason = _from_debian("prometheus", "usr/bin/promtool")
    if found is None:
        pytest.skip(f"promtool cannot be had: {reason}")
    return found


def systemd_analyze() -> str:
    """Return systemd-analyze, or skip the test with the reason."""
    path = shutil.which("systemd-analyze")
    if path is None:
        pytest.skip("no systemd-analyze on PATH (Debian: apt-get install systemd)")
    version = re.search(r"systemd (\d+)", run(path, "--version").stdout)
    if version is None or int(version[1]) < 250:
        pytest.skip("systemd-analyze is older than 250: it knows no security --offline")
    return path


def curl() -> str:
    """Return curl, or skip the test with the reason."""
    path = shutil.which("curl")
    if path is None:
        pytest.skip("no curl on PATH")
    return path
