"""Runs with their clients in one process, killed at fail points and taken up again.

    python tests/crashing_run.py FOLDER < cases.json

Reads ``{"config": TOML, "clients": N, "cases": [["point:2", …], …]}``. Each case is a run of its own: one
process for each fail point in turn, then one that nothing stops. A line of JSON a case: the exit codes of
the processes, the run's last state, the digest of the final model, and of that of its journal's replay.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedsim.config import load_config
from fedsim.identity import Key
from fedsim.server import failpoints
from fedsim.simulation.replay import Replay, read_journal
from fedsim.storage import sha256
from tests.fleet import Coordinator, Node


def key_in(path: Path) -> Key:
    """The key in a file, made where there is none."""
    if not path.exists():
        Key.new().save(path)
    return Key.load(path)


def serve(folder: Path, config: str, clients: int) -> None:
    """Submit the run, or go on with it, to its end."""
    nodes = []
    for number in range(clients):
        home = folder / f"client-{number}"
        home.mkdir(exist_ok=True)
        nodes.append(Node(f"client-{number}", home, key_in(home / "node.key")))
    coordinator = Coordinator(folder / "state", key_in(folder / "server.key"), nodes).start()
    run = coordinator.runs.submit(config, "run", "the-key", "")
    state = coordinator.serve(run.run_id)
    found = coordinator.runs.folder(run.run_id)
    coordinator.stop()
    replay = Replay(load_config(found / "config.toml").config, read_journal(found / "journal.jsonl"))
    records = list(replay)
    from fedsim.runs.checkpoints import save

    again = sha256(save(folder, replay.model_tensors(), "replayed"))
    lines = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    result = {
        "state": state,
        "digest": sha256(found / "checkpoints" / "final.safetensors"),
        "replayed": again,
        "rounds": [line["round"] for line in lines],
        "received": sum(line["received"] for line in lines),
        "replayed_received": sum(record["received"] for record in records),
        "clients": len((found / "clients.jsonl").read_text().splitlines()),
    }
    (folder / "result.json").write_text(json.dumps(result))


def in_a_process(folder: Path, config: str, clients: int, point: str) -> int:
    """`serve` in a process of its own; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        failpoints.arm(point)
        serve(folder, config, clients)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(folder: Path) -> None:
    wanted = json.load(sys.stdin)
    for number, points in enumerate(wanted["cases"]):
        home = folder / str(number)
        home.mkdir()
        codes = [in_a_process(home, wanted["config"], wanted["clients"], p) for p in (*points, "")]
        result = home / "result.json"
        found = json.loads(result.read_text()) if result.exists() else {}
        print(json.dumps({"points": points, "codes": codes, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
