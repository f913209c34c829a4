"""Callers who are not who they say, and names that are more than names, against a real coordinator."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from grpc import StatusCode

from fedsim.cli import call, make_app
from fedsim.identity import ENROL, LOGIN, SUBMIT, TASK, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server.audit import verify
from fedsim.server.logs import start_logging, stop_logging
from fedsim.server.state_keys import ADMIN_KEY
from fedsim.transport import TICKET
from tests.hostile import RawNode, Site, child, denied, honest_update, site, values

SECONDS = 30.0
LET_IN = StatusCode.UNAUTHENTICATED
HARMFUL = (
    "../../../etc/passwd", "/etc/passwd", "..", "a/../b", "nul\0byte", "line\r\nforged: yes", "\x1b[2J",
    "\x1b[31m", "\u202eevil", "\U0001f600", "x" * 10_000, "<script>alert(1)</script>", "$(reboot)", "a b;c",
)  # fmt: skip


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site")) as found:
        yield found


@pytest.fixture
def trio(coordinator: Site, request: pytest.FixtureRequest) -> Iterator[list[RawNode]]:
    """Three nodes with a run of one round, which must end with the answers of the other two."""
    group = re.sub(r"[^a-z0-9]", "-", request.node.name)[:50]
    nodes = coordinator.fleet(f"v-{group}", f"a-{group}", f"b-{group}", group=group)
    run = coordinator.submit(values(), group=group)
    yield nodes
    for node in nodes[1:]:
        node.answer()
    run.end()
    assert run.lines("metrics.jsonl")[-1]["received"] == 2


# Proofs


def test_a_signed_request_serves_once(coordinator: Site) -> None:
    """S9: enrolment and login sent again, by the same caller and by another one."""
    node, thief = coordinator.stranger("once"), coordinator.stranger("thief")
    enrolment = node.signed(ENROL, node.enrol_body(coordinator.operator.invite().token))
    node.stub.Enrol(enrolment, timeout=SECONDS)
    login = node.signed(LOGIN, node.login_body())
    node.stub.Login(login, timeout=SECONDS)
    for caller in (node, thief):
        again = denied(caller.stub.Login, login, timeout=SECONDS)
        assert again.code is LET_IN
        assert "nonce" in again.text
        assert denied(caller.stub.Enrol, enrolment, timeout=SECONDS).code is LET_IN


def test_nonces_are_for_one_use_at_one_coordinator(coordinator: Site, tmp_path: Path) -> None:
    """S9: one that another node used, one of another process, one that nobody gave."""
    first, second = coordinator.node("first-nonce"), coordinator.node("second-nonce")
    used = first.login_body()
    first.stub.Login(first.signed(LOGIN, used), timeout=SECONDS)
    with site(tmp_path) as elsewhere:
        foreign = elsewhere.stranger().hello().nonce
    for nonce in (used.nonce, foreign, os.urandom(32), b"", used.nonce[:-1] + b"\0", bytes(10_000)):
        signed = second.signed(LOGIN, second.login_body(nonce=nonce))
        assert denied(second.stub.Login, signed, timeout=SECONDS).code is LET_IN
    second.log_in()


def test_what_was_changed_after_signing_is_refused(coordinator: Site) -> None:
    """S10: in the body, in the label of its context, in the key, and for whom it was meant."""
    node, other = coordinator.node("changed"), Key.new()
    body = node.login_body()
    good = node.signed(LOGIN, body)
    body.session = os.urandom(16)
    wrong = [
        pb.Signed(body=body.SerializeToString(), signature=good.signature),
        pb.Signed(body=good.body, signature=good.signature[:-1] + bytes([good.signature[-1] ^ 1])),
        pb.Signed(body=good.body, signature=b""),
        *[node.signed(context, node.login_body()) for context in (ENROL, SUBMIT, TASK, b"")],
        node.signed(LOGIN, node.login_body(), key=other),
        node.signed(LOGIN, node.login_body(server_id=other.public)),
    ]
    assert {denied(node.stub.Login, signed, timeout=SECONDS).code for signed in wrong} == {LET_IN}


def test_a_submission_is_the_signers_own_and_unchanged(coordinator: Site) -> None:
    """S9, S10: the signature covers the digest; sent again it is a duplicate, from another node nothing."""
    villain, honest = coordinator.fleet("v-signer", "a-signer", group="signer")
    run = coordinator.submit(values(clients=2), group="signer")
    task, _ = honest.lease()
    content = honest_update(task, honest.name)
    body = honest.body(task, content)
    good = honest.request(body, content)
    changes: list[Callable[[pb.SubmitBody], Any]] = [
        lambda b: setattr(b, "examples", 10**6),
        lambda b: b.metrics.update(loss=0.0),
        lambda b: setattr(b.update, "digest", bytes(32)),
        lambda b: setattr(b, "key", bytes(16)),
        lambda b: setattr(b, "run_id", "0" * 12),
    ]
    for change in changes:
        changed = pb.SubmitBody.FromString(good.body)
        change(changed)
        request = pb.SubmitRequest(body=changed.SerializeToString(), signature=good.signature, update=content)
        assert denied(honest.call, "Submit", request).code is LET_IN
    assert denied(villain.call, "Submit", good).code is LET_IN
    elsewhere = honest.request(honest.body(task, content, server_id=bytes(32)), content)
    assert denied(honest.call, "Submit", elsewhere).code is LET_IN
    assert honest.call("Submit", good).verdict == pb.ACCEPTED
    again = honest.call("Submit", good)
    assert (again.verdict, again.first) == (pb.DUPLICATE, pb.ACCEPTED)
    villain.give_up()
    run.end()
    assert run.lines("metrics.jsonl")[-1]["received"] == 1


def test_an_update_other_than_the_signed_one_is_rejected(coordinator: Site, trio: list[RawNode]) -> None:
    """S10: the bytes are compared with the digest in the body."""
    villain = trio[0]
    task, _ = villain.lease()
    content = honest_update(task, "v")
    reply = villain.call("Submit", villain.request(villain.body(task, content), content[:-1] + b"\x01"))
    assert (reply.verdict, reply.reason) == (pb.REJECTED, "digest")


def operate(node: RawNode, method: str, request: Any) -> Any:
    """One call of the service for operators."""
    return getattr(node.control, method)(request, metadata=node.metadata, timeout=SECONDS)


def test_unknown_and_revoked_keys_hear_the_same(coordinator: Site) -> None:
    """S11: one status and one text, for a login, a ticket that was good, and one that nobody gave."""
    unknown, revoked = coordinator.stranger("unknown"), coordinator.node("revoked")
    coordinator.operator.revoke(revoked.node_id)
    first, second = denied(unknown.log_in), denied(revoked.log_in)
    assert first == second
    assert first.code is StatusCode.PERMISSION_DENIED
    assert "not known, or was revoked" in first.text
    old = denied(revoked.call, "Lease", pb.LeaseRequest())
    unknown.metadata = ((TICKET, os.urandom(32)),)
    never = denied(unknown.call, "Lease", pb.LeaseRequest())
    assert old == never
    assert old.code is LET_IN


def test_a_node_that_is_revoked_in_mid_round_counts_no_more(coordinator: Site) -> None:
    """S11: what it handed in is dropped, and the run goes on without it."""
    run_group = "mid-round"
    villain, *honest = coordinator.fleet("v-mid", "a-mid", "b-mid", group=run_group)
    run = coordinator.submit(values(2, deployment={"min_clients": None}), group=run_group)
    villain.answer()
    coordinator.operator.revoke(villain.node_id)
    for _ in range(2):
        for node in honest:
            node.answer()
    run.end()
    assert [line["received"] for line in run.lines("metrics.jsonl")[1:]] == [2, 2]
    alone = coordinator.fleet("a-mid2", "b-mid2", group="mid2")
    for node, name in zip(alone, ("a-mid", "b-mid"), strict=True):
        node.name = name
    other = coordinator.submit(values(2, clients=2), group="mid2")
    for _ in range(2):
        for node in alone:
            node.answer()
    other.end()
    assert run.digest == other.digest


def test_a_key_without_the_role_may_not(coordinator: Site, trio: list[RawNode]) -> None:
    """S11: clients run nothing, viewers and operators train nothing, others' runs offer nothing."""
    client, viewer = trio[0], coordinator.node("viewer-1", role="viewer")
    outsider = coordinator.node("outsider")
    assert not outsider.call("Lease", pb.LeaseRequest()).HasField("offer")
    task, _ = client.lease()
    foreign = outsider.request(outsider.body(task, b"x"), b"x")
    refused = [
        denied(operate, client, "SubmitRun", pb.SubmitRunRequest(config="x")),
        denied(operate, client, "RevokeNode", pb.NodeRequest(node="a")),
        denied(operate, client, "CreateEnrolToken", pb.TokenRequest(role="admin")),
        denied(operate, viewer, "SubmitRun", pb.SubmitRunRequest(config="x")),
        denied(viewer.call, "Lease", pb.LeaseRequest()),
        denied(viewer.call, "Submit", foreign),
        denied(outsider.call, "Submit", foreign),
    ]
    assert {one.code for one in refused} == {StatusCode.PERMISSION_DENIED}
    client.call("Fail", pb.FailRequest(task_id=task.task_id, attempt=task.attempt, code="exception"))


