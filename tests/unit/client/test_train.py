"""A client's answer is the simulation's, bit for bit, over several rounds and with its state in files."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import cast

import pytest
import torch

from fedsim import bundle, wire
from fedsim.client.data import Source
from fedsim.client.job import Job
from fedsim.client.train import INLINE, Trainee
from fedsim.errors import FedsimError, ModelError
from fedsim.pb import federation_pb2 as pb
from tests.wired import Exchange, config, exchanges, same

OPTIMISED = {"client": {"optimizer": "sgd", "momentum": 0.9}}


@pytest.mark.parametrize(
    ("strategy", "tables"),
    [
        ("fedavg", OPTIMISED),
        ("scaffold", {}),
        ("fedau", {}),
        ("fedspeed", {}),
        ("fedhyper", {"engine": {"name": "loop", "dtype": "float32"}}),
        ("feddyn", {}),
        ("fedvarp", {"client": {"steps": 3, "batch_size": 0, "lr": 0.1}}),
        ("fedavg", {"model": {"name": "mlp", "hidden": [5], "personal": ["3."]}}),
    ],
)
def test_an_answer_equals_that_of_the_simulation_bit_for_bit(
    tmp_path: Path, strategy: str, tables: dict[str, dict[str, object]]
) -> None:
    states: dict[int, Path | None] = {}
    trainees: dict[int, Trainee] = {}
    moved = count = 0
    for found in exchanges(config(strategy, **tables)):
        trainee = trainees.setdefault(found.client, Trainee(Source()))
        out = tmp_path / str(count)
        answer = trainee.train(Job(found.task, found.message, found.lent, states.get(found.client), out))
        assert isinstance(answer.update, bytes)
        task = pb.Task.FromString(found.task)
        update = wire.unpack_update(bundle.decode(answer.update), trainee.place_of(task).spec)
        assert set(update.vectors) == set(found.block.vectors)
        assert all(same(update.vectors[n], v) for n, v in found.block.vectors.items())
        assert set(update.scalars) == set(found.block.scalars)
        assert all(same(update.scalars[n], v) for n, v in found.block.scalars.items())
        assert answer.examples == found.block.examples[0]
        assert answer.local_steps == found.block.local_steps[0]
        assert answer.normaliser == pytest.approx(found.block.normaliser[0], rel=0, abs=0, nan_ok=True)
        assert answer.metrics == {n: float(v[0]) for n, v in found.block.metrics.items()}
        moved += int(sum(float(v.abs().sum()) for v in update.vectors.values()) > 0)
        if found.kept:
            assert answer.state is not None
            kept = bundle.decode_file(answer.state)
            assert set(kept) == set(found.kept)
            assert all(same(kept[n], found.kept[n]) for n in kept)
        else:
            assert answer.state is None
        states[found.client] = answer.state
        count += 1
    assert count == 12
    assert moved == 12


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_answer_does_not_depend_on_where_the_broadcast_lies_in_memory(tmp_path: Path, dtype: str) -> None:
    """A product with a matrix has other last bits where its memory begins elsewhere."""
    values = config("fedavg", engine={"name": "loop", "dtype": dtype}, model={"name": "mlp", "hidden": [300]})
    values["data"]["features"] = 100
    values["client"] = {"epochs": 1, "batch_size": 1, "lr": 0.1}
    for count, found in enumerate(islice(exchanges(values), 4)):
        for shift in (0, 4, 8, 16):
            place = torch.empty(len(found.message) + 128, dtype=torch.uint8)
            start = -(place.data_ptr() + bundle.read_header(found.message, len(found.message)).body) % 64
            view = memoryview(place.numpy().data)[start + shift :][: len(found.message)]
            view[:] = found.message
            job = Job(found.task, cast(bytes, view), None, None, tmp_path / f"{count}-{shift}")
            answer = Trainee(Source()).train(job)
            assert isinstance(answer.update, bytes)
            assert same(bundle.decode(answer.update)["vectors/delta"], found.block.vectors["delta"][0])
    assert count == 3


def test_the_buffers_of_a_model_are_those_of_the_simulation(tmp_path: Path) -> None:

    values = config("fedavg")
    values["data"] = {"name": "digits", "partition": {"kind": "iid", "clients": 4}}
    values["model"] = {"name": "resnet18", "norm": "batch", "width": 4}
    values["client"] = {"steps": 1, "batch_size": 4, "lr": 0.1}
    values["run"] = {"seed": 3, "rounds": 1}
    first = next(iter(exchanges(values)))
    trainee = Trainee(Source())
    answer = trainee.train(Job(first.task, first.message, None, None, tmp_path))
    content = answer.update if isinstance(answer.update, bytes) else answer.update.read_bytes()
    update = wire.unpack_update(bundle.decode(content), trainee.place_of(pb.Task.FromString(first.task)).spec)
    assert update.buffers is not None
    assert first.block.buffers is not None
    assert same(update.buffers, first.block.buffers)
    assert update.integers is not None
    assert first.block.int_buffers is not None
    assert same(update.integers, first.block.int_buffers)


def first_exchange(strategy: str = "fedavg", **tables: dict[str, object]) -> Exchange:
    return next(iter(exchanges(config(strategy, **tables))))


def test_a_large_update_goes_into_a_file_and_bundles_may_come_in_files(tmp_path: Path) -> None:
    found = first_exchange(model={"name": "mlp", "hidden": [20_000]}, run={"seed": 1, "rounds": 1})
    message = tmp_path / "message"
    message.write_bytes(found.message)
    answer = Trainee(Source()).train(Job(found.task, message, None, None, tmp_path / "out"))
    assert answer.update == tmp_path / "out" / "update.safetensors"
    assert answer.update.stat().st_size > INLINE
    delta = bundle.decode_file(answer.update)["vectors/delta"]
    assert same(delta, found.block.vectors["delta"][0])
    assert message.read_bytes() == found.message  # mapped, never written to


def test_steps_of_the_task_win_over_the_epochs_of_its_local_training(tmp_path: Path) -> None:
    found = first_exchange()
    task = pb.Task.FromString(found.task)
    task.steps = 1
    heard: list[tuple[int, int]] = []
    answer = Trainee(Source()).train(
        Job(task.SerializeToString(), found.message, None, None, tmp_path), lambda *at: heard.append(at)
    )
    assert answer.local_steps == 1
    assert set(heard) == {(0, 1)}


def test_each_step_is_told_and_what_is_raised_then_ends_the_task(tmp_path: Path) -> None:
    found = first_exchange("fedspeed")  # two gradients in a step
    heard: list[tuple[int, int]] = []
    trainee = Trainee(Source())
    job = Job(found.task, found.message, found.lent, None, tmp_path)
    steps = trainee.train(job, lambda *at: heard.append(at)).local_steps
    assert steps > 1
    assert heard == [(0, steps), *((step, steps) for step in range(steps))]

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        trainee.train(job, stop)
    again = trainee.train(job)  # and the next one is not disturbed
    assert isinstance(again.update, bytes)
    assert same(bundle.decode(again.update)["vectors/delta"], found.block.vectors["delta"][0])


def test_a_run_is_built_once_and_the_oldest_is_forgotten(tmp_path: Path) -> None:
    runs = [first_exchange(run={"seed": seed, "rounds": 1}) for seed in (1, 2, 3)]
    trainee = Trainee(Source())

    def place(found: Exchange) -> object:
        trainee.train(Job(found.task, found.message, None, None, tmp_path))
        return trainee.place_of(pb.Task.FromString(found.task))

    first = place(runs[0])
    assert place(runs[0]) is first
    second = place(runs[1])
    assert place(runs[0]) is first
    place(runs[2])  # the second run was used longest ago
    assert place(runs[0]) is first
    assert place(runs[1]) is not second


def test_a_client_says_how_many_examples_it_has_before_it_trains() -> None:
    found = first_exchange()
    task = pb.Task.FromString(found.task)
    assert Trainee(Source()).examples(task.config, task.client, 4) == found.block.examples[0]


def test_a_model_of_another_layout_is_refused(tmp_path: Path) -> None:
    found = first_exchange()
    task = pb.Task.FromString(found.task)
    task.schema = "f" * 64
    with pytest.raises(ModelError) as refused:
        Trainee(Source()).train(Job(task.SerializeToString(), found.message, None, None, tmp_path))
    assert refused.value.code == "FS-CLI-050"


def test_a_broadcast_of_another_size_is_refused(tmp_path: Path) -> None:
    found = first_exchange()
    short = {name: t[:-1] if t.ndim else t for name, t in bundle.decode(found.message).items()}
    with pytest.raises(ModelError) as refused:
        Trainee(Source()).train(Job(found.task, bundle.encode(short), None, None, tmp_path))
    assert refused.value.code == "FS-CLI-050"


def test_a_state_of_another_run_or_none_at_all_is_refused(tmp_path: Path) -> None:
    found = first_exchange("scaffold")
    trainee = Trainee(Source())
    foreign = tmp_path / "foreign.safetensors"
    bundle.encode_to(foreign, {"local-000": torch.zeros(1, 3)}, {"fedsim.kind": "state"})
    for path, code in ((foreign, "FS-CLI-049"), (tmp_path / "gone", "FS-ENV-024")):
        with pytest.raises(FedsimError) as refused:
            trainee.train(Job(found.task, found.message, found.lent, path, tmp_path))
        assert refused.value.code == code


def test_the_clients_owner_bounds_the_threads_and_the_run_asks_for_less(tmp_path: Path) -> None:
    found = first_exchange(engine={"name": "loop", "dtype": "float64", "threads": 2})
    job = Job(found.task, found.message, None, None, tmp_path)
    try:
        Trainee(Source()).train(job)
        assert torch.get_num_threads() == 2
        Trainee(Source(), threads=1).train(job)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
