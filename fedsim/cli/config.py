"""`fedsim config` and `fedsim explain`: what a configuration is, and what an error means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli import output
from fedsim.cli.arguments import ConfigFile, Preset, Sets, load
from fedsim.cli.settings import Command, settings_of

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@app.command("show", cls=Command)
def show(
    context: typer.Context,
    config: ConfigFile = None,
    sets: Sets = None,
    preset: Preset = None,
    sources: Annotated[bool, typer.Option("--sources", help="Say where each value comes from.")] = False,
) -> None:
    """Print the resolved configuration; it is a file that can be run."""
    from fedsim.config import to_dict, to_toml

    settings = settings_of(context)
    loaded = load(config, preset=preset, sets=sets)
    values = to_dict(loaded.config)
    lines = to_toml(loaded.config).splitlines()
    if sources:
        rows = []
        for key, origin in loaded.sources.items():
            value: object = values
            for part in key.split("."):
                value = value[part] if isinstance(value, dict) else None
            rows.append([key, json.dumps(value), origin])
        lines = output.columns(["key", "value", "from"], rows)
    data = {"config": values, "sources": loaded.sources, "expected": loaded.expected}
    output.result(settings, data, lines)


@app.command("validate", cls=Command)
def validate(
    context: typer.Context, config: ConfigFile = None, sets: Sets = None, preset: Preset = None
) -> None:
    """Check a configuration without loading data; fedsim run --dry-run checks those too."""
    from fedsim.config import digest

    settings = settings_of(context)
    loaded = load(config, preset=preset, sets=sets)
    name = "the defaults" if loaded.file is None else str(loaded.file)
    data = {"file": None if loaded.file is None else str(loaded.file), "digest": digest(loaded.config)}
    lines = [f"{name}: valid, digest {data['digest']}", "Next: fedsim run --dry-run"]
    output.result(settings, data, lines)


@app.command("schema", cls=Command)
def schema(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="Write it into this file.")] = None,
) -> None:
    """Print the JSON Schema of configuration files, for completion in editors."""
    from fedsim.config import json_schema
    from fedsim.storage import write_atomically

    settings = settings_of(context)
    text = json.dumps(json_schema(), indent=2)
    if out is not None:
        write_atomically(out, f"{text}\n".encode())
    output.result(settings, json_schema(), [text] if out is None else [f"wrote {out}"])


@app.command("presets", cls=Command)
def presets(context: typer.Context) -> None:
    """List the presets with what each should reach."""
    from fedsim.config_merge import parse, preset_names, preset_text

    settings = settings_of(context)
    rows, data = [], {}
    for name in preset_names():
        text = preset_text(name)
        expected = parse(text, where=f"preset {name}").get("expected", {})
        title = text.partition("\n")[0].lstrip("# ")
        reached = "–"
        if expected:
            reached = f"{expected['metric']} {expected['value']} ± {expected['tolerance']}"
            reached += f" after {expected['round']} rounds"
        rows.append([name, title, reached])
        data[name] = {"title": title, "expected": expected}
    output.result(settings, data, output.columns(["preset", "what it is", "expected"], rows))


@app.command("explain", cls=Command)
def explain(
    context: typer.Context,
    key: Annotated[
        str | None, typer.Argument(help="A table or table.key, such as client.lr; all without one.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All tables as a document.")] = False,
) -> None:
    """Explain a key or a table: type, default, meaning, who uses it."""
    from fedsim.config_keys import as_markdown
    from fedsim.config_keys import explain as explained
    from fedsim.config_sections import TABLES

    settings = settings_of(context)
    entries = [e for table in TABLES for e in explained(table)] if key is None else explained(key)
    if markdown:
        output.result(settings, {"keys": [e._asdict() for e in entries]}, as_markdown().splitlines())
        return
    lines: list[str] = []
    for entry in entries:
        lines += [
            entry.key,
            *(f"  {line}" for line in output.pairs({
                "type": entry.type,
                "default": entry.default,
                "meaning": entry.doc,
                "used by": entry.used_by,
            }) if line.split("  ", 1)[-1].strip()),
            "",
        ]  # fmt: skip
    output.result(settings, {"keys": [e._asdict() for e in entries]}, lines[:-1])


def explain_code(
    context: typer.Context,
    code: Annotated[str | None, typer.Argument(help="Such as FS-CFG-004; all codes without one.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All pages as one document.")] = False,
) -> None:
    """Explain an error code: what it means and what to do."""
    from fedsim.explain import as_markdown, page, pages

    settings = settings_of(context)
    if code is not None:
        found = page(code)
        output.result(settings, found._asdict(), found.lines())
        return
    every = pages()
    lines = as_markdown().splitlines() if markdown else output.pairs({p.code: p.title for p in every})
    output.result(settings, {"codes": [p._asdict() for p in every]}, lines)
