"""The settings of a coordinator: ``server.toml``, environment and flags as one checked model.

Defaults < file < environment (``FEDSIM_SERVER__LIMITS__UPLOADS=8``) < flags. A coordinator without TLS, with
open registration or with contradicting flags is refused here, before it opens a port.
"""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from fedsim.config_sections import Section
from fedsim.connections import Address, parse_address
from fedsim.errors import ConfigError
from fedsim.schema import UNKNOWN, alternatives, check, shown, unknown_key
from fedsim.server.settings_tables import (
    DatabaseSection,
    LeasesSection,
    LimitsSection,
    ServerSection,
)
from fedsim.storage import unreadable
from fedsim.transport import is_loopback

__all__ = [
    "DatabaseSection",
    "LeasesSection",
    "LimitsSection",
    "ServerSection",
    "ServerSettings",
    "check_settings",
    "load_settings",
]

Values = dict[str, Any]  # Any: whatever TOML holds

ENVIRONMENT = "FEDSIM_SERVER__"


class ServerSettings(Section):
    """All settings of a coordinator, checked."""

    server: ServerSection = Field(default_factory=ServerSection)
    limits: LimitsSection = Field(default_factory=LimitsSection)
    leases: LeasesSection = Field(default_factory=LeasesSection)
    database: DatabaseSection = Field(default_factory=DatabaseSection)

    @property
    def listen(self) -> Address:
        """Where clients and operators connect."""
        return parse_address(self.server.listen)

    @property
    def http(self) -> Address:
        """Where metrics and probes are served."""
        return parse_address(self.server.http)


SECTIONS: Mapping[str, type[Section]] = {
    "server": ServerSection,
    "limits": LimitsSection,
    "leases": LeasesSection,
    "database": DatabaseSection,
}
PATHS = ("state", "http_token", "cert", "cert_key", "client_ca")


def load_settings(
    file: Path | None = None,
    *,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServerSettings:
    """Read, merge and check the settings of a coordinator.

    Args:
        file: ``server.toml``; paths in it are relative to its folder.
        flags: ``table.key`` -> value, such as ``{"server.listen": "127.0.0.1:0"}``; None is not given.
        environ: usually ``os.environ``; names that begin with ``FEDSIM_SERVER__`` are read.

    Raises:
        ConfigError: FS-CFG-004 … 007 for a single key, FS-CFG-120 … 126 for what does not go together.
        EnvironmentProblem: FS-ENV-024, the file cannot be read.
    """
    merged: dict[str, Values] = {}
    origins: dict[str, str] = {}
    layers = [] if file is None else [(str(file), _from_file(file))]
    layers.append(("environment", _from_environment(environ or {})))
    layers.append(("command line", _nested({k: v for k, v in (flags or {}).items() if v is not None})))
    for origin, tables in layers:
        for table, values in tables.items():
            merged.setdefault(table, {}).update(values)
            origins |= {f"{table}.{key}": origin for key in values}
    checked = {name: _checked(name, values, origins) for name, values in merged.items()}
    settings = ServerSettings.model_validate(checked)
    check_settings(settings)
    return settings


def check_settings(settings: ServerSettings) -> None:
    """Refuse settings that contradict each other or would open the coordinator to strangers.

    Raises:
        ConfigError: FS-CFG-121 … 126.
    """
    server = settings.server
    reachable = not is_loopback(server.listen)
    if (server.cert is None) != (server.cert_key is None):
        lacking = "cert_key" if server.cert_key is None else "cert"
        raise _refused("FS-CFG-121", "a certificate needs its private key", f"[server] {lacking} is missing")
    if server.insecure and server.cert is not None:
        why = "insecure = true would send in plain text although a certificate is there"
        raise _refused("FS-CFG-122", "insecure and a certificate do not go together", why)
    if server.insecure_beyond_loopback and not server.insecure:
        why = "insecure_beyond_loopback widens insecure, which is not set"
        raise _refused("FS-CFG-122", "insecure_beyond_loopback means nothing by itself", why)
    if not server.insecure and server.cert is None:
        raise _refused("FS-CFG-121", "there is no certificate", "[server] cert and cert_key are not set")
    if server.client_ca is not None and server.insecure:
        why = "client certificates are checked by TLS, which insecure = true switches off"
        raise _refused("FS-CFG-122", "insecure and client_ca do not go together", why)
    if server.insecure and reachable and not server.insecure_beyond_loopback:
        why = f"{server.listen} can be reached from other machines, which would see everything in plain text"
        raise _refused("FS-CFG-123", "plain text is for loopback alone", why)
    if server.allow_anonymous and reachable:
        why = f"{server.listen} can be reached from other machines, whose keys would all be let in"
        raise _refused("FS-CFG-124", "open registration is for loopback alone", why)
    leases = settings.leases
    if leases.seconds < 2 * leases.heartbeat_seconds:
        why = f"seconds = {leases.seconds:g}, heartbeat_seconds = {leases.heartbeat_seconds:g}"
        raise _refused("FS-CFG-125", "a lease must outlast two heartbeats", why)


def _refused(code: str, what: str, why: str) -> ConfigError:
    where, hint = _ADVICE[code]
    return ConfigError(what, code=code, where=where, why=why, hint=hint)


_ADVICE = {
    "FS-CFG-121": (
        "[server] cert, cert_key",
        "make one with fedsim certs dev DIR --name HOST; or give --insecure, on loopback alone",
    ),
    "FS-CFG-122": ("[server] insecure", "remove one of the two"),
    "FS-CFG-123": (
        "[server] insecure, listen",
        "listen on 127.0.0.1, or set cert and cert_key; --insecure-beyond-loopback lifts this check",
    ),
    "FS-CFG-124": ("[server] allow_anonymous, listen", "invite clients with fedsim node invite"),
    "FS-CFG-125": ("[leases] seconds, heartbeat_seconds", "lengthen the lease or shorten the heartbeat"),
}


def _from_file(file: Path) -> dict[str, Values]:
    try:
        text = file.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file.name} is not TOML",
            code="FS-CFG-120",
            where=str(file),
            why=str(error),
            hint="correct that line; deploy/config/server.toml is an example",
        ) from error
    except OSError as error:
        raise unreadable(error, file) from error
    for name, values in tables.items():
        _known_table(name, values, where=str(file))
    server = tables.get("server", {})
    for key in PATHS:
        if isinstance(server.get(key), str):
            server[key] = str(file.parent / server[key])
    url = tables.get("database", {}).get("url")
    if isinstance(url, str) and _password(url) and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            "the password of the database lies open",
            code="FS-CFG-126",
            where=f"{file}: [database] url",
            why="other users of this machine may read the file",
            hint=f"chmod 600 {file.name}, or use PGPASSFILE, or {ENVIRONMENT}DATABASE__URL",
        )
    return tables