def test_the_task_of_another_node_is_as_unknown_as_a_guessed_one(
    coordinator: Site, trio: list[RawNode]
) -> None:
    """S12: to submit for it, fail it or say that it is held; its own node notices nothing."""
    villain, honest, _ = trio
    theirs, _ = honest.lease()
    content = honest_update(theirs, "v")
    found = set()
    for name in (theirs.task_id, os.urandom(16)):
        body = villain.body(theirs, content, task_id=name)
        submitted = denied(villain.call, "Submit", villain.request(body, content))
        fail = pb.FailRequest(task_id=name, attempt=theirs.attempt, code="exception")
        failed = denied(villain.call, "Fail", fail)
        found |= {(submitted.code, submitted.text), (failed.code, failed.text)}
        beat = villain.call("Heartbeat", pb.HeartbeatRequest(held=[pb.Progress(task_id=name)]))
        assert [(lease.cancelled, lease.seconds) for lease in beat.held] == [(True, 0.0)]
    assert len(found) == 1
    assert found.pop()[0] is StatusCode.PERMISSION_DENIED
    mine = honest.call("Heartbeat", pb.HeartbeatRequest(held=[pb.Progress(task_id=theirs.task_id)]))
    assert not mine.held[0].cancelled
    villain.give_up()


# Invitations; in a coordinator of their own, because failures of this address are counted


