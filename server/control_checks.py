"""What operators send, looked at before anything is done with it; what they are told where it is refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from grpc import StatusCode

from fedsim.errors import ConfigError, DataError, FedsimError, ModelError
from fedsim.pb import federation_pb2 as pb
from fedsim.server.calls import Refused
from fedsim.server.run_table import NoSuchRun

if TYPE_CHECKING:
    from fedsim.server.node_rows import Node

MOST_CONFIG = 1024 * 1024
MOST_EXPRESSION = 1_000
_RUN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._-]{0,99}")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,127}")
_NODE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_STATUS = {
    "FS-SRV-051": StatusCode.NOT_FOUND,  # no such run
    "FS-SRV-052": StatusCode.ALREADY_EXISTS,  # the run key is taken
    "FS-SEC-006": StatusCode.NOT_FOUND,  # no such node
    "FS-SEC-009": StatusCode.FAILED_PRECONDITION,  # revoked for good
}
_STATES = {"pending": pb.PENDING, "approved": pb.APPROVED, "revoked": pb.REVOKED}


def check_submission(request: pb.SubmitRunRequest) -> None:
    """Sizes and names of a run that is submitted.

    Raises:
        Refused: INVALID_ARGUMENT.
    """
    if not 0 < len(request.config) <= MOST_CONFIG:
        text = f"a configuration has 1 to {MOST_CONFIG:,} characters, got {len(request.config):,}"
        raise Refused(StatusCode.INVALID_ARGUMENT, text)
    if request.name:
        run_name(request.name)
    if request.run_key:
        _fits(_KEY, request.run_key, "a run key")
    if len(request.nodes) > MOST_EXPRESSION or not request.nodes.isprintable():
        text = f"a selection of nodes is one printable line of at most {MOST_EXPRESSION:,} characters"
        raise Refused(StatusCode.INVALID_ARGUMENT, text)


def run_name(text: str) -> str:
    """`text`, if it can be the identifier, the beginning of one, or the name of a run.

    Raises:
        Refused: INVALID_ARGUMENT.
    """
    return _fits(_RUN, text, "the identifier or name of a run")


def node_name(text: str) -> str:
    """`text`, if it can be the identifier or name of a node.

    Raises:
        Refused: INVALID_ARGUMENT.
    """
    return _fits(_NODE, text, "the identifier or name of a node")


def told_to_operator(error: FedsimError) -> Refused | None:
    """What an operator did wrong, in full; None where the machine is at fault and its paths stay here."""
    if not isinstance(error, (ConfigError, DataError, ModelError, NoSuchRun)):
        return None
    parts = (f"{error.code}: {error.what}", error.where, error.why, error.hint)
    return Refused(_STATUS.get(error.code, StatusCode.INVALID_ARGUMENT), "; ".join(filter(None, parts)))


def node_of(node: Node, online: frozenset[str]) -> pb.Node:
    """A node as operators see it.

    Args:
        online: identifiers of the nodes that are there.
    """
    return pb.Node(
        node_id=node.node_id,
        name=node.name,
        state=_STATES.get(node.state, pb.NODE_STATE_UNSPECIFIED),
        role=node.role,
        labels=dict(node.labels),
        online=node.node_id in online,
        last_seen=node.last_seen,
        build=node.build,
        device=node.device,
        fingerprint=node.fingerprint,
    )


def _fits(pattern: re.Pattern[str], text: str, what: str) -> str:
    if not pattern.fullmatch(text):
        allowed = "letters and digits of ASCII and . _ -, and is not long"
        raise Refused(StatusCode.INVALID_ARGUMENT, f"{what} is made of {allowed}")
    return text
