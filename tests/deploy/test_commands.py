"""The kubectl and helm commands of every page and comment: they parse, what they name is there, and in the right order.

Without a cluster: what `apply` and `install` would send is rendered; of the others the options are parsed by the tool.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from tests.deploy.manifests import (
    CHART,
    CONSUMERS,
    DEPLOY,
    OVERLAYS,
    ROOT,
    documents,
    of_layer,
    pod_of,
    rendered,
    run,
    said,
    workload,
)

if TYPE_CHECKING:
    from pathlib import Path

# A block of commands in a page, indented or not; commands in a YAML file's comments.
_BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"^ *#  +((?:kubectl|helm) .*)$", re.MULTILINE)


def blocks() -> dict[str, list[list[str]]]:
    """Return, by page or file, the blocks that have such commands, each as its commands."""
    found: dict[str, list[list[str]]] = {}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *DEPLOY.rglob("*.md")]
    files = [path for path in DEPLOY.rglob("*.y*ml") if "templates" not in path.parts]
    for path in sorted([*pages, *files]):
        text = path.read_text(encoding="utf-8")
        parts = _BLOCK.findall(text) if path.suffix == ".md" else ["\n".join(_COMMENT.findall(text))]
        for part in parts:
            lines = part.replace("\\\n", " ").splitlines()
            commands = [line.strip() for line in lines if line.strip().startswith(("kubectl ", "helm "))]
            if commands:
                found.setdefault(str(path.relative_to(ROOT)), []).append(commands)
    return found


BLOCKS = blocks()
COMMANDS = sorted({command for parts in BLOCKS.values() for part in parts for command in part})


def names() -> set[tuple[str, str]]:
    """Return kind and name of everything that the overlays and the consumers make, and of their claims and Secrets."""
    found = [document for name in (*OVERLAYS, CONSUMERS) for document in documents(rendered(name))]
    known = {(document["kind"].lower(), document["metadata"]["name"]) for document in found}
    work = workload(documents(rendered("overlays/sidecar")))
    ordinals = range(work["spec"]["replicas"])
    known |= {("persistentvolumeclaim", f"journal-{work['metadata']['name']}-{ordinal}") for ordinal in ordinals}
    return known


def secrets(value: Any) -> set[str]:
    """Return the Secrets that *value* mounts."""
    if isinstance(value, dict):
        own = {value["secretName"]} if isinstance(value.get("secretName"), str) else set()
        return own.union(*map(secrets, value.values()))
    return set().union(*map(secrets, value)) if isinstance(value, list) else set()


@pytest.mark.artefact("docs/kubernetes.md", "kubectl", "helm")
def test_there_are_commands() -> None:
    """The pages that have commands for Kubernetes are found, and those of the files' comments."""
    assert {"docs/kubernetes.md", "docs/production.md", "deploy/kubernetes/migrate/job.yaml"} <= set(BLOCKS)
    assert len(COMMANDS) > 12


@pytest.mark.artefact("docs/kubernetes.md", "kubectl", "helm")
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    """The tool takes the command's options, and what it names is there."""
    program, verb, *words = shlex.split(command, comments=True)
    tool = of_layer(program)
    # Its options are parsed before the help is printed; a wrong one ends with an error instead.
    parsed = run(tool, verb, *words, "--help")
    assert parsed.returncode == 0, parsed.stderr
    if program == "helm":
        assert verb in ("install", "upgrade")
        assert words[1] == str(CHART.relative_to(ROOT))
        made = said(tool, "template", words[0], CHART, *(str(ROOT / w) if "/" in w else w for w in words[2:]))
        assert documents(made)
    elif verb == "apply" and words[0] == "--kustomize":
        assert words[1].removeprefix("deploy/kubernetes/") in OVERLAYS
        assert documents(said(tool, "kustomize", ROOT / words[1]))
    elif verb == "apply":
        files = [word for word in words if word != "--filename"]
        assert all(documents((ROOT / file).read_text(encoding="utf-8")) for file in files)
    elif verb == "create":
        assert words[:2] == ["secret", "generic"]
        for word in words[3:]:
            (tmp_path / word.removeprefix("--from-file=")).write_text("x")
        here = [w.replace("--from-file=", f"--from-file={tmp_path}/") for w in words]
        (secret,) = documents(said(tool, "create", *here, "--dry-run=client", "--output", "yaml"))
        mounting = [document for name in (*OVERLAYS, CONSUMERS) for document in documents(rendered(name))]
        assert secret["metadata"]["name"] in secrets(mounting)
        assert set(secret["data"]) == {word.removeprefix("--from-file=") for word in words[3:]}
    elif verb in ("wait", "delete", "logs", "rollout"):
        plain = [word for word in words if not word.startswith("--") and word != "status"]
        kind, name = plain[0].split("/") if "/" in plain[0] else plain[:2]
        assert (kind, name) in names()
    elif verb == "set":
        place, container = words[1].split("/"), words[2].partition("=")[0]
        made = [document for name in (*OVERLAYS, CONSUMERS) for document in documents(rendered(name))]
        pods = [pod_of(each) for each in made if [each["kind"].lower(), each["metadata"]["name"]] == place]
        assert pods
        assert all(pod and container in [each["name"] for each in pod["containers"]] for pod in pods)
    else:
        assert verb == "get", f"nothing is known of `kubectl {verb}` here"


@pytest.mark.artefact("docs/kubernetes.md", "kubectl")
@pytest.mark.parametrize("page", sorted(BLOCKS))
def test_jobs_are_made_anew(page: str) -> None:
    """Wherever a Job is applied an earlier one is deleted first, and it is waited for, longer than it may take."""
    for commands in BLOCKS[page]:
        for number, command in enumerate(commands):
            applied = re.search(r"--kustomize deploy/kubernetes/(migrate|recover)\b", command)
            if applied is None:
                continue
            (job,) = [each for each in documents(rendered(applied[1])) if each["kind"] == "Job"]
            name = job["metadata"]["name"]
            assert commands[number - 1].startswith(f"kubectl delete job {name} --ignore-not-found")
            waits = re.match(
                rf"kubectl wait job/{name} --for=condition=complete --timeout=(\d+)m", commands[number + 1]
            )
            assert waits
            assert int(waits[1]) * 60 > job["spec"].get("activeDeadlineSeconds", 0)
