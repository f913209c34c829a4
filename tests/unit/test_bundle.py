"""Tensor bundles: canonical to write, true to what was written, bounded in memory."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from fedsim import bundle, bundle_check
from fedsim.bundle import DTYPES, BundleError, TensorSpec
from fedsim.errors import EnvironmentProblem
from tests.bundles import FLOATS, every_type, framed, read, tensor

# Writing.


def test_the_bytes_are_those_that_the_library_writes() -> None:
    tensors = {name: t.contiguous() for name, t in every_type().items()}
    assert bundle.encode(tensors) == safetensors.torch.save(tensors)


def test_equal_content_gives_equal_bytes_whatever_the_order_and_the_layout() -> None:
    tensors = every_type()
    metadata = {"fedsim.kind": "update", "a": "b"}
    first = bundle.encode(tensors, metadata)
    backwards = {name: tensors[name] for name in reversed(tensors)}
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] if t.numel() else t for name, t in backwards.items()}
    assert bundle.encode(strided, dict(reversed(metadata.items()))) == first
    assert read(first).metadata == metadata


def test_views_that_share_memory_or_are_not_contiguous_are_written_as_what_they_show() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "same": base,
        "columns": base[:, ::2],
        "transposed": base.t(),
        "one row three times": base[0].expand(3, 4),
        "negated without a copy": torch.complex(base, base).conj().imag,
    }
    for name, found in bundle.decode(bundle.encode(tensors)).items():
        assert torch.equal(found, tensors[name]), name


@pytest.mark.parametrize("block", [16, 64, 8 << 20])
def test_a_file_holds_the_same_bytes_and_its_digest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(bundle, "_COPY_BYTES", block)
    cube = torch.arange(120.0).reshape(4, 5, 6)
    tensors = every_type() | {"cube": cube.permute(2, 0, 1), "strided": torch.arange(99.0)[::3]}
    content = bundle.encode(tensors)
    path = tmp_path / "update.safetensors"
    written = bundle.encode_to(path, tensors)
    assert path.read_bytes() == content
    assert written == bundle.Object(hashlib.sha256(content).digest(), len(content))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_tensor_that_must_be_copied_is_copied_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_COPY_BYTES", 64)
    wide = torch.arange(400.0).reshape(4, 100).t()
    pieces = list(bundle._pieces(wide, 64))
    assert max(map(len, pieces)) <= 64
    assert b"".join(pieces) == wide.contiguous().numpy().tobytes()


def test_writing_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "update.safetensors"
    path.write_bytes(b"old")

    def breaking() -> Any:
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentProblem) as found:
        bundle.write_pieces(path, breaking())
    assert found.value.code == "FS-ENV-021"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(EnvironmentProblem) as found:
        bundle.encode_to(tmp_path / "no folder" / "x", {})
    assert found.value.code == "FS-ENV-020"


@pytest.mark.parametrize(
    "tensors",
    [
        {"complex": torch.zeros(2, dtype=torch.complex64)},
        {"sparse": torch.zeros(2, 2).to_sparse()},
        {"meta": torch.zeros(2, device="meta")},
        {"": torch.zeros(2)},
        {"n" * 257: torch.zeros(2)},
        {"escape \x1b[31m": torch.zeros(2)},
        {"half a pair \ud800": torch.zeros(2)},
        {"__metadata__": torch.zeros(2)},
        {"rank 9": torch.zeros([1] * 9)},
    ],
    ids=lambda tensors: ascii(next(iter(tensors)))[:20],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(BundleError):
        bundle.encode(tensors)
    with pytest.raises(BundleError):
        bundle.encode_to(tmp_path / "x", tensors)
    assert not list(tmp_path.iterdir())


# Reading.


def test_every_type_scalars_and_empty_tensors_come_back(tmp_path: Path) -> None:
    tensors = every_type()
    content = bundle.encode(tensors)
    (tmp_path / "b").write_bytes(content)
    sources = [bundle.decode(content), bundle.decode(bytearray(content)), bundle.decode_file(tmp_path / "b")]
    for found in sources:
        assert set(found) == set(tensors)
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)


def test_an_empty_bundle_and_one_of_empty_tensors_are_legal(tmp_path: Path) -> None:
    assert bundle.decode(bundle.encode({})) == {}
    content = bundle.encode({"a": torch.zeros(0), "b": torch.zeros(3, 0, dtype=torch.int16)})
    (tmp_path / "b").write_bytes(content)
    for found in (bundle.decode(content), bundle.decode_file(tmp_path / "b")):
        assert {name: tuple(t.shape) for name, t in found.items()} == {"a": (0,), "b": (3, 0)}


def test_a_change_of_a_decoded_tensor_reaches_neither_bytes_nor_file(tmp_path: Path) -> None:
    content = bundle.encode({"a": torch.ones(4)})
    path = tmp_path / "b"
    path.write_bytes(content)
    kept = bytes(bytearray(content))
    bundle.decode(content)["a"].zero_()
    bundle.decode_file(path)["a"].zero_()
    assert content == kept
    assert path.read_bytes() == kept


def test_memory_that_may_be_written_is_viewed_not_copied() -> None:
    content = bytearray(bundle.encode({"a": torch.ones(4)}))
    bundle.decode(content)["a"].zero_()
    assert bundle.decode(content)["a"].tolist() == [0, 0, 0, 0]


def test_tensors_that_are_not_aligned_are_copied() -> None:
    values = np.arange(4, dtype="<f4").tobytes()
    table = {"bytes": tensor("U8", [1], [0, 1]), "floats": tensor("F32", [4], [1, 17])}
    found = bundle.decode(bytearray(framed(table, b"\x07" + values)))
    assert found["floats"].tolist() == [0, 1, 2, 3]
    assert found["floats"].data_ptr() % 4 == 0


def test_the_header_is_read_from_a_file_that_gives_few_bytes_at_a_time() -> None:
    content = bundle.encode(every_type(), {"kind": "x"})

    class Slow(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:3])

    assert bundle.read_header(Slow(content), len(content)) == read(content)
    with pytest.raises(BundleError, match="FS-WIR-001"):
        bundle.read_header(Slow(content[:40]), len(content))


def test_the_header_alone_suffices_when_the_size_is_known() -> None:
    content = bundle.encode({"a": torch.ones(1000)})
    header = read(content)
    assert bundle.read_header(content[: header.body], len(content)) == header


def test_metadata_and_other_tensors_do_not_mix() -> None:
    header = read(framed({"__metadata__": {"x": "1"}, "a": tensor()}, bytes(8)))
    assert [entry.name for entry in header.entries] == ["a"]
    assert header.metadata == {"x": "1"}


# The schema.


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ([("a", "F32", (2,)), ("b", "I64", ())], None),
        ([("b", "I64", ()), ("a", "F32", (2,))], None),
        ([("a", "F32", (2,))], "tensor 'b' does not belong there"),
        ([("c", "F32", (2,)), ("a", "F32", (2,)), ("b", "I64", ())], "tensor 'c' is missing"),
        ([("a", "F64", (2,)), ("b", "I32", ())], "tensor 'a' is F32, it must be F64"),
        ([("b", "I64", (1,)), ("a", "F64", (2,))], "tensor 'b' has shape [], not [1]"),
        ([("a", "F32", (2, 1)), ("b", "I64", ())], "tensor 'a' has shape [2], not [2, 1]"),
    ],
)
def test_the_schema_is_compared_by_name_and_the_first_difference_is_named(
    wanted: list[tuple[str, str, tuple[int, ...]]], reason: str | None
) -> None:
    header = read(bundle.encode({"a": torch.zeros(2), "b": torch.tensor(1)}))
    schema = [TensorSpec(*each) for each in wanted]
    if reason is None:
        bundle.check_schema(header, schema)
    else:
        with pytest.raises(BundleError) as found:
            bundle.check_schema(header, schema)
        assert found.value.reason == reason


# Values.


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 70_000, 199_999])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    tmp_path: Path, code: str, value: float, place: int
) -> None:
    bad = torch.ones(200_000, dtype=DTYPES[code])
    bad[place] = value
    content = bundle.encode({"a": torch.ones(3), "bad": bad, "integers": torch.ones(3, dtype=torch.int64)})
    (tmp_path / "b").write_bytes(content)
    assert bundle.first_not_finite(content) == "bad"
    assert bundle.first_not_finite(tmp_path / "b") == "bad"


@pytest.mark.parametrize("code", FLOATS)
def test_every_finite_value_passes(code: str) -> None:
    info = torch.finfo(DTYPES[code])
    values = [0.0, -0.0, info.max, info.min, info.tiny, info.smallest_normal / 2, -1.0]
    content = bundle.encode({"a": torch.tensor(values, dtype=DTYPES[code]).repeat(40_000)})
    assert bundle.first_not_finite(content) is None


@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_all_words_of_sixteen_bits_are_judged_as_torch_judges_them(code: str) -> None:
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    finite = torch.isfinite(words.view(DTYPES[code])).tolist()
    judged = [not bundle_check.is_bad(code, iter([memoryview(word.tobytes())])) for word in words.numpy()]
    assert judged == finite


def test_integers_that_look_like_a_nan_are_no_nan() -> None:
    pattern = torch.full((4,), 0x7FC0_0000, dtype=torch.int32)
    assert bundle.first_not_finite(bundle.encode({"a": pattern})) is None


def test_a_truth_value_other_than_0_and_1_is_refused(tmp_path: Path) -> None:
    content = framed({"flags": tensor("BOOL", [3], [0, 3])}, b"\x00\x01\x02")
    (tmp_path / "b").write_bytes(content)
    assert bundle.first_not_finite(content) == "flags"
    for attempt in (lambda: bundle.decode(content), lambda: bundle.decode_file(tmp_path / "b")):
        with pytest.raises(BundleError, match="truth value"):
            attempt()


@pytest.mark.parametrize("code", FLOATS)
def test_the_norm_is_that_of_the_values(tmp_path: Path, code: str) -> None:
    values = torch.randn(150_001, generator=torch.Generator().manual_seed(1)).to(DTYPES[code])
    content = bundle.encode({"a": values})
    header = read(content)
    found = bundle_check.norm(content, header, header.entries[0])
    assert found == pytest.approx(float(values.double().norm()), rel=1e-12)
    (tmp_path / "b").write_bytes(content)
    with (tmp_path / "b").open("rb") as file:
        assert bundle_check.norm(file, header, header.entries[0]) == found


@pytest.mark.parametrize(
    ("values", "norm"),
    [
        (torch.full((4,), 3e38), 6e38),
        (torch.full((4,), 1e200, dtype=torch.float64), 2e200),
        (torch.full((4,), 1.7e308, dtype=torch.float64), math.inf),
        (torch.zeros(4), 0.0),
        (torch.zeros(0), 0.0),
    ],
)
def test_the_norm_of_huge_values_does_not_overflow_before_it_must(values: torch.Tensor, norm: float) -> None:
    content = bundle.encode({"a": values})
    header = read(content)
    assert bundle_check.norm(content, header, header.entries[0]) == pytest.approx(norm)


def test_a_file_that_is_gone_is_a_problem_of_the_machine(tmp_path: Path) -> None:
    for reader in (bundle.decode_file, bundle.first_not_finite):
        with pytest.raises(EnvironmentProblem) as found:
            reader(tmp_path / "none")
        assert found.value.code == "FS-ENV-024"


def test_a_released_file_is_read_again_without_what_was_changed(tmp_path: Path) -> None:
    values = torch.arange(10_000, dtype=torch.float32)
    bundle.encode_to(tmp_path / "b", {"a": values})
    tensors, release = bundle.map_file(tmp_path / "b")
    tensors["a"].zero_()
    release()
    assert torch.equal(tensors["a"], values)
