"""The settings of a client: flags, file, bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsim.cli import call
from fedsim.client.settings import client_settings, labels_of
from fedsim.errors import ConfigError, EnvironmentProblem

SERVER = "ab" * 32


def bundle(folder: Path, mode: int = 0o600) -> Path:
    path = folder / "bundle.toml"
    path.write_text(f'server = "lab:8470"\nserver_id = "{SERVER}"\nca = "PEM"\ntoken = "t0ken"\n')
    path.chmod(mode)
    return path


def test_flags_win_over_the_file_and_the_file_over_the_bundle(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text(
        f'bundle = "{bundle(tmp_path)}"\nstate = "s"\nname = "a"\nthreads = 2\n'
        '[labels]\nsite = "a"\ngpu = "no"\n'
    )
    found = client_settings({"name": "b", "labels": {"gpu": "yes"}}, file)
    assert (found.server, found.server_id, found.token) == ("lab:8470", bytes.fromhex(SERVER), "t0ken")
    assert (found.name, found.threads, found.state) == ("b", 2, Path("s"))
    assert found.labels == {"site": "a", "gpu": "yes"}
    assert (found.key, found.policy) == (Path("s/node.key"), Path("s/policy.toml"))
    assert "t0ken" not in repr(found)
    assert client_settings({"server": "other:1"}, file).server == "other:1"


def test_the_authority_of_the_bundle_is_put_where_grpc_can_read_it(tmp_path: Path) -> None:
    found = client_settings({"bundle": bundle(tmp_path), "state": tmp_path})
    tls = found.tls()
    assert tls is not None
    assert tls.ca is not None
    assert tls.ca.read_text() == "PEM"


def test_a_bundle_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem) as raised:
        client_settings({"bundle": bundle(tmp_path, 0o644)})
    assert raised.value.code == "FS-SEC-001"


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ({}, "FS-CFG-111"),
        ({"server": "lab:1", "threads": -1}, "FS-CFG-110"),
        ({"server": "lab:1", "name": "../x"}, "FS-CFG-110"),
        ({"server": "lab:1", "server_id": "12"}, "FS-CFG-113"),
        ({"server": "lab:1", "insecure": True, "insecure_beyond_loopback": True}, "FS-CFG-112"),
        ({"server": "lab:1", "server_id": SERVER, "insecure": True}, "FS-SEC-004"),
        ({"server": "lab:1", "insecure_beyond_loopback": True}, "FS-SEC-004"),
        ({"server": "127.0.0.1:1", "insecure": True, "ca": Path("ca.pem")}, "FS-SEC-004"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as raised:
        client_settings(flags)
    assert raised.value.code == code


def test_plain_text_on_the_loopback_needs_no_server_id() -> None:
    assert client_settings({"server": "127.0.0.1:1", "insecure": True}).server_id is None


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "client.toml").write_text('server = "a:1"\ndevize = "cpu"\n')
    with pytest.raises(ConfigError, match="devize"):
        client_settings({}, tmp_path / "client.toml")


def test_the_example_that_is_deployed_has_only_known_keys(repository: Path, tmp_path: Path) -> None:
    text = (repository / "deploy" / "config" / "client.toml").read_text()
    (tmp_path / "client.toml").write_text(
        text.replace("/etc/fedsim/enrolment/bundle.toml", str(bundle(tmp_path)))
    )
    assert client_settings({}, tmp_path / "client.toml").device == "auto"


def test_labels_are_read_as_written() -> None:
    assert labels_of(["site=a", "gpu"]) == {"site": "a", "gpu": "true"}
    with pytest.raises(ConfigError) as raised:
        labels_of(["a b=c"])
    assert raised.value.code == "FS-CFG-114"


def test_a_client_that_may_not_speak_plain_text_leaves_no_folder_behind(tmp_path: Path) -> None:
    state = tmp_path / "state"
    flags = ["--server", "hub.example.org:8470", "--state", str(state), "--insecure"]
    (tmp_path / "client.toml").write_text(f'server_id = "{SERVER}"\n')
    assert call(["client", *flags, "--config", str(tmp_path / "client.toml")]) == 2
    assert not state.exists()
