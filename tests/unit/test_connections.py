"""Addresses, and names for coordinators in connections.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.connections import (
    Address,
    Connection,
    connection_of,
    home,
    parse_address,
    read_connections,
    write_connection,
)
from fedsim.errors import ConfigError

ID = "ab" * 32


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8470", "127.0.0.1", 8470),
        ("[::1]:0", "::1", 0),
        ("fed.example.org:65535", "fed.example.org", 65535),
    ],
)
def test_an_address_is_read_and_written_alike(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":8470",
        "host:65536",
        "host:-1",
        "::1:8470",
        "a b:1",
        "host\x00:1",
        "host:1\n",
        "h/x:1",
        "host:٣",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


def test_files_of_an_entry_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "connections.toml").write_text(
        f'[lab]\naddress = "lab:8470"\nca = "ca.pem"\nkey = "/keys/me.key"\nserver_id = "{ID}"\n'
    )
    lab = read_connections(tmp_path)["lab"]
    assert lab == Connection(
        "lab:8470", tmp_path / "ca.pem", Path("/keys/me.key"), bytes.fromhex(ID), insecure=False, name="lab"
    )


def test_an_entry_is_written_beside_those_that_are_there(tmp_path: Path) -> None:
    first = Connection("a:1", tmp_path / "ca.pem", tmp_path / "a.key", bytes.fromhex(ID), name="a")
    second = Connection("b:2", insecure=True, name="b")
    write_connection(tmp_path, first)
    write_connection(tmp_path, second)
    assert read_connections(tmp_path) == {"a": first, "b": second}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[lab", "FS-CFG-127"),
        ("lab = 3", "FS-CFG-127"),
        ('[lab]\naddress = "lab"', "FS-CFG-127"),
        ("[lab]\naddress = 5", "FS-CFG-127"),
        ("[lab]", "FS-CFG-127"),
        ('[lab]\naddress = "l:1"\nserver_id = "xy"', "FS-CFG-127"),
        ('[lab]\naddress = "l:1"\ninsecure = "yes"', "FS-CFG-127"),
        ('["../lab"]\naddress = "l:1"', "FS-CFG-127"),
        ('[lab]\naddress = "l:1"\nkei = "x"', "FS-CFG-004"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_place(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "connections.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_connections(tmp_path)
    assert caught.value.code == code
    assert "connections.toml" in str(caught.value.where)


def test_a_name_wins_over_an_address_and_flags_win_over_the_entry(tmp_path: Path) -> None:
    environ = {"FEDSIM_HOME": str(tmp_path)}
    write_connection(tmp_path, Connection("lab:8470", tmp_path / "ca.pem", tmp_path / "a.key", name="lab"))
    assert connection_of("lab", environ=environ).address == "lab:8470"
    assert connection_of("lab", key=Path("mine"), environ=environ).key == Path("mine")
    typed = connection_of("127.0.0.1:1", insecure=True, environ=environ)
    assert (typed.address, typed.insecure, typed.name) == ("127.0.0.1:1", True, "")
    with pytest.raises(ConfigError) as caught:
        connection_of("lap", environ=environ)
    assert caught.value.code == "FS-CFG-128"
    assert caught.value.hint == "write lab"


def test_the_folder_of_settings_follows_the_variables() -> None:
    assert home({"FEDSIM_HOME": "/x"}) == Path("/x")
    assert home({"XDG_CONFIG_HOME": "/y"}) == Path("/y/fedsim")
    assert home({}) == Path.home() / ".config" / "fedsim"
