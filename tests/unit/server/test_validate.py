"""What makes an update worth folding, and the one reason why another is not."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import bundle
from fedsim.bundle import TensorSpec
from fedsim.errors import EnvironmentProblem
from fedsim.pb import federation_pb2 as pb
from fedsim.server.validate import Accepted, Expected, Rejected, validate


@dataclass(frozen=True)
class Limits:
    max_weight: float = 1e6
    max_norm: float | None = None
    over_norm: str = "reject"


@dataclass(frozen=True)
class Asked:
    update: tuple[TensorSpec, ...]
    max_update_bytes: int = 1 << 20
    limits: Limits = Limits()


def update() -> dict[str, Tensor]:
    return {
        "vectors/delta": torch.tensor([3.0, 4.0, 0.0]),
        "vectors/control": torch.tensor([100.0, 0.0, 0.0]),
        "scalars/rate": torch.tensor(0.5, dtype=torch.float64),
        "buffers/floating": torch.zeros(2),
        "buffers/integers": torch.tensor([7]),
    }


ASKED = Asked(bundle.specs_of(update()))


def body_of(content: bytes, **changes: Any) -> pb.SubmitBody:
    fields: dict[str, Any] = {
        "update": pb.Object(digest=hashlib.sha256(content).digest(), size=len(content)),
        "examples": 20,
        "local_steps": 5,
        "normaliser": 0.5,
        "train_seconds": 1.5,
        "metrics": {"loss": 0.7},
    }
    return pb.SubmitBody(**(fields | changes))


@pytest.fixture(params=["inline", "file"])
def check(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Validates an update that travelled inside the call, or one that lies in a file."""

    def validated(content: bytes, asked: Expected = ASKED, **changes: Any) -> Accepted | Rejected:
        source: bytes | Path = content
        if request.param == "file":
            source = tmp_path / "update"
            source.write_bytes(content)
        return validate(asked, body_of(content, **changes), source)

    return validated


def reason_of(found: Accepted | Rejected) -> str:
    assert isinstance(found, Rejected)
    assert found.text.isprintable()
    return found.reason


def test_a_sound_update_is_accepted_with_its_norm(check: Any) -> None:
    found = check(bundle.encode(update()))
    assert isinstance(found, Accepted)
    assert found.norm == 5.0
    assert found.clipped is None
    assert found.seconds > 0


def test_the_order_of_the_tensors_and_metadata_do_not_matter(check: Any) -> None:
    asked = Asked(tuple(reversed(ASKED.update)))
    assert isinstance(check(bundle.encode(update(), {"fedsim.kind": "update"}), asked), Accepted)


# S1


@pytest.mark.parametrize("name", ["vectors/delta", "vectors/control", "scalars/rate", "buffers/floating"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_s1_a_value_that_is_not_finite_is_rejected_wherever_it_is(
    check: Any, name: str, value: float
) -> None:
    tensors = update()
    tensors[name] = torch.full_like(tensors[name], value)
    found = check(bundle.encode(tensors))
    assert reason_of(found) == "non_finite"
    assert name in found.text


@pytest.mark.parametrize("value", [-0.0, 1e-45, -1e-40, 3.4e38])
def test_s1_negative_zero_denormals_and_large_values_are_accepted(check: Any, value: float) -> None:
    tensors = update() | {"vectors/delta": torch.full((3,), value)}
    found = check(bundle.encode(tensors))
    assert isinstance(found, Accepted)
    assert found.norm == pytest.approx(float(tensors["vectors/delta"].double().norm()))


# S2


def without(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in update().items() if n != name}


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (update() | {"vectors/delta": torch.zeros(4)}, "tensor 'vectors/delta' has shape [4], not [3]"),
        (update() | {"vectors/delta": torch.zeros(3, 1)}, "tensor 'vectors/delta' has shape [3, 1], not [3]"),
        (update() | {"vectors/delta": torch.zeros(3).double()}, "'vectors/delta' is F64, it must be F32"),
        (update() | {"buffers/integers": torch.tensor([7.0]).double()}, "is F64, it must be I64"),
        (without("vectors/control"), "tensor 'vectors/control' is missing"),
        (without("scalars/rate") | {"scalars/Rate": torch.tensor(0.5).double()}, "'scalars/rate' is missing"),
        (update() | {"vectors/more": torch.zeros(3)}, "tensor 'vectors/more' does not belong there"),
        ({}, "is missing"),
    ],
)
def test_s2_other_tensors_than_asked_for_are_rejected_and_the_first_is_named(
    check: Any, tensors: dict[str, Tensor], text: str
) -> None:
    found = check(bundle.encode(tensors))
    assert reason_of(found) == "schema"
    assert text in found.text


