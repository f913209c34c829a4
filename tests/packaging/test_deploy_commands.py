"""Every command line below ``deploy/`` is one that fedsim has: commands and options."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import typer
import yaml

from fedsim.cli import make_app
from tests.packaging import deploy_rules as rules
from tests.packaging.source_tree import ROOT

DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kubernetes" / "base"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


class Call(NamedTuple):
    """A command line of fedsim that a file has."""

    where: str
    words: list[str]


def image_calls(name: str) -> list[Call]:
    """What an image starts and how it asks after its health."""
    last = rules.stages(text_of(DEPLOY / "docker" / name))[-1]
    found = {step.word: step.rest for step in last}
    calls = [Call(name, json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"]))]
    if "CMD" in found["HEALTHCHECK"]:
        calls.append(Call(name, json.loads(found["HEALTHCHECK"].partition("CMD ")[2])))
    return calls


def script_calls(path: Path) -> list[Call]:
    """The lines of a script or a page that begin with fedsim, or hand their words to it in compose."""
    joined = re.sub(r"\\\n[#\s]*", " ", text_of(path))
    lines = re.findall(
        r"^[#\s]*((?:docker compose .* )?run --rm operator |fedsim )([^|>\n]*)", joined, re.MULTILINE
    )
    return [Call(path.name, ["fedsim", *shlex.split(words)]) for _, words in lines]


def calls() -> Iterator[Call]:
    """Every command line of fedsim below deploy/."""
    for path in sorted((DEPLOY / "docker").iterdir()):
        yield from image_calls(path.name)
    for path in sorted((DEPLOY / "compose").glob("*.yaml")):
        for name, service in yaml.safe_load(text_of(path))["services"].items():
            if service.get("entrypoint") == ["fedsim"]:
                yield Call(f"{path.name}: {name}", ["fedsim", *service["command"]])
                continue
            role = {"coordinator": "server"}.get(name, "client" if name.startswith("client") else None)
            if role and "command" in service:
                yield Call(f"{path.name}: {name}", ["fedsim", role, *service["command"]])
    for path in sorted(BASE.glob("*/*.yaml")):
        for item in yaml.safe_load_all(text_of(path)):
            for box in item.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
                role = {"coordinator": "server", "client": "client"}[box["name"]]
                yield Call(path.name, ["fedsim", role, *box["args"]])
    for path in sorted((DEPLOY / "systemd").glob("*.service")):
        words = rules.unit_of(text_of(path))["Service"]["ExecStart"].split()
        yield Call(path.name, ["fedsim", *words[1:]])
    yield from script_calls(DEPLOY / "compose" / "init.sh")
    yield from script_calls(DEPLOY / "compose" / "compose.yaml")
    yield from script_calls(DEPLOY / "README.md")


def faults_of(words: list[str], program: click.Command) -> list[str]:
    """Commands and options of a command line that fedsim does not have."""
    command, rest = program, words[1:]
    while isinstance(command, click.Group) and rest:
        found = command.get_command(click.Context(command), rest[0])
        if found is None:
            return [f"no command {rest[0]!r}"]
        command, rest = found, rest[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return [
        f"no option {w}"
        for w in (word.split("=")[0] for word in rest)
        if w.startswith("-") and w not in known
    ]


def test_every_command_line_is_one_that_fedsim_has() -> None:
    program = typer.main.get_command(make_app())
    found = list(calls())
    assert {"server", "client", "health", "certs", "node", "connect", "run", "watch"} <= {
        call.words[1] for call in found
    }
    assert [(call, faults) for call in found if (faults := faults_of(call.words, program))] == []


def test_a_command_line_that_fedsim_does_not_have_is_noticed() -> None:
    program = typer.main.get_command(make_app())
    assert faults_of(["fedsim", "run", "x.toml", "--sed", "1", "--name=a"], program) == ["no option --sed"]
    assert faults_of(["fedsim", "serve"], program) == ["no command 'serve'"]
