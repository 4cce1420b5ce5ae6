"""Fixtures: podman for the run, and the images, each made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.deploy.podman import Podman, make_daemon, make_podman, make_postgres, make_prometheus

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """Podman on storage of its own; what runs at the end is ended."""
    podman = make_podman()
    podman.end()
    yield podman
    podman.end()


@pytest.fixture(scope="session")
def daemon_image(podman: Podman) -> str:
    """The project's image, from the Dockerfile as it stands."""
    return make_daemon(podman)


@pytest.fixture(scope="session")
def postgres_image(podman: Podman) -> str:
    """The stand-in for Postgres' image."""
    return make_postgres(podman)


@pytest.fixture(scope="session")
def prometheus_image(podman: Podman) -> str:
    """The stand-in for Prometheus' image."""
    return make_prometheus(podman)