def test_an_invitation_serves_once_and_guessing_is_stopped(tmp_path: Path) -> None:
    """S15: used, expired and guessed tokens hear the same; after ten there is a pause; all is audited."""
    with site(tmp_path) as gate:
        inside = gate.node("inside")
        token = gate.operator.invite().token
        gate.stranger("first").enrol(token)
        brief = gate.operator.invite(valid_seconds=0.001).token
        refused = []
        for number, guess in enumerate([token, brief, *(os.urandom(16).hex() for _ in range(20))]):
            node = gate.stranger(f"guess-{number}")
            refused.append(denied(node.enrol, guess))
        codes = [one.code for one in refused]
        assert codes == [StatusCode.PERMISSION_DENIED] * 10 + [StatusCode.RESOURCE_EXHAUSTED] * 12
        assert len({one.text for one in refused[:10]}) == 1
        assert float(refused[-1].metadata["fedsim-retry-after"]) > 0
        # Who is in already goes on, and may log in again.
        inside.log_in()
        assert sum(line["action"] == "enrol.denied" for line in gate.audit) == 10
        verify(gate.state / "audit.jsonl")
        said = (gate.state / "audit.jsonl").read_text()
        assert token not in said
    with (tmp_path / "state" / "fedsim.db").open("rb") as database:
        assert token.encode() not in database.read()


# Names


