"""`fedsim.simulate` and `fedsim.Simulation` as a user's program calls them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedsim
from fedsim.config import load_config
from fedsim.errors import ConfigError, DataError, EnvironmentProblem, FedsimError, QuorumNotReached
from fedsim.opaque_client import LocalData, LocalTask
from fedsim.runs.folder import RunFolder
from fedsim.runs.lines import Record
from fedsim.simulation.session import Session, execute, resume
from fedsim.transform import Observed, UpdateTransform
from tests.processes import script

QUIET = {"output": {"report": False, "plots": False}}
CLIENTS, FEATURES, CLASSES = 6, 5, 3


class Net(nn.Module):
    """A user's own model, with a layer that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(torch.relu(self.hidden(inputs))))
        return logits


def arrays(count: int = 120) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Inputs [n, F], labels [n] that the inputs decide, names of the owners [n]."""
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(count, FEATURES)).astype(np.float32)
    labels = (inputs @ draw.normal(size=(FEATURES, CLASSES))).argmax(1)
    return inputs, labels, [f"site {i % CLIENTS}" for i in range(count)]


@pytest.fixture(scope="module")
def data() -> fedsim.FederatedData:
    inputs, labels, owners = arrays()
    return fedsim.from_arrays(inputs, labels, client_ids=owners, test=(inputs[:40], labels[:40]))


def simulation(data: Any, **changes: Any) -> fedsim.Simulation:
    settings: dict[str, Any] = {
        "model": Net, "data": data, "rounds": 4, "sample": 3,
        "client": {"epochs": 1, "batch_size": 8, "lr": 0.2},
    }  # fmt: skip
    return fedsim.Simulation(**(settings | changes))


def untimed(records: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


def test_ten_lines_on_standard_input_train_and_print(tmp_path: Path) -> None:
    # Without a file there is no main module to import again: nothing may start other processes.
    text = (
        "import fedsim\n"
        "data = fedsim.data.load('synthetic', clients=4, examples=40).split('iid', clients=4)\n"
        "run = fedsim.simulate(data=data, model='logistic', rounds=2, sample=2)\n"
        "print(run.path.is_dir(), run.best('accuracy') > 0)\n"
        "for record in fedsim.Simulation(data=data, model='logistic', rounds=1, sample=2):\n"
        "    print(record['round'])\n"
        "\n"
    )
    for options in ((), ("-i", "-q")):
        ended = script(tmp_path, text, *options)
        assert ended.code == 0, ended.err
        assert ended.out.split() == ["True", "True", "0", "1"], ended.err


def test_an_instance_a_class_and_a_function_are_models_and_the_instance_is_not_touched(
    data: fedsim.FederatedData,
) -> None:
    torch.manual_seed(0)
    instance = Net().eval()
    before = {name: value.clone() for name, value in instance.state_dict().items()}
    accuracies = []
    for model in (instance, Net, lambda: Net(), lambda classes: nn.Linear(FEATURES, classes)):
        sim = simulation(data, model=model, sections={"engine": {"dtype": "float64"}})
        accuracies.append(list(sim)[-1]["accuracy"])
    assert min(accuracies) > 0.5
    assert accuracies[1] == accuracies[2]
    for name, value in instance.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert not instance.training


def test_one_data_set_per_client_is_as_good_as_arrays_with_owners(data: fedsim.FederatedData) -> None:
    inputs, labels, _ = arrays()
    sets = [
        TensorDataset(torch.from_numpy(inputs[i::CLIENTS]), torch.from_numpy(labels[i::CLIENTS]))
        for i in range(CLIENTS)
    ]
    own = fedsim.from_datasets(sets)
    assert own.sizes.tolist() == data.sizes.tolist()
    a, b = (list(simulation(d, engine="loop", sample="all")) for d in (own, data))
    assert [r["train_loss"] for r in a[1:]] == [r["train_loss"] for r in b[1:]]


@pytest.mark.parametrize(
    "argument",
    [
        {"data": [1, 2, 3]},
        {"strategy": 3},
        {"strategy": fedsim.make_strategy},
        {"engine": "fast"},
        {"client": lambda model, data, task: None},
    ],
    ids=["data", "strategy", "factory", "engine", "client"],
)
def test_an_argument_of_another_kind_is_refused_and_never_replaced_by_a_default(
    data: fedsim.FederatedData, argument: dict[str, Any]
) -> None:
    with pytest.raises(FedsimError, match=next(iter(argument))):
        simulation(**({"data": data} | argument))


def test_a_list_of_datasets_is_not_silently_the_default_data() -> None:
    inputs, labels, _ = arrays()
    own = [TensorDataset(torch.from_numpy(inputs[i::4]), torch.from_numpy(labels[i::4])) for i in range(4)]
    try:
        sim = fedsim.Simulation(data=own, model=Net, sample=2, rounds=1)
    except (ConfigError, DataError):
        return
    assert sim.data.clients == 4
    assert sim.data.dataset.input_shape == (FEATURES,)


def test_own_data_with_mistakes_are_refused_with_their_place() -> None:
    inputs, labels, owners = arrays()
    holed = inputs.copy()
    holed[3, 2] = np.nan
    with pytest.raises(DataError, match="not a finite number") as found:
        fedsim.from_arrays(holed, labels, client_ids=owners)
    assert found.value.code == "FS-DAT-008"
    assert "row 3, column [2]" in str(found.value.where)
    with pytest.raises(DataError) as found:
        fedsim.from_arrays(inputs, labels, client_ids=owners, classes=2)
    assert found.value.code == "FS-DAT-007"
    with pytest.raises(DataError) as found:
        fedsim.from_arrays(inputs, labels, client_ids=owners[:-1])
    assert found.value.code == "FS-DAT-022"


def test_a_loop_that_breaks_goes_on_where_it_stopped(data: fedsim.FederatedData) -> None:
    whole = untimed(simulation(data))
    sim, seen = simulation(data), []
    for record in sim:
        seen.append(record)
        if record["round"] == 2:
            break
    seen.extend(sim)
    assert untimed(seen) == whole
    assert list(sim) == []


@pytest.mark.parametrize("engine", ["loop", "stacked"])
def test_two_simulations_in_turns_give_the_numbers_of_each_alone(
    data: fedsim.FederatedData, engine: str
) -> None:
    def make() -> tuple[fedsim.Simulation, fedsim.Simulation]:
        return (
            simulation(data, engine=engine, seed=1),
            simulation(data, engine=engine, seed=2, strategy="scaffold", sample=5),
        )

    alone = [untimed(sim) for sim in make()]
    turns: list[list[dict[str, Any]]] = [[], []]
    for pair in zip(*make(), strict=True):
        torch.manual_seed(99)  # what the program draws in between is no business of theirs
        np.random.rand()
        for kept, record in zip(turns, pair, strict=True):
            kept.append(record)
    assert [untimed(kept) for kept in turns] == alone


@pytest.mark.parametrize("engine", ["loop", "stacked"])
def test_a_simulation_leaves_the_generators_of_the_program_alone(
    data: fedsim.FederatedData, engine: str
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first = untimed(simulation(data, engine=engine))
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]
    torch.manual_seed(6)
    assert untimed(simulation(data, engine=engine)) == first


@fedsim.opaque
def own_loop(model: nn.Module, data: LocalData, task: LocalTask) -> fedsim.Result:
    """Plain SGD; client 4 has a broken file."""
    if task.client == 4:
        raise OSError("cannot read <b>scan 12</b>")
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    loss = torch.zeros(())
    for inputs, targets in data.loader(batch_size=8, seed=task.seed):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return fedsim.Result(model, metrics={"loss": float(loss.detach())})


def test_a_training_loop_that_raises_for_one_client_is_that_clients_loss_and_the_report_names_it(
    data: fedsim.FederatedData, tmp_path: Path
) -> None:
    run = fedsim.simulate(
        model=Net, data=data, client=own_loop, rounds=2, sample="all", runs=tmp_path, sections={}
    )
    counts = [(r["received"], r["lost"], r["outcome"]) for r in run.records[1:]]
    assert counts == [(CLIENTS - 1, 1, "partial")] * 2
    lines = [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]
    lost = {(c["client"], c["reason"]) for c in lines if c["verdict"] == "lost"}
    assert lost == {(4, "OSError: cannot read <b>scan 12</b>")}
    page = (run.path / "report.html").read_text()
    assert "cannot read &lt;b&gt;scan 12" in page
    assert "<b>scan 12" not in page


def test_a_training_loop_that_always_raises_fails_the_run_with_its_own_words(
    data: fedsim.FederatedData, tmp_path: Path
) -> None:
    @fedsim.opaque
    def broken(model: nn.Module, data: LocalData, task: LocalTask) -> fedsim.Result:
        raise OSError("no such sensor")

    with pytest.raises(QuorumNotReached) as found:
        fedsim.simulate(
            model=Net, data=data, client=broken, rounds=2, runs=tmp_path, sample=2, sections=QUIET
        )
    assert "no such sensor" in str(found.value)
    (run,) = tmp_path.iterdir()
    assert json.loads((run / "manifest.json").read_text())["outcome"] == "failed"


@pytest.mark.parametrize("engine", ["loop", "stacked"])
def test_a_transform_with_state_loses_nothing_over_the_rounds(
    data: fedsim.FederatedData, engine: str
) -> None:
    """Error feedback: what rounding takes away in one round is sent in the next."""
    grid = 2.0**-4

    def encode(state: Any, vectors: Any, keys: Any) -> tuple[Any, Any]:
        total = {name: vectors[name] + state[name] for name in vectors}
        sent = {name: torch.round(value / grid) * grid for name, value in total.items()}
        return sent, {name: total[name] - sent[name] for name in vectors}

    feedback = UpdateTransform(
        lambda vectors: {name: v.clone() for name, v in vectors.items()}, encode, lambda message: message
    )
    seen: list[Observed] = []
    sim = simulation(data, engine=engine, sample="all", transform=feedback, observers=[seen.append])
    records = list(sim)
    assert sorted({o.round_index for o in seen}) == [0, 1, 2, 3]
    ids = np.concatenate([o.block.ids for o in seen if o.round_index == 0])
    assert sorted(ids.tolist()) == list(range(CLIENTS))
    for observed in seen:
        for sent in observed.block.vectors.values():
            torch.testing.assert_close(sent / grid, torch.round(sent / grid))
    assert records[-1]["loss"] < records[0]["loss"]
    # Without the state most of the small updates would be rounded to nothing.
    last = sum(int(v.count_nonzero()) for o in seen if o.round_index == 3 for v in o.block.vectors.values())
    assert last > 0


def test_a_wrapped_gradient_is_the_one_that_trains(data: fedsim.FederatedData) -> None:
    def nothing(grad: Any) -> Any:
        def zeros(x: Any, batch: Any, **more: Any) -> Any:
            gradient, aux = grad(x, batch, **more)
            return torch.utils._pytree.tree_map(torch.zeros_like, gradient), aux

        return zeros

    plain = simulation(data, grad_fn=lambda grad: grad, engine="loop")
    list(plain)
    stopped = simulation(data, grad_fn=nothing, engine="loop")
    start = stopped.federation.model.clone()
    list(stopped)
    assert torch.equal(stopped.federation.model, start)
    assert not torch.equal(plain.federation.model, start)


@pytest.mark.parametrize("model", [Net, "logistic"], ids=["class", "name"])
def test_a_run_made_of_objects_is_extended_with_the_same_objects(
    data: fedsim.FederatedData, tmp_path: Path, model: Any
) -> None:
    settings: dict[str, Any] = {
        "model": model, "data": data, "strategy": fedsim.make_strategy("scaffold"), "sample": 3,
        "sections": QUIET,
    }  # fmt: skip
    whole = fedsim.simulate(rounds=4, runs=tmp_path / "whole", **settings)
    short = fedsim.simulate(rounds=2, runs=tmp_path / "short", **settings)
    with pytest.raises(ConfigError) as found:
        fedsim.resume(short.path, rounds=4)
    assert found.value.code == "FS-CFG-074"
    assert "data" in str(found.value.why)
    objects = {"data": data, "strategy": settings["strategy"]} | ({"model": model} if model is Net else {})
    longer = fedsim.resume(short.path, rounds=4, **objects)
    assert longer.records[-1]["accuracy"] == whole.records[-1]["accuracy"]
    assert [r["train_loss"] for r in longer.records[1:]] == [r["train_loss"] for r in whole.records[1:]]


def test_a_resume_that_comes_while_another_goes_on_leaves_the_run_as_it_is(
    data: fedsim.FederatedData, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"model": "logistic", "data": data, "sample": 3, "sections": QUIET}
    folder = RunFolder(fedsim.simulate(rounds=1, runs=tmp_path, **settings).path)
    one, other = resume(folder, rounds=3, data=data), resume(folder, data=data)
    refused = []

    def late(record: Record) -> None:
        with pytest.raises(EnvironmentProblem) as found:
            execute(other[0], folder, progress=other[1], session=Session(["late"]))
        refused.append(found.value.code)

    execute(one[0], folder, on_record=late, progress=one[1], session=Session(["first"], 3))
    assert refused == ["FS-ENV-025"] * 2
    document = folder.manifest
    assert [(s["command"], s["outcome"]) for s in document["sessions"]][1:] == [(["first"], "ok")]
    assert document["outcome"] == "ok"
    assert document["files"]
    assert load_config(folder.path / "config.toml").config.run.rounds == 3
    with pytest.raises(EnvironmentProblem, match="extended the run to 3 rounds meanwhile"):
        execute(other[0], folder, progress=other[1], session=Session(["stale"]))
    with pytest.raises(ConfigError, match="completed 3 rounds already"):
        fedsim.resume(folder.path, rounds=2, data=data)
    assert folder.manifest == document


def test_objects_print_in_a_notebook_without_their_contents(
    data: fedsim.FederatedData, tmp_path: Path
) -> None:
    assert len(repr(data)) < 1000
    run = fedsim.simulate(model=Net, data=data, rounds=1, sample=2, runs=tmp_path, sections=QUIET)
    assert "accuracy" in run._repr_html_()
    assert run.plot("accuracy").axes
