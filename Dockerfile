# The daemon's image; `tracker-daemon` is its entrypoint. `--target embedded` makes the one with a PostgreSQL of its own.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY deploy/requirements-build.txt deploy/requirements.txt deploy/
# Wheels are made or fetched once; each is checked against the hash that was written down.
RUN pip install --require-hashes --only-binary :all: --requirement deploy/requirements-build.txt \
    && pip download --require-hashes --only-binary :all: --dest /wheels --requirement deploy/requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY tracker_daemon tracker_daemon
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist .
RUN python -m venv --without-pip /opt/tracker \
    && pip --python /opt/tracker install --no-index --no-deps /wheels/*.whl /dist/*.whl


FROM build AS build-embedded
COPY deploy/requirements-embedded.txt deploy/
RUN pip --python /opt/tracker install --require-hashes --only-binary :all: \
    --requirement deploy/requirements-embedded.txt


FROM python:3.13-slim AS base
LABEL org.opencontainers.image.title="tracker-daemon" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.description="Write-behind conversation tracking for chat servers: the daemon." \
      org.opencontainers.image.licenses="MIT"
ENV PATH=/opt/tracker/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# By number everywhere: Kubernetes can tell that it is not root. The name is for initdb, which wants one.
RUN groupadd --gid 10001 tracker \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/tracker --shell /usr/sbin/nologin tracker \
    && install --directory --owner 10001 --group 10001 --mode 0700 /var/lib/tracker \
    && install --directory --owner 10001 --group 10001 --mode 0750 /run/tracker-daemon
COPY deploy/docker/tracker-daemon-health /usr/local/bin/
# The root file system may be read-only: /var/lib/tracker holds the journal, /run/tracker-daemon the socket.
VOLUME ["/var/lib/tracker", "/run/tracker-daemon"]
WORKDIR /var/lib/tracker
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["tracker-daemon"]
CMD ["serve"]
# Where the daemon listens elsewhere than at the default socket, set TRACKER_LISTEN: this asks the first address.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["tracker-daemon-health"]


FROM base AS embedded
COPY --from=build-embedded /opt/tracker /opt/tracker


FROM base
COPY --from=build /opt/tracker /opt/tracker
