"""`fedsim run`, `fedsim resume` and `fedsim tune`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedsim.cli import output
from fedsim.cli.arguments import ConfigFile, Preset, Run, Sets, import_from_here, load
from fedsim.cli.settings import Settings, settings_of
from fedsim.errors import ConfigError, Interrupted, RunFailed
from fedsim.imports import uncollected

if TYPE_CHECKING:
    from fedsim.config import Config, Loaded
    from fedsim.progress import Progress
    from fedsim.runs.folder import RunFolder
    from fedsim.simulation.run import Simulation
    from fedsim.simulation.session import Session

Baseline = Literal["centralised", "local"]
SERVER = "server"


def run(
    context: typer.Context,
    config: ConfigFile = None,
    sets: Sets = None,
    preset: Preset = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, fused, stacked, flat, loop; server for real clients.")
    ] = None,
    connect: Annotated[
        str | None, typer.Option(help="Coordinator of --engine server: a name or HOST:PORT.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="Authority of the coordinator's certificate.")] = None,
    key: Annotated[Path | None, typer.Option(help="Key of an operator.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS; on loopback only.")] = False,
    nodes: Annotated[str, typer.Option(help="Clients that take part, such as 'site in {a,b}'.")] = "",
    run_key: Annotated[
        str | None, typer.Option(help="The same key and configuration is the same run.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the run is submitted.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that train.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:0 or auto.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    baseline: Annotated[
        Baseline | None,
        typer.Option(help="Instead of the federation: one model on all data, or every client alone."),
    ] = None,
    require: Annotated[
        bool, typer.Option("--require", help="Exit with 1 where [evaluation] target is not reached.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build and check everything, train and write nothing.")
    ] = False,
) -> None:
    """Run a federation by its configuration, in simulation or, with --engine server, with real clients.

    Without a file and a preset the defaults are used: digits, 20 clients, FedAvg.
    """
    settings = settings_of(context)
    flags: dict[str, tuple[str, object]] = {
        "run.seed": ("--seed", seed),
        "run.name": ("--name", name),
        "engine.name": ("--engine", None if engine == SERVER else engine),
        "engine.workers": ("--workers", workers),
        "engine.device": ("--device", device),
    }
    loaded = load(config, preset=preset, sets=sets, flags=flags)
    if require and loaded.config.evaluation.target is None:
        raise ConfigError(
            "--require needs a target",
            code="FS-CFG-022",
            where="[evaluation] target",
            hint="add --set evaluation.target='accuracy >= 0.95'",
        )
    remote = engine == SERVER or connect is not None
    if remote and baseline is not None:
        raise ConfigError(
            "a baseline runs in simulation only",
            code="FS-CFG-135",
            where=f"--baseline {baseline}",
            why="a coordinator has no data of its own to train on",
            hint="leave --engine server and --connect out",
        )
    if remote and not dry_run:
        from fedsim.cli.operate import run_on_server

        run_on_server(
            settings,
            loaded,
            connect=connect,
            ca=ca,
            key=key,
            insecure=insecure,
            nodes=nodes,
            run_key=run_key,
            detach=detach,
            require=require,
        )
    elif dry_run:
        _dry(settings, loaded, baseline)
    else:
        start(settings, loaded, baseline=baseline, require=require)


def start(
    settings: Settings, loaded: Loaded, *, baseline: Baseline | None = None, require: bool = False
) -> None:
    """Run a configuration to its end, show it and print the end block.

    Raises:
        Interrupted: Ctrl-C; the run can be resumed.
        RunFailed: the outcome is failure, or the target was not reached under `require`.
    """
    from fedsim.config import to_toml
    from fedsim.progress import progress_of, target_of
    from fedsim.runs.folder import RunFolder

    sim = simulation(loaded.config, baseline)
    # Nothing is written before everything that the configuration says has been understood.
    progress = progress_of(sim.config, sim.evaluator.names)
    target_of(sim.config)
    name = sim.config.run.name or "-".join(filter(None, (sim.strategy_name, sim.data.dataset.name, baseline)))
    folder = RunFolder.create(
        settings.runs,
        name,
        config_text=to_toml(sim.config),
        facts={**sim.facts, "baseline": baseline},
        command=sys.argv,
    )
    sim.keep_state_in(folder.state_folder)
    expected = None if baseline else _expected(loaded)
    carry_on(settings, sim, folder, progress, expected=expected, require=require)


def _expected(loaded: Loaded) -> dict[str, Any] | None:
    """What a preset promises, where its settings are its own: where data lie and what is written is free."""
    free = ("run.seed", "run.name", "data.path", "output.", "engine.")
    own = all(
        origin == "default" or origin.startswith("preset ") or key.startswith(free)
        for key, origin in loaded.sources.items()
    )
    return loaded.expected if own and loaded.expected else None


def simulation(config: Config, baseline: Baseline | None) -> Simulation:
    """The simulation of a configuration, or of one of its baselines."""
    with uncollected(keep=True):
        from fedsim.config import config_from, to_dict
        from fedsim.simulation.run import Simulation
    if baseline is None:
        return Simulation(config)
    from fedsim.build import build_data
    from fedsim.simulation.baselines import baseline_sections, pooled

    values = to_dict(config)
    del values["strategy"]  # its parameters belong to what the baseline is compared with
    changed = config_from(values, baseline_sections(baseline))
    if baseline == "local":
        return Simulation(changed)
    return Simulation(changed, data=pooled(build_data(config)))


def carry_on(
    settings: Settings,
    sim: Simulation,
    folder: RunFolder,
    progress: Progress,
    *,
    expected: dict[str, Any] | None = None,
    require: bool = False,
    session: Session | None = None,
) -> None:
    """The rounds that are left, shown; then the end block and, where it is one, the error."""
    with uncollected(keep=True):
        from fedsim.cli.ending import end_block, run_data
        from fedsim.cli.interrupt import stop_on_signal
        from fedsim.cli.logs import log_to_stderr
        from fedsim.cli.view import view_for
        from fedsim.simulation.session import execute
    rounds = sim.config.run.rounds
    facts = sim.facts
    output.note(
        settings,
        f"{folder.path.name}: {facts['clients']:,} clients, {facts['train_examples']:,} examples, "
        f"{facts['model_parameters']:,} parameters, engine {facts['engine']} ({facts['engine_reason']})",
    )
    settings.result = {"path": str(folder.path)}  # what an error from here on is about
    view = view_for(settings, folder.name, rounds=rounds, metric=sim.evaluator.names[0])
    with log_to_stderr(settings), view, stop_on_signal(view.stopping) as stop:
        outcome = execute(sim, folder, on_record=view.record, stop=stop, progress=progress, session=session)
    data = run_data(folder)
    lines = end_block(folder, data, rounds=rounds, expected=expected)
    unmet = require and outcome.outcome != "target"
    if outcome.outcome not in ("failed", "interrupted") and not unmet:
        output.result(settings, data, lines)
        return
    settings.result = data
    for line in lines:
        output.say(settings, line)
    if outcome.error is not None:
        raise outcome.error
    if outcome.outcome == "interrupted":
        raise Interrupted(
            f"interrupted after round {outcome.rounds} of {rounds}",
            where=str(folder.path),
            why="everything up to this round is saved",
            hint=f"resume with fedsim resume {folder.path.name}",
        )
    raise RunFailed(
        "the target was not reached",
        code="FS-RUN-010",
        where=f"[evaluation] target = {sim.config.evaluation.target!r}",
        why=f"after {outcome.rounds} rounds: " + ", ".join(f"{k} {v:.4g}" for k, v in outcome.final.items()),
        hint=f"go on with fedsim resume {folder.path.name} --rounds {2 * rounds}, or change the settings",
    )


def _dry(settings: Settings, loaded: Loaded, baseline: Baseline | None) -> None:
    from fedsim.config import to_dict, to_toml
    from fedsim.progress import progress_of, target_of

    sim = simulation(loaded.config, baseline)
    progress_of(sim.config, sim.evaluator.names)
    target_of(sim.config)
    facts = {k: v for k, v in sim.facts.items() if v is not None}
    shown = [f"# {line}" for line in output.pairs({k.replace("_", " "): v for k, v in facts.items()})]
    text = [*to_toml(sim.config).splitlines(), "", "# checked, nothing was trained or written", *shown]
    output.result(settings, {"config": to_dict(sim.config), "facts": facts}, text)


def resume(
    context: typer.Context,
    run: Run,
    rounds: Annotated[int | None, typer.Option(min=1, help="New total of rounds, to extend the run.")] = None,
) -> None:
    """Go on with a run after its last checkpoint."""
    with uncollected(keep=True):
        from fedsim.cli.ending import end_block, run_data
        from fedsim.config import load_config
        from fedsim.runs.folder import CONFIG, REPORT, RunFolder
        from fedsim.runs.report import write_report
        from fedsim.simulation.session import REMOTE, Session
        from fedsim.simulation.session import resume as continue_run
    settings = settings_of(context)
    import_from_here()
    folder = RunFolder.open(settings.runs, run)
    config = load_config(folder.path / CONFIG).config
    complete = folder.status() in ("ok", "target", "early_stop")
    if complete and rounds in (None, config.run.rounds):
        if config.output.report and not (folder.path / REPORT).exists():
            write_report(folder)  # the disk had no room for it when the run ended
        data = run_data(folder)
        ours = folder.manifest["facts"].get("engine") != REMOTE
        lines = ["this run is complete" + ("; --rounds N extends it" if ours else "")]
        output.result(settings, data, lines + end_block(folder, data, rounds=config.run.rounds))
        return
    sim, progress = continue_run(folder, rounds=rounds)
    carry_on(settings, sim, folder, progress, session=Session(sys.argv, rounds))


def tune(
    context: typer.Context,
    config: ConfigFile = None,
    sets: Sets = None,
    preset: Preset = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each setting.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="File for the recommendation; it extends the configuration.")
    ] = None,
) -> None:
    """Measure the engines on this machine and write a recommendation."""
    import tomli_w

    from fedsim.runs.manifest import cores
    from fedsim.simulation.tune import measure
    from fedsim.storage import write_atomically

    settings = settings_of(context)
    loaded = load(config, preset=preset, sets=sets)
    found = measure(loaded.config, rounds=rounds, cores=cores())
    best = found[0]
    engine: dict[str, Any] = {"name": best.engine, "workers": best.workers, "threads": best.threads}
    if best.engine in ("fused", "stacked"):
        engine["block"] = best.block
    path = out or Path("fedsim.tuned.toml")
    table: dict[str, Any] = {"engine": engine}
    if loaded.file is not None:
        table = {"extends": os.path.relpath(loaded.file, path.parent), **table}
    write_atomically(path, tomli_w.dumps(table).encode())
    rows = [
        [
            m.engine,
            m.block,
            m.workers,
            m.threads,
            m.refused or f"{m.median:.3f}",
            "" if m.refused else f"{m.least:.3f} – {m.most:.3f}",
        ]
        for m in found
    ]
    lines = output.columns(
        ["engine", "block", "workers", "threads", "s/round", "range"], rows, right=(1, 2, 3)
    )
    chosen = " ".join(f"{key}={value}" for key, value in engine.items())
    use = f"fedsim run {path}" + (f" --preset {preset}" if preset else "")
    lines += ["", f"recommended: {chosen}, written to {path}", f"Next: {use}"]
    data = {"recommended": engine, "file": str(path), "measured": [m._asdict() for m in found]}
    output.result(settings, data, lines)
