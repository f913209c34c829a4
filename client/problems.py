"""What ends a client for good: the coordinator refuses it, is another one, or cannot be reached.

Everything else (a lost link, a restarting coordinator, a full disk over there) is waited out.
"""

from __future__ import annotations

from fedsim.errors import FedsimError


class CoordinatorProblem(FedsimError):
    """The coordinator cannot be reached, or client and coordinator do not accept each other."""

    exit_code = 3
    default_code = "FS-CLI-001"


class SupersededError(FedsimError):
    """A newer process logged in with the same key; this one must not be started again by itself."""

    exit_code = 7
    default_code = "FS-CLI-003"


def denied(said: str, *, where: str) -> CoordinatorProblem:
    """FS-CLI-001: this key may not take part."""
    return CoordinatorProblem(
        "the coordinator does not let this client in",
        code="FS-CLI-001",
        where=where,
        why=said,
        hint="ask its operator: fedsim node ls shows whether this key waits for approval or was revoked; "
        "fedsim node invite makes a token for a new one",
    )


def other_version(said: str, *, where: str) -> CoordinatorProblem:
    """FS-CLI-002: the two sides speak different major versions of the protocol."""
    return CoordinatorProblem(
        "client and coordinator speak different versions of the protocol",
        code="FS-CLI-002",
        where=where,
        why=said,
        hint="install the coordinator's version of fedsim on the client, or upgrade the older side",
    )


def superseded(said: str, *, where: str) -> SupersededError:
    """FS-CLI-003: another process uses this client's key."""
    return SupersededError(
        "another process has logged in with the key of this client",
        code="FS-CLI-003",
        where=where,
        why=f"{said}; one client has one voice",
        hint="stop one of the two; a copied key needs its own: fedsim keys new, fedsim node invite",
    )


def other_server(pinned: bytes, came: bytes, *, where: str) -> CoordinatorProblem:
    """FS-CLI-004: the coordinator's key is not the one that this client knows."""
    return CoordinatorProblem(
        "the coordinator is not the one that this client knows",
        code="FS-CLI-004",
        where=where,
        why=f"its key is {came.hex()[:16] or 'empty'}…, this client is bound to {pinned.hex()[:16]}…",
        hint="check the address; where the coordinator really has a new identity, take a new bundle and "
        "a new state folder",
    )


def went_back(known: int, came: int, *, where: str) -> CoordinatorProblem:
    """FS-CLI-005: the coordinator is older than what this client has already seen of it."""
    return CoordinatorProblem(
        "the coordinator has gone back in time",
        code="FS-CLI-005",
        where=where,
        why=f"this client has worked for incarnation {known}, the coordinator is at {came}: perhaps an old "
        "copy of its state was started",
        hint="restore backups with the command for it, which counts the incarnation up",
    )


def gave_up(tries: int, said: str, *, where: str) -> CoordinatorProblem:
    """FS-CLI-006: as many tries as --max-retries allows have failed."""
    return CoordinatorProblem(
        "the coordinator cannot be reached",
        code="FS-CLI-006",
        where=where,
        why=f"{tries} tries failed, the last one with: {said}",
        hint="check address and network; without --max-retries a client keeps trying",
    )


def bad_certificate(said: str, *, where: str) -> CoordinatorProblem:
    """FS-CLI-007: the TLS handshake failed."""
    return CoordinatorProblem(
        "the coordinator's certificate is not accepted, or it does not accept this client's",
        code="FS-CLI-007",
        where=where,
        why=said,
        hint="check --ca, the name in --server, and that no certificate has expired; fedsim doctor helps",
    )
