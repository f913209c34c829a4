"""`fedsim data`: the data sets, and how a configuration divides one among clients."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli import output
from fedsim.cli.arguments import Preset, Sets, load
from fedsim.cli.settings import Command, settings_of

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@app.command("ls", cls=Command)
def ls(context: typer.Context) -> None:
    """List the data sets and the partitioners."""
    from fedsim import registry

    settings = settings_of(context)
    data = {
        kind: {
            name: (inspect.getdoc(registry.load(kind, name)) or "").partition("\n")[0]
            for name in registry.names(kind)
        }
        for kind in ("datasets", "partitioners")
    }
    lines: list[str] = []
    for kind, found in data.items():
        lines += [f"{kind}:", *(f"  {line}" for line in output.pairs(found)), ""]
    output.result(settings, data, [*lines, "Next: fedsim data show digits --plot"])


@app.command("show", cls=Command)
def show(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="Data set; that of the configuration without one.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Configuration file.")] = None,
    preset: Preset = None,
    sets: Sets = None,
    path: Annotated[str | None, typer.Option(help="Local folder or file to read.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partitioner.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Number of clients.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of a Dirichlet partitioner.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the label histogram per client.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path(),
) -> None:
    """Load a data set, divide it and say who holds what."""
    import numpy as np

    from fedsim.build import build_data

    settings = settings_of(context)
    flags: dict[str, tuple[str, object]] = {
        "data.name": ("NAME", name),
        "data.path": ("--path", path),
        "data.partition.kind": ("--partition", partition),
        "data.partition.clients": ("--clients", clients),
        "data.partition.alpha": ("--alpha", alpha),
    }
    loaded = load(config, preset=preset, sets=sets, flags=flags)
    federated = build_data(loaded.config)
    dataset, sizes = federated.dataset, federated.sizes
    data = {
        "name": dataset.name,
        "task": dataset.task,
        "classes": dataset.classes,
        "input_shape": list(dataset.input_shape),
        "train_examples": len(dataset.train),
        "test_examples": 0 if dataset.test is None else len(dataset.test),
        "digest": dataset.digest,
        "partition": federated.description,
        "clients": federated.clients,
        "assigned": int(sizes.sum()),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "held_out": len(federated.holdout_index),
    }
    if dataset.task in ("classification", "binary"):
        from fedsim.data.picture import label_counts

        histogram, _ = label_counts(federated)
        data["classes_per_client"] = float((histogram > 0).sum(axis=1).mean())
    files: list[str] = []
    if plot:
        from fedsim.data.picture import draw_partition

        files = [str(file) for file in draw_partition(federated, out)]
    lines = output.pairs({k.replace("_", " "): v for k, v in data.items()})
    lines += [f"wrote {file}" for file in files]
    output.result(settings, {**data, "files": files}, lines)
