"""What ``deploy/`` says about the product is true: settings, paths, metrics."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from fedsim import registry
from fedsim.config import load_config
from tests.packaging import deploy_rules as rules
from tests.packaging.source_tree import ROOT, modules

DEPLOY = ROOT / "deploy"
CONFIG, OBSERVABILITY = DEPLOY / "config", DEPLOY / "observability"
BASE = DEPLOY / "kubernetes" / "base"
ZEROS = "0" * 64


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def product(name: str) -> Any:
    """A module of the product; skips where this source tree has no such file."""
    if name not in modules():
        pytest.skip(f"there is no {name}")
    return importlib.import_module(name)


def with_comments(text: str) -> dict[str, Any]:
    """A TOML example with what it shows in comments; a key shown twice counts once."""
    lines, seen = [], set()
    for line in text.splitlines():
        line = re.sub(r"^# (?=\[[a-z]+\]$|[a-z_]+ = )", "", line)
        if (key := re.match(r"\[?[a-z_]+", line)) and key[0] not in seen:
            seen.add(key[0]) if key[0][0] != "[" else seen.clear()
            lines.append(line)
    return tomllib.loads("\n".join(lines))


def unknown_keys(values: Mapping[str, Any], model: type[BaseModel]) -> Iterator[str]:
    """Keys that a model does not have, in its tables too."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for key, value in values.items():
        inner = fields[key].annotation if key in fields else None
        if key not in fields:
            yield key
        elif isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from (f"{key}.{name}" for name in unknown_keys(value, inner))


# ---------------------------------------------------------------------- settings


def test_the_examples_of_the_server_are_settings_of_the_server() -> None:
    settings = product("fedsim.server.settings")
    loaded = settings.load_settings(CONFIG / "server.toml")
    assert (loaded.listen.port, loaded.http.port) == (rules.GRPC, rules.HTTP)
    assert str(loaded.server.state) == rules.STATE
    shown = with_comments(text_of(CONFIG / "server.toml"))
    assert {"url", "client_ca"} <= {key for table in shown.values() for key in table}
    assert list(unknown_keys(shown, settings.ServerSettings)) == []
    assert list(unknown_keys({"server": {"prot": 1}, "x": 1}, settings.ServerSettings)) == [
        "server.prot",
        "x",
    ]


def test_the_examples_of_the_client_are_settings_of_the_client(tmp_path: Path) -> None:
    settings = product("fedsim.client.settings")
    bundle = tmp_path / "bundle.toml"
    bundle.write_text(f'server = "coordinator:{rules.GRPC}"\nserver_id = "{ZEROS}"\n', encoding="utf-8")
    bundle.chmod(0o600)
    loaded = settings.client_settings({"bundle": bundle}, CONFIG / "client.toml")
    assert (loaded.server, str(loaded.state)) == (f"coordinator:{rules.GRPC}", rules.STATE)
    assert str(loaded.policy) == "/etc/fedsim/policy.toml"
    shown = with_comments(text_of(CONFIG / "client.toml"))
    assert {"bundle", "server", "data_function", "copy", "labels"} <= shown.keys()
    # The model of the file itself, which says what may be written, besides what is written.
    assert list(unknown_keys(shown, settings._File)) == []


def test_the_example_of_a_policy_allows_nobody_until_it_is_filled_in(tmp_path: Path) -> None:
    policy = product("fedsim.client.policy")
    read = policy.read_policy(CONFIG / "policy.toml")
    assert read.coordinators.allow == [ZEROS]
    shown = with_comments(text_of(CONFIG / "policy.toml"))
    assert {"privacy", "hours"} <= shown.keys()
    assert list(unknown_keys(shown, policy.Policy)) == []


def test_the_example_of_a_policy_allows_the_example_of_a_run() -> None:
    policy = product("fedsim.client.policy")
    read = policy.read_policy(CONFIG / "policy.toml")
    config = load_config(CONFIG / "federation.toml").config
    names = {"strategy": config.strategy.name, "model": config.model.name, "dataset": config.data.name}
    terms = policy.Terms(
        server_id=ZEROS, run_id="0", run_name=config.run.name, **names, batch_size=config.client.batch_size,
        steps=None, epochs=1, upload_bytes=1 << 20, schema="", noise_multiplier=None, clip=None,
    )  # fmt: skip
    assert policy.refusal(read, terms, 400) is None
    assert policy.refusal(read, terms._replace(strategy="unheard_of"), 400) is not None
    assert policy.refusal(read, terms._replace(server_id="1" * 64), 400) is not None
    for kind in ("strategies", "models", "datasets"):
        assert set(getattr(read.plugins, kind)) <= set(registry.names(kind)), kind


@pytest.mark.parametrize(
    "copy",
    ["coordinator/server.toml", "client/client.toml", "client/policy.toml"],
    ids=lambda c: Path(c).name,
)
def test_a_manifest_carries_the_example_itself(copy: str) -> None:
    assert text_of(BASE / copy) == text_of(CONFIG / Path(copy).name)


# ------------------------------------------------------------------------- paths


def inside(path: str, mounts: set[str]) -> bool:
    return any(path == mount or path.startswith(f"{mount}/") for mount in mounts)


