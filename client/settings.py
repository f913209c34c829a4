"""The settings of a client: flags, then ``client.toml``, then the enrolment bundle, then defaults.

Secrets are files: a token or a key is named by its path and never stands on the command line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedsim.errors import ConfigError
from fedsim.identity import read_secret
from fedsim.storage import unreadable, write_atomically
from fedsim.transport import Tls, check_insecure, is_loopback

KEY_FILE, POLICY_FILE = "node.key", "policy.toml"
Model = TypeVar("Model", bound=BaseModel)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _File(BaseModel):
    """``client.toml``; the keys are the flags."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bundle: Path | None = None
    server: str | None = None
    server_id: str | None = None
    ca: Path | None = None
    cert: Path | None = None
    cert_key: Path | None = None
    state: Path = Path("fedsim-client")
    key: Path | None = None
    token_file: Path | None = None
    name: str = ""
    labels: dict[str, str] = {}
    data: Path | None = None
    data_function: str | None = None
    copy_of_data: Annotated[Path | None, Field(alias="copy")] = None
    device: str = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    idle_seconds: Annotated[float, Field(gt=0)] = 300.0
    policy: Path | None = None
    max_retries: Annotated[int, Field(ge=0)] | None = None
    insecure: bool = False
    insecure_beyond_loopback: bool = False

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if name and not _NAME.fullmatch(name):
            raise ValueError("a name has up to 64 letters, digits, dots, dashes and underscores")
        return name


class _Bundle(BaseModel):
    """What ``fedsim node invite`` writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    server: str
    server_id: str
    ca: str = ""
    token: str = ""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client needs to know before it starts.

    Args:
        server: ``host:port``.
        server_id: public key of the coordinator, None where only TLS (or the loopback) vouches for it.
        ca_text: authority from the bundle, as PEM; `ca` wins.
        key: file of this client's key; made where it does not exist.
        token: for enrolment; shown nowhere.
        data, data_function, copy: where examples come from, as in `WorkerOptions`.
        threads: of a tensor operation, 0 for what a run says.
        policy: what the owner allows.
        max_retries: tries in a row that may fail, None for any number.
    """

    server: str
    state: Path
    key: Path
    policy: Path
    server_id: bytes | None = None
    ca: Path | None = None
    ca_text: str = field(default="", repr=False)
    cert: Path | None = None
    cert_key: Path | None = None
    token: str = field(default="", repr=False)
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None
    data_function: str | None = None
    copy: Path | None = None
    device: str = "auto"
    threads: int = 0
    idle_seconds: float = 300.0
    max_retries: int | None = None
    insecure: bool = False
    insecure_beyond_loopback: bool = False

    def tls(self) -> Tls | None:
        """What the client brings to TLS; the bundle's authority is put beside the state, where gRPC reads it.

        The state folder must exist.
        """
        ca = self.ca
        if ca is None and self.ca_text:
            ca = self.state / "ca.pem"
            content = self.ca_text.encode()
            if not ca.exists() or ca.read_bytes() != content:
                write_atomically(ca, content)
        if ca is None and self.cert is None and self.cert_key is None:
            return None
        return Tls(ca, self.cert, self.cert_key)


