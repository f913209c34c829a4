"""The rules of the Kubernetes manifests, as functions that list what breaks them; see `deploy_rules`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tests.packaging.deploy_rules import GRACE_SECONDS, GRPC, HTTP, STATE, USER, Table, secrets_shown

WRITABLE = {STATE, "/tmp"}


def pod_faults(name: str, pod: Table) -> Iterator[str]:
    """What is wrong with the pods of a workload."""
    who = pod.get("securityContext", {})
    if who.get("runAsNonRoot") is not True or who.get("runAsUser") != USER:
        yield f"{name} does not run as user {USER}"
    if who.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name} has no seccomp profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield f"{name} gets a token of the cluster"
    if pod.get("enableServiceLinks") is not False:
        yield f"{name} gets variables that look like settings"
    if pod.get("terminationGracePeriodSeconds", 30) < GRACE_SECONDS:
        yield f"{name} is killed before it has drained"
    if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield f"{name} shares the host"
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    if any("hostPath" in volume for volume in volumes.values()):
        yield f"{name} mounts a path of the host"
    in_memory = {n for n, v in volumes.items() if v.get("emptyDir", {}).get("medium") == "Memory"}
    for box in [*pod["containers"], *pod.get("initContainers", [])]:
        rights = box.get("securityContext", {})
        if rights.get("readOnlyRootFilesystem") is not True:
            yield f"{name} can write to its root"
        if rights.get("allowPrivilegeEscalation") is not False or rights.get("privileged"):
            yield f"{name} may gain privileges"
        if rights.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name} keeps capabilities"
        limits = box.get("resources", {})
        if not {"cpu", "memory"} <= set(limits.get("requests", {})) or "memory" not in limits.get(
            "limits", {}
        ):
            yield f"{name} has no resources"
        writable = {m["mountPath"]: m["name"] for m in box["volumeMounts"] if not m.get("readOnly")}
        if box in pod["containers"] and set(writable) != WRITABLE:
            yield f"{name} writes to {sorted(writable)}"
        if box not in pod["containers"] and not set(writable.values()) <= in_memory:
            yield f"{box['name']} of {name} keeps a secret on a disk"
        if box["image"].endswith(":latest"):
            yield f"{name} takes whatever is latest"
        variables = {v["name"]: str(v.get("value", "")) for v in box.get("env", [])}
        yield from (
            f"{name}: {s}" for s in secrets_shown([*box.get("command", []), *box.get("args", [])], variables)
        )


def cluster_faults(objects: Sequence[Table]) -> Iterator[str]:
    """What is wrong with manifests that go to a cluster together."""
    kinds: dict[str, list[Table]] = {}
    for item in objects:
        kinds.setdefault(item["kind"], []).append(item)
    if "Secret" in kinds:
        yield "secrets lie in the manifests"
    workloads = kinds.get("StatefulSet", []) + kinds.get("Deployment", [])
    policies = kinds.get("NetworkPolicy", [])
    for work in workloads:
        name, template = work["metadata"]["name"], work["spec"]["template"]
        yield from pod_faults(name, template["spec"])
        if work["spec"]["replicas"] != 1:
            yield f"{name} has {work['spec']['replicas']} pods for one state"
        mine = [p for p in policies if _selects(p["spec"]["podSelector"], template)]
        if {t for p in mine for t in p["spec"]["policyTypes"]} != {"Ingress", "Egress"}:
            yield f"{name} may be reached by everybody, or may reach everybody"
    for work in kinds.get("Deployment", []):
        if work["spec"]["strategy"]["type"] != "Recreate":
            yield f"{work['metadata']['name']} would run twice with one key"
    for work in kinds.get("StatefulSet", []):
        yield from _coordinator_faults(work, kinds)


def _coordinator_faults(work: Table, kinds: Mapping[str, Sequence[Table]]) -> Iterator[str]:
    (box,) = work["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in box["ports"]}
    if ports != {"grpc": GRPC, "http": HTTP}:
        yield f"ports {ports}"
    for probe, path in (
        ("startupProbe", "/livez"),
        ("livenessProbe", "/livez"),
        ("readinessProbe", "/readyz"),
    ):
        if box.get(probe, {}).get("httpGet") != {"path": path, "port": "http"}:
            yield f"{probe} does not ask {path}"
    if [claim["metadata"]["name"] for claim in work["spec"]["volumeClaimTemplates"]] != ["state"]:
        yield "the state has no volume of its own"
    services = {service["metadata"]["name"]: service for service in kinds.get("Service", [])}
    offered = sorted(port["port"] for service in services.values() for port in service["spec"]["ports"])
    if offered != [GRPC, HTTP] or work["spec"]["serviceName"] not in services:
        yield f"services offer {offered}"
    template = work["spec"]["template"]
    if not all(
        _selects({"matchLabels": service["spec"]["selector"]}, template) for service in services.values()
    ):
        yield "a service selects other pods"
    if not any(_selects(b["spec"]["selector"], template) for b in kinds.get("PodDisruptionBudget", [])):
        yield "no disruption budget"


def _selects(selector: Table, template: Table) -> bool:
    wanted = selector.get("matchLabels", {})
    return bool(wanted) and wanted.items() <= template["metadata"]["labels"].items()
