"""A run that has ended, as a Python object: what `fedsim.simulate` returns."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.errors import ConfigError, ModelError
from fedsim.runs import measures, page, theme
from fedsim.runs.curves import communication_figure, loss_figure, metric_figure
from fedsim.runs.folder import RunFolder
from fedsim.runs.lines import Record
from fedsim.runs.numbers import in_time, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class RunResult:
    """What a run came to.

    Attributes:
        path: its folder.
        outcome: ``ok``, ``target``, ``early_stop``, ``interrupted`` or ``failed``.
        records: the lines of ``metrics.jsonl``, as dictionaries.
        final: metrics of the last evaluation.
        seconds: wall time of the last session.
        module: the model that was trained, where the run was started from Python; its weights are
            not those of the result, `model` puts these in.
    """

    path: Path
    outcome: str
    records: list[Record] = field(repr=False)
    final: dict[str, float]
    seconds: float
    module: nn.Module | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: str | Path, *, module: nn.Module | None = None) -> RunResult:
        """The result of the run in the folder `path`.

        Raises:
            EnvironmentProblem: FS-ENV-023, FS-ENV-024, a file is damaged or cannot be read.
        """
        folder = RunFolder(Path(path))
        result = folder.manifest.get("result") or {}
        return cls(
            folder.path,
            folder.status(),
            folder.records(),
            dict(result.get("final") or {}),
            float(result.get("seconds") or 0.0),
            module,
        )

    @property
    def metric(self) -> str:
        """The metric that the run is about."""
        return measures.main_metric(RunFolder(self.path).manifest["facts"], self.records)

    def best(self, metric: str | None = None) -> float:
        """The best value that `metric` (the run's own when None) reached.

        Raises:
            ConfigError: FS-CFG-093, it was never measured.
        """
        name = metric or self.metric
        found = measures.best(self.records, name)
        if found is None:
            raise self._unmeasured(name)
        return found[1]

    def plot(self, metric: str | None = None) -> Figure:
        """A picture of `metric` by round; ``loss`` and ``communication`` are as in the report.

        Raises:
            ConfigError: FS-CFG-093, it was never measured.
        """
        name = metric or self.metric
        with theme.style():
            if name == "loss":
                drawing = loss_figure(self.records)
            elif name == "communication":
                drawing = communication_figure(self.records)
            else:
                drawing = metric_figure(self.records, name)
        if drawing is None:
            raise self._unmeasured(name)
        return drawing

    def tensors(self, checkpoint: str = "final") -> dict[str, Tensor]:
        """The model's tensors by name, for ``load_state_dict``.

        Args:
            checkpoint: ``final``, ``best`` or a round's, such as ``round-00010``.

        Raises:
            EnvironmentProblem: FS-ENV-026, there is no such checkpoint.
        """
        return RunFolder(self.path).load_model(checkpoint)

    def model(self, checkpoint: str = "final") -> nn.Module:
        """A copy of the module with the weights of a checkpoint, ready to evaluate.

        Raises:
            ModelError: FS-MOD-039, the run was opened from its folder, which holds weights and no code.
            EnvironmentProblem: FS-ENV-026, there is no such checkpoint.
        """
        if self.module is None:
            raise ModelError(
                "a run's folder holds a model's weights, not its code",
                code="FS-MOD-039",
                where=str(self.path),
                hint="build the module and call module.load_state_dict(run.tensors())",
            )
        module = copy.deepcopy(self.module)
        module.load_state_dict(self.tensors(checkpoint))
        return module.eval()

    def _unmeasured(self, name: str) -> ConfigError:
        known = sorted({key for record in self.records for key in record} - {"time", "nonfinite", "outcome"})
        return ConfigError(
            f"this run never measured {name!r}",
            code="FS-CFG-093",
            where=str(self.path),
            why=f"it recorded {', '.join(known) or 'nothing'}",
            hint="ask for one of these, or add it to [evaluation] metrics and run again",
        )

    def _repr_html_(self) -> str:
        metric = self.metric
        top = measures.best(self.records, metric)
        rows: dict[str, object] = {"outcome": self.outcome}
        if top is not None:
            rows[f"best {metric}"] = f"{short(top[1])} (round {top[0]})"
        rows |= {f"final {name}": short(value) for name, value in self.final.items()}
        rows |= {"seconds": in_time(self.seconds), "folder": self.path}
        picture = ""
        if top is not None:
            content = io.StringIO()
            with theme.style():
                self.plot(metric).savefig(content, format="svg", metadata={"Date": None})
            label = page.text(f"{metric} by round")
            svg = theme.embedded(content.getvalue(), f"run-{self.path.name}", label=label)
            picture = f'<div style="max-width:32rem">{svg}</div>'
        return f"<div>{page.pairs(rows)}{picture}</div>"
