"""server.toml, environment and flags of a coordinator."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.connections import Address
from fedsim.errors import ConfigError
from fedsim.server.settings import load_settings

LOCAL = {"server.insecure": True}
ROOT = Path(__file__).resolve().parents[3]


def code_of(**flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags={name.replace("__", "."): value for name, value in flags.items()})
    assert caught.value.hint
    return caught.value.code


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_defaults_are_those_of_the_specification() -> None:
    settings = load_settings(flags=LOCAL)
    assert settings.listen == Address("127.0.0.1", 8470)
    assert settings.http == Address("127.0.0.1", 8471)
    limits, leases = settings.limits, settings.leases
    assert (limits.chunk_bytes, limits.object_bytes, limits.inline_bytes) == (2**20, 8 * 2**30, 2**20)
    assert (limits.concurrent_rpcs, limits.uploads_per_node, limits.uploads) == (2000, 2, 64)
    assert limits.min_free_bytes == 10 * 2**30
    assert (leases.seconds, leases.heartbeat_seconds, leases.grace_seconds) == (90, 20, 60)
    assert settings.database.url is None


def test_the_example_of_the_deployment_is_understood() -> None:
    settings = load_settings(ROOT / "deploy" / "config" / "server.toml")
    assert settings.server.state == Path("/var/lib/fedsim")
    assert settings.server.cert == Path("/etc/fedsim/tls/server.pem")


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "server.toml",
        "[server]\ninsecure = true\nlisten = '127.0.0.1:1'\n[limits]\nuploads = 1\nparked_polls = 7\n",
    )
    environ = {
        "FEDSIM_SERVER__SERVER__LISTEN": "127.0.0.1:2",
        "FEDSIM_SERVER__LIMITS__UPLOADS": "2",
        "HOME": "x",
    }
    settings = load_settings(
        file, environ=environ, flags={"server.listen": "127.0.0.1:3", "server.http": None}
    )
    assert settings.listen.port == 3
    assert settings.limits.uploads == 2
    assert settings.limits.parked_polls == 7
    assert settings.http.port == 8471


def test_amounts_may_have_units(tmp_path: Path) -> None:
    text = "[server]\ninsecure = true\n[limits]\nchunk_bytes = '2MiB'\n[leases]\nmax_task_seconds = '2h'\n"
    settings = load_settings(
        write(tmp_path / "s.toml", text), environ={"FEDSIM_SERVER__LEASES__SECONDS": "2m"}
    )
    assert settings.limits.chunk_bytes == 2 * 2**20
    assert settings.leases.max_task_seconds == 7200
    assert settings.leases.seconds == 120


def test_paths_of_a_file_lie_beside_it_and_paths_of_flags_here(tmp_path: Path) -> None:
    text = "[server]\nstate = 'state'\ncert = 'tls/c.pem'\ncert_key = '/k.pem'\n"
    settings = load_settings(write(tmp_path / "s.toml", text), flags={"server.client_ca": "ca.pem"})
    server = settings.server
    assert (server.state, server.cert) == (tmp_path / "state", tmp_path / "tls" / "c.pem")
    assert (server.cert_key, server.client_ca) == (Path("/k.pem"), Path("ca.pem"))


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("[server", "FS-CFG-120", "table declaration"),
        ("[sever]\n", "FS-CFG-004", "did you mean `server`"),
        ("[limits]\nupload = 3\n", "FS-CFG-004", "did you mean `uploads`"),
        ("limits = 3\n", "FS-CFG-005", "table"),
        ("[limits]\nuploads = '3'\n", "FS-CFG-005", "whole number"),
        ("[limits]\nchunk_bytes = 1\n", "FS-CFG-005", "greater than"),
        ("[limits]\nchunk_bytes = '8MiB'\n", "FS-CFG-005", "less than"),
        ("[leases]\nseconds = true\n", "FS-CFG-005", "number"),
        ("[server]\nlisten = 'nowhere'\n", "FS-CFG-005", "HOST:PORT"),
        ("[server]\nlog_level = 'loud'\n", "FS-CFG-005", "'debug'"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_place(
    tmp_path: Path, text: str, code: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path / "server.toml", text))
    assert caught.value.code == code
    assert says in str(caught.value)
    assert "server.toml" in str(caught.value)


def test_a_mistake_in_the_environment_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        load_settings(environ={"FEDSIM_SERVER__LIMITS__UPLOAD": "3"})
    assert "environment" in str(caught.value.where)
    with pytest.raises(ConfigError, match="unknown table"):
        load_settings(environ={"FEDSIM_SERVER__LIMIT__UPLOADS": "3"})


def test_without_a_certificate_or_insecure_nothing_starts() -> None:
    assert code_of() == "FS-CFG-121"
    assert code_of(server__cert="c.pem") == "FS-CFG-121"
    assert code_of(server__cert_key="c.pem") == "FS-CFG-121"


def test_insecure_and_tls_are_not_mixed() -> None:
    assert code_of(server__insecure=True, server__cert="c", server__cert_key="k") == "FS-CFG-122"
    assert code_of(server__insecure=True, server__client_ca="c") == "FS-CFG-122"
    assert (
        code_of(server__insecure_beyond_loopback=True, server__cert="c", server__cert_key="k") == "FS-CFG-122"
    )


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.168.1.5:1", "example.org:1"])
def test_plain_text_beyond_loopback_needs_a_second_flag(address: str) -> None:
    assert code_of(server__insecure=True, server__listen=address) == "FS-CFG-123"
    both = {"server.insecure": True, "server.listen": address, "server.insecure_beyond_loopback": True}
    assert load_settings(flags=both).server.insecure


def test_open_registration_stays_on_loopback() -> None:
    tls = {"server__cert": "c", "server__cert_key": "k", "server__allow_anonymous": True}
    assert code_of(**tls, server__listen="0.0.0.0:1") == "FS-CFG-124"
    assert load_settings(flags=LOCAL | {"server.allow_anonymous": True}).server.allow_anonymous


def test_a_lease_outlasts_two_heartbeats() -> None:
    assert code_of(server__insecure=True, leases__seconds=30) == "FS-CFG-125"


def test_a_password_in_a_file_that_others_read_is_refused_and_never_shown(tmp_path: Path) -> None:
    text = "[server]\ninsecure = true\n[database]\nurl = 'postgresql://me:hunter22@db/fed'\n"
    file = write(tmp_path / "server.toml", text)
    file.chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert caught.value.code == "FS-CFG-126"
    assert "hunter22" not in str(caught.value)
    file.chmod(0o600)
    settings = load_settings(file)
    assert settings.database.url == "postgresql://me:hunter22@db/fed"
    assert "hunter22" not in repr(settings)
    file.write_text(text.replace("'postgresql", "5 # 'postgresql"))
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert "hunter22" not in str(caught.value)
