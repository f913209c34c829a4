"""The rules that everything below ``deploy/`` keeps, as functions that list what breaks them.

Each takes parsed files and returns sentences, none for a file in order. So the tests can ask the same rule
about the files as they are, and about files that were broken on purpose.
"""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

Table = Mapping[str, Any]  # Any: whatever YAML holds

USER, STATE, GRACE_SECONDS = 10001, "/var/lib/fedsim", 45
GRPC, HTTP = 8470, 8471

SECRET_NAME = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|SECRET|PRIVATE|CREDENTIAL|API_?KEY)(?!.*_FILE$)", re.IGNORECASE
)
SECRET_FLAG = re.compile(r"^--(token|password|secret|key-text)(=|$)")
SECRET_VALUE = re.compile(r"-----BEGIN|^[0-9a-fA-F]{32,}$|^[A-Za-z0-9_-]{40,}$|://[^/@\s]+:[^/@\s]+@")


def secrets_shown(words: Iterable[str], variables: Mapping[str, str]) -> list[str]:
    """Secrets on a command line or in an environment, which other users and logs see."""
    found = [f"argument {word}" for word in words if SECRET_FLAG.match(word) or SECRET_VALUE.search(word)]
    return found + [
        f"variable {name}"
        for name, value in variables.items()
        if value and (SECRET_NAME.search(name) or SECRET_VALUE.search(value))
    ]


# ------------------------------------------------------------------ Dockerfiles


class Step(NamedTuple):
    """One instruction of a Dockerfile, on one line."""

    word: str
    rest: str


def steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile, without comments and line ends."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Step(*(re.split(r"\s+", line, maxsplit=1))) for line in joined.splitlines() if line.strip()]


def stages(text: str) -> list[list[Step]]:
    """The instructions of each stage, which begins with FROM."""
    found: list[list[Step]] = []
    for step in steps(text):
        if step.word == "FROM":
            found.append([])
        if found:
            found[-1].append(step)
    return found


def image_faults(text: str, *, server: bool) -> Iterator[str]:
    """What is wrong with a Dockerfile."""
    everything, parts = steps(text), stages(text)
    last = parts[-1]
    given = {word: [s.rest for s in last if s.word == word] for word in {s.word for s in last}}

    def only(word: str) -> str:
        values = given.get(word, [])
        return values[0] if len(values) == 1 else ""

    if len(parts) < 2 or not any(s.word == "COPY" and "--from=build" in s.rest for s in last):
        yield "the image is not copied out of a build stage"
    bases = [s.rest for s in everything if s.word == "ARG" and s.rest.startswith("BASE=")]
    if len(bases) != 1 or "/" in bases[0] or not all(p[0].rest.startswith("${BASE}") for p in parts):
        yield "the base image is no build argument, or its default names a host"
    users = [n for n, s in enumerate(last) if s.word == "USER"]
    if only("USER") != f"{USER}:{USER}" or any(s.word in {"RUN", "COPY"} for s in last[users[-1] :]):
        yield f"the image does not end as user {USER}"
    for word in ("ENTRYPOINT", "CMD"):
        if not only(word).startswith("["):
            yield f"{word} is no list, so a shell would stand before the process"
    if only("STOPSIGNAL") != "SIGTERM":
        yield "SIGTERM does not stop it"
    if only("VOLUME") != json.dumps([STATE]):
        yield f"{STATE} is no volume"
    health = only("HEALTHCHECK")
    if server and f'CMD ["fedsim", "health", "localhost:{GRPC}"' not in health:
        yield "HEALTHCHECK does not ask the coordinator"
    if not server and health != "NONE":
        yield "HEALTHCHECK of a client has nobody to ask"
    if server and only("EXPOSE").split() != [str(GRPC), str(HTTP)]:
        yield "EXPOSE names other ports"
    labels = {
        key for s in last if s.word == "LABEL" for key in re.findall(r"opencontainers\.image\.(\w+)=", s.rest)
    }
    if not {"title", "description", "licenses", "version", "revision", "created"} <= labels:
        yield "labels are missing"
    for step in everything:
        if step.word == "ADD" or (step.word != "LABEL" and "://" in step.rest):
            yield f"{step.word} fetches by itself: {step.rest}"
        if step.word in {"ARG", "ENV"} and SECRET_NAME.search(step.rest.partition("=")[0]):
            yield f"{step.word} {step.rest} would keep a secret in the image"
        for install in re.findall(r"pip install [^&]*", step.rest):
            if "-c constraints.txt" not in install and "--no-index" not in install:
                yield f"versions are not fixed: {install}"


# ---------------------------------------------------------------------- compose


def seconds(text: str) -> float:
    """Of ``45s`` or ``1m30s``."""
    units = {"s": 1, "m": 60, "h": 3600}
    return sum(float(n) * units[u] for n, u in re.findall(r"(\d+)([smh])", text))


