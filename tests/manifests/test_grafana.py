"""The dashboard and the alerts ask for what is really exported, and each alert says what to do."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.reporter.reporter_agent import GPU_TAG_KEYS, METRICS_GAUGES

from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.local.ray import temp_dir
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.telemetry.prometheus import METRICS, JobMetrics

REPOSITORY = Path(__file__).resolve().parents[2]
DASHBOARD: dict[str, Any] = json.loads((REPOSITORY / "infra" / "grafana" / "dashboard.json").read_text())
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((REPOSITORY / "infra" / "grafana" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
QUERIES = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]] + [a["expr"] for a in ALERTS]
OURS = "ray_ddpm_"
GPU_METRICS = {name for query in QUERIES for name in re.findall(r"\bray_node_(?:gpu|gram)\w*", query)}
PROMTOOL = shutil.which("promtool")


def asked_for() -> set[str]:
    """Metrics that the dashboard and the alerts name."""
    without_labels = [re.sub(r"\{[^}]*\}|\bby ?\([^)]*\)", "", query) for query in QUERIES]
    return {name for query in without_labels for name in re.findall(r"\bray_[a-z_]+", query)}


def exported_name(name: str) -> str:
    """What Ray makes of a name of `METRICS`."""
    return f"ray_{name}" + "_total" * (METRICS[name].kind == "counter")


def test_dashboard_and_alerts_ask_for_all_of_our_metrics_and_no_others() -> None:
    assert {name for name in asked_for() if name.startswith(OURS)} == {
        exported_name(name) for name in METRICS
    }


def test_every_metric_of_ours_is_told_by_some_code() -> None:
    files = [*REPOSITORY.glob("pipeline/**/*.py")]
    code = "\n".join(file.read_text() for file in files if file.name != "meters.py")
    for name in METRICS:
        assert f'"{name.removeprefix("ddpm_")}"' in code or f'"{name}"' in code, name


def test_metrics_outside_a_cluster_do_nothing_and_a_wrong_name_is_an_error() -> None:
    meters = JobMetrics("train", "nobody")
    meters.gauge("ddpm_step", 5)
    meters.add_counted()
    with pytest.raises(KeyError):
        meters.add("ddpm_shard_done")


def promtool_accepts(what: str, rules: Path) -> None:
    told = subprocess.run(
        [str(PROMTOOL), what, "rules", str(rules)], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool (of Prometheus) is not installed")
def test_every_alert_is_raised_by_what_it_is_for_and_by_nothing_else() -> None:
    rules = REPOSITORY / "infra" / "grafana"
    cases = yaml.safe_load((rules / "alerts_test.yaml").read_text())["tests"]
    raised = {
        test["alertname"] for case in cases for test in case["alert_rule_test"] if test.get("exp_alerts")
    }
    assert raised == {alert["alert"] for alert in ALERTS}
    promtool_accepts("test", rules / "alerts_test.yaml")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool (of Prometheus) is not installed")
def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    plain = [re.sub(r"\$__\w+", "5m", query) for query in QUERIES]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(plain)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool_accepts("check", tmp_path / "rules.yaml")


def test_every_alert_has_its_paragraph_in_the_runbook() -> None:
    runbook = (REPOSITORY / "docs" / "operations.md").read_text()
    for alert in ALERTS:
        heading = f"### {alert['alert']}\n"
        assert heading in runbook, alert["alert"]
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{alert['alert'].lower()}"
        assert alert["for"]
        assert alert["labels"]["severity"] in ("page", "warn")
    told = re.findall(r"^### ([A-Z][A-Za-z]+)$", runbook, re.M)
    assert sorted(told) == sorted(alert["alert"] for alert in ALERTS)


def test_every_panel_asks_something_and_says_what_it_shows() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) >= 8
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert all(target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"])


def test_ray_has_the_metrics_of_gpus_that_are_asked_for() -> None:
    """Ray exports them only on a node with a GPU, so they are looked up in its table."""
    assert {f"ray_{name}" for name in METRICS_GAUGES} >= GPU_METRICS
    assert {"GpuIndex", "GpuDeviceName"} <= set(GPU_TAG_KEYS)


@pytest.mark.stack
def test_every_metric_that_is_asked_for_is_exported_by_ray(stack: LocalStack) -> None:
    state = read_state(stack.root)
    assert state is not None
    url = f"http://127.0.0.1:{state.ports['ray-metrics']}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    of_ray = {name for name in asked_for() - GPU_METRICS if not name.startswith(OURS)}
    assert len(of_ray) >= 12
    exported, deadline = set[str](), time.monotonic() + 90
    # Ray forgets a reading after some seconds, so that while its agent is kept waiting an answer may lack some.
    while not of_ray <= exported and time.monotonic() < deadline:
        with opener.open(url, timeout=20) as answer:
            exported |= set(re.findall(r"^# TYPE (\S+)", answer.read().decode(), re.M))
        time.sleep(1)
    missing = of_ray - exported
    if missing and _gave_up_exporting(stack):
        pytest.skip("Ray's control store gave up exporting metrics: its agent took more than 30 s to start")
    assert missing == set()


def _gave_up_exporting(stack: LocalStack) -> bool:
    """Ray 2.60 tries 30 times, a second apart, and never again."""
    logs = (temp_dir(stack.root) / "session_latest" / "logs").glob("gcs_server*")
    return any("Events and metrics will not be exported" in log.read_text(errors="replace") for log in logs)
