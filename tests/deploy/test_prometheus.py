"""The rules for Prometheus, by promtool and against the metrics of a daemon that runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.deploy.manifests import documents, helmed, only
from tests.deploy.queries import missing, names
from tests.deploy.tools import DEPLOY, ROOT, promtool, run

if TYPE_CHECKING:
    from tests.deploy.conftest import Samples

pytestmark = pytest.mark.artefact("deploy/prometheus", "promtool", "promql-parser")
FOLDER = DEPLOY / "prometheus"


def _read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


RULES = [rule for group in _read("rules.yml")["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
STATED = {rule["record"] for group in _read("stream.yml")["groups"] for rule in group["rules"]}
"""What a rule file of its own says that there must be."""

UNITS = sorted(f"tests/{path.name}" for path in (FOLDER / "tests").glob("*.yml"))
RECORDED = {rule["record"] for rule in RULES if "record" in rule} | STATED


@pytest.mark.parametrize(("name", "count"), [("rules.yml", len(RULES)), ("stream.yml", len(STATED))])
def test_rules(name: str, count: int) -> None:
    """Prometheus takes the rules, and no rule stands there twice."""
    got = run(promtool(), "check", "rules", "--lint-fatal", FOLDER / name)
    assert got.returncode == 0, got.stdout
    assert f"{count} rules found" in got.stdout


@pytest.mark.parametrize("name", UNITS)
def test_units(name: str) -> None:
    """Every alert fires when it should, and not when it should not, across restarts and gaps as well."""
    got = run(promtool(), "test", "rules", FOLDER / name)
    assert got.returncode == 0, got.stdout


def test_every_alert_is_tested_both_ways() -> None:
    """No alert without an instant at which it fires and one at which it does not; no recording without a value."""
    fires, silent, valued = set[str](), set[str](), set[str]()
    for test in [test for name in UNITS for test in _read(name)["tests"]]:
        for each in test.get("alert_rule_test", ()):
            (fires if each.get("exp_alerts") else silent).add(each["alertname"])
        valued |= {name for each in test.get("promql_expr_test", ()) for name in names(each["expr"])}
    assert fires == silent == set(ALERTS)
    # The usage is seen by the alert on it, in per cent.
    assert valued == RECORDED - STATED - {"instance:tracker_queue_usage:ratio"}


def test_what_is_stated_is_read() -> None:
    """An alert asks for what the rules beside them state."""
    assert {name for rule in RULES for name in names(rule["expr"])} >= STATED


@pytest.mark.parametrize("name", UNITS)
def test_groups_are_evaluated_in_order(name: str) -> None:
    """The unit tests name the order of the groups: promtool takes any where none is named, and their results differ."""
    assert _read(name)["group_eval_order"] == [group["name"] for group in _read("rules.yml")["groups"]]


def test_example_configuration() -> None:
    """Prometheus takes the example, with the rules it names."""
    got = run(promtool(), "check", "config", FOLDER / "prometheus.yml")
    assert got.returncode == 0, got.stdout
    jobs = {job["job_name"] for job in _read("prometheus.yml")["scrape_configs"]}
    assert "tracker-daemon" in jobs, "the alert TrackerAbsent knows the daemon by that name"


def test_metrics_of_a_running_daemon(scraped: str) -> None:
    """The linter finds nothing to say about `/metrics`."""
    got = subprocess.run(
        [promtool(), "check", "metrics"], input=scraped, text=True, capture_output=True, timeout=60, check=False
    )
    assert (got.returncode, got.stdout, got.stderr) == (0, "", "")


def test_every_metric_exists(samples: Samples) -> None:
    """Every metric, label and label value that a rule names is in the `/metrics` of a daemon with a journal."""
    assert [fault for rule in RULES for fault in missing(rule["expr"], samples, RECORDED)] == []


def test_what_does_not_exist_is_found(samples: Samples) -> None:
    """The check of metrics finds a name, a label and a value that are not there."""
    assert missing("rate(tracker_calls_losst_total[5m])", samples) == ["no metric 'tracker_calls_losst_total'"]
    assert missing('tracker_calls_lost_total{why="x"}', samples) == ["tracker_calls_lost_total has no label 'why'"]
    assert missing('tracker_calls_lost_total{reason=~"deadline|fun"}', samples) == [
        "tracker_calls_lost_total has no reason='fun'"
    ]
    assert missing("sum by (kind) (tracker_calls_lost_total)", samples) == [
        "sum by (kind) (tracker_calls_lost_total): nothing has the label 'kind'"
    ]


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_shape_of_an_alert(name: str) -> None:
    """An alert has a severity, a summary, and a runbook of its own name in the repository."""
    alert = ALERTS[name]
    assert alert["labels"] == {"severity": alert["labels"]["severity"]}
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"deploy/runbooks/{name}.md"
    assert (ROOT / alert["annotations"]["runbook_url"]).is_file()


def test_runbooks_have_an_address() -> None:
    """The command in the rules' own comment leads every alert to its runbook in a copy of the repository."""
    text = (FOLDER / "rules.yml").read_text(encoding="utf-8")
    (command,) = re.findall(r"^# +(sed .*) rules\.yml > \S+$", text, re.MULTILINE)
    got = run(*shlex.split(command), FOLDER / "rules.yml")
    assert got.returncode == 0, got.stdout
    alerts = [rule for group in yaml.safe_load(got.stdout)["groups"] for rule in group["rules"] if "alert" in rule]
    assert [rule["annotations"]["runbook_url"] for rule in alerts] == [
        f"https://HOST/PATH/deploy/runbooks/{name}.md" for name in ALERTS
    ]


@pytest.mark.artefact("deploy/helm", "helm")
@pytest.mark.parametrize("prefix", ["https://HOST/PATH", "https://HOST/PATH/"])
def test_runbooks_have_an_address_in_the_chart(prefix: str) -> None:
    """One value of the chart does the same."""
    found = documents(helmed("journal", "--set", f"prometheusRule.runbookPrefix={prefix}"))
    alerts = [rule for group in only("PrometheusRule", found)["spec"]["groups"] for rule in group["rules"]]
    assert [rule["annotations"]["runbook_url"] for rule in alerts if "alert" in rule] == [
        f"https://HOST/PATH/deploy/runbooks/{name}.md" for name in ALERTS
    ]


def test_every_alert_is_told() -> None:
    """docs/production.md says what each alert means, and leads to its runbook."""
    text = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    assert [name for name in ALERTS if f"[`{name}`](../deploy/runbooks/{name}.md)" not in text] == []
