"""Coordinators that a person works with: addresses, and names for them in ``connections.toml``.

    [lab]
    address = "fedsim.example.org:8470"
    ca = "lab-ca.pem"          # authority of the coordinator's certificate
    key = "operator.key"       # this person's own key
    server_id = "<64 hex digits>"

The file lies in ``$FEDSIM_HOME``, by default ``~/.config/fedsim``; files that it names are relative to
that folder. It holds paths of keys and never a key.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fedsim.errors import ConfigError
from fedsim.schema import shown, unknown_key
from fedsim.storage import unreadable, write_atomically

FILE = "connections.toml"
KEYS = ("address", "ca", "key", "server_id", "insecure")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.%]{2,64}\]")


class Address(NamedTuple):
    """Where a process listens.

    Args:
        host: name or number; IPv6 without its brackets.
        port: 0 … 65535, where 0 lets the system choose one.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """``host:port`` or ``[::1]:port``.

    Raises:
        ValueError: another form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not _HOST.fullmatch(host) or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"an address is written HOST:PORT, such as 127.0.0.1:8470, got {shown(text)}")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach one coordinator.

    Args:
        address: ``host:port``.
        ca: certificates that are trusted; None for those of the system.
        key: file of the operator's private key.
        server_id: the coordinator's public key, 32 bytes; None where it is not pinned.
        insecure: plain text, which is for loopback alone.
        name: of the entry in ``connections.toml``, "" for an address that was typed.
    """

    address: str
    ca: Path | None = None
    key: Path | None = None
    server_id: bytes | None = None
    insecure: bool = False
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.address})" if self.name else self.address


def home(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of a person's own settings: ``$FEDSIM_HOME``, else ``~/.config/fedsim``."""
    variables = os.environ if environ is None else environ
    named = variables.get("FEDSIM_HOME")
    if named:
        return Path(named)
    base = variables.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "fedsim"


def read_connections(folder: Path) -> dict[str, Connection]:
    """The entries of the file below `folder`; without a file there is none.

    Raises:
        ConfigError: FS-CFG-127, the file is no TOML or an entry is wrong; FS-CFG-004, an unknown key.
        EnvironmentProblem: FS-ENV-024, the file cannot be read.
    """
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise _wrong(str(path), "it is not UTF-8") from error
    except OSError as error:
        raise unreadable(error, path) from error
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _wrong(str(path), str(error)) from error
    return {name: _entry(name, table, path) for name, table in tables.items()}


def write_connection(folder: Path, connection: Connection) -> Path:
    """Add or replace the entry ``connection.name``; the path of the file.

    Raises:
        ConfigError: FS-CFG-127, the file that is there cannot be understood.
        EnvironmentProblem: FS-ENV-020 … 022.
    """
    if not _NAME.fullmatch(connection.name):
        raise _wrong(shown(connection.name), "a name is made of letters, digits, - and _")
    known = {**read_connections(folder), connection.name: connection}
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / FILE
    write_atomically(path, tomli_w.dumps({name: _table(c) for name, c in sorted(known.items())}).encode())
    return path


def connection_of(
    target: str,
    *,
    ca: Path | None = None,
    key: Path | None = None,
    insecure: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Connection:
    """What `--connect` means: the name of an entry, or an address.

    Args:
        ca, key, insecure: replace what the entry says, where they are given.

    Raises:
        ConfigError: FS-CFG-128, neither a known name nor an address; FS-CFG-127.
    """
    folder = home(environ)
    known = read_connections(folder)
    found = known.get(target)
    if found is None:
        try:
            address = parse_address(target)
        except ValueError as error:
            near = difflib.get_close_matches(target, known, n=1)
            raise ConfigError(
                f"no connection is called {shown(target)}",
                code="FS-CFG-128",
                where=str(folder / FILE),
                why=f"known: {', '.join(known) or 'none'}; and it is no address HOST:PORT either",
                hint=f"write {near[0]}"
                if near
                else "write HOST:PORT, or add a table of that name to the file",
            ) from error
        found = Connection(str(address))
    return replace(found, ca=ca or found.ca, key=key or found.key, insecure=insecure or found.insecure)


def _entry(name: str, table: Any, path: Path) -> Connection:  # Any: as TOML holds it
    where = f"{path}: [{name}]"
    if not _NAME.fullmatch(name):
        raise _wrong(where, "a name is made of letters, digits, - and _")
    if not isinstance(table, dict):
        raise _wrong(where, f"{name} = {shown(table)} stands where a table belongs")
    for key, value in table.items():
        if key not in KEYS:
            raise unknown_key(key, KEYS, where=where)
        if not isinstance(value, bool if key == "insecure" else str):
            raise _wrong(where, f"{key} = {shown(value)} has the wrong type")
    try:
        address = parse_address(table.get("address", ""))
        identity = _identity(table.get("server_id"))
    except ValueError as error:
        raise _wrong(where, str(error)) from error
    return Connection(
        str(address),
        ca=_beside(path, table.get("ca")),
        key=_beside(path, table.get("key")),
        server_id=identity,
        insecure=table.get("insecure", False),
        name=name,
    )


def _identity(text: str | None) -> bytes | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("server_id is written as 64 hexadecimal digits")
    return bytes.fromhex(text)


def _beside(file: Path, named: str | None) -> Path | None:
    return None if named is None else file.parent / Path(named).expanduser()


def _table(connection: Connection) -> dict[str, str | bool]:
    table: dict[str, str | bool] = {"address": connection.address}
    for key, path in (("ca", connection.ca), ("key", connection.key)):
        if path is not None:
            table[key] = str(path.absolute())
    if connection.server_id is not None:
        table["server_id"] = connection.server_id.hex()
    return table | ({"insecure": True} if connection.insecure else {})


def _wrong(where: str, why: str) -> ConfigError:
    return ConfigError(
        f"{FILE} cannot be used",
        code="FS-CFG-127",
        where=where,
        why=why,
        hint='an entry is a table with address = "HOST:PORT" and, where wanted, ca, key, server_id, insecure',
    )
