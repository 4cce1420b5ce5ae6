"""Carry the rules of `deploy/prometheus` to where Kubernetes and Helm want them: `make deploy-files`."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

DEPLOY = Path(__file__).resolve().parent.parent
RULES = DEPLOY / "prometheus/rules.yml"
OF_CHART = DEPLOY / "helm/tracker-daemon/files/rules.yml"
MANIFESTS = {
    RULES: DEPLOY / "kubernetes/base/prometheusrule.yaml",
    DEPLOY / "prometheus/stream.yml": DEPLOY / "stream/prometheusrule.yaml",
}
"""The PrometheusRule that is made from a file of rules."""

_HEAD = """\
# Made from deploy/prometheus/FILE by `make deploy-files`: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: NAME
  labels:
    app.kubernetes.io/name: NAME
spec:
"""


def manifest(rules: Path) -> str:
    """Return the PrometheusRule with what the file *rules* has."""
    name = "tracker-daemon" if rules == RULES else "tracker-consumer"
    text = rules.read_text(encoding="utf-8")
    head = _HEAD.replace("FILE", rules.name).replace("NAME", name)
    return head + indent(text[text.index("groups:") :], "  ")


def main() -> None:
    """Write all of them."""
    for rules, made in MANIFESTS.items():
        made.write_text(manifest(rules), encoding="utf-8")
    OF_CHART.parent.mkdir(parents=True, exist_ok=True)
    OF_CHART.write_text(RULES.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main()
