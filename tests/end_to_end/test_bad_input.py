"""Mistakes of users and of machines: one screen, the right exit code, nothing half-written."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import SMALL, assert_told, config, fedsim, only_run, records

resource = pytest.importorskip("resource", reason="limits on file sizes need POSIX")

TABLE = """
[run]
rounds = 2
[data]
name = "tabular"
path = "table.csv"
target = "label"
client = "site"
task = "regression"
standardise = false
test_fraction = 0.0
[data.partition]
kind = "natural"
[model]
name = "logistic"
[client]
epochs = 1
[round]
sample = "all"
[evaluation]
clients = "never"
[output]
plots = false
"""

MODELS = """
from torch import nn


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(600, 5)

    def forward(self, inputs):
        return self.head(inputs.flatten(1))
"""


def write_table(folder: Path, *, cell: str | None = None, scale: float = 1.0) -> None:
    """Eighty rows of five sites; `cell` in row 38, and site c3 measured in a unit `scale` times finer."""
    draw = np.random.default_rng(0)
    lines = ["a,b,label,site"]
    for row in range(80):
        a, b, label = draw.normal(size=3)
        factor = scale if row % 5 == 3 else 1.0
        first = cell if cell is not None and row == 37 else f"{a * factor:.6g}"
        lines.append(f"{first},{b * factor:.6g},{label:.6g},c{row % 5}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")


def at_most(size: int) -> Callable[[], None]:
    """For a child process: no file larger than `size` bytes, as on a disk that is full."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize(
    ("assignment", "code", "naming"),
    [
        ("data.partition.alhpa=0.3", "FS-CFG-004", ("did you mean `alpha`?", "[data.partition]")),
        ("run.rounds=many", "FS-CFG-005", ("run.rounds", "whole number")),
        ("round.sample=99", "FS-CFG-061", ("[round] sample = 99", "8 are registered")),
        ("engine.name=fast", "FS-REG-001", ("[engine]", "fused, stacked, flat, loop")),
    ],
)
def test_a_mistake_in_the_configuration_names_the_key_and_the_remedy(
    tmp_path: Path, assignment: str, code: str, naming: tuple[str, ...]
) -> None:
    text = SMALL.replace('kind = "iid"', "")
    ended = fedsim(tmp_path, "run", config(tmp_path, text), "--set", assignment)
    assert_told(ended, code=code, exit_code=2, naming=naming)
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_a_file_is_told_with_the_file(tmp_path: Path) -> None:
    ended = fedsim(tmp_path, "run", config(tmp_path, SMALL.replace("sample", "sampel")))
    assert_told(ended, code="FS-CFG-004", exit_code=2, naming=("fedsim.toml", "did you mean `sample`?"))


def test_clients_left_empty_are_counted_and_refused(tmp_path: Path) -> None:
    text = SMALL.replace('kind = "iid"', 'kind = "dirichlet"\nalpha = 0.01\nmin_examples = 0')
    ended = fedsim(tmp_path, "run", config(tmp_path, text.replace("clients = 8", "clients = 300")))
    naming = ("of 300 clients have no example", "data.partition", 'on_empty = "keep"')
    assert_told(ended, code="FS-DAT-041", exit_code=2, naming=naming)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("cell", ["nan", ""])
def test_a_value_that_is_not_finite_is_named_by_row_and_column(tmp_path: Path, cell: str) -> None:
    write_table(tmp_path, cell=cell)
    ended = fedsim(tmp_path, "run", config(tmp_path, TABLE))
    assert_told(ended, code="FS-DAT-008", exit_code=2, naming=("table.csv", "row 38", "column a"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["cut", "label"])
def test_a_damaged_parquet_file_is_named_and_never_cached(tmp_path: Path, damage: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")

    def picture(value: int) -> dict[str, Any]:
        file = io.BytesIO()
        image.fromarray(np.full((8, 8), value, np.uint8)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    for split in ("train", "test"):
        labels = [i % 3 for i in range(40)]
        if split == "train" and damage == "label":
            labels[17] = -1
        table = pa.table({"image": [picture(i) for i in range(40)], "label": labels})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    train = tmp_path / "train.parquet"
    if damage == "cut":
        train.write_bytes(train.read_bytes()[:-100])
    (tmp_path / "fedsim.toml").write_text(f'[data]\nname = "image_folder"\npath = "{tmp_path}"\n')
    ended = fedsim(tmp_path, "run", environ={"FEDSIM_CACHE": str(tmp_path / "cache")})
    if damage == "cut":
        assert_told(ended, code="FS-DAT-003", exit_code=2, naming=("train.parquet", "fetch it again"))
    else:
        assert_told(ended, code="FS-DAT-007", exit_code=2, naming=("label -1", "train split, row 17"))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not (tmp_path / "runs").exists()


def test_a_model_that_does_not_fit_the_labels_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODELS)
    text = SMALL.replace('name = "logistic"', 'target = "mine:Narrow"')
    ended = fedsim(tmp_path, "run", config(tmp_path, text))
    naming = ("[2, 5]", "[2, 10]", "make the last layer 10 wide")
    assert_told(ended, code="FS-MOD-007", exit_code=2, naming=naming)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_missing_extra_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'onnxscript' else found(name, package)\n"
    )
    assert fedsim(tmp_path, "run", config(tmp_path), "--name", "a", "-q").code == 0
    run = only_run(tmp_path / "runs")
    before = sorted(run.rglob("*"))
    ended = fedsim(tmp_path, "export", "a", "--to", "onnx", environ={"PYTHONPATH": str(tmp_path)})
    assert ended.code == 6, ended.err
    assert "error[FS-ENV-027]" in ended.err
    assert "pip install 'fedsim[onnx]'" in ended.err
    assert "Traceback" not in ended.err
    assert sorted(run.rglob("*")) == before


def test_a_folder_of_runs_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    ended = fedsim(tmp_path, "run", config(tmp_path), "--runs", "file/below")
    assert_told(ended, code="FS-ENV-020", exit_code=6, naming=("file/below", "--runs DIR"))
    assert "round" not in ended.out
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SMALL that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert fedsim(folder, "run", config(folder), "-q").code == 0
    return only_run(folder / "runs")


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path: Path) -> None:
    ended = fedsim(tmp_path, "run", config(tmp_path), "-q", preexec_fn=at_most(600))
    assert_told(ended, code="FS-ENV-021", exit_code=6, naming=("config.toml", "free some space"))
    assert list((tmp_path / "runs").iterdir()) == []