def test_names_that_are_more_than_names_are_refused(coordinator: Site) -> None:
    """S16: of nodes, labels, invitations, runs, keys of runs, artifacts; nothing is written anywhere else."""
    before = {path for path in coordinator.state.parent.rglob("*") if "-wal" not in path.name}
    stranger = coordinator.stranger()
    admin = coordinator.stranger(key=Key.load(coordinator.state / ADMIN_KEY))
    admin.log_in()
    text = "[run]\nrounds = 1\n"
    codes = set()
    for name in HARMFUL:
        token = coordinator.operator.invite().token
        plain = name.encode("utf-8", "replace").decode()
        enrolments: list[dict[str, Any]] = [
            {"name": plain},
            {"labels": {plain: "x"}},
            {"labels": {"x": plain}},
        ]
        codes |= {denied(stranger.enrol, token, **fields).code for fields in enrolments}
        for method, request in (
            ("SubmitRun", pb.SubmitRunRequest(config=text, name=plain)),
            ("SubmitRun", pb.SubmitRunRequest(config=text, run_key=plain)),
            ("GetRun", pb.RunRequest(run_id=plain)),
            ("RevokeNode", pb.NodeRequest(node=plain)),
            ("CreateEnrolToken", pb.TokenRequest(role="client", valid_seconds=9, name=plain)),
            ("CreateEnrolToken", pb.TokenRequest(role=plain, valid_seconds=9)),
            ("LabelNode", pb.LabelRequest(node="a", set={plain: "x"})),
        ):
            if (method, name) in {("SubmitRun", "a b;c"), ("SubmitRun", "..")}:
                continue
            refused = denied(operate, admin, method, request)
            assert refused.text.isprintable(), (method, name)
            codes.add(refused.code)
    assert codes <= {StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND}, codes
    after = {path for path in coordinator.state.parent.rglob("*") if "-wal" not in path.name}
    assert not after - before  # what earlier runs left may still be on its way out


def test_artifacts_are_those_of_a_list(coordinator: Site) -> None:
    """S16: no name leads out of the folder of a run or to what clients sent."""
    nodes = coordinator.fleet("a-art", group="art")
    run = coordinator.submit(values(clients=1), group="art")
    nodes[0].answer()
    run.end()
    admin = coordinator.node("viewer-2", role="viewer")
    more = "", "state", "state/000001-0.safetensors", "../fedsim.db", "checkpoints/..", "log.txt/.."
    for name in (*HARMFUL, *more):
        request = pb.ArtifactRequest(run_id=run.run_id, name=name)
        refused = denied(lambda asked: list(operate(admin, "GetArtifact", asked)), request)
        assert refused.code in (StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND), name
        assert refused.text.isprintable()


def test_a_name_inside_a_configuration_stays_inside_the_folder(coordinator: Site) -> None:
    """S16: what a file calls a run becomes a safe name of a folder."""
    runs = coordinator.state / "runs"
    for number, name in enumerate(("../../../outside", "x\x1b[2J\r\n\U0001f600" * 1_000)):
        group = f"named-{number}"
        (node,) = coordinator.fleet(f"n-{group}", group=group)
        run = coordinator.submit(values(clients=1, run={"name": name}), group=group)
        assert run.path.parent == runs
        assert re.fullmatch(r"[0-9T_:-]+[A-Za-z0-9._-]+", run.path.name)
        assert run.path.name.isascii()
        assert len(run.path.name) < 100
        node.answer()
        run.end()
    assert not (coordinator.state.parent / "outside").exists()


ESCAPE = "\x1b[2J\x1b]0;owned\x07\u202e\r\nforged=1"