def overridden(base: Table, override: Table) -> dict[str, Any]:
    """The services of two compose files together; networks and volumes add up, the rest is replaced."""
    services = {name: dict(service) for name, service in base["services"].items()}
    for name, service in override["services"].items():
        mine = services.setdefault(name, {})
        for key, value in service.items():
            adds_up = key in {"networks", "volumes"} and isinstance(mine.get(key), list)
            mine[key] = mine[key] + value if adds_up else value
    return {
        **base,
        **override,
        "services": services,
        "networks": {**base["networks"], **override.get("networks", {})},
    }


def service_faults(name: str, service: Table) -> Iterator[str]:
    """What is wrong with one service of a compose file."""
    if str(service.get("user", "0")).split(":")[0] in {"0", "root"}:
        yield f"{name} runs as root"
    if service.get("read_only") is not True:
        yield f"{name} can write to its root"
    if service.get("cap_drop") != ["ALL"] or "cap_add" in service or service.get("privileged"):
        yield f"{name} keeps capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield f"{name} may gain privileges"
    if seconds(service.get("stop_grace_period", "10s")) < GRACE_SECONDS:
        yield f"{name} is killed before it has drained"
    if not any(mount.startswith("/tmp") for mount in service.get("tmpfs", [])):
        yield f"{name} has no /tmp"
    if "host" in (service.get("network_mode"), service.get("pid"), service.get("ipc")):
        yield f"{name} shares the host"
    for port in service.get("ports", []):
        if not port.startswith("127.0.0.1:"):
            yield f"{name} listens beyond this machine: {port}"
    for mount in service.get("volumes", []):
        if mount.startswith((".", "/")) and not mount.endswith(":ro"):
            yield f"{name} can write to the host: {mount}"
    for word in ("entrypoint", "command"):
        if not isinstance(service.get(word, []), list):
            yield f"{word} of {name} goes through a shell"
    words = [*service.get("entrypoint", []), *service.get("command", [])]
    build = service.get("build", {})
    variables = {**service.get("environment", {}), **build.get("args", {})}
    yield from (f"{name}: {s}" for s in secrets_shown(words, {k: str(v) for k, v in variables.items()}))


def compose_faults(file: Table) -> Iterator[str]:
    """What is wrong with a compose file, or with several taken together by `overridden`."""
    services: Mapping[str, Table] = file["services"]
    for name, service in services.items():
        yield from service_faults(name, service)
    coordinator = services["coordinator"]
    inner = [port.rpartition(":")[2] for port in coordinator.get("ports", [])]
    if inner != [str(GRPC), str(HTTP)]:
        yield f"the coordinator publishes {inner}"
    if coordinator["depends_on"]["init"]["condition"] != "service_completed_successfully":
        yield "the coordinator does not wait for its certificate"
    clients = [name for name in services if name.startswith("client-")]
    if len(clients) != 3:
        yield f"{len(clients)} clients"
    for name in clients:
        if any(not file["networks"][n].get("internal") for n in services[name]["networks"]):
            yield f"{name} has a way out"
        if services[name]["depends_on"]["coordinator"]["condition"] != "service_healthy":
            yield f"{name} does not wait for the coordinator"
    for name in ("coordinator", *clients):
        to = {mount.split(":")[1] for mount in services[name]["volumes"] if not mount.endswith(":ro")}
        if to != {STATE}:
            yield f"{name} writes to {sorted(to)}"
    states = [m for name in ("coordinator", *clients) for m in services[name]["volumes"] if m.endswith(STATE)]
    if len(set(states)) != len(states):
        yield "two processes share a state folder"


# ---------------------------------------------------------------------- systemd

HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "CapabilityBoundingSet": "",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
    "KillSignal": "SIGTERM",
    "KillMode": "mixed",
    "Restart": "on-failure",
}


def unit_of(text: str) -> dict[str, dict[str, str]]:
    """The sections of a unit; of a key that is written twice the last value counts."""
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return {name: dict(parser[name]) for name in parser.sections()}


def unit_faults(unit: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """What is wrong with a service unit."""
    service = unit["Service"]
    for key, value in HARDENED.items():
        if service.get(key) != value:
            yield f"{key} is {service.get(key)}"
    if service.get("User", "root") == "root":
        yield "it runs as root"
    if int(service.get("TimeoutStopSec", "0")) < GRACE_SECONDS:
        yield "it is killed before it has drained"
    if service.get("WorkingDirectory") != f"/var/lib/{service.get('StateDirectory')}":
        yield "it works outside of its state folder"
    variables = dict(pair.partition("=")[::2] for pair in service.get("Environment", "").split())
    yield from secrets_shown(service["ExecStart"].split(), variables)