def paths_named(config: str) -> set[str]:
    found = re.findall(r'^[a-z_]+ = "(/[^"]+)"', text_of(CONFIG / config), re.MULTILINE)
    return set(found)


@pytest.mark.parametrize(
    ("config", "service", "manifest"),
    [
        ("server.toml", "coordinator", "coordinator/statefulset.yaml"),
        ("client.toml", "client-1", "client/deployment.yaml"),
    ],
)
def test_every_path_of_an_example_is_mounted(config: str, service: str, manifest: str) -> None:
    compose = yaml.safe_load(text_of(DEPLOY / "compose" / "compose.yaml"))["services"][service]
    in_compose = {mount.split(":")[1] for mount in compose["volumes"]}
    work = next(yaml.safe_load_all(text_of(BASE / manifest)))
    (box,) = work["spec"]["template"]["spec"]["containers"]
    in_cluster = {mount["mountPath"] for mount in box["volumeMounts"]}
    named = paths_named(config)
    assert len(named) >= 3
    # The command line of compose names another policy, which init.sh filled in.
    over = {"/etc/fedsim/policy.toml"} if "--policy" in compose["command"] else set()
    assert [path for path in named - over if not inside(path, in_compose)] == []
    assert [path for path in named if not inside(path, in_cluster)] == []
    flags = [word for word in compose["command"] if word.startswith("/")]
    assert [path for path in flags if not inside(path, in_compose)] == []
    assert f"/etc/fedsim/{config}" in in_compose & in_cluster


# ----------------------------------------------------------------------- metrics


def series() -> dict[str, dict[str, set[str]]]:
    """Every series of a coordinator that has done everything once: name -> label -> values."""
    telemetry = product("fedsim.server.telemetry")
    one = telemetry.Telemetry(ROOT)
    one.nodes({"online": 1})
    one.round("a", 1)
    one.phase(telemetry.PHASES[0], 1.0)
    one.epsilon("a", 1.0)
    one.aggregated("fedavg", 1.0)
    for outcome in telemetry.OUTCOMES:
        one.task(outcome)
    for verdict in telemetry.VERDICTS:
        one.update(verdict)
    one.moved("up", "update", 1)
    found: dict[str, dict[str, set[str]]] = {}
    for metric in one.registry.collect():
        for sample in metric.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def expressions() -> list[str]:
    rows = yaml.safe_load(text_of(OBSERVABILITY / "alerts.yml"))["groups"]
    board = json.loads(text_of(OBSERVABILITY / "grafana" / "fedsim.json"))
    return [rule["expr"] for group in rows for rule in group["rules"]] + [
        target["expr"] for panel in board["panels"] for target in panel.get("targets", [])
    ]


def strangers(expression: str, known: Mapping[str, Mapping[str, set[str]]]) -> list[str]:
    """Series, labels and values in an expression that a coordinator does not have."""
    found = []
    for name, labels in re.findall(r"\b(fedsim_\w+)(?:\{([^}]*)\})?", expression):
        if name not in known:
            found.append(name)
            continue
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!=|=)\s*"([^"]*)"', labels):
            if label == "instance":  # Prometheus adds it
                continue
            values = known[name].get(label)
            if values is None or (operator == "=" and value not in values):
                found.append(f"{name}{{{label}{operator}{value}}}")
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    labels_known = {"instance", "job", *(label for labels in known.values() for label in labels)}
    return found + [
        label for group in grouped for label in re.split(r",\s*", group) if label not in labels_known
    ]


def test_board_and_alerts_ask_for_what_a_coordinator_counts() -> None:
    known = series()
    asked = expressions()
    assert len(asked) > 25
    assert [(e, s) for e in asked if (s := strangers(e, known))] == []
    assert strangers('sum by (colour) (fedsim_nodes{state="happy"}) + fedsim_ruonds', known) == [
        'fedsim_nodes{state=happy}', "fedsim_ruonds", "colour",
    ]  # fmt: skip
    names = {
        re.sub(r"_(bucket|sum|count|created)$", "", name) for name in known if not name.endswith("_created")
    }
    unseen = {name for name in names if not any(name in expression for expression in asked)}
    assert unseen == set(), "the board shows everything that is counted"


def test_prometheus_scrapes_the_coordinator_of_compose() -> None:
    (job,) = yaml.safe_load(text_of(OBSERVABILITY / "prometheus.yml"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"coordinator:{rules.HTTP}"]}]
    file = yaml.safe_load(text_of(DEPLOY / "compose" / "with-observability.yaml"))
    mounts = {mount.split(":")[1] for mount in file["services"]["prometheus"]["volumes"]}
    assert inside(job["authorization"]["credentials_file"], mounts)
    assert inside("/etc/prometheus/alerts.yml", mounts)


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"],
        cwd=OBSERVABILITY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------ README


def test_the_readme_lists_every_file() -> None:
    readme = text_of(DEPLOY / "README.md")
    listed = set(re.findall(r"^\| `([^`]+)` \|", readme, re.MULTILINE))
    files = {path.relative_to(DEPLOY) for path in DEPLOY.rglob("*") if path.is_file()} - {Path("README.md")}
    lost = [str(f) for f in files if not any(f.match(name) or f.is_relative_to(name) for name in listed)]
    assert lost == []
    assert [name for name in listed if not list(DEPLOY.glob(name))] == []
