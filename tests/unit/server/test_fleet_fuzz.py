"""Anything in any field of any request: the service answers, or refuses with a status that it chose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.identity import SUBMIT
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import FleetStub
from fedsim.wire import MAJOR
from tests.fake_runs import update_bundle
from tests.fleet_server import Node, Service, serving

# What the service says when it does not know what happened to it.
SURPRISED = {StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.CANCELLED, StatusCode.UNAVAILABLE}
UNARY = {
    "Hello": pb.HelloRequest,
    "Enrol": pb.Signed,
    "Login": pb.Signed,
    "Heartbeat": pb.HeartbeatRequest,
    "Lease": pb.LeaseRequest,
    "UploadStatus": pb.UploadStatusRequest,
    "Submit": pb.SubmitRequest,
    "Fail": pb.FailRequest,
}
SIZES = st.sampled_from([0, 1, 16, 32, 64])
BYTES = SIZES.flatmap(lambda n: st.binary(min_size=n, max_size=n)) | st.binary(max_size=200)
VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BYTES: BYTES,
    FieldDescriptor.TYPE_STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_ENUM: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
}


def messages(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    """Messages of one kind with anything in their fields."""
    fields = {}
    for field in descriptor.fields:
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            key, value = (VALUES[entry.fields_by_name[n].type] for n in ("key", "value"))
            one: st.SearchStrategy[Any] = st.dictionaries(key, value, max_size=3)
        else:
            one = messages(entry) if entry is not None else VALUES[field.type]
            if field.is_repeated:
                one = st.lists(one, max_size=3)
        fields[field.name] = one
    kind = GetMessageClass(descriptor)
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**_one_of(descriptor, values)))


def _one_of(descriptor: Descriptor, values: dict[str, Any]) -> dict[str, Any]:
    """At most one field of each choice."""
    for choice in descriptor.oneofs:
        for name in [f.name for f in choice.fields if f.name in values][1:]:
            del values[name]
    return values


class Line:
    """A service in a thread of its own and a blocking channel to it."""

    def __init__(self, service: Service, node: Node) -> None:
        self.service, self.node = service, node
        self.stub: Any = FleetStub(grpc.insecure_channel(service.address))

    def status(self, method: str, request: Any) -> StatusCode:
        """What a call ends with; nothing that it did not choose."""
        try:
            found = getattr(self.stub, method)(request, metadata=self.node.metadata, timeout=60)
            if method == "Fetch":
                list(found)
        except grpc.RpcError as error:
            code, text = error.code(), error.details()
        else:
            code, text = StatusCode.OK, ""
        assert code not in SURPRISED, f"{method}: {code.name} {text}"
        return code


@contextmanager
def in_thread(folder: Path) -> Iterator[Line]:
    """Serve in another thread, so that Hypothesis may draw in this one."""
    ready: list[Line] = []
    begun, over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(folder, stored=True) as service:
            ready.append(Line(service, service.node()))
            begun.set()
            while not over.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert begun.wait(30)
        yield ready[0]
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with in_thread(tmp_path_factory.mktemp("state")) as found:
        yield found


few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def assert_alive(line: Line) -> None:
    assert line.status("Hello", pb.HelloRequest(major=MAJOR)) is StatusCode.OK


@pytest.mark.parametrize("method", UNARY)
def test_a_request_with_anything_in_its_fields_gets_an_answer(line: Line, method: str) -> None:
    @few
    @given(messages(UNARY[method].DESCRIPTOR))
    def ask(request: Any) -> None:
        if method == "Lease":
            request.wait_seconds = min(request.wait_seconds, 0.0)  # nobody has work: it would only wait
        line.status(method, request)

    ask()
    assert_alive(line)


def test_a_signed_body_with_anything_in_its_fields_gets_an_answer(line: Line) -> None:
    task = line.service.runs.put(line.node.node_id)

    @few
    @given(messages(pb.SubmitBody.DESCRIPTOR), BYTES, st.booleans())
    def submit(body: pb.SubmitBody, update: bytes, known: bool) -> None:
        body.server_id = line.node.server_id
        if known:  # past the first checks
            body.task_id, body.run_id, body.key = task.task_id, task.run_id, bytes(16)
            body.update.digest = body.update.digest.ljust(32)[:32]
        raw = body.SerializeToString()
        signature = line.node.key.sign(SUBMIT, raw)
        line.status("Submit", pb.SubmitRequest(body=raw, signature=signature, update=update))

    submit()
    good = line.service.runs.put(line.node.node_id)
    request = line.node.signed(line.node.body(good, update_bundle()), update_bundle())
    assert line.status("Submit", request) is StatusCode.OK


@few
@given(BYTES, BYTES)
def test_bytes_that_are_no_body_get_an_answer(line: Line, body: bytes, update: bytes) -> None:
    signature = line.node.key.sign(SUBMIT, body)
    code = line.status("Submit", pb.SubmitRequest(body=body, signature=signature, update=update))
    assert code in (StatusCode.INVALID_ARGUMENT, StatusCode.UNAUTHENTICATED)


@few
@given(messages(pb.FetchRequest.DESCRIPTOR))
def test_a_download_of_anything_gets_an_answer(line: Line, request: Any) -> None:
    assert line.status("Fetch", request) is StatusCode.PERMISSION_DENIED


@few
@given(st.lists(messages(pb.UploadFrame.DESCRIPTOR), max_size=4), st.booleans())
def test_an_upload_of_anything_gets_an_answer(line: Line, frames: list[Any], known: bool) -> None:
    if known and frames:
        task = line.service.runs.put(line.node.node_id)
        start = pb.UploadStart(upload_id=bytes(16), task_id=task.task_id)
        start.object.digest, start.object.size = bytes(32), 8
        frames = [pb.UploadFrame(start=start), *frames]
    assert line.status("Upload", iter(frames)) is not StatusCode.OK or known
    assert_alive(line)