def test_escapes_have_no_power_in_logs_files_and_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """S17: through every text that a node may send: build, device, plugins, failures, goodbyes, metrics."""
    said = io.StringIO()
    handlers = [start_logging(form, "debug", stream=said) for form in ("json", "text")]
    try:
        with site(tmp_path) as gate:
            villain, *honest = gate.fleet("v", "a", "b", group="one")
            run = gate.submit(values(2, run={"name": f"n{ESCAPE}"}), group="one")
            villain.log_in(build=ESCAPE)
            task, _ = villain.lease()
            plugin = pb.Plugin(kind=ESCAPE, name=ESCAPE, version=ESCAPE)
            villain.call("Lease", pb.LeaseRequest(device=ESCAPE, plugins=[plugin]))
            fail = pb.FailRequest(task_id=task.task_id, attempt=task.attempt, code="exception", text=ESCAPE)
            villain.call("Fail", fail)
            for node in honest:
                node.answer()
            task, _ = villain.lease()
            assert villain.submit(task, honest_update(task, "v"), metrics={ESCAPE: 1.0}).reason == "policy"
            for node in honest:
                node.answer()
            run.end()
            villain.call("Bye", pb.ByeRequest(reason=ESCAPE))
            link = ("--connect", gate.address, "--insecure", "--key", str(gate.state / ADMIN_KEY))
            for words in (("node", "ls"), ("watch", run.run_id), ("logs", run.run_id)):
                capsys.readouterr()
                assert call([*words, *link]) == 0
                shown = capsys.readouterr()
                assert_harmless(shown.out + shown.err)
    finally:
        for handler in handlers:
            stop_logging(handler)
    assert_harmless(said.getvalue())
    for path in (run.path, gate.state / "audit.jsonl"):
        for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix != ".safetensors"]:
            if file.is_file():
                content = file.read_bytes()
                assert b"\x1b" not in content, file
                assert b"\x07" not in content, file
                assert not any(line.startswith(b"forged") for line in content.splitlines()), file


def assert_harmless(text: str) -> None:
    """Nothing in it steers a terminal or begins a line of its own."""
    assert text
    assert not [line for line in text.splitlines() if line.startswith("forged")]
    assert not [c for c in text if not c.isprintable() and c not in "\n\r"], text
    assert "\r" not in text


def test_plain_text_beyond_loopback_takes_two_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S23: for coordinator, client and operator; and not where TLS was asked for as well."""
    monkeypatch.chdir(tmp_path)
    far = "192.0.2.1:8470"
    for words in (
        ("server", "--insecure", "--listen", "0.0.0.0:0", "--state", "s"),
        ("server", "--insecure", "--listen", "[::]:0", "--state", "s"),
        ("server", "--insecure-beyond-loopback", "--listen", "127.0.0.1:0", "--state", "s"),
        ("server", "--insecure", "--cert", "c.pem", "--cert-key", "k.pem", "--state", "s"),
        ("server", "--allow-anonymous", "--insecure", "--insecure-beyond-loopback", "--listen", "0.0.0.0:0"),
        ("client", "--server", far, "--insecure", "--state", "c"),
        ("client", "--server", far, "--insecure-beyond-loopback", "--state", "c"),
        ("client", "--server", "127.0.0.1:1", "--insecure", "--ca", "ca.pem", "--state", "c"),
        ("watch", "run", "--connect", far, "--insecure"),
    ):
        code = call(list(words))
        said = capsys.readouterr().err
        assert code == 2, (words, said)
        assert "FS-CFG-1" in said or "FS-SEC-004" in said, words
    assert not (tmp_path / "s").exists()


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the program with its options. Any: of click."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_no_option_takes_a_secret() -> None:
    """S23: a command line is seen by everybody on the machine, so secrets come from files alone."""
    secret = re.compile(r"token|secret|password|passphrase")
    seen = 0
    for path, command in commands(typer.main.get_command(make_app())):
        for parameter in command.params:
            seen += 1
            if secret.search(parameter.name or ""):
                assert "path" in str(parameter.type).lower(), (path, parameter.name)
    assert seen > 100


@pytest.mark.slow
def test_secrets_are_in_no_log_and_no_file(tmp_path: Path) -> None:
    """S17, S23: tickets, tokens and keys of a process that has said everything that it says."""
    with child(tmp_path, {"server.log_level": "debug"}) as server:
        token = server.operator.invite().token
        node = server.stranger("quiet")
        node.enrol(token)
        ticket = node.log_in().ticket
        denied(node.enrol, token, name="x" * 100)
        denied(node.call, "Submit", pb.SubmitRequest(body=ticket, signature=token.encode()))
        arguments = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{server.process.pid}/environ").read_bytes()
    pem = (server.state / ADMIN_KEY).read_bytes().splitlines()[1]
    for secret in (token.encode(), ticket, ticket.hex().encode(), pem):
        assert secret not in arguments
        assert secret not in environment
        for path in [server.log, *(p for p in server.state.rglob("*") if p.is_file())]:
            if path.name not in (ADMIN_KEY, "identity.key"):
                assert secret not in path.read_bytes(), path
