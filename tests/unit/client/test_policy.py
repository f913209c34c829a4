"""What the owner of a client allows."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fedsim.client.policy import Policy, PolicyFile, leaving, needs_examples, open_in, read_policy, refusal
from fedsim.client.terms import Malformed, Terms, terms_of
from fedsim.errors import ConfigError
from fedsim.pb import federation_pb2 as pb
from tests.fake_fleet import local, task_config

SERVER = "ab" * 32


def policy(**tables: Any) -> Policy:
    """A policy that allows `terms()`, with further tables."""
    allowing = {
        "coordinators": {"allow": [SERVER]},
        "runs": {"names": ["digits-*"]},
        "plugins": {"strategies": ["fedavg"], "models": ["mlp"], "datasets": ["digits"]},
    }
    return Policy.model_validate(allowing | tables)


def terms(**changed: Any) -> Terms:
    given: dict[str, Any] = {
        "server_id": SERVER, "run_id": "0123456789ab", "run_name": "digits-1",
        "strategy": "fedavg", "model": "mlp", "dataset": "digits",
        "batch_size": 16, "steps": None, "epochs": 2, "upload_bytes": 4000, "schema": "5c4e",
        "noise_multiplier": None, "clip": None,
    }  # fmt: skip
    return Terms(**(given | changed))


def test_what_is_allowed_is_not_refused() -> None:
    assert refusal(policy(), terms(), 100) is None


def test_an_empty_policy_allows_nothing() -> None:
    assert "coordinators" in (refusal(Policy(), terms()) or "")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"server_id": "cd" * 32}, "[coordinators] allow"),
        ({"run_name": "faces", "run_id": "ffffffffffff"}, "[runs] names"),
        ({"strategy": "scaffold"}, "[plugins] strategies"),
        ({"model": "resnet18"}, "[plugins] models"),
        ({"dataset": "hub"}, "[plugins] datasets"),
        ({"dataset": "Digits"}, "[plugins] datasets"),
        ({"batch_size": -1}, "batch size"),
    ],
)
def test_who_and_what_is_not_listed_is_refused(changed: dict[str, Any], word: str) -> None:
    assert word in (refusal(policy(), terms(**changed)) or "")


@pytest.mark.parametrize(
    ("limits", "changed", "examples", "refused"),
    [
        ({"min_batch_size": 16}, {}, 100, False),
        ({"min_batch_size": 17}, {}, 100, True),
        ({"min_batch_size": 17}, {"batch_size": 0}, 100, False),  # all examples at once
        ({"min_batch_size": 17}, {"batch_size": 0}, 16, True),
        ({"min_batch_size": 16}, {}, 15, True),  # no batch can be fuller than the data
        ({"min_examples": 100}, {}, 100, False),
        ({"min_examples": 101}, {}, 100, True),
        ({"max_local_steps": 14}, {}, 100, False),  # 2 epochs of 7 steps
        ({"max_local_steps": 13}, {}, 100, True),
        ({"max_local_steps": 13}, {"steps": 13}, 100, False),
        ({"max_local_steps": 13}, {"steps": 14}, None, True),
        ({"max_local_epochs": 2}, {}, 100, False),
        ({"max_local_epochs": 1.5}, {}, None, True),
        ({"max_local_epochs": 1}, {"steps": 7}, 100, False),
        ({"max_local_epochs": 1}, {"steps": 8}, 100, True),
        ({"max_upload_bytes": "4kB"}, {}, None, False),
        ({"max_upload_bytes": 3999}, {}, None, True),
        ({"schemas": ["5c4e"]}, {}, None, False),
        ({"schemas": []}, {}, None, True),
        ({"min_examples": 1}, {}, 0, True),
    ],
)
def test_limits_hold_to_the_last_one(
    limits: dict[str, Any], changed: dict[str, Any], examples: int | None, refused: bool
) -> None:
    why = refusal(policy(limits=limits), terms(**changed), examples)
    assert (why is not None) == refused
    if why is not None:
        assert next(iter(limits)) in why


@pytest.mark.parametrize(
    ("privacy", "changed", "refused"),
    [
        ({"min_noise_multiplier": 0.8}, {}, True),
        ({"min_noise_multiplier": 0.8}, {"noise_multiplier": 0.0}, True),
        ({"min_noise_multiplier": 0.8}, {"noise_multiplier": float("nan")}, True),
        ({"min_noise_multiplier": 0.8}, {"noise_multiplier": 0.8}, False),
        ({"max_clip": 1.0}, {"noise_multiplier": 0.8}, True),
        ({"max_clip": 1.0}, {"clip": float("inf")}, True),
        ({"max_clip": 1.0}, {"clip": 0.0}, True),
        ({"max_clip": 1.0}, {"clip": 1.0}, False),
    ],
)
def test_too_little_privacy_is_refused(
    privacy: dict[str, Any], changed: dict[str, Any], refused: bool
) -> None:
    assert (refusal(policy(privacy=privacy), terms(**changed)) is not None) == refused


def test_examples_are_counted_only_where_they_matter() -> None:
    assert not needs_examples(policy(), terms())
    assert needs_examples(policy(limits={"max_local_steps": 5}), terms())
    assert not needs_examples(policy(limits={"max_local_steps": 5}), terms(steps=3))
    assert needs_examples(policy(limits={"max_local_epochs": 5}), terms(steps=3))


def test_a_task_says_what_it_asks_for() -> None:
    config = json.loads(task_config("scaffold", "cnn", "mnist"))
    config["privacy"] = {"noise_multiplier": 1.1, "clip_norm": 0.5}
    task = pb.Task(
        server_id=bytes.fromhex(SERVER), run_id="0123456789ab", run_name="r", schema="s", steps=-1,
        population=4,
        config=json.dumps(config).encode(), local=local(batch_size=8, epochs=3),
        update=[
            pb.TensorSpec(name="a", dtype="F32", shape=[10, 2]),
            pb.TensorSpec(name="b", dtype="F64"),
            pb.TensorSpec(name="c", dtype="I64", shape=[0]),
        ],
    )  # fmt: skip
    assert terms_of(task) == Terms(
        SERVER, "0123456789ab", "r", "scaffold", "cnn", "mnist", 8, None, 3, 88, "s", 1.1, 0.5
    )
    task.steps = 7
    assert terms_of(task).steps == 7


@pytest.mark.parametrize(
    "changed",
    [
        {"config": b""},
        {"config": b"[]"},
        {"config": b'{"strategy": {"name": 3}, "model": {"name": "m"}, "data": {"name": "d"}}'},
        {"config": b'{"strategy": "fedavg"}'},
        {"config": b"[" * 100_000},
        {"config": b"\xff"},
        {"local": b"{}"},
        {"local": local(batch_size=True)},
        {"local": json.dumps({"batch_size": 1.5, "epochs": 1, "steps": None}).encode()},
        {"update": [pb.TensorSpec(name="a", dtype="F8", shape=[1])]},
        {"client": 4},
        {"population": 10**9},
    ],
)
def test_a_task_that_does_not_say_it_is_malformed(changed: dict[str, Any]) -> None:
    given: dict[str, Any] = {"config": task_config(), "local": local(), "steps": -1, "population": 4}
    terms_of(pb.Task(**given))
    with pytest.raises(Malformed):
        terms_of(pb.Task(**(given | changed)))


@pytest.mark.parametrize(
    ("begin", "end", "hour", "seconds"),
    [
        ("08:00", "18:00", 8, 0),
        ("08:00", "18:00", 18, 14 * 3600),
        ("08:00", "18:00", 5, 3 * 3600),
        ("20:00", "06:00", 23, 0),
        ("20:00", "06:00", 3, 0),
        ("20:00", "06:00", 6, 14 * 3600),
    ],
)
def test_hours_may_pass_midnight(begin: str, end: str, hour: int, seconds: float) -> None:
    hours = policy(hours={"from": begin, "to": end})
    assert open_in(hours, datetime(2026, 3, 1, hour)) == seconds
    assert open_in(policy(), datetime(2026, 3, 1, hour)) == 0


def test_metrics_leave_by_pattern() -> None:
    metrics = {"loss": 1.0, "loss_worst": 2.0, "age": 3.0}
    assert leaving(policy(), metrics) == metrics
    assert leaving(policy(limits={"metrics": ["loss*"]}), metrics) == {"loss": 1.0, "loss_worst": 2.0}
    assert leaving(policy(limits={"metrics": []}), metrics) == {}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[limit]\nmin_examples = 3", "limit"),
        ("[limits]\nmin_example = 3", "limits.min_example"),
        ("[limits]\nmin_batch_size = 0", "limits.min_batch_size"),
        ('[coordinators]\nallow = ["abc"]', "64 hexadecimal digits"),
        ('[hours]\nfrom = "25:00"\nto = "06:00"', "hours.from"),
        ("[limits", "TOML|bracket|Expected"),
    ],
)
def test_a_wrong_policy_is_an_error_that_names_the_key(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigError, match=word) as raised:
        read_policy(tmp_path / "policy.toml")
    assert raised.value.code == "FS-CFG-115"


def test_the_example_that_is_deployed_is_a_policy_and_allows_nobody_yet(repository: Path) -> None:
    found = read_policy(repository / "deploy" / "config" / "policy.toml")
    assert found is not None
    assert "coordinators" in (refusal(found, terms()) or "")


def test_a_policy_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = PolicyFile(tmp_path / "policy.toml")
    assert file.policy() is None
    file.path.write_text('[runs]\nnames = ["a"]')
    first = file.policy()
    assert first is not None
    assert first.runs.names == ["a"]
    assert file.policy() is first
    file.path.write_text('[runs]\nnames = ["b", "c"]')
    second = file.policy()
    assert second is not None
    assert second.runs.names == ["b", "c"]
    file.path.write_text("[")
    for _ in range(2):
        with pytest.raises(ConfigError):
            file.policy()
    file.path.unlink()
    assert file.policy() is None
