"""Carry `deploy/prometheus/rules.yml` to where Kubernetes and Helm want it: `make deploy-files`."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

DEPLOY = Path(__file__).resolve().parent.parent
RULES = DEPLOY / "prometheus/rules.yml"
MANIFEST = DEPLOY / "kubernetes/base/prometheusrule.yaml"
OF_CHART = DEPLOY / "helm/tracker-daemon/files/rules.yml"

_HEAD = """\
# Made from deploy/prometheus/rules.yml by `make deploy-files`: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: tracker-daemon
  labels:
    app.kubernetes.io/name: tracker-daemon
spec:
"""


def manifest(rules: str) -> str:
    """Return the PrometheusRule with *rules*, the text of a rule file."""
    return _HEAD + indent(rules[rules.index("groups:") :], "  ")


def main() -> None:
    """Write both files."""
    rules = RULES.read_text(encoding="utf-8")
    MANIFEST.write_text(manifest(rules), encoding="utf-8")
    OF_CHART.parent.mkdir(parents=True, exist_ok=True)
    OF_CHART.write_text(rules, encoding="utf-8")


if __name__ == "__main__":
    main()
