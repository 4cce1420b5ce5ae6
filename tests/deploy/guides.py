"""The commands of a guide, run in order as they stand, with the places of the test for those of a machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Self

from tests.deploy.tools import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SERVICE = re.compile(r"^```ini\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Every command as the shell runs it, and so as `ps` shows it, goes into a file.
_TRACED = "exec {BASH_XTRACEFD}>>arguments; set -x\n"


class Guide:
    """A page whose commands a test runs one block after the other; at the end none may be left.

    Args:
        name: of the page, as docs/ has it.
        folder: where the commands run.
        programs: a directory that is looked in before PATH.
        places: what stands in the page, and what is in its place here; of the environment nothing else is known to it.
    """

    def __init__(self, name: str, folder: Path, programs: Path, places: dict[str, str]) -> None:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        self._blocks: Iterator[str] = iter(_BLOCK.findall(text))
        self._folder, self._places = folder, places
        for service in _SERVICE.findall(text):
            (folder / ".pg_service.conf").write_text(self._in_place(service))
        ours = folder / "programs"
        ours.mkdir()
        (ours / "tracker-daemon").write_text(f'#!/bin/sh\nexec {sys.executable} -m tracker_daemon "$@"\n')
        # What needs systemd says here what it was asked.
        for sham in ("journalctl", "systemctl"):
            known = '*" tracker-daemon "* | *" tracker-consumer "* | " daemon-reload ") ;; *) exit 1 ;;'
            (ours / sham).write_text(f'#!/bin/sh\ncase " $* " in {known} esac\n')
        for program in ours.iterdir():
            program.chmod(0o755)
        self._environment = {
            "PATH": f"{ours}:{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
        }

    def step(self, begins: str, **environment: str) -> str:
        """Run the next block, which has *begins* in its first line; return what it said."""
        block = next(self._blocks)
        assert begins in block.partition("\n")[0], f"the next step is {block!r}"
        block = self._in_place(block)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", _TRACED + block],
            cwd=self._folder,
            env=self._environment | environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        return done.stdout

    def _in_place(self, text: str) -> str:
        for there, here in self._places.items():
            text = text.replace(there, here)
        return text

    @property
    def arguments(self) -> str:
        """Every command that was run until now, as `ps` showed it to all users of the machine."""
        return (self._folder / "arguments").read_text()

    def skip(self, begins: str) -> None:
        """Leave out the next block, which is for another case."""
        block = next(self._blocks)
        assert begins in block.partition("\n")[0], f"the next step is {block!r}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        if kind is None:
            assert list(self._blocks) == [], "not every step of the guide was run"
