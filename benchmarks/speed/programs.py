"""Which programs a measurement starts: fedsim under each engine, the sequential loop, the peers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tomli_w

from benchmarks.speed.plan import Plan
from benchmarks.speed.runner import Program
from benchmarks.speed.workloads import Workload
from fedsim.config import Config, load_config, to_toml

PEERS = {"pfl": "pfl_research", "fedjax": "fedjax_rounds", "flower": "flower_ray", "jax": "jax_scan"}
THREADED = ("fedjax", "jax")  # one process: measured with each thread setting, like the sequential loop
ENGINE_FLAGS = ("workers", "threads", "block", "precision", "layout", "dtype")


def configurations(workload: Workload, options: argparse.Namespace, folder: Path) -> dict[str, Config]:
    """fedsim's resolved configuration of each engine asked for, by the program's name."""
    base = folder / "workload.toml"
    values = workload.config(options.data) | {"strategy": {"name": options.strategy}}
    base.write_text(tomli_w.dumps(values), encoding="utf-8")
    flags = [f"engine.{key}={value}" for key in ENGINE_FLAGS if (value := getattr(options, key)) is not None]
    found = {}
    for asked in options.engine or ["auto"]:
        name, *pairs = asked.split(",")
        sets = [*options.set, *flags, f"engine.name={name}", *(f"engine.{pair}" for pair in pairs)]
        shown = [p for p in [*(f.removeprefix("engine.") for f in flags), *pairs]]
        found[" ".join(["fedsim", name, *shown])] = load_config(base, sets=sets).config
    return found


def fedsim_programs(configs: dict[str, Config], folder: Path, trace: Path | None) -> list[Program]:
    """One child for each configuration; the first is traced where that is asked for."""
    found = []
    for number, (name, config) in enumerate(configs.items()):
        file = folder / f"fedsim-{number}.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        words = [sys.executable, "-m", "benchmarks.speed.federated", str(file), str(folder / "runs")]
        if trace is not None and not number:
            words.append(str(trace.resolve()))
        found.append(Program(name, words))
    return found


def other_programs(plan: Plan, options: argparse.Namespace) -> list[Program]:
    """The sequential loop under each thread setting, and the peers."""
    found = []
    for threads in options.seq_threads.split(","):
        words = [
            sys.executable,
            "-m",
            "benchmarks.speed.sequential",
            str(plan.path),
            options.strategy,
            threads,
        ]
        found.append(Program(f"Seq {_threads(threads)}", words))
    pythons = dict(pair.split("=", 1) for pair in options.peer_python)
    for peer in filter(None, options.peers.split(",")):
        if peer not in PEERS:
            raise SystemExit(f"no peer is called {peer!r}; known: {', '.join(PEERS)}")
        if options.strategy != "fedavg":
            raise SystemExit("the peers run fedavg alone")
        words = [
            pythons.get(peer, sys.executable),
            "-m",
            f"benchmarks.speed.peers.{PEERS[peer]}",
            str(plan.path),
        ]
        if peer not in THREADED:
            found.append(Program(peer, words))
            continue
        for threads in options.seq_threads.split(","):
            found.append(Program(f"{peer} {_threads(threads)}", [*words, threads]))
    return found


def _threads(count: str) -> str:
    return f"{count} thread{'s' if count != '1' else ''}"
