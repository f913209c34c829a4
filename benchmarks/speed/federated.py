"""Child process that runs fedsim as ``fedsim run`` does: through `Simulation` and its run folder.

Every line of ``metrics.jsonl`` and ``clients.jsonl`` is written, checkpoints too. After a round's lines are
on disk the run waits until the leader asks for more. ``python -m benchmarks.speed.federated CONFIG FOLDER``,
and with a third word a trace of the turns is written there: Chrome's format by torch.profiler for a name
that ends with ``.json``, that of cProfile for any other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.speed.turns import Turns

if TYPE_CHECKING:
    from fedsim.simulation.run import Simulation

WARM_ROUNDS = 1  # before a trace begins


class Over(Exception):
    """The leader has gone."""


class Led:
    """Runs rounds when the leader wants them; called with each record."""

    def __init__(self, turns: Turns, sim: Simulation, trace: Path | None) -> None:
        self.turns, self.sim, self.trace = turns, sim, trace
        self.left = 0
        self.seconds: list[float] = []
        self.evaluated: list[bool] = []
        self.began = 0.0
        self.done = 0
        self.finish_trace: Callable[[], None] | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        now = time.perf_counter()
        if record["round"] == 0:
            config = self.sim.config.engine
            self.turns.say(ready=True, engine=config.name, block=config.block, workers=config.workers,
                           reason=self.sim.engine_reason, names=list(self.sim.spec.names))  # fmt: skip
        else:
            if record["outcome"] == "failed":
                raise SystemExit(f"round {record['round']} failed")
            self.done += 1
            self.left -= 1
            self.seconds.append(now - self.began)
            self.evaluated.append(any(name in record for name in self.sim.evaluator.names))
        if not self.left:
            self._wait()
        self.began = time.perf_counter()

    def _wait(self) -> None:
        """Say how long the rounds took, and wait until there is more to do."""
        if self.seconds:
            self.turns.say(seconds=self.seconds, evaluated=self.evaluated)
        self.seconds, self.evaluated = [], []
        while not self.left:
            wish = self.turns.hear()
            if wish is None:
                raise Over
            if "save" in wish:
                import numpy as np

                arrays: dict[str, Any] = {n: t.numpy() for n, t in self.sim.model_tensors().items()}
                np.savez(wish["save"], **arrays)
                self.turns.say(saved=True)
            self.left = wish.get("rounds", 0)
        if self.trace is not None and self.done >= WARM_ROUNDS and self.finish_trace is None:
            self.finish_trace = tracing(self.trace)


def tracing(path: Path) -> Callable[[], None]:
    """Begin a trace of this process; the function returned ends and writes it."""
    if path.suffix == ".json":
        from torch.profiler import ProfilerActivity, profile

        profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        profiler.start()

        def write() -> None:
            profiler.stop()
            profiler.export_chrome_trace(str(path))

        return write
    import cProfile

    python = cProfile.Profile()
    python.enable()

    def dump() -> None:
        python.disable()
        python.dump_stats(path)

    return dump


def main() -> None:
    """Serve turns: CONFIG FOLDER [TRACE]."""
    turns = Turns()
    # As late as the command line imports them, so that start-up is what a user waits for.
    from fedsim.imports import uncollected

    with uncollected(keep=True):
        from fedsim.config import load_config, to_toml
        from fedsim.runs.folder import RunFolder
        from fedsim.simulation.run import Simulation
        from fedsim.simulation.session import execute

    sim = Simulation(load_config(Path(sys.argv[1])).config)
    folder = RunFolder.create(
        Path(sys.argv[2]), "speed", config_text=to_toml(sim.config), facts=sim.facts, command=sys.argv
    )
    sim.keep_state_in(folder.state_folder)
    led = Led(turns, sim, Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    try:
        execute(sim, folder, on_record=led)
    except Over:
        if led.finish_trace is not None:
            led.finish_trace()
    finally:
        sim.engine.close()


if __name__ == "__main__":
    main()
