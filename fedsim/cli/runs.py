"""Commands that look after finished runs: ls, show, compare, report, verify, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedsim.cli import output
from fedsim.cli.arguments import Run, import_from_here
from fedsim.cli.settings import settings_of
from fedsim.errors import FedsimError, RunFailed

if TYPE_CHECKING:
    from fedsim.runs.folder import RunFolder

LAST_ROUNDS = 10


def ls(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the latest.")] = 30,
) -> None:
    """List the runs, the latest last."""
    from fedsim.cli.ending import run_data
    from fedsim.runs.find import list_runs
    from fedsim.runs.numbers import in_time, short

    settings = settings_of(context)
    known = list_runs(settings.runs)
    entries: list[dict[str, Any]] = []
    for folder in known[-limit:]:
        try:
            entries.append(run_data(folder))
        except FedsimError as error:  # one damaged run does not hide the others
            entries.append({"path": str(folder.path), "outcome": "damaged", "error": {"what": error.what}})
    rows = []
    for entry in entries:
        best = entry.get("best") or {}
        value = f"{best['metric']} {short(best['value'])}" if best else ""
        seconds = in_time(entry["seconds"]) if "seconds" in entry else ""
        rows.append([Path(entry["path"]).name, entry["outcome"], entry.get("rounds", ""), value, seconds])
    lines = output.columns(["run", "outcome", "rounds", "best", "time"], rows, right=(2,))
    if not entries:
        lines = [f"there are no runs in {settings.runs}", "Next: fedsim demo"]
    elif len(known) > limit:
        lines.append(f"and {len(known) - limit} older ones; --limit N shows more")
    output.result(settings, {"folder": str(settings.runs), "runs": entries}, lines)


def show(context: typer.Context, run: Run) -> None:
    """Show how a run went: the end block and its last rounds."""
    from fedsim.cli.ending import end_block, run_data
    from fedsim.config import load_config
    from fedsim.runs.folder import CONFIG, RunFolder
    from fedsim.runs.numbers import short

    settings = settings_of(context)
    folder = RunFolder.open(settings.runs, run)
    import_from_here()
    config = load_config(folder.path / CONFIG).config
    data, manifest = run_data(folder), folder.manifest
    head = {
        "run": folder.name,
        "started": manifest["started"],
        "strategy": config.strategy.name,
        "data": manifest["facts"].get("partition") or config.data.name,
        "clients": manifest["facts"].get("clients"),
        "seed": config.run.seed,
        "engine": config.engine.name,
    }
    names = ["round", "outcome", *data["final"], "train_loss", "received", "refused", "late", "lost"]
    last = folder.records()[-LAST_ROUNDS:]
    kept = [n for n in dict.fromkeys(names) if any(n in record for record in last)]
    rows = [[short(record.get(n)) for n in kept] for record in last]
    numbers = [i for i, n in enumerate(kept) if n != "outcome"]
    lines = [
        *output.pairs(head),
        "",
        *output.columns([n.replace("_", " ") for n in kept], rows, right=numbers),
    ]
    lines += ["", *end_block(folder, data, rounds=config.run.rounds)]
    output.result(settings, {**data, "facts": manifest["facts"], "started": manifest["started"]}, lines)


def compare(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs; seeds of one setting are one.")],
    metric: Annotated[str | None, typer.Option(help="Compare by this metric.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also draw: SVG, PNG and CSV of this name.")] = None,
) -> None:
    """Compare runs; runs that differ only in their seeds are one, with mean and deviation."""
    from fedsim.runs.compare import compare as compared
    from fedsim.runs.compare import save_comparison
    from fedsim.runs.folder import RunFolder

    settings = settings_of(context)
    found = compared([RunFolder.open(settings.runs, name) for name in names], metric=metric)
    header, rows = found.table()
    files = [] if out is None else save_comparison(found, out)
    lines = output.columns(header, rows, right=range(1, len(header)))
    lines += [f"wrote {path}" for path in files]
    output.result(settings, {**found.document(), "files": [str(path) for path in files]}, lines)


def report(context: typer.Context, run: Run) -> None:
    """Write the report of a run again, from the files of its folder."""
    from fedsim.runs.folder import RunFolder
    from fedsim.runs.report import write_report

    settings = settings_of(context)
    folder = RunFolder.open(settings.runs, run)
    with folder.locked():
        path = write_report(folder)
    output.result(settings, {"path": str(folder.path), "report": str(path)}, [str(path)])


def verify(
    context: typer.Context,
    run: Run,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds to repeat; 0 checks the files only.")] = 2,
) -> None:
    """Check a run's files against its manifest, and repeat its first rounds.

    Same seed, same configuration, same machine: every number but the times must come out again.
    """
    from fedsim.runs.folder import RunFolder
    from fedsim.simulation.verify import repeat

    settings = settings_of(context)
    import_from_here()
    folder = RunFolder.open(settings.runs, run)
    changed = folder.changed_files()
    differences = repeat(folder, rounds=rounds) if rounds else []
    if len(folder.manifest["sessions"]) > 1:
        # A run that was extended evaluated its clients at what was then its last round.
        differences = [d for d in differences if d.repeated is not None or not d.key.startswith("client_")]
    repeated = min(rounds, max((int(r["round"]) for r in folder.records()), default=0))
    data = {
        "path": str(folder.path),
        "files": len(folder.manifest["files"]),
        "changed": changed,
        "rounds": repeated,
        "differences": [d._asdict() for d in differences],
    }
    told = [f"{name}: {what}" for name, what in changed.items()]
    told += [
        f"round {d.round}, {d.key}: {d.recorded} then, {d.repeated} now" for d in differences[:LAST_ROUNDS]
    ]
    if told:
        settings.result = data
        raise RunFailed(
            "the run does not verify",
            code="FS-RUN-011",
            where=str(folder.path),
            why="\n".join(told),
            hint="other versions or another machine may change last digits: compare manifest.json; "
            "a changed file was edited after the run",
        )
    lines = [
        f"{data['files']} files are as the manifest says",
        f"{repeated} rounds came out again, digit for digit",
    ]
    output.result(settings, data, lines)


def export(
    context: typer.Context,
    run: Run,
    to: Annotated[Literal["torch", "onnx", "numpy"], typer.Option(help="Form of the model.")],
    checkpoint: Annotated[str, typer.Option(help="final, best or round-00010.")] = "final",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files; exports in the run's folder.")
    ] = None,
) -> None:
    """Write a run's model for PyTorch, ONNX or NumPy."""
    from fedsim.runs.export import export as exported
    from fedsim.runs.folder import RunFolder

    settings = settings_of(context)
    folder = RunFolder.open(settings.runs, run)
    model = _module_of(folder) if to == "onnx" else {}
    files = exported(folder, to, checkpoint=checkpoint, out=out, **model)
    data = {"path": str(folder.path), "checkpoint": checkpoint, "files": [str(path) for path in files]}
    output.result(settings, data, [str(path) for path in files])


def _module_of(folder: RunFolder) -> dict[str, Any]:
    """The module and a batch, built again from the configuration; the weights come from the checkpoint."""
    from fedsim.simulation.session import again

    import_from_here()
    sim = again(folder)
    dataset = sim.data.dataset
    return {"module": sim.module, "example": dataset.transforms.evaluate(dataset.train.inputs[:2])}
