"""Image files made on the spot, a cache of the tests' own, and the real data where there are any."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

WriteParquet = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the cache of whoever runs it."""
    place = tmp_path / "cache-of-this-test"
    monkeypatch.setenv("FEDSIM_CACHE", str(place))
    return place


@pytest.fixture(scope="session")
def real_data() -> Path:
    named = os.environ.get("FEDSIM_TEST_DATA")
    place = Path(named) if named else Path(__file__).parents[4] / "shared" / "data"
    if not place.is_dir():
        pytest.skip("no real data: set FEDSIM_TEST_DATA to a folder with mnist/, cifar10/, …")
    return place


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def write_parquet() -> WriteParquet:
    """Write images and labels the way the hub's tools do."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(
        file: Path,
        images: list[np.ndarray | bytes | None],
        labels: list[int | None],
        *,
        image: str = "image",
        label: str = "label",
        names: list[str] | None = None,
        extra: dict[str, list[object]] | None = None,
        described: bool = True,
    ) -> Path:
        contents = [encoded(i) if isinstance(i, np.ndarray) else i for i in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns: dict[str, object] = {
            image: pa.array([{"bytes": c, "path": None} for c in contents], type=kind),
            label: pa.array(labels, type=pa.int64()),
            **(extra or {}),
        }
        table = pa.table(columns)
        if described:
            features = {
                image: {"_type": "Image"},
                label: {"_type": "ClassLabel", **({"names": names} if names else {})},
            }
            note = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": note})
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)
        return file

    return write


@pytest.fixture
def grey() -> Callable[..., list[np.ndarray]]:
    """Different grey images; PNG keeps them exactly."""

    def make(count: int, *, size: int = 6, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return list(rng.integers(0, 256, (count, size, size), dtype=np.uint8))

    return make