# S3


@pytest.mark.parametrize("examples", [0, -1, -(2**63), 1_000_001, 2**53, 2**63 - 1])
def test_s3_a_weight_outside_the_limits_is_rejected(check: Any, examples: int) -> None:
    assert reason_of(check(bundle.encode(update()), examples=examples)) == "weight"


@pytest.mark.parametrize("examples", [1, 1_000_000])
def test_s3_a_weight_at_the_limits_is_accepted(check: Any, examples: int) -> None:
    assert isinstance(check(bundle.encode(update()), examples=examples), Accepted)


@pytest.mark.parametrize("examples", [math.nan, math.inf, 2**63, 1.5, "20"])
def test_s3_what_is_no_whole_number_of_64_bits_cannot_even_be_written(examples: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        pb.SubmitBody(examples=examples)


@pytest.mark.parametrize(
    "changes",
    [
        {"local_steps": -1},
        {"normaliser": math.inf},
        {"normaliser": -math.inf},
        {"normaliser": -0.1},
        {"train_seconds": math.nan},
        {"train_seconds": math.inf},
        {"train_seconds": -1.0},
    ],
    ids=str,
)
def test_s3_counters_that_no_client_can_have_are_rejected(check: Any, changes: dict[str, Any]) -> None:
    assert reason_of(check(bundle.encode(update()), **changes)) == "weight"


def test_no_local_step_and_an_optimiser_without_a_normaliser_are_accepted(check: Any) -> None:
    found = check(bundle.encode(update()), local_steps=0, normaliser=math.nan, train_seconds=0.0)
    assert isinstance(found, Accepted)


# S4


def long(value: float, dtype: torch.dtype = torch.float32) -> tuple[bytes, tuple[TensorSpec, ...]]:
    tensors = update() | {"vectors/delta": torch.full((3,), value, dtype=dtype)}
    return bundle.encode(tensors), bundle.specs_of(tensors)


def test_s4_a_norm_above_the_limit_is_rejected_with_its_value(check: Any) -> None:
    content, specs = long(1e30)
    found = check(content, Asked(specs, limits=Limits(max_norm=10.0)))
    assert reason_of(found) == "norm"
    assert found.norm == pytest.approx(math.sqrt(3) * 1e30)
    assert "1.73205e+30" in found.text


def test_s4_without_a_limit_any_finite_norm_is_accepted(check: Any) -> None:
    content, specs = long(1e30)
    found = check(content, Asked(specs))
    assert isinstance(found, Accepted)
    assert found.norm == pytest.approx(math.sqrt(3) * 1e30)


def test_s4_a_norm_at_the_limit_is_accepted_as_it_is(check: Any) -> None:
    for policy in ("reject", "clip"):
        found = check(bundle.encode(update()), Asked(ASKED.update, limits=Limits(1e6, 5.0, policy)))
        assert isinstance(found, Accepted)
        assert found.clipped is None


def content_of(found: Accepted) -> bytes:
    assert found.clipped is not None
    clipped = found.clipped.content
    content = clipped.read_bytes() if isinstance(clipped, Path) else clipped
    assert found.clipped.object == bundle.Object(hashlib.sha256(content).digest(), len(content))
    return content


def test_s4_clipping_shortens_the_difference_and_leaves_the_rest(check: Any) -> None:
    sent = update()
    found = check(bundle.encode(sent), Asked(ASKED.update, limits=Limits(1e6, 1.0, "clip")))
    assert isinstance(found, Accepted)
    assert found.norm == 5.0
    clipped = bundle.decode(content_of(found))
    assert torch.allclose(clipped.pop("vectors/delta"), torch.tensor([0.6, 0.8, 0.0]))
    del sent["vectors/delta"]
    assert all(torch.equal(clipped[name], value) for name, value in sent.items())
    assert clipped.keys() == sent.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_s4_clipping_works_at_any_size_and_type(check: Any, dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 200_003).to(dtype)
    tensors = {"vectors/control": torch.ones(70_001), "vectors/delta": values, "z": torch.ones(3).bool()}
    asked = Asked(bundle.specs_of(tensors), 1 << 30, Limits(1e6, 2.0, "clip"))
    found = check(bundle.encode(tensors), asked)
    assert isinstance(found, Accepted)
    clipped = bundle.decode(content_of(found))
    assert found.norm == pytest.approx(float(values.double().norm()), rel=1e-12)
    expected = values.double() * (2.0 / found.norm)
    assert torch.equal(clipped["vectors/delta"], expected.to(dtype))
    assert torch.equal(clipped["vectors/control"], tensors["vectors/control"])
    assert torch.equal(clipped["z"], tensors["z"])


def test_s4_a_norm_that_no_float_can_hold_is_rejected_even_where_others_are_clipped(check: Any) -> None:
    content, specs = long(1.7e308, torch.float64)
    found = check(content, Asked(specs, limits=Limits(1e6, 1.0, "clip")))
    assert reason_of(found) == "norm"


def test_s4_the_clipped_copy_of_a_file_lies_where_the_caller_wants_it(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    content = bundle.encode(update())
    source = tmp_path / "update"
    source.write_bytes(content)
    asked = Asked(ASKED.update, limits=Limits(1e6, 1.0, "clip"))
    found = validate(asked, body_of(content), source, scratch=tmp_path / "scratch")
    assert isinstance(found, Accepted)
    assert found.clipped is not None
    assert [found.clipped.content] == list((tmp_path / "scratch").iterdir())
    assert source.read_bytes() == content
    with pytest.raises(EnvironmentProblem):
        validate(asked, body_of(content), source, scratch=tmp_path / "none")


def test_s4_a_strategy_without_a_difference_is_measured_by_its_first_vector(check: Any) -> None:
    tensors = {"vectors/shifted": torch.full((4,), 3.0), "vectors/z": torch.full((4,), 1e9)}
    asked = Asked(bundle.specs_of(tensors), limits=Limits(max_norm=5.0))
    found = check(bundle.encode(tensors), asked)
    assert reason_of(found) == "norm"
    assert found.norm == 6.0


def test_an_update_without_vectors_has_no_length(check: Any) -> None:
    tensors = {"scalars/n": torch.tensor(3.0)}
    found = check(bundle.encode(tensors), Asked(bundle.specs_of(tensors), limits=Limits(max_norm=1.0)))
    assert isinstance(found, Accepted)
    assert found.norm == 0.0


# S5 (the header reader has its own tests) and S8


def pickled() -> bytes:
    return pickle.dumps({"vectors/delta": np.zeros(3)})


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save(update(), buffer)
    assert zipfile.is_zipfile(buffer)
    return buffer.getvalue()


def saved_by_numpy() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, delta=np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(8),
        (1 << 30).to_bytes(8, "little") + b"{}",
        bundle.encode(update())[:-1],
        bundle.encode(update()) + b"\0",
        bundle.encode(update()).replace(b'"shape":[3]', b'"shape":[9]', 1),
        bundle.encode(update()).replace(b'"shape":[3]', b'"shape":[-]', 1),
        bundle.encode(update()).replace(b"vectors/control", b"buffers/integer"),
        b"\xff" * 64,
        pickled(),
        torch_zip(),
        saved_by_numpy(),
        b"<html>",
    ],
    ids=[
        "empty", "zeros", "header of 1 GB", "cut", "longer", "shape", "no number", "renamed", "ones",
        "pickle", "torch zip", "npz", "html",
    ],
)  # fmt: skip
def test_s5_s8_what_is_no_bundle_is_rejected_whatever_else_it_may_be(check: Any, content: bytes) -> None:
    assert reason_of(check(content)) == "schema"


