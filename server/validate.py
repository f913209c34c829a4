"""Is an update worth anything? What is checked before the ledger sees it, cheap to dear.

Sizes, header, schema, weight and counters, digest, finite values, norm. An update comes from a client that
nobody trusts: its tensors are looked at block by block in raw bytes, nothing of it is unpacked, and what
it claims is checked before memory is given to it. The answer is a verdict with one reason, which the
client is told; a call that is malformed in itself never gets here.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from fedsim import bundle_check, storage
from fedsim.bundle import (
    BundleError,
    Entry,
    Header,
    Object,
    TensorSpec,
    check_schema,
    digest,
    read_header,
    write_pieces,
)
from fedsim.pb import federation_pb2 as pb

SCHEMA, DIGEST, WEIGHT = "schema", "digest", "weight"
NON_FINITE, NORM, POLICY = "non_finite", "norm", "policy"
"""Why an update is rejected: its form, bytes, weight and counters, values, length; anything else."""

CLIP = "clip"
DELTA = "vectors/delta"
VECTORS = "vectors/"
MOST_METRICS = 256
MOST_METRIC_BYTES = 64 * 1024
_METRIC = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@%+ -]{0,127}")
_FLOATING = {"F64", "F32", "F16", "BF16"}


class Limits(Protocol):
    """What a run allows beside well-formed updates."""

    @property
    def max_weight(self) -> float:
        """Most examples that a client may claim."""

    @property
    def max_norm(self) -> float | None:
        """Longest difference to the model that was sent; None for any."""

    @property
    def over_norm(self) -> str:
        """What becomes of a longer one: ``reject`` or ``clip``."""


class Expected(Protocol):
    """The part of an open task that an update is compared with."""

    @property
    def update(self) -> Sequence[TensorSpec]:
        """What an answer must hold."""

    @property
    def max_update_bytes(self) -> int:
        """Most bytes of its bundle."""

    @property
    def limits(self) -> Limits: ...


class Clipped(NamedTuple):
    """An update that was scaled to the longest length allowed: its name, and the bytes or their file."""

    object: Object
    content: bytes | Path


class Accepted(NamedTuple):
    """An update that can be folded.

    Args:
        norm: Euclidean length of the difference before any clipping, 0 where there is none.
        seconds: that the validation took.
        clipped: what is to be folded in place of the update where it was too long, else None.
    """

    norm: float
    seconds: float
    clipped: Clipped | None = None


class Rejected(NamedTuple):
    """An update that must not count.

    Args:
        reason: one of the words above; text: one sentence for the client.
        norm: where it was measured.
    """

    reason: str
    text: str
    norm: float | None = None


class _Wrong(Exception):
    """The first thing that is wrong."""

    def __init__(self, reason: str, text: str, norm: float | None = None) -> None:
        super().__init__(text)
        self.verdict = Rejected(reason, text, norm)


def validate(
    task: Expected,
    body: pb.SubmitBody,
    source: bytes | Path,
    *,
    known: Object | None = None,
    scratch: Path | None = None,
) -> Accepted | Rejected:
    """Check one submission and the update that belongs to it.

    Args:
        task: what was asked for.
        body: what the client says of its update, signature and field sizes checked.
        source: the bundle, or the file that holds it.
        known: what the receiver has hashed itself while the bytes came; None hashes them here.
        scratch: folder for the clipped copy of a file; that of the file by default.

    Returns:
        The verdict. The file of a clipped update belongs to the caller, who takes or removes it.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 024, the disk fails; it says nothing about the update.
    """
    started = time.perf_counter()
    try:
        with _opened(source) as (file, size):
            header = _form(task, body, file, size)
            _check_counters(task.limits, body)
            _check_digest(body, known or _hashed(file, size))
            bad = bundle_check.first_bad(file, header)
            if bad is not None:
                raise _Wrong(NON_FINITE, f"tensor {bad!r} holds a NaN or an infinity")
            folder = (scratch or source.parent) if isinstance(source, Path) else None
            norm, clipped = _check_norm(task.limits, file, header, folder)
    except BundleError as error:
        return Rejected(SCHEMA, error.reason)
    except _Wrong as wrong:
        return wrong.verdict
    return Accepted(norm, time.perf_counter() - started, clipped)


@contextmanager
def _opened(source: bytes | Path) -> Iterator[tuple[bytes | BinaryIO, int]]:
    """The update, a file where it is not in memory, and its size."""
    if not isinstance(source, Path):
        yield source, len(source)
        return
    try:
        file = source.open("rb", buffering=0)
    except OSError as error:
        raise storage.unreadable(error, source) from error
    with file:
        try:
            yield file, os.fstat(file.fileno()).st_size
        except OSError as error:
            raise storage.unreadable(error, source) from error


def _form(task: Expected, body: pb.SubmitBody, file: bytes | BinaryIO, size: int) -> Header:
    """Sizes, header, schema: nothing is allocated that the file does not hold."""
    if size > task.max_update_bytes or body.update.size > task.max_update_bytes:
        most = max(size, body.update.size)
        raise _Wrong(SCHEMA, f"the update has {most} bytes, {task.max_update_bytes} are allowed")
    if size != body.update.size:
        raise _Wrong(DIGEST, f"the update has {size} bytes, {body.update.size} were declared")
    header = read_header(file, size)
    check_schema(header, task.update)
    return header


def _check_counters(limits: Limits, body: pb.SubmitBody) -> None:
    """What the client counts of itself; weights are made from it."""
    if not 0 < body.examples <= limits.max_weight:
        text = f"{body.examples} examples are claimed, 1 to {limits.max_weight:.17g} are allowed"
        raise _Wrong(WEIGHT, text)
    if body.local_steps < 0:
        raise _Wrong(WEIGHT, f"{body.local_steps} local steps are claimed")
    # NaN is what a client says whose optimiser has no such length.
    if math.isinf(body.normaliser) or body.normaliser < 0:
        raise _Wrong(WEIGHT, f"the sum of step lengths must be finite and not negative: {body.normaliser}")
    if not math.isfinite(body.train_seconds) or body.train_seconds < 0:
        raise _Wrong(WEIGHT, f"the time of training must be finite and not negative: {body.train_seconds}")
    if len(body.metrics) > MOST_METRICS:
        raise _Wrong(POLICY, f"{len(body.metrics)} metrics are sent, at most {MOST_METRICS} are taken")
    # 8 for the value; what a value is does not matter, a NaN is simply not shown.
    if sum(len(name.encode()) + 8 for name in body.metrics) > MOST_METRIC_BYTES:
        raise _Wrong(POLICY, f"the metrics have more than {MOST_METRIC_BYTES} bytes")
    for name in sorted(body.metrics):
        if not _METRIC.fullmatch(name):
            text = f"{name[:40]!a} is no name of a metric: 1 to 128 letters, digits and _.:/@%+ -"
            raise _Wrong(POLICY, text)


def _hashed(file: bytes | BinaryIO, size: int) -> Object:
    if isinstance(file, bytes):
        return Object(digest(file), size)
    file.seek(0)
    return Object(hashlib.file_digest(file, "sha256").digest(), size)  # type: ignore[arg-type]


def _check_digest(body: pb.SubmitBody, found: Object) -> None:
    if (found.digest, found.size) != (body.update.digest, body.update.size):
        raise _Wrong(DIGEST, "the update is not the one whose digest was signed")


def _check_norm(
    limits: Limits, file: bytes | BinaryIO, header: Header, folder: Path | None
) -> tuple[float, Clipped | None]:
    """Length of the difference to the model sent, and the clipped update where that is the policy.

    A strategy that reports no difference is measured by its first vector in the order of names, so that a
    limit of the run holds for every strategy.
    """
    vectors = sorted(e for e in header.entries if e.name.startswith(VECTORS) and e.dtype in _FLOATING)
    entry = next((e for e in vectors if e.name == DELTA), vectors[0] if vectors else None)
    if entry is None:
        return 0.0, None
    norm, most = bundle_check.norm(file, header, entry), limits.max_norm
    if most is None or norm <= most:
        return norm, None
    if limits.over_norm != CLIP or math.isinf(norm):
        raise _Wrong(NORM, f"the update is {norm:.6g} long, {most:.6g} is allowed", norm)
    return norm, _clipped(file, header, entry, most / norm, folder)


def _clipped(
    file: bytes | BinaryIO, header: Header, entry: Entry, factor: float, folder: Path | None
) -> Clipped:
    """The same update with a shorter difference; a file stays a file, whatever its size."""
    pieces = bundle_check.scaled(file, header, entry, factor)
    if folder is None:
        content = b"".join(bytes(piece) for piece in pieces)
        return Clipped(Object(digest(content), len(content)), content)
    path = folder / f".writing-{secrets.token_hex(8)}"  # unfinished until the caller takes it
    return Clipped(write_pieces(path, pieces), path)
