"""What is below ``deploy/`` keeps the rules of `deploy_rules`, and those rules notice what breaks them."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.client.problems import CoordinatorProblem, SupersededError
from fedsim.errors import ConfigError
from tests.packaging import deploy_rules as rules
from tests.packaging.deploy_cluster_rules import cluster_faults
from tests.packaging.source_tree import PROJECT, ROOT

DEPLOY = ROOT / "deploy"
DOCKER, COMPOSE, KUBERNETES = DEPLOY / "docker", DEPLOY / "compose", DEPLOY / "kubernetes"
IMAGES = {
    "server": "Dockerfile.server",
    "client": "Dockerfile.client",
    "client-cuda": "Dockerfile.client-cuda",
}
UNITS = ["fedsim-server.service", "fedsim-client.service"]
OVERRIDES = ["with-observability.yaml", "gpu.yaml"]
Broken = Callable[[Any], object]  # Any: a file as YAML gave it


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def documents(path: Path) -> list[Any]:
    return [part for part in yaml.safe_load_all(text_of(path)) if part is not None]


@functools.cache
def _compose(name: str) -> Any:
    return documents(COMPOSE / name)[0]


def compose(*overrides: str) -> Any:
    file = copy.deepcopy(_compose("compose.yaml"))
    for name in overrides:
        file = rules.overridden(file, copy.deepcopy(_compose(name)))
    return file


@functools.cache
def _base() -> list[Any]:
    folders = [KUBERNETES / "base" / "coordinator", KUBERNETES / "base" / "client"]
    files = [f for folder in folders for f in sorted(folder.glob("*.yaml")) if f.name != "kustomization.yaml"]
    return [item for file in files for item in documents(file)]


def base() -> list[Any]:
    """The manifests as they are written; kustomize adds the common labels to what they select."""
    items = copy.deepcopy(_base())
    for item in items:
        if item["kind"] == "Service":
            item["spec"]["selector"] = {"app.kubernetes.io/component": "coordinator"}
    return items


def one(items: list[Any], kind: str) -> Any:
    (found,) = [item for item in items if item["kind"] == kind]
    return found


# ------------------------------------------------------------------------- rules


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_keeps_the_rules(name: str) -> None:
    assert list(rules.image_faults(text_of(DOCKER / IMAGES[name]), server=name == "server")) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("USER 10001:10001", "USER root"),
        ("USER 10001:10001\n", ""),
        ('ENTRYPOINT ["fedsim", "server"]', "ENTRYPOINT fedsim server"),
        ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL"),
        ("EXPOSE 8470 8471", "EXPOSE 8470 8080"),
        ('"localhost:8470"', '"localhost:80"'),
        ("ARG BASE=python", "ARG BASE=registry.example.org/python"),
        ("ARG EXTRAS", "ARG INDEX_PASSWORD"),
        ("pip install -c constraints.txt", "pip install"),
        ("COPY --from=build", "COPY"),
        ("image.revision=", "image.other="),
        ("WORKDIR /src", "ADD https://example.org/x /src"),
        ('VOLUME ["/var/lib/fedsim"]', 'VOLUME ["/data"]'),
    ],
)
def test_a_broken_image_is_noticed(old: str, new: str) -> None:
    text = text_of(DOCKER / "Dockerfile.server")
    assert old in text
    assert list(rules.image_faults(text.replace(old, new), server=True))


def test_the_images_are_built_alike_but_for_the_check_of_torch() -> None:
    builds = [rules.stages(text_of(DOCKER / file))[0] for file in IMAGES.values()]
    for same in zip(*builds, strict=True):
        different = len(set(same)) > 1
        assert different == ("torch/version.py" in same[0].rest), same[0]


def test_a_build_gets_what_it_copies_and_nothing_else() -> None:
    first, *kept = [line for line in text_of(ROOT / ".dockerignore").splitlines() if line and line[0] != "#"]
    assert first == "*"
    copied: set[str] = set()
    for step in rules.stages(text_of(DOCKER / "Dockerfile.server"))[0]:
        if step.word == "COPY":
            copied |= set(step.rest.split()[:-1])
    assert {line[1:] for line in kept if line.startswith("!")} == copied
    assert set(PROJECT["tool"]["setuptools"]["package-dir"].values()) <= copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("override", [(), *((name,) for name in OVERRIDES), tuple(OVERRIDES)])
def test_a_compose_file_keeps_the_rules(override: tuple[str, ...]) -> None:
    assert list(rules.compose_faults(compose(*override))) == []


@pytest.mark.parametrize(
    "broken",
    [
        lambda s: s["coordinator"].update(user="0:0"),
        lambda s: s["coordinator"].pop("user"),
        lambda s: s["client-1"].update(read_only=False),
        lambda s: s["client-2"].pop("cap_drop"),
        lambda s: s["client-2"].update(cap_add=["NET_ADMIN"]),
        lambda s: s["init"].update(security_opt=[]),
        lambda s: s["coordinator"].update(stop_grace_period="10s"),
        lambda s: s["coordinator"].update(ports=["8470:8470", "127.0.0.1:8471:8471"]),
        lambda s: s["coordinator"].update(ports=["127.0.0.1:8470:8470"]),
        lambda s: s["client-3"].update(networks=["operators"]),
        lambda s: s["client-3"]["volumes"].append("./data:/data"),
        lambda s: s["client-3"]["volumes"].append("more:/data"),
        lambda s: s["client-2"]["volumes"].append("client-1:/var/lib/fedsim"),
        lambda s: s["client-1"].update(command="--config /etc/fedsim/client.toml"),
        lambda s: s["client-1"]["command"].extend(["--token", "abc"]),
        lambda s: s["client-1"].update(environment={"ENROL_TOKEN": "abc"}),
        lambda s: s["client-1"].update(environment={"URL": "postgresql://u:p@host/db"}),
        lambda s: s["client-1"].update(network_mode="host"),
        lambda s: s["client-1"]["depends_on"].update(coordinator={"condition": "service_started"}),
        lambda s: s.pop("client-3"),
    ],
)
def test_a_broken_compose_file_is_noticed(broken: Broken) -> None:
    file = copy.deepcopy(compose())
    broken(file["services"])
    assert list(rules.compose_faults(file))


def test_the_manifests_keep_the_rules() -> None:
    assert list(cluster_faults(base())) == []


def _template(items: list[Any], kind: str = "StatefulSet") -> Any:
    return one(items, kind)["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "broken",
    [
        lambda i: _template(i)["securityContext"].pop("runAsNonRoot"),
        lambda i: _template(i)["securityContext"].update(runAsUser=0),
        lambda i: _template(i)["securityContext"].pop("seccompProfile"),
        lambda i: _template(i).update(terminationGracePeriodSeconds=30),
        lambda i: _template(i).pop("automountServiceAccountToken"),
        lambda i: _template(i, "Deployment").update(hostNetwork=True),
        lambda i: _template(i)["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
        lambda i: _template(i, "Deployment")["containers"][0]["securityContext"].pop("capabilities"),
        lambda i: _template(i)["initContainers"][0]["securityContext"].update(privileged=True),
        lambda i: _template(i)["containers"][0].pop("readinessProbe"),
        lambda i: _template(i)["containers"][0]["livenessProbe"].update(
            httpGet={"path": "/", "port": "http"}
        ),
        lambda i: _template(i)["containers"][0].pop("resources"),
        lambda i: _template(i)["containers"][0]["ports"][0].update(containerPort=50051),
        lambda i: _template(i)["containers"][0].update(image="fedsim-server:latest"),
        lambda i: _template(i)["containers"][0].update(env=[{"name": "DB_PASSWORD", "value": "x"}]),
        lambda i: _template(i)["containers"][0]["args"].append("--token=x"),
        lambda i: _template(i)["containers"][0]["volumeMounts"].append({"name": "config", "mountPath": "/x"}),
        lambda i: _template(i)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        lambda i: one(i, "StatefulSet")["spec"].update(replicas=2),
        lambda i: one(i, "Deployment")["spec"].update(strategy={"type": "RollingUpdate"}),
        lambda i: i.remove(one(i, "PodDisruptionBudget")),
        lambda i: i.remove([p for p in i if p["kind"] == "NetworkPolicy"][0]),
        lambda i: i.remove([s for s in i if s["kind"] == "Service"][0]),
        lambda i: i.append({"kind": "Secret", "metadata": {"name": "x"}}),
    ],
)
def test_broken_manifests_are_noticed(broken: Broken) -> None:
    items = base()
    broken(items)
    assert list(cluster_faults(items))


@pytest.mark.parametrize("overlay", ["base", "overlays/lab"])
def test_what_kustomize_makes_of_the_manifests_keeps_the_rules(overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    items = [item for item in yaml.safe_load_all(done.stdout) if item is not None]
    assert list(cluster_faults(items)) == []
    names = {volume["secret"]["secretName"] for w in items for volume in _secret_volumes(w)}
    clients = [item for item in items if item["kind"] == "Deployment"]
    assert len(names) == 2 + len(clients), "every client has a bundle of its own"


def _secret_volumes(item: Any) -> Iterator[Any]:
    pod = item.get("spec", {}).get("template", {}).get("spec", {})
    return (volume for volume in pod.get("volumes", []) if "secret" in volume)


def test_the_secrets_that_pods_mount_are_described_and_hold_nothing() -> None:
    examples = {
        item["metadata"]["name"]: item for item in documents(KUBERNETES / "base" / "secrets.example.yaml")
    }
    mounted = {v["secret"]["secretName"]: v["secret"] for item in base() for v in _secret_volumes(item)}
    assert examples.keys() == mounted.keys()
    for name, secret in mounted.items():
        values = examples[name]["stringData"]
        assert {item["key"] for item in secret.get("items", [])} <= values.keys()
        assert all(re.fullmatch(r"<[\w ]+>", value) for value in values.values())


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_keeps_the_rules(name: str) -> None:
    assert list(rules.unit_faults(rules.unit_of(text_of(DEPLOY / "systemd" / name)))) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("User", "root"),
        ("NoNewPrivileges", "no"),
        ("ProtectSystem", "full"),
        ("CapabilityBoundingSet", "CAP_NET_ADMIN"),
        ("TimeoutStopSec", "10"),
        ("KillSignal", "SIGKILL"),
        ("StateDirectory", "other"),
        ("ExecStart", "/opt/fedsim/bin/fedsim client --token abc"),
        ("Environment", "FEDSIM_TOKEN=abc"),
    ],
)
def test_a_broken_unit_is_noticed(key: str, value: str) -> None:
    unit = rules.unit_of(text_of(DEPLOY / "systemd" / UNITS[0]))
    assert key in unit["Service"]
    unit["Service"][key] = value
    assert list(rules.unit_faults(unit))


def test_a_client_that_was_superseded_or_is_set_up_wrongly_is_not_started_again() -> None:
    unit = rules.unit_of(text_of(DEPLOY / "systemd" / "fedsim-client.service"))["Service"]
    final = {error.exit_code for error in (ConfigError, CoordinatorProblem, SupersededError)}
    assert {int(code) for code in unit["RestartPreventExitStatus"].split()} == final
