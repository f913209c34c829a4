"""The pictures of a run's folder, each as SVG and PNG beside the numbers that it shows.

    accuracy.* (or the run's own metric)   loss.*   communication.*   fairness.*   partition.*

The first three are drawn from ``metrics.jsonl``. Fairness and partition need what only the
simulation knows; their CSV files keep it.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.runs import curves, measures, spread, theme
from fedsim.runs.folder import PLOTS, RunFolder
from fedsim.runs.names import slug
from fedsim.runs.table import csv_bytes
from fedsim.storage import problem, unreadable, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedsim.data.federated import FederatedData

Records = Sequence[Mapping[str, Any]]


def draw(
    folder: RunFolder,
    *,
    data: FederatedData | None = None,
    client_evaluation: Mapping[str, Any] | None = None,
) -> list[str]:
    """Draw all pictures that the run has numbers for, and write those numbers.

    Args:
        data: the partitioned data, for the picture of the partition and the names of clients;
            without it a picture drawn before stays.
        client_evaluation: columns ``client``, ``accuracy``, ``loss`` … of the last evaluation of
            clients, equally long; without it ``fairness.csv`` of before is used.

    Returns:
        Names of the pictures that are in the folder now, in the order of a report.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022.
    """
    records, manifest = folder.records(), folder.manifest
    metric = measures.main_metric(manifest["facts"], records)
    plots = folder.path / PLOTS
    try:
        plots.mkdir(exist_ok=True)
    except OSError as error:
        raise problem(error, plots) from error
    with theme.style():
        if records:
            _draw_rounds(plots, records, metric, _target(folder))
        if client_evaluation is not None:
            _write_clients(plots, client_evaluation, data)
        _draw_fairness(plots, metric)
        if data is not None:
            _draw_partition(plots, data)
    wanted = dict.fromkeys([slug(metric), "accuracy", "loss", "fairness", "communication", "partition"])
    return [name for name in wanted if (plots / f"{name}.svg").exists()]


def _draw_rounds(plots: Path, records: Records, metric: str, target: tuple[str, float] | None) -> None:
    bound = target[1] if target is not None and target[0] == metric else None
    drawn: list[tuple[str, Figure | None, list[str]]] = [
        ("loss", curves.loss_figure(records), ["loss", "train_loss"]),
        ("communication", curves.communication_figure(records), ["bytes_down", "bytes_up"]),
    ]
    if metric != "loss":
        drawn.insert(0, (slug(metric), curves.metric_figure(records, metric, target=bound), [metric]))
    for name, drawing, columns in drawn:
        if drawing is not None:
            theme.save(drawing, plots, name)
            rows = ([r["round"], *(r.get(c) for c in columns)] for r in records)
            write_atomically(plots / f"{name}.csv", csv_bytes(["round", *columns], rows))


def _target(folder: RunFolder) -> tuple[str, float] | None:
    """Metric and value of ``[evaluation] target``, None where the run has none."""
    text = folder.config.get("evaluation", {}).get("target")
    found = re.fullmatch(r"\s*(\w+)\s*[<>]=\s*([-+.\deE]+)\s*", text) if isinstance(text, str) else None
    return (found[1], float(found[2])) if found else None


def _write_clients(plots: Path, columns: Mapping[str, Any], data: FederatedData | None) -> None:
    """``fairness.csv``: a row per evaluated client, by number."""
    values = {name: [_cell(v) for v in column] for name, column in columns.items() if name != "client"}
    clients = [int(client) for client in columns["client"]]
    named = [data.names[c] if data is not None and data.names else "" for c in clients]
    rows = sorted(zip(clients, named, *values.values(), strict=True), key=lambda row: row[0])
    write_atomically(plots / "fairness.csv", csv_bytes(["client", "name", *values], rows))


def _cell(value: Any) -> float | int | None:
    """A number of numpy's as Python's; nothing where it is not finite."""
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float):
        return number if math.isfinite(number) else None
    return int(number) if number is not None else None


def _draw_fairness(plots: Path, metric: str) -> None:
    rows = read_csv(plots / "fairness.csv")
    if not rows:
        return
    shown = metric if metric in rows[0] else "accuracy" if "accuracy" in rows[0] else "loss"
    found = client_fairness(rows, shown)
    if found is not None:
        theme.save(spread.fairness_figure(found, shown), plots, "fairness")


def client_fairness(rows: Sequence[Mapping[str, str]], metric: str) -> measures.Fairness | None:
    """Spread of one column of ``fairness.csv`` over the clients."""
    values = [float(row[metric]) if row.get(metric) else math.nan for row in rows]
    return measures.fairness(values, smaller_better=measures.smaller_is_better(metric))


def _draw_partition(plots: Path, data: FederatedData) -> None:
    from fedsim.data.picture import draw_partition

    try:
        draw_partition(data, plots)
    except OSError as error:
        raise problem(error, plots / "partition.svg") from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column; none where there is no file.

    Raises:
        EnvironmentProblem: FS-ENV-024, it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(error, path) from error