def _password(url: str) -> bool:
    try:
        return make_url(url).password is not None
    except ArgumentError:
        return False  # open_database says what is wrong with it


def _from_environment(environ: Mapping[str, str]) -> dict[str, Values]:
    given = {}
    for variable, text in environ.items():
        if variable.startswith(ENVIRONMENT):
            table, _, key = variable.removeprefix(ENVIRONMENT).lower().partition("__")
            _known_table(table, {}, where=f"environment: {variable}")
            given[f"{table}.{key}"] = _value(text, SECTIONS[table], key)
    return _nested(given)


def _value(text: str, section: type[Section], key: str) -> object:
    """A variable holds TOML, and a text may lack its quotes."""
    if key in PATHS or key in ("listen", "http", "url"):
        return text
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _nested(flat: Mapping[str, object]) -> dict[str, Values]:
    tables: dict[str, Values] = {}
    for dotted, value in flat.items():
        table, _, key = dotted.partition(".")
        tables.setdefault(table, {})[key] = value
    return tables


def _known_table(name: str, values: object, *, where: str) -> None:
    if name not in SECTIONS:
        error = unknown_key(name, SECTIONS, where=where)
        error.what = error.what.replace("unknown key", "unknown table")
        raise error
    if not isinstance(values, dict):
        raise ConfigError(
            f"[{name}] is a table",
            code="FS-CFG-005",
            where=where,
            why=f"{name} = {shown(values)}",
            hint=f"write its keys below a line [{name}]",
        )


def _checked(table: str, values: Values, origins: Mapping[str, str]) -> Section:
    section = SECTIONS[table]
    try:
        return check(section, values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        first = next((e for e in found if e["type"] in UNKNOWN), found[0])
        key = str(first["loc"][0])
        where = f"{origins.get(f'{table}.{key}', 'command line')}: [{table}] {key}"
        if first["type"] in UNKNOWN:
            raise unknown_key(key, section.model_fields, where=where) from error
        wanted = alternatives([e for e in found if str(e["loc"][0]) == key])
        said = "" if key == "url" else f"{key} = {shown(values.get(key))}; "
        raise ConfigError(
            f"the value of `{key}` does not fit",
            code="FS-CFG-005",
            where=where,
            why=f"{said}{wanted}",
            hint=f"correct {key}",
        ) from error