# The 6,010 parameters of SMALL take 24.2 kB as a model, and 25.3 kB in the state of the run.
@pytest.mark.parametrize(("limit", "file"), [(8_000, "best.safetensors"), (24_800, "run.safetensors")])
def test_a_full_disk_leaves_whole_files_and_a_run_that_resumes(
    tmp_path: Path, whole: Path, limit: int, file: str
) -> None:
    name = config(tmp_path)
    ended = fedsim(tmp_path, "run", name, "--name", "full", "-q", preexec_fn=at_most(limit))
    assert_told(ended, code="FS-ENV-021", exit_code=6, naming=(file, "free some space"))
    run = only_run(tmp_path / "runs")
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert fedsim(tmp_path, "resume", "full", "-q").code == 0
    assert records(only_run(tmp_path / "runs")) == records(whole)
    assert (run / "clients.jsonl").read_bytes() == (whole / "clients.jsonl").read_bytes()


@pytest.mark.slow
def test_a_report_that_the_disk_had_no_room_for_is_written_by_resume(tmp_path: Path) -> None:
    name = config(tmp_path, SMALL.replace("report = false", "report = true"))
    ended = fedsim(tmp_path, "run", name, "--name", "full", "-q", preexec_fn=at_most(30_000))
    assert_told(ended, code="FS-ENV-021", exit_code=6, naming=("plots",))
    run = only_run(tmp_path / "runs")
    assert len(records(run)) == 4
    assert not (run / "report.html").exists()
    assert fedsim(tmp_path, "resume", "full").code == 0
    assert (run / "report.html").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_full_output_is_an_error_and_no_traceback(tmp_path: Path, form: str) -> None:
    with open("/dev/full", "w") as full:
        ended = fedsim(tmp_path, "ls", "--format", form, stdout=full)
    assert ended.code == 6, ended.err
    assert "Traceback" not in ended.err
    assert "error[FS-ENV-004]" in ended.err


def test_a_client_whose_update_is_not_finite_is_refused_counted_and_named(tmp_path: Path) -> None:
    write_table(tmp_path, scale=1e30)
    ended = fedsim(tmp_path, "run", config(tmp_path, TABLE))
    assert ended.code == 0, ended.err
    assert "client 3: refused, the update is not finite, rounds 1, 2" in ended.out
    run = only_run(tmp_path / "runs")
    assert [(r["received"], r["refused"]) for r in records(run)[1:]] == [(4, 1), (4, 1)]
    named = [json.loads(line) for line in (run / "clients.jsonl").read_text().splitlines()]
    refused = {(c["client"], c["reason"]) for c in named if c["verdict"] == "refused"}
    assert refused == {(3, "the update is not finite")}
    assert "the update is not finite" in (run / "report.html").read_text()


def test_rounds_whose_answers_were_all_refused_end_the_run_loudly(tmp_path: Path) -> None:
    write_table(tmp_path, scale=1e30)
    text = TABLE.replace('sample = "all"', 'sample = 1\n[sampler]\nname = "listed"\nclients = [3]')
    ended = fedsim(tmp_path, "run", config(tmp_path, text), "--format", "json")
    assert_told(ended, code="FS-RUN-003", exit_code=1, naming=("not finite", "[client] lr"))
    assert ended.document["status"] == "error"
    assert ended.document["data"]["outcome"] == "failed"
    assert ended.document["data"]["not_counted"] == {"refused": 3}


def test_a_run_that_skipped_every_one_of_its_rounds_is_no_success(tmp_path: Path) -> None:
    write_table(tmp_path, scale=1e30)
    text = TABLE.replace(
        'sample = "all"',
        'sample = 1\non_failed = "skip"\nmax_failed = 2\n[sampler]\nname = "listed"\nclients = [3]',
    )
    ended = fedsim(tmp_path, "run", config(tmp_path, text.replace("rounds = 2", "rounds = 5")))
    assert ended.code == 1, ended.out
    assert "FS-RUN-003" in ended.err
