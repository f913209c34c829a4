"""Who somebody is: an Ed25519 key in a file of its own, and signatures over the very bytes that are sent.

Clients, operators and the coordinator each have one key and are known by its public half. What is signed
begins with a label of its purpose, so that a signature made for one kind of message never fits another.
A private key is read from a file that nobody else may read; it appears in no text, log or representation.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import sys
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedsim.errors import EnvironmentProblem
from fedsim.storage import problem, sync_folder, unreadable, write_all

ENROL, LOGIN, SUBMIT, TASK = b"fedsim.v1 enrol", b"fedsim.v1 login", b"fedsim.v1 submit", b"fedsim.v1 task"

PUBLIC_BYTES, SIGNATURE_BYTES = 32, 64
_MOST_FILE_BYTES = 64 * 1024
_P = 2**255 - 19
# Points of small order, by their y: a signature of one of these keys can be made to fit any message.
_WEAK = {
    y.to_bytes(32, "little")
    for y in (
        0,
        1,
        _P - 1,
        _P,
        _P + 1,
        0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
        0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
    )
}


class Key:
    """A private key; its representation shows the public half alone.

    Args:
        private: the key itself.
    """

    __slots__ = ("_private", "node_id", "public")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()
        self.node_id = node_id_of(self.public)

    @classmethod
    def new(cls) -> Key:
        """A key that nobody had before."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Key:
        """Read a key from a PEM file (PKCS #8, without a password) with mode 0600 or stricter.

        Raises:
            EnvironmentProblem: FS-ENV-024, the file cannot be read; FS-SEC-001, others may read it;
                FS-SEC-002, it holds no such key.
        """
        content = read_secret(path)
        try:
            private = serialization.load_pem_private_key(content, password=None)
        except TypeError as error:  # as cryptography says that a password is wanted
            raise _no_key(path, "it is protected by a password") from error
        except ValueError:
            # What the library says may quote the file: it stays out of the message and of its causes.
            raise _no_key(path, "it is not a private key in PEM form") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise _no_key(path, "it is a key of another kind; fedsim signs with Ed25519")
        return cls(private)

    def save(self, path: Path) -> None:
        """Write the key into a new file with mode 0600.

        Raises:
            EnvironmentProblem: FS-SEC-003, something is there already; FS-ENV-020 … 022, it cannot be
                written.
        """
        content = self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_new_secret(path, content)

    @property
    def fingerprint(self) -> str:
        """The public key's digest, for people to compare: ``SHA256:`` and 43 characters."""
        return fingerprint_of(self.public)

    def sign(self, context: bytes, body: bytes) -> bytes:
        """Signature (64 bytes) over `context`, a zero byte and `body`.

        Args:
            context: what is signed: ENROL, LOGIN, SUBMIT or TASK.
        """
        return self._private.sign(_signed(context, body))

    def __repr__(self) -> str:
        return f"Key({self.node_id})"


def verify(public: bytes, context: bytes, body: bytes, signature: bytes) -> bool:
    """Whether `signature` was made by the holder of `public` over this context and body.

    Malformed keys and signatures are wrong ones, and so are keys that anybody can sign for.
    """
    if len(public) != PUBLIC_BYTES or len(signature) != SIGNATURE_BYTES or is_weak(public):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed(context, body))
    except (InvalidSignature, ValueError):
        return False
    return True


def is_weak(public: bytes) -> bool:
    """Whether a public key (32 bytes) is a point of small order, which is nobody's honest key."""
    return public[:-1] + bytes([public[-1] & 0x7F]) in _WEAK


def node_id_of(public: bytes) -> str:
    """Identifier of a key: 16 hexadecimal digits of the SHA-256 of its public half."""
    return hashlib.sha256(public).hexdigest()[:16]


def fingerprint_of(public: bytes) -> str:
    """The SHA-256 of a public key, as programs for SSH show it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(public).digest()).decode().rstrip("=")


def read_secret(path: Path) -> bytes:
    """Content of a small file that its owner alone may read; the check is on the file that was opened.

    Raises:
        EnvironmentProblem: FS-ENV-024, FS-SEC-001.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise _no_key(path, "it is not a plain file")
            check_mode(path, status.st_mode)
            return os.read(handle, _MOST_FILE_BYTES)
        finally:
            os.close(handle)
    except OSError as error:
        raise unreadable(error, path) from error


def check_mode(path: Path, mode: int) -> None:
    """Refuse a file that anybody but its owner may read or change; Windows has no such modes.

    Raises:
        EnvironmentProblem: FS-SEC-001.
    """
    if sys.platform == "win32" or not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return
    raise EnvironmentProblem(
        f"{path.name} holds a secret, and others may read or change it",
        code="FS-SEC-001",
        where=str(path),
        why=f"its mode is {stat.S_IMODE(mode):04o}; a secret belongs to its owner alone",
        hint=f"chmod 600 {path}",
    )


def write_new_secret(path: Path, content: bytes) -> None:
    """Write a new file with mode 0600, whole and durable or not at all; nothing is ever replaced.

    Raises:
        EnvironmentProblem: FS-SEC-003, FS-ENV-020 … 022.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_all(handle, content)
            os.fsync(handle)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        sync_folder(path.parent)
    except FileExistsError as error:
        raise exists_already(path) from error
    except OSError as error:
        raise problem(error, path) from error


def exists_already(path: Path) -> EnvironmentProblem:
    """FS-SEC-003: a secret is never overwritten."""
    return EnvironmentProblem(
        f"{path.name} exists already",
        code="FS-SEC-003",
        where=str(path),
        why="a secret is never overwritten: whoever is known by the old one would be locked out",
        hint="choose another name, or move the old file away first",
    )


def _signed(context: bytes, body: bytes) -> bytes:
    return context + b"\0" + body


def _no_key(path: Path, why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{path.name} is not a key of fedsim",
        code="FS-SEC-002",
        where=str(path),
        why=why,
        hint="fedsim keys new FILE makes one",
    )
