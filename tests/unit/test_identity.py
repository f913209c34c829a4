"""Keys in files, and signatures that hold for one purpose and one body."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedsim.errors import EnvironmentProblem
from fedsim.identity import (
    ENROL,
    LOGIN,
    SUBMIT,
    TASK,
    Key,
    fingerprint_of,
    is_weak,
    node_id_of,
    read_secret,
    verify,
    write_new_secret,
)


def code_of(caught: pytest.ExceptionInfo[EnvironmentProblem]) -> str:
    return caught.value.code


def test_a_signature_holds_for_its_key_context_and_body_alone() -> None:
    key, other = Key.new(), Key.new()
    signature = key.sign(LOGIN, b"body")
    assert verify(key.public, LOGIN, b"body", signature)
    assert not verify(key.public, LOGIN, b"bodY", signature)
    assert not verify(key.public, ENROL, b"body", signature)
    assert not verify(other.public, LOGIN, b"body", signature)
    assert not verify(key.public, LOGIN, b"body", signature[:-1] + bytes([signature[-1] ^ 1]))


def test_no_context_and_body_can_be_taken_for_another_pair() -> None:
    key = Key.new()
    contexts = (ENROL, LOGIN, SUBMIT, TASK)
    for context in contexts:
        assert not any(other != context and other.startswith(context) for other in contexts)
        assert b"\0" not in context
    assert not verify(key.public, LOGIN[:-1], LOGIN[-1:] + b"x", key.sign(LOGIN, b"x"))


@pytest.mark.parametrize("public", [b"", b"x" * 31, b"x" * 33, b"\xff" * 32])
def test_a_malformed_key_or_signature_is_a_wrong_one(public: bytes) -> None:
    assert not verify(public, LOGIN, b"body", b"\0" * 64)
    assert not verify(Key.new().public, LOGIN, b"body", public)


def test_a_key_that_anybody_can_sign_for_is_refused() -> None:
    identity = b"\x01" + bytes(31)  # the neutral element: R = neutral, S = 0 fits every message
    forged = identity + bytes(32)
    Ed25519PublicKey.from_public_bytes(identity).verify(forged, b"anything")  # the library accepts it
    assert is_weak(identity)
    assert not verify(identity, LOGIN, b"anything", forged)
    assert is_weak(identity[:-1] + b"\x80")
    assert not is_weak(Key.new().public)


def test_names_of_a_key_come_from_its_public_half() -> None:
    key = Key.new()
    assert key.node_id == hashlib.sha256(key.public).hexdigest()[:16] == node_id_of(key.public)
    assert key.fingerprint == fingerprint_of(key.public)
    assert key.fingerprint.startswith("SHA256:")
    assert len(key.fingerprint) == len("SHA256:") + 43


def test_a_key_comes_back_from_its_file(tmp_path: Path) -> None:
    path, key = tmp_path / "node.key", Key.new()
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Key.load(path).public == key.public
    path.chmod(0o400)
    assert Key.load(path).public == key.public


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Key.new().save(tmp_path / "k")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    Key.new().save(path)
    content = path.read_bytes()
    with pytest.raises(EnvironmentProblem) as caught:
        Key.new().save(path)
    assert code_of(caught) == "FS-SEC-003"
    assert path.read_bytes() == content


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o602])
def test_a_file_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "node.key"
    Key.new().save(path)
    path.chmod(mode)
    with pytest.raises(EnvironmentProblem) as caught:
        Key.load(path)
    assert code_of(caught) == "FS-SEC-001"
    assert f"{mode:04o}" in str(caught.value)


def test_what_is_no_key_is_refused_without_quoting_it(tmp_path: Path) -> None:
    secret = b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0LXNlY3JldA==\n-----END PRIVATE KEY-----\n"
    elliptic = ec.generate_private_key(ec.SECP256R1())
    own = Ed25519PrivateKey.generate()
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    contents = {
        "empty": b"",
        "noise": secret,
        "other": elliptic.private_bytes(*form, serialization.NoEncryption()),
        "locked": own.private_bytes(*form, serialization.BestAvailableEncryption(b"password")),
    }
    for name, content in contents.items():
        write_new_secret(tmp_path / name, content)
        with pytest.raises(EnvironmentProblem) as caught:
            Key.load(tmp_path / name)
        assert code_of(caught) == "FS-SEC-002", name
        assert "c2VjcmV0" not in str(caught.value) + repr(caught.value.__cause__)
    with pytest.raises(EnvironmentProblem) as caught:
        Key.load(tmp_path / "missing")
    assert code_of(caught) == "FS-ENV-024"


def test_a_folder_or_a_pipe_is_no_secret(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(EnvironmentProblem) as caught:
            read_secret(path)
        assert code_of(caught) == "FS-SEC-002"


def test_a_key_shows_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = Key.new()
    key.save(tmp_path / "k")
    raw = key._private.private_bytes_raw().hex()
    pem = (tmp_path / "k").read_text().splitlines()[1]
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("fedsim").info("key=%s %r", key, {"key": key})
    shown = caplog.text + repr(key) + str(key) + repr([key])
    assert key.node_id in shown
    assert raw not in shown
    assert pem not in shown