def test_s8_nothing_of_a_pickle_is_ever_executed(check: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (trace,))

    assert reason_of(check(pickle.dumps(Trap()))) == "schema"
    assert not trace.exists()


# Sizes and digest


def test_an_update_above_the_size_of_the_task_is_rejected_unread(check: Any) -> None:
    content = bundle.encode(update())
    asked = Asked(ASKED.update, max_update_bytes=len(content) - 1)
    found = check(content, asked)
    assert reason_of(found) == "schema"
    assert f"{len(content)} bytes" in found.text
    assert reason_of(check(content, update=pb.Object(digest=bytes(32), size=2**63))) == "schema"


def test_bytes_that_are_not_those_that_were_signed_are_rejected(check: Any) -> None:
    content = bundle.encode(update())
    other = pb.Object(digest=bytes(32), size=len(content))
    assert reason_of(check(content, update=other)) == "digest"
    shorter = pb.Object(digest=hashlib.sha256(content).digest(), size=len(content) - 1)
    assert reason_of(check(content, update=shorter)) == "digest"


def test_what_the_receiver_hashed_itself_is_not_hashed_again_but_compared(tmp_path: Path) -> None:
    content = bundle.encode(update())
    path = tmp_path / "update"
    path.write_bytes(content)
    known = bundle.Object(hashlib.sha256(content).digest(), len(content))
    assert isinstance(validate(ASKED, body_of(content), path, known=known), Accepted)
    wrong = known._replace(digest=bytes(32))
    assert reason_of(validate(ASKED, body_of(content), path, known=wrong)) == "digest"


