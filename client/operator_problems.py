"""The errors that an operator meets: the coordinator does not answer, refuses, or takes too long."""

from __future__ import annotations

from pathlib import Path

from fedsim.client.problems import CoordinatorProblem
from fedsim.errors import ConfigError, FedsimError

_HINTS = {
    "NOT_FOUND": "fedsim watch --connect … and fedsim node ls --connect … list what there is",
    "ALREADY_EXISTS": "give another run key, or none",
    "INVALID_ARGUMENT": "correct what the coordinator names",
    "FAILED_PRECONDITION": "look at its state: fedsim watch RUN --connect …",
}


class CoordinatorRefused(FedsimError):
    """The coordinator answered, and the answer is no; `status` is the word of gRPC for it."""

    exit_code = 2
    default_code = "FS-SRV-024"
    status = ""


class TimedOut(FedsimError):
    """What was waited for did not come in time."""

    exit_code = 4
    default_code = "FS-SRV-027"


def no_answer(said: str, seconds: float, *, where: str) -> CoordinatorProblem:
    """FS-SRV-022: nobody answers."""
    return CoordinatorProblem(
        "the coordinator does not answer",
        code="FS-SRV-022",
        where=where,
        why=f"tried for {seconds:g} s; the last try ended with {said}",
        hint="check that it runs and that the address is right: fedsim health HOST:PORT",
    )


def not_let_in(said: str, *, where: str) -> CoordinatorProblem:
    """FS-SRV-023: the coordinator does not know the key, or does not approve of it."""
    return CoordinatorProblem(
        "the coordinator does not let this key in",
        code="FS-SRV-023",
        where=where,
        why=said or "it gave no reason",
        hint="let an admin invite you (fedsim node invite); then fedsim connect NAME --bundle FILE",
    )


def not_allowed(said: str, *, where: str) -> CoordinatorProblem:
    """FS-SRV-025: the key's role does not allow the call."""
    return CoordinatorProblem(
        "this key may not do that",
        code="FS-SRV-025",
        where=where,
        why=said,
        hint="a viewer reads, an operator starts and stops runs, an admin decides who takes part",
    )


def refused(status: str, said: str, *, where: str) -> CoordinatorRefused:
    """FS-SRV-024: the call itself is refused."""
    error = CoordinatorRefused(
        "the coordinator refuses this",
        code="FS-SRV-024",
        where=where,
        why=f"{status}: {said}",
        hint=_HINTS.get(status, "the log of the coordinator says more"),
    )
    error.status = status
    return error


def no_service(status: str, *, where: str) -> CoordinatorProblem:
    """FS-SRV-028: the coordinator is there and does not serve."""
    return CoordinatorProblem(
        "the coordinator does not serve now",
        code="FS-SRV-028",
        where=where,
        why=f"it says {status}: it is being opened, drains, or has no space left",
        hint="its log says which; GET /readyz as well",
    )


def timed_out(what: str, seconds: float, *, where: str, hint: str) -> TimedOut:
    """FS-SRV-027: `what` took longer than it was given."""
    return TimedOut(what, code="FS-SRV-027", where=where, why=f"waited for {seconds:g} s", hint=hint)


def no_key(path: Path | None) -> ConfigError:
    """FS-CFG-129: there is no operator key."""
    return ConfigError(
        "there is no operator key",
        code="FS-CFG-129",
        where=str(path) if path is not None else "--key",
        why="a coordinator knows operators by their keys",
        hint="fedsim connect NAME --bundle FILE makes one and enrols it; or name it with --key FILE",
    )
