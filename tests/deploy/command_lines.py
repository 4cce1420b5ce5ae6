"""Every `tracker-daemon …` that a page, a unit or a manifest has, as the words that the program would be given.

A command line is one that somebody runs as it stands: in a block of a page, in a comment of an example, in a unit, in
a container. A mention is one in the middle of a sentence (`dead-letters list | retry`), which need not be whole.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.deploy.manifests import CASES, DEPLOY, OVERLAYS, ROOT, documents, helmed, kustomized
from tracker_daemon.cli import program

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME = "tracker-daemon"
RUNBOOKS = DEPLOY / "runbooks"
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(DEPLOY.rglob("*.md")),
)
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
_SCRIPTS = (*sorted((ROOT / "examples").rglob("*.*")), *sorted((DEPLOY / "docker").iterdir()))
_BLOCK = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_SET = re.compile(r"\b(TRACKER_[A-Z_]+)=(\S+)")
_ENDS = frozenset("();<>|&")
# The one word in a sentence that is a command's name and a setting's as well.
_SETTINGS = frozenset({"journal"})

# What stands in a page for what the reader has: by the word, or by the option before it.
_STANDS_FOR = {
    "DIR": "journal",
    "FILE": "file",
    "ID": "t-1",
    "N": "4",
    "PRODUCER": "0b8c7b3e-3f0e-4f4e-9f57-5f0d2c2f9a10",
    "SECONDS": "5",
    "--daemon": "unix:tracker.sock",
    "--database": "postgresql:///chat",
    "--stream": "nats://n1,n2,n3/chat",
}


@dataclass(frozen=True)
class CommandLine:
    """What the program is given, and where that stands."""

    place: str
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.words)}"


def _filled(words: list[str]) -> tuple[str, ...]:
    found: list[str] = []
    for word in words:
        placeholder = word.isupper() and word.isalpha()
        key = found[-1] if placeholder and found and word == "URL" else word
        found.append(_STANDS_FOR[key] if placeholder else word)
    return tuple(found)


# -- pages -----------------------------------------------------------------------------------------


def _of_shell(line: str) -> Iterator[list[str]]:
    """Yield what the program is given by each of a line's simple commands that run it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    simple: list[str] = []
    for word in [*lexer, ";"]:
        if not _ENDS.issuperset(word):
            simple.append(word)
            continue
        while simple and (re.match(r"\w+=", simple[0]) or simple[0] in ("exec", "$")):
            del simple[0]
        if simple and Path(simple[0]).name == _NAME:
            yield [each for each in simple[1:] if not each.startswith("$")]
        simple = []


def _of_text(place: str, text: str, environment: dict[str, str]) -> Iterator[CommandLine]:
    for line in text.replace("\\\n", " ").splitlines():
        # Other lines may be anything: JSON over several lines, SQL.
        if re.search(rf"(?:^|[\s/]){_NAME}\s", line):
            for words in _of_shell(line):
                yield CommandLine(place, _filled(words), tuple(environment.items()))


def of_pages() -> list[CommandLine]:
    """Return every command line in a block of a page, with the environment that the page gives it."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.parent == RUNBOOKS:
            environment = dict(_SET.findall((RUNBOOKS / "README.md").read_text(encoding="utf-8").replace("`", " ")))
        else:
            environment = dict(_SET.findall(" ".join(_BLOCK.findall(text))))
        for block in _BLOCK.findall(text):
            found += _of_text(str(page.relative_to(ROOT)), block, environment)
    return found


def of_scripts() -> list[CommandLine]:
    """Return every command line in an example, its comments too, or in the image's scripts."""
    found = []
    for script in _SCRIPTS:
        text = re.sub(r"^[#/ ]+", "", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
        lines = re.findall(rf"^(?:exec )?{_NAME} (?:.*\\\n)*.*", text, re.MULTILINE)
        found += [each for line in lines for each in _of_text(str(script.relative_to(ROOT)), line, {})]
    return found


def mentions() -> list[CommandLine]:
    """Return every mention of a command in a sentence; of `list | retry` there are two."""
    found = []
    for page in PAGES:
        text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
        for inline in _INLINE.findall(text):
            first, *others = " ".join(inline.split()).split(" | ")
            words = first.removeprefix(f"{_NAME} ").split(" ")
            if words[0] not in program.commands or first in _SETTINGS:
                continue
            place = str(page.relative_to(ROOT))
            found += [
                CommandLine(place, _filled(each)) for each in (words, *([*words[:-1], other] for other in others))
            ]
    return found


# -- units and containers --------------------------------------------------------------------------


def of_units() -> list[CommandLine]:
    """Return the command of every unit of systemd, with the unit's environment."""
    found = []
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8")
        lines = re.findall(r"^Environment=(.*)$", text, re.MULTILINE)
        pairs = (pair.partition("=") for line in lines for pair in shlex.split(line))
        environment = tuple((name, value) for name, _, value in pairs)
        [line] = re.findall(rf"^ExecStart=\S*/{_NAME} (.*)$", text, re.MULTILINE)
        found.append(CommandLine(str(unit.relative_to(ROOT)), tuple(line.split()), environment))
    return found


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for each in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(each)


def _environment(container: dict[str, Any], maps: dict[str, dict[str, str]]) -> tuple[tuple[str, str], ...]:
    of_compose = container.get("environment", {})
    found = {name: value for each in container.get("envFrom", ()) for name, value in _map_of(each, maps).items()}
    found |= {each["name"]: str(each["value"]) for each in container.get("env", ()) if "value" in each}
    return tuple((name, str(value)) for name, value in {**of_compose, **found}.items() if name.startswith("TRACKER_"))


def _map_of(source: dict[str, Any], maps: dict[str, dict[str, str]]) -> dict[str, str]:
    return maps.get(source.get("configMapRef", {}).get("name", ""), {})


def in_documents(place: str, found: list[dict[str, Any]]) -> Iterator[CommandLine]:
    """Yield what every container or service in YAML *found* has the program do, or asks it (`exec`)."""
    maps = {each["metadata"]["name"]: each["data"] for each in found if each.get("kind") == "ConfigMap"}
    for node in (node for document in found for node in _nodes(document)):
        words = [str(word) for word in node.get("args") or node.get("command") or ()]
        if words[:1] == [_NAME]:
            del words[0]
        elif not words or words[0] not in program.commands:
            continue
        yield CommandLine(place, tuple(words), _environment(node, maps))


def of_files_of_compose() -> list[CommandLine]:
    """Return the commands of compose's services and of the stream's consumers."""
    files = (DEPLOY / "compose/compose.yml", *sorted((DEPLOY / "stream").glob("*.y*ml")))
    return [
        each
        for file in files
        for each in in_documents(str(file.relative_to(ROOT)), documents(file.read_text(encoding="utf-8")))
    ]


def of_kubernetes() -> list[CommandLine]:
    """Return the commands of every container that kustomize or helm makes; skip without them."""
    made = {f"kubernetes/{overlay}": kustomized(overlay) for overlay in OVERLAYS}
    made |= {f"helm, {case}": helmed(case) for case in CASES}
    return [each for place, text in made.items() for each in in_documents(place, documents(text))]
