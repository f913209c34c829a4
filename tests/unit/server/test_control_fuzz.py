"""Anything in any field of any request of an operator: a real coordinator answers, or refuses on purpose.

The same for the bodies with which nodes enrol and log in, signed as they should be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.identity import ENROL, LOGIN, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server.state_keys import ADMIN_KEY
from tests.hostile import RawNode, Site, site, values
from tests.unit.server.test_fleet_fuzz import SURPRISED, messages

REQUESTS: dict[str, Any] = {
    "SubmitRun": pb.SubmitRunRequest,
    "ListRuns": pb.ListRunsRequest,
    "GetRun": pb.RunRequest,
    "WatchRun": pb.WatchRequest,
    "PauseRun": pb.RunRequest,
    "ResumeRun": pb.RunRequest,
    "StopRun": pb.StopRequest,
    "ListNodes": pb.ListNodesRequest,
    "ApproveNode": pb.NodeRequest,
    "RevokeNode": pb.NodeRequest,
    "LabelNode": pb.LabelRequest,
    "CreateEnrolToken": pb.TokenRequest,
    "GetArtifact": pb.ArtifactRequest,
    "GetLogs": pb.LogsRequest,
    "Version": pb.VersionRequest,
}
"""All but `Drain`, which has no field and ends the coordinator."""
STREAMS = {"WatchRun", "GetArtifact", "GetLogs"}

few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Line:
    """A coordinator with a run that is over, and somebody who administers it."""

    def __init__(self, place: Site) -> None:
        self.place = place
        (node,) = place.fleet("n", group="g")
        run = place.submit(values(clients=1), group="g")
        node.answer()
        run.end()
        self.run_id = run.run_id
        self.admin: RawNode = place.stranger(key=Key.load(place.state / ADMIN_KEY))
        self.admin.log_in()

    def status(self, method: str, request: Any) -> StatusCode:
        """What a call ends with; nothing that the coordinator did not choose."""
        call = getattr(self.admin.control, method)
        try:
            found = call(request, metadata=self.admin.metadata, timeout=60)
            if method in STREAMS:
                list(found)
        except grpc.RpcError as error:
            code, text = error.code(), error.details() or ""
        else:
            return StatusCode.OK
        assert code not in SURPRISED | {StatusCode.DEADLINE_EXCEEDED}, f"{method}: {code.name} {text}"
        assert text.isprintable(), method
        return code


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with site(tmp_path_factory.mktemp("site")) as place:
        yield Line(place)


@pytest.mark.parametrize("method", REQUESTS)
def test_a_request_with_anything_in_its_fields_gets_an_answer(line: Line, method: str) -> None:
    """S16: with the name of a run that there is, too."""

    @few
    @given(messages(REQUESTS[method].DESCRIPTOR), st.booleans())
    def ask(request: Any, known: bool) -> None:
        if known and hasattr(request, "run_id"):
            request.run_id = line.run_id
        line.status(method, request)

    ask()
    assert line.status("GetRun", pb.RunRequest(run_id=line.run_id)) is StatusCode.OK


@pytest.mark.parametrize(("method", "context", "kind"), [
    ("Enrol", ENROL, pb.EnrolBody), ("Login", LOGIN, pb.LoginBody),
])  # fmt: skip
def test_a_proof_with_anything_in_its_fields_lets_nobody_in(
    line: Line, method: str, context: bytes, kind: Any
) -> None:
    """S11, S15: a key of one's own, a fresh nonce, and then whatever there is. Any: a message type."""

    @few
    @given(messages(kind.DESCRIPTOR), st.booleans())
    def ask(body: Any, fresh: bool) -> None:
        node = RawNode(line.place.address)
        try:
            if fresh:
                greeting = node.hello()
                body.server_id, body.nonce, body.public_key = (
                    greeting.server_id, greeting.nonce, node.key.public,
                )  # fmt: skip
            with pytest.raises(grpc.RpcError) as refused:
                getattr(node.stub, method)(node.signed(context, body), timeout=60)
        finally:
            node.close()
        error: Any = refused.value
        assert error.code() not in SURPRISED, error.details()

    ask()
    assert line.status("Version", pb.VersionRequest()) is StatusCode.OK
