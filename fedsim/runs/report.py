"""``report.html``: one run on one page that needs nothing but itself.

Built from the files of the run's folder alone, so it can be built again at any time. Every text is
escaped, pictures are inline, the page makes no request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.runs import measures, page, theme
from fedsim.runs.folder import PLOTS, REPORT, RunFolder
from fedsim.runs.lines import ROUND_KEYS
from fedsim.runs.numbers import in_bytes, in_time, short, some
from fedsim.runs.plots import client_fairness, draw, read_csv
from fedsim.runs.table import flat
from fedsim.runs.troubles import Trouble, counts, troubles
from fedsim.storage import unreadable, write_atomically

if TYPE_CHECKING:
    from fedsim.data.federated import FederatedData

MOST_ROWS = 100
_OUTCOMES = {
    "ok": ("✓ finished", "good"),
    "target": ("✓ reached its target", "good"),
    "early_stop": ("✓ stopped early, no longer improving", "good"),
    "interrupted": ("‖ interrupted, can be resumed", "fair"),
    "running": ("… running", "fair"),
    "stopped": ("‖ stopped, can be resumed", "fair"),
    "failed": ("✗ failed", "bad"),
}


def write_report(
    folder: RunFolder,
    *,
    data: FederatedData | None = None,
    client_evaluation: Mapping[str, Any] | None = None,
) -> Path:
    """Draw the run's pictures, write ``report.html`` and renew the manifest's digests.

    Args:
        data, client_evaluation: of the simulation, see `plots.draw`; without them the pictures that
            need them are those of before.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022, the old report is untouched.
    """
    names = draw(folder, data=data, client_evaluation=client_evaluation)
    path = folder.path / REPORT
    write_atomically(path, html(folder, names).encode())
    folder.digest_files()
    return path


def html(folder: RunFolder, pictures: Sequence[str]) -> str:
    """The page of a run.

    Args:
        pictures: names in the folder's ``plots``, in order.
    """
    manifest, records = folder.manifest, folder.records()
    metric = measures.main_metric(manifest["facts"], records)
    clients = read_csv(folder.path / PLOTS / "fairness.csv")
    owners = clients or read_csv(folder.path / PLOTS / "partition.csv")
    found = troubles(folder.path, {int(row["client"]): row.get("name") or "" for row in owners})
    parts = [
        _head(folder, manifest),
        page.tiles(_tiles(manifest, records, metric, clients, found)),
        '<h2>Results</h2><div class="cards">',
        *(_picture(folder, name, metric) for name in pictures),
        "</div>",
        _rounds(records, metric),
        _troubles(found),
        _clients(clients, metric),
        "<h2>The run</h2>",
        page.pairs({name.replace("_", " "): _shown(v) for name, v in flat(manifest["facts"])}),
        "<h2>Where and with what</h2>",
        page.pairs(_surroundings(manifest)),
        "<h2>Configuration</h2>",
        f'<pre tabindex="0">{page.text(folder.config_text)}</pre>',
        _foot(),
    ]
    return page.document(f"{manifest['run']['name']} – fedsim", "\n".join(parts))


def _head(folder: RunFolder, manifest: Mapping[str, Any]) -> str:
    outcome = str(manifest["outcome"])
    word, look = _OUTCOMES.get(outcome, (outcome, "fair"))
    name, where = page.text(manifest["run"]["name"]), page.text(manifest["run"]["folder"])
    started = page.text(str(manifest["started"])[:16].replace("T", " "))
    return (
        f'<h1>{name}</h1><p><span class="mark {look}">{page.text(word)}</span></p>'
        f'<p class="quiet">{where}, started {started} UTC</p>'
    )


def _tiles(
    manifest: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    metric: str,
    clients: Sequence[Mapping[str, str]],
    found: Sequence[Trouble],
) -> list[tuple[str, str, str]]:
    result: list[tuple[str, str, str]] = []
    values, top = measures.series(records, metric), measures.best(records, metric)
    if top is not None:
        result.append((f"final {metric}", short(values.values[-1].item()), f"round {values.rounds[-1]:.0f}"))
        result.append((f"best {metric}", short(top[1]), f"round {top[0]}"))
    per_client = client_fairness(clients, metric if clients and metric in clients[0] else "accuracy")
    if per_client is not None:
        remark = f"mean {short(per_client.mean)}, spread {short(per_client.spread)}"
        result.append(("worst 10 % of clients", short(per_client.worst), remark))
    spent = measures.cost(records)
    result.append(("rounds", f"{spent.rounds:,}", f"{spent.failed} failed attempts"))
    sent = f"{in_bytes(spent.bytes_down)} down, {in_bytes(spent.bytes_up)} up"
    result.append(("communication", in_bytes(spent.bytes_down + spent.bytes_up), sent))
    sessions = len(manifest["sessions"])
    result.append(
        ("computing time", in_time(spent.seconds), "1 session" if sessions == 1 else f"{sessions} sessions")
    )
    by_verdict = counts(list(found))
    told = ", ".join(f"{count:,} {verdict}" for verdict, count in by_verdict.items())
    result.append(("answers not counted", f"{sum(by_verdict.values()):,}", told or "every answer counted"))
    return result


_CAPTIONS = {
    "loss": "Training loss is the mean over the clients of a round, weighted by their examples.",
    "fairness": "Each client's own examples; spread is the standard deviation over clients.",
    "partition": "How many training examples of each class each client owns.",
    "communication": "Payload of messages, as tensors; in a simulation it is counted, not sent.",
}


def _picture(folder: RunFolder, name: str, metric: str) -> str:
    path = folder.path / PLOTS / f"{name}.svg"
    try:
        svg = path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(error, path) from error
    title = {"fairness": "Fairness over clients", "partition": "Partition"}.get(name, name.capitalize())
    caption = _CAPTIONS.get(name, f"The global model's {metric} on the central test set.")
    image = theme.recoloured(theme.embedded(svg, name, label=page.text(f"{title}. {caption}")))
    numbers = f"The numbers are in plots/{name}.csv."
    return page.card(title, image, caption=f"{caption} {numbers}", wide=name == "partition")


def _rounds(records: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The table behind the curves; of a long run the last rounds."""
    columns = [c for c in dict.fromkeys((metric, *ROUND_KEYS)) if any(c in r for r in records)]
    columns.sort(key=("round", "outcome", metric, *ROUND_KEYS).index)
    rows = [[short(r.get(c)) for c in columns] for r in records[-MOST_ROWS:]]
    title = "All rounds" if len(records) <= MOST_ROWS else f"The last {MOST_ROWS} of {len(records):,} records"
    right = [i for i, c in enumerate(columns) if c != "outcome"]
    table = page.table(columns, rows, numbers=right)
    return page.folded(f"{title} as a table (rounds.csv has every column)", table)


