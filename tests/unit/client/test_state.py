"""The folder of a client: states, answers on their way, the coordinator it is bound to, the audit file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fedsim.client.audit import Audit, broken_at
from fedsim.client.client_states import ClientStates, StateLost
from fedsim.client.state import Bound, StateFolder
from fedsim.client.unsent import UnsentAnswers
from fedsim.errors import EnvironmentProblem
from fedsim.identity import SUBMIT, Key
from fedsim.pb import federation_pb2 as pb

RUN = "0123456789ab"


@pytest.fixture
def states(tmp_path: Path) -> ClientStates:
    return ClientStates(tmp_path)


def task(number: int) -> bytes:
    return bytes([number]) * 16


def kept(states: ClientStates, root: Path, number: int) -> None:
    """Keep a state after task `number`, whose content names it."""
    file = root / "from-the-worker"
    file.write_bytes(task(number))
    states.keep(RUN, task(number), file)


def names(root: Path) -> set[int]:
    return {int(file.stem[:2], 16) for file in (root / RUN).glob("*.safetensors")}


def test_a_pending_state_is_not_current_before_the_coordinator_names_it(
    states: ClientStates, tmp_path: Path
) -> None:
    assert states.current(RUN, b"") is None
    kept(states, tmp_path, 1)
    assert states.current(RUN, b"") is None
    current = states.current(RUN, task(1))
    assert current is not None
    assert current.read_bytes() == task(1)


def test_the_last_two_folded_states_and_the_pending_one_are_kept(
    states: ClientStates, tmp_path: Path
) -> None:
    for number in range(1, 6):
        kept(states, tmp_path, number)
        states.current(RUN, task(number))
    kept(states, tmp_path, 6)
    assert names(tmp_path) == {4, 5, 6}
    back = states.current(RUN, task(4))  # the coordinator fell back by one checkpoint
    assert back is not None
    assert back.read_bytes() == task(4)


def test_a_state_that_was_not_folded_goes_when_a_later_one_was(states: ClientStates, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        kept(states, tmp_path, number)
    states.current(RUN, task(1))
    assert names(tmp_path) == {1, 2, 3}
    states.current(RUN, task(3))
    assert names(tmp_path) == {1, 3}


def test_pending_states_are_bounded(states: ClientStates, tmp_path: Path) -> None:
    for number in range(1, 12):
        kept(states, tmp_path, number)
    assert names(tmp_path) == {8, 9, 10, 11}


def test_a_dropped_state_is_gone_and_a_folded_one_stays(states: ClientStates, tmp_path: Path) -> None:
    kept(states, tmp_path, 1)
    states.current(RUN, task(1))
    kept(states, tmp_path, 2)
    states.drop(RUN, task(1))
    states.drop(RUN, task(2))
    assert names(tmp_path) == {1}


def test_a_state_that_another_machine_has_is_noticed(states: ClientStates, tmp_path: Path) -> None:
    assert states.current(RUN, task(9)) is None  # this client never kept anything
    kept(states, tmp_path, 1)
    with pytest.raises(StateLost):
        states.current(RUN, task(9))


@pytest.mark.parametrize("index", [None, b"{", b"[]", b'{"order": 3}'])
def test_states_survive_the_loss_of_their_index(
    states: ClientStates, tmp_path: Path, index: bytes | None
) -> None:
    for number in (1, 2):
        kept(states, tmp_path, number)
    place = tmp_path / RUN / "order.json"
    place.unlink() if index is None else place.write_bytes(index)
    current = states.current(RUN, task(2))
    assert current is not None
    assert current.read_bytes() == task(2)


def answer(key: Key, content: bytes, *, upload: bool = False) -> tuple[pb.SubmitBody, pb.SubmitRequest]:
    body = pb.SubmitBody(
        run_id=RUN,
        task_id=os.urandom(16),
        key=os.urandom(16),
        update=pb.Object(digest=hashlib.sha256(content).digest(), size=len(content)),
        upload_id=os.urandom(16) if upload else b"",
    )
    signed = body.SerializeToString()
    request = pb.SubmitRequest(body=signed, signature=key.sign(SUBMIT, signed))
    if not upload:
        request.update = content
    return body, request


@pytest.mark.parametrize("upload", [False, True])
def test_an_answer_is_read_back_byte_for_byte(tmp_path: Path, upload: bool) -> None:
    key, unsent = Key.new(), UnsentAnswers(tmp_path)
    body, request = answer(key, b"update" * 100, upload=upload)
    content: bytes | Path = b"update" * 100
    folder = unsent.folder(body.task_id)
    if upload:
        content = folder / "made-by-the-worker"
        content.write_bytes(b"update" * 100)
    unsent.write(body, request, content)
    (found,) = UnsentAnswers(tmp_path).load(key.public)
    assert found.request.SerializeToString() == request.SerializeToString()
    assert found.body == body
    assert found.inline == (not upload)
    assert (found.content.read_bytes() if isinstance(found.content, Path) else found.content) == (
        b"update" * 100
    )
    unsent.remove(body.task_id)
    assert unsent.load(key.public) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "no record", "other key", "other content"])
def test_an_answer_that_is_not_whole_is_not_sent(tmp_path: Path, damage: str) -> None:
    key, unsent = Key.new(), UnsentAnswers(tmp_path)
    upload = damage == "other content"
    body, request = answer(key, b"update", upload=upload)
    folder = unsent.folder(body.task_id)
    unsent.write(body, request, b"update")
    record = folder / "submit"
    content = record.read_bytes()
    match damage:
        case "cut":
            record.write_bytes(content[:-1])
        case "flip":
            record.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "no record":
            record.unlink()
        case "other key":
            key = Key.new()
        case "other content":
            (folder / "update").write_bytes(b"updatf")
    assert unsent.find(body.task_id, key.public) is None
    assert unsent.load(key.public) == []
    assert not folder.exists()


def test_the_folder_remembers_its_coordinator(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "c")
    assert folder.bound == Bound()
    bound = Bound(os.urandom(32), 3, True, "clinic-a")
    folder.bind(bound)
    folder.close()
    folder = StateFolder(tmp_path / "c")
    assert folder.bound == bound
    folder.close()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"server_id": "xyz"}', '{"server_id": "00", "a": 1}'])
def test_a_damaged_note_of_the_coordinator_is_an_error_and_not_a_new_beginning(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "node.json").write_text(content)
    with pytest.raises(EnvironmentProblem) as raised:
        StateFolder(tmp_path)
    assert raised.value.code == "FS-ENV-023"


def test_a_torn_note_of_the_task_in_hand_is_no_task(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    assert folder.held() is None
    folder.hold(pb.Task(run_id=RUN, task_id=task(1)).SerializeToString())
    held = folder.held()
    assert held is not None
    assert held.task_id == task(1)
    (tmp_path / "held").write_bytes(b"\xff\xff\xff")
    assert folder.held() is None
    folder.close()


def test_the_audit_file_is_a_chain_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for number in range(3):
        Audit(path).write("policy_refused", reason=f"because {number}\n\x1b[31m")
    assert broken_at(path) is None
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    path.write_bytes(lines[0].replace(b"because 0", b"because 9") + lines[1] + lines[2])
    assert broken_at(path) == 2
    path.write_bytes(lines[0] + lines[2])
    assert broken_at(path) == 2