def client_settings(flags: Mapping[str, Any], file: Path | None = None) -> ClientSettings:
    """The settings that a command line means.

    Args:
        flags: those that were given, by the keys of ``client.toml``.
        file: ``client.toml``, None for none.

    Raises:
        ConfigError: FS-CFG-110 … 114; FS-SEC-004, plain text where it is not allowed.
        EnvironmentProblem: a file cannot be read, or others can read it.
    """
    values = {} if file is None else _toml(file)
    if "labels" in flags:
        flags = {**flags, "labels": {**values.get("labels", {}), **flags["labels"]}}
    given = _parsed(_File, {**values, **flags}, "FS-CFG-110", file)
    bundle = None
    if given.bundle is not None:
        content = read_secret(given.bundle).decode("utf-8", "replace")
        bundle = _parsed(_Bundle, _toml_of(content, given.bundle, "FS-CFG-113"), "FS-CFG-113", given.bundle)
    server = given.server or (bundle.server if bundle else None)
    if not server:
        raise ConfigError(
            "a client needs a coordinator",
            code="FS-CFG-111",
            where="--server",
            hint="give --server HOST:PORT, or --bundle FILE with what fedsim node invite wrote",
        )
    server_id = _server_id(given.server_id or (bundle.server_id if bundle else None))
    if given.insecure and server_id is None and not is_loopback(server):
        raise ConfigError(
            "without TLS nothing says who the coordinator is",
            code="FS-CFG-112",
            where=f"--insecure, --server {server}",
            why="every task is checked against the coordinator's key, and this client does not know it",
            hint="give --bundle FILE, or server_id in client.toml; better: use TLS",
        )
    # Before anything is written: a client that may not connect leaves no folder behind.
    check_insecure(
        server,
        insecure=given.insecure,
        insecure_beyond_loopback=given.insecure_beyond_loopback,
        has_tls=any(file is not None for file in (given.ca, given.cert, given.cert_key)),
    )
    return ClientSettings(
        server=server,
        server_id=server_id,
        state=given.state,
        key=given.key or given.state / KEY_FILE,
        policy=given.policy or given.state / POLICY_FILE,
        ca=given.ca,
        ca_text="" if given.insecure or bundle is None else bundle.ca,
        cert=given.cert,
        cert_key=given.cert_key,
        token=_token(given.token_file) or (bundle.token if bundle else ""),
        name=given.name,
        labels=given.labels,
        data=given.data,
        data_function=given.data_function,
        copy=given.copy_of_data,
        device=given.device,
        threads=given.threads,
        idle_seconds=given.idle_seconds,
        max_retries=given.max_retries,
        insecure=given.insecure,
        insecure_beyond_loopback=given.insecure_beyond_loopback,
    )


def labels_of(texts: list[str]) -> dict[str, str]:
    """``["site=a"]`` as ``{"site": "a"}``; ``gpu`` alone is ``{"gpu": "true"}``.

    Raises:
        ConfigError: FS-CFG-114.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not _NAME.fullmatch(name) or "=" in value or len(value) > 64:
            raise ConfigError(
                f"{text!r} is not a label",
                code="FS-CFG-114",
                where="--label",
                hint="write --label site=a, with letters, digits, dots, dashes and underscores",
            )
        found[name] = value or "true"
    return found


def _token(path: Path | None) -> str:
    return "" if path is None else read_secret(path).decode("ascii", "replace").strip()


def _server_id(text: str | None) -> bytes | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ConfigError(
            "the server id is malformed",
            code="FS-CFG-113",
            where="server_id",
            why=f"expected 64 hexadecimal digits, got {len(text)} characters",
            hint="fedsim keys show prints it on the coordinator",
        )
    return bytes.fromhex(text)


def _toml(path: Path) -> dict[str, Any]:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(error, path) from error
    except ValueError as error:
        raise _wrong("FS-CFG-110", path, f"not UTF-8: {error}") from error
    return _toml_of(content, path, "FS-CFG-110")


def _toml_of(content: str, path: Path, code: str) -> dict[str, Any]:
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise _wrong(code, path, f"not TOML: {error}") from error


def _parsed(model: type[Model], values: Mapping[str, Any], code: str, file: Path | None) -> Model:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        # Not the value: it may be a secret.
        said = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)]
        raise _wrong(code, file, "\n".join(said[:5])) from None


def _wrong(code: str, file: Path | None, why: str) -> ConfigError:
    what = "the enrolment bundle" if code == "FS-CFG-113" else "the settings of the client"
    return ConfigError(
        f"{what} cannot be understood",
        code=code,
        where="command line" if file is None else str(file),
        why=why,
        hint="fedsim client --help lists the settings; the keys of client.toml are the same",
    )