def test_the_cheap_checks_come_first(check: Any) -> None:
    """Everything is wrong at once; each correction shows the next check in the order of the specification."""
    bad = torch.full((3,), math.nan)
    unlike = bundle.encode(update() | {"vectors/delta": bad.double()})
    alike = bundle.encode(update() | {"vectors/delta": bad})
    long_one = bundle.encode(update())
    tight = Asked(ASKED.update, limits=Limits(max_norm=1.0))
    other = pb.Object(digest=bytes(32), size=len(alike))
    assert reason_of(check(unlike, tight, examples=0, update=pb.Object(size=len(unlike)))) == "schema"
    assert reason_of(check(alike, tight, examples=0, update=other)) == "weight"
    assert reason_of(check(alike, tight, update=other)) == "digest"
    assert reason_of(check(alike, tight)) == "non_finite"
    assert reason_of(check(long_one, tight)) == "norm"
    assert isinstance(check(long_one), Accepted)


def test_a_file_that_is_gone_says_nothing_about_the_update(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem) as found:
        validate(ASKED, body_of(bundle.encode(update())), tmp_path / "none")
    assert found.value.code == "FS-ENV-024"


# S18


def test_s18_256_metrics_are_taken_and_one_more_is_rejected(check: Any) -> None:
    metrics = {f"m{i}": float(i) for i in range(256)}
    content = bundle.encode(update())
    assert isinstance(check(content, metrics=metrics), Accepted)
    assert reason_of(check(content, metrics=metrics | {"one": 1.0})) == "policy"


def test_s18_a_flood_of_metrics_is_rejected(check: Any) -> None:
    metrics = {f"m{i}": 0.0 for i in range(100_000)}
    assert reason_of(check(bundle.encode(update()), metrics=metrics)) == "policy"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_s18_any_value_of_a_metric_is_taken(check: Any, value: float) -> None:
    assert isinstance(check(bundle.encode(update()), metrics={"loss": value}), Accepted)


@pytest.mark.parametrize("name", ["loss", "eval/top-5", "a.b_c:d", "f1@10", "error %", "9"])
def test_s18_ordinary_names_of_metrics_are_taken(check: Any, name: str) -> None:
    assert isinstance(check(bundle.encode(update()), metrics={name: 1.0}), Accepted)


HARMFUL = ["", " loss", "-rf", "../x", "a\x00", "a\r\nb", "\x1b[31mred", "loss\n", "<b>", "\u202eabc", "é"]


@pytest.mark.parametrize("name", [*HARMFUL, "n" * 129], ids=ascii)
def test_s18_names_that_could_harm_a_reader_are_rejected(check: Any, name: str) -> None:
    assert reason_of(check(bundle.encode(update()), metrics={name: 1.0})) == "policy"


def test_s18_metrics_with_too_many_bytes_are_rejected(check: Any) -> None:
    metrics = {f"{i:0300d}": 0.0 for i in range(250)}
    found = check(bundle.encode(update()), metrics=metrics)
    assert reason_of(found) == "policy"
    assert "65536 bytes" in found.text
