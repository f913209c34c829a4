"""Who is known: names, labels, selections, revocations, the keys of a state folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.identity import Key
from fedsim.server.audit import Audit
from fedsim.server.database import Database, open_database
from fedsim.server.enrolment import Applicant
from fedsim.server.members import Candidate
from fedsim.server.nodes import Nodes
from fedsim.server.state_keys import first_admin, server_key


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database("", tmp_path / "state")
    yield opened
    opened.close()


@pytest.fixture
def nodes(database: Database, tmp_path: Path) -> Iterator[Nodes]:
    audit = Audit(tmp_path / "state" / "audit.jsonl", wall=lambda: 5.0)
    yield Nodes(database, audit, wall=lambda: 1000.0)
    audit.close()


def enrolled(nodes: Nodes, name: str, role: str = "client", **labels: str) -> Key:
    key = Key.new()
    applicant = Applicant(key.public, nodes.invite(role, labels=labels), name, {})
    found = nodes.enrol(applicant, anonymous=False, state="approved", check=lambda node_id, name: None)
    assert found is not None
    assert found.new
    return key


def refused(code: str, attempt: object) -> ConfigError:
    assert callable(attempt)
    with pytest.raises(ConfigError) as caught:
        attempt()
    assert caught.value.code == code
    return caught.value


def matching(nodes: Nodes, expression: str) -> list[str]:
    """The selection among all nodes there are."""
    everyone = {node.node_id for node in nodes.list()}
    return [found.node_id for found in nodes.candidates(expression, everyone)]


def test_expressions_select_approved_clients_in_the_order_of_their_names(nodes: Nodes) -> None:
    c = enrolled(nodes, "c", site="x")
    a = enrolled(nodes, "a", site="x", gpu="true")
    b = enrolled(nodes, "b", site="y")
    enrolled(nodes, "person", "operator", site="x")
    assert matching(nodes, "") == [a.node_id, b.node_id, c.node_id]
    assert matching(nodes, "site = x") == [a.node_id, c.node_id]
    assert matching(nodes, "gpu or name = b") == [a.node_id, b.node_id]
    assert nodes.candidates("site = x", {c.node_id, b.node_id}) == [Candidate(c.node_id, "c", {"site": "x"})]
    refused("FS-SEC-008", lambda: matching(nodes, "site ="))


def test_a_selection_follows_every_change(nodes: Nodes) -> None:
    a, b = enrolled(nodes, "a"), enrolled(nodes, "b")
    assert matching(nodes, "gpu") == []
    assert nodes.label("a", {"gpu": "true", "site": "x"}).labels == {"gpu": "true", "site": "x"}
    assert matching(nodes, "gpu") == [a.node_id]
    nodes.label(b.node_id, {"gpu": ""})
    assert matching(nodes, "gpu") == [a.node_id, b.node_id]
    assert nodes.label("A", {"tier": "1"}, ["gpu", "unknown"]).labels == {"site": "x", "tier": "1"}
    assert matching(nodes, "gpu") == [b.node_id]
    nodes.revoke("b")
    assert matching(nodes, "") == [a.node_id]
    new = enrolled(nodes, "c")
    assert matching(nodes, "") == [a.node_id, new.node_id]


def test_a_node_is_found_by_name_and_identifier(nodes: Nodes) -> None:
    key = enrolled(nodes, "site-a")
    for name in ("site-a", "SITE-A", key.node_id, key.node_id.upper()):
        found = nodes.get(name)
        assert (found.node_id, found.fingerprint, found.created) == (key.node_id, key.fingerprint, 1000.0)
    for name in ("site", "x" * 10_000, "'; drop table nodes; --", "\0"):
        refused("FS-SEC-006", lambda name=name: nodes.get(name))
        refused("FS-SEC-006", lambda name=name: nodes.revoke(name))
    assert len(nodes.list()) == 1


def test_a_revoked_node_is_not_approved_again(nodes: Nodes) -> None:
    key = enrolled(nodes, "a")
    assert nodes.revoke("a").state == "revoked"
    assert nodes.revoke("a").state == "revoked"
    refused("FS-SEC-009", lambda: nodes.approve("a"))
    refused("FS-SEC-009", lambda: nodes.bootstrap_admin(key.public))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"role": "root"}, "FS-SEC-007"), ({"valid_seconds": 0.0}, "FS-SEC-007"),
        ({"valid_seconds": float("nan")}, "FS-SEC-007"), ({"valid_seconds": 1e9}, "FS-SEC-007"),
        ({"name": "a b"}, "FS-SEC-007"), ({"labels": {"a": "b c"}}, "FS-SEC-007"),
        ({"name": "ME"}, "FS-SEC-007"),
    ],
)  # fmt: skip
def test_an_invitation_that_makes_no_sense_is_refused(
    nodes: Nodes, arguments: dict[str, object], code: str
) -> None:
    enrolled(nodes, "me")
    refused(code, lambda: nodes.invite(**arguments))  # type: ignore[arg-type]


def test_too_many_labels_do_not_come_in_by_instalments(nodes: Nodes) -> None:
    enrolled(nodes, "a", **{f"k{i}": "v" for i in range(60)})
    refused("FS-SEC-007", lambda: nodes.label("a", {f"m{i}": "v" for i in range(10)}))
    assert len(nodes.get("a").labels) == 60


def test_when_nodes_were_there_and_what_they_compute_on_is_noted(nodes: Nodes, database: Database) -> None:
    a, b = enrolled(nodes, "a"), enrolled(nodes, "b")
    enrolled(nodes, "c")
    nodes.seen({a.node_id: "cuda", b.node_id: "", "0" * 16: "cpu"})
    database.writer.run(lambda connection: None)
    found = {node.name: (node.device, node.last_seen) for node in nodes.list()}
    assert found == {"a": ("cuda", 1000.0), "b": ("", 1000.0), "c": ("", 0.0)}
    nodes.seen({a.node_id: ""})
    database.writer.run(lambda connection: None)
    assert nodes.get("a").device == "cuda"


def test_the_first_administrator_is_made_once(nodes: Nodes, tmp_path: Path) -> None:
    state = tmp_path / "state"
    path = first_admin(state, nodes)
    assert path == state / "admin.key"
    key = Key.load(path)
    found = nodes.get("admin")
    assert (found.node_id, found.role, found.state) == (key.node_id, "admin", "approved")
    assert first_admin(state, nodes) is None


def test_an_administrator_that_was_revoked_stays_out_and_the_coordinator_starts(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    first_admin(state, nodes)
    nodes.revoke("admin")
    assert first_admin(state, nodes) is None
    assert "fedsim node invite --role admin" in caplog.text
    assert nodes.get("admin").state == "revoked"
    enrolled(nodes, "other", "admin")
    assert first_admin(state, nodes) is None


def test_a_client_that_took_the_name_does_not_keep_the_administrator_out(
    nodes: Nodes, tmp_path: Path
) -> None:
    enrolled(nodes, "Admin")
    path = first_admin(tmp_path / "state", nodes)
    assert path is not None
    key = Key.load(path)
    assert nodes.get(key.node_id).name == f"admin-{key.node_id[:8]}"


def test_a_first_start_that_was_interrupted_uses_the_key_that_is_there(nodes: Nodes, tmp_path: Path) -> None:
    key = Key.new()
    key.save(tmp_path / "state" / "admin.key")
    first_admin(tmp_path / "state", nodes)
    assert nodes.get("admin").node_id == key.node_id


def test_a_coordinator_keeps_its_identity(database: Database, tmp_path: Path) -> None:
    state = tmp_path / "state"
    key = server_key(state, database)
    assert server_key(state, database).public == key.public
    assert database.fact("server_id") == key.public.hex()
    (state / "identity.key").unlink()
    with pytest.raises(EnvironmentProblem) as caught:
        server_key(state, database)
    assert caught.value.code == "FS-SEC-011"
    assert not (state / "identity.key").exists()
    Key.new().save(state / "identity.key")
    with pytest.raises(EnvironmentProblem) as caught:
        server_key(state, database)
    assert caught.value.code == "FS-SEC-011"