def _troubles(found: Sequence[Trouble]) -> str:
    title = "<h2>Clients whose answers did not count</h2>"
    if not found:
        return title + "<p>None: every answer of every client counted.</p>"
    named = any(t.name for t in found)
    rows = [
        [t.client, *([t.name] if named else []), t.verdict, t.reason or "–", len(t.rounds), some(t.rounds)]
        for t in found[:MOST_ROWS]
    ]
    header = ["client", *(["name"] if named else []), "verdict", "reason", "times", "rounds"]
    rest = len(found) - MOST_ROWS
    more = f'<p class="quiet">{rest:,} more are in clients.jsonl.</p>' if rest > 0 else ""
    return title + page.table(header, rows, numbers=[0, header.index("times")]) + more


def _clients(clients: Sequence[Mapping[str, str]], metric: str) -> str:
    """The worst clients by name; all are in ``fairness.csv``."""
    shown = metric if clients and metric in clients[0] else "accuracy"
    judged = [row for row in clients if row.get(shown)]
    if not judged:
        return ""
    sign = -1 if measures.smaller_is_better(shown) else 1
    judged.sort(key=lambda row: sign * float(row[shown]))
    header = [name for name in judged[0] if name != "name" or any(row["name"] for row in judged)]
    numbers = [i for i, name in enumerate(header) if name != "name"]

    def cell(name: str, value: str) -> str:
        return value if name in ("client", "name", "examples") or not value else short(float(value))

    rows = [[cell(name, row[name]) for name in header] for row in judged[:20]]
    table = page.table(header, rows, numbers=numbers)
    return page.folded(f"The {len(rows)} clients with the worst {shown} of {len(judged):,}", table)


def _surroundings(manifest: Mapping[str, Any]) -> dict[str, object]:
    hardware, software, git = manifest["hardware"], manifest["software"], manifest["git"]
    memory = hardware["memory_bytes"]
    changed = {True: ", with changes", False: "", None: ", changes unknown"}
    versions = ", ".join(f"{name} {version}" for name, version in software["packages"].items())
    return {
        "command": "; ".join(" ".join(session["command"]) for session in manifest["sessions"]),
        "seeds": ", ".join(f"{name} {seed}" for name, seed in manifest["seeds"].items()),
        "processor": f"{hardware['cpu']}, {hardware['cores']} cores",
        "memory": "unknown" if memory is None else in_bytes(memory),
        "accelerators": ", ".join(hardware["accelerators"]) or "none",
        "system": f"{software['system']}, Python {software['python']}",
        "packages": versions,
        "commit": "not in a repository" if git is None else git["commit"] + changed[git["modified"]],
    }


def _shown(value: object) -> str:
    return "–" if value is None or value == "" else short(value)


def _foot() -> str:
    return (
        '<p class="quiet">Beside this page: metrics.jsonl and rounds.csv (every round), clients.jsonl '
        "(every client and round), plots (pictures as SVG and PNG with their numbers), checkpoints "
        "(models), manifest.json (versions and digests).</p>"
    )
