from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedsim.errors import ConfigError, EnvironmentProblem, ModelError
from fedsim.runs.export import export
from fedsim.runs.folder import RunFolder

MakeRun = Callable[..., RunFolder]
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")),
    reason="needs fedsim[onnx]",
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


@pytest.fixture
def run(make_run: MakeRun) -> RunFolder:
    folder = make_run()
    folder.save_model(model().state_dict(), "final")
    return folder


def test_pytorch_loads_the_export_with_weights_only(run: RunFolder) -> None:
    state, safe = export(run, "torch")
    assert (state.name, safe.name) == ("final.pt", "final.safetensors")
    assert state.parent == run.path / "exports"
    other = model()
    other.load_state_dict(torch.load(state, weights_only=True))
    wanted = model().state_dict()
    for loaded in (other.state_dict(), load_file(safe)):
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_numpy_loads_the_export_without_pickle(run: RunFolder, tmp_path: Path) -> None:
    (path,) = export(run, "numpy", out=tmp_path / "new" / "folder")
    arrays = np.load(path, allow_pickle=False)
    for name, tensor in model().state_dict().items():
        assert arrays[name].dtype == tensor.numpy().dtype
        assert np.array_equal(arrays[name], tensor.numpy()), name


def test_numpy_gets_tensors_of_any_name_and_type(make_run: MakeRun) -> None:
    run = make_run()
    run.save_model({"file": torch.ones(2), "half": torch.ones(2, dtype=torch.bfloat16)}, "final")
    first = export(run, "numpy")[0].read_bytes()
    arrays = np.load(run.path / "exports/final.npz", allow_pickle=False)
    assert arrays["file"].tolist() == [1.0, 1.0]
    assert arrays["half"].dtype == np.float32
    assert export(run, "numpy")[0].read_bytes() == first


def test_exports_do_not_count_as_changes_of_a_run(run: RunFolder) -> None:
    run.digest_files()
    export(run, "torch")
    assert run.changed_files() == {}


def test_another_form_is_an_error_that_lists_the_known_ones(run: RunFolder) -> None:
    with pytest.raises(ConfigError) as caught:
        export(run, "keras")
    assert caught.value.code == "FS-CFG-092"
    assert "torch, onnx, numpy" in (caught.value.hint or "")


def test_a_checkpoint_that_is_not_there_writes_nothing(run: RunFolder) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        export(run, "torch", checkpoint="best")
    assert caught.value.code == "FS-ENV-026"
    assert not (run.path / "exports").exists()


def test_an_export_into_a_place_that_cannot_be_written_is_an_error(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem) as caught:
        export(run, "numpy", out=tmp_path / "file")
    assert caught.value.code == "FS-ENV-020"


def test_without_the_extra_the_error_names_it_and_nothing_is_written(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    monkeypatch.delitem(sys.modules, "onnxscript", raising=False)
    with pytest.raises(EnvironmentProblem) as caught:
        export(run, "onnx", module=model(), example=torch.zeros(1, 1, 8, 8))
    assert caught.value.code == "FS-ENV-027"
    assert caught.value.hint == "pip install 'fedsim[onnx]'"
    assert "onnxscript" in (caught.value.why or "")
    assert not (run.path / "exports").exists()


@needs_onnx
def test_onnx_computes_what_the_model_computes_for_any_batch(run: RunFolder) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    (path,) = export(run, "onnx", module=model(), example=torch.zeros(1, 1, 8, 8))
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    for batch in (1, 5):
        inputs = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        wanted = model().eval()(inputs).detach().numpy()
        got = np.asarray(ReferenceEvaluator(graph).run(None, {"input": inputs.numpy()})[0])
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@needs_onnx
def test_a_model_that_onnx_cannot_express_is_an_error(run: RunFolder) -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w if float(x.sum()) > 0 else x.flip(0)[: int(x.abs().sum())]

    run.save_model({"w": torch.zeros(1)}, "final")
    with pytest.raises(ModelError) as caught:
        export(run, "onnx", module=Deciding(), example=torch.ones(2, 3))
    assert caught.value.code == "FS-MOD-038"
    assert not list((run.path / "exports").glob("*.onnx"))
