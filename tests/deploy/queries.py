"""What a PromQL query asks for, and whether a scrape has it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import promql_parser

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.deploy.conftest import Samples

# What Prometheus adds to every sample, and the one series it makes by itself.
_OF_TARGETS = {"job", "instance", "namespace"}  # the last one of a PodMonitor
_OF_PROMETHEUS = {"up": {"job", "instance"}}
_OF_GRAFANA = {"$__rate_interval": "5m", "$__range": "1h"}


def parsed(query: str) -> promql_parser.Expr:
    """Return *query* as a tree; raises ValueError where it is no PromQL."""
    for name, value in _OF_GRAFANA.items():
        query = query.replace(name, value)
    return promql_parser.parse(query)


def _nodes(tree: promql_parser.Expr) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(tree, found.append)
    return found


def _selectors(tree: promql_parser.Expr) -> list[promql_parser.VectorSelector]:
    found: dict[str, promql_parser.VectorSelector] = {}
    for node in _nodes(tree):
        if isinstance(node, promql_parser.MatrixSelector):
            node = node.vector_selector  # noqa: PLW2901
        if isinstance(node, promql_parser.VectorSelector):
            found[node.prettify()] = node
    return list(found.values())


def names(query: str) -> set[str]:
    """Return the metrics that *query* names."""
    return {selector.name or "" for selector in _selectors(parsed(query))}


def missing(query: str, samples: Samples, recorded: Iterable[str] = ()) -> list[str]:
    """Return what *query* names and neither *samples* nor the *recorded* series have."""
    tree, recorded, faults = parsed(query), set(recorded), []
    for selector in _selectors(tree):
        name = selector.name or ""
        if name in recorded or name in _OF_PROMETHEUS:
            continue
        if name not in samples:
            faults.append(f"no metric {name!r}")
            continue
        for matcher in selector.matchers.matchers:
            if matcher.name in _OF_TARGETS:
                continue
            if matcher.name not in samples[name]:
                faults.append(f"{name} has no label {matcher.name!r}")
                continue
            wanted = re.split(r"\|", matcher.value)
            faults += [
                f"{name} has no {matcher.name}={value!r}"
                for value in wanted
                if value not in samples[name][matcher.name]
            ]
    for node in _nodes(tree):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            inside = [samples.get(each.name or "", {}) for each in _selectors(node.expr)]
            known = _OF_TARGETS.union(*inside)
            faults += [f"{query}: nothing has the label {name!r}" for name in node.modifier.labels if name not in known]
    return faults
