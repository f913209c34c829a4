"""What each key of a configuration means: type, default, text, and who uses it."""

from __future__ import annotations

import difflib
import inspect
import json
from typing import NamedTuple

from fedsim import registry
from fedsim.attribute_docs import attribute_docs
from fedsim.config import PLUGIN_TABLES
from fedsim.config_sections import TABLES, Section
from fedsim.errors import ConfigError, FedsimError
from fedsim.local import LocalSpec
from fedsim.schema import Parameter, describe, type_name


class Explanation(NamedTuple):
    """One key, in words.

    Args:
        key: ``table.key``, or the table itself.
        type, default: in words; "" for a table.
        doc: what it means.
        used_by: what reads it.
    """

    key: str
    type: str
    default: str
    doc: str
    used_by: str


def explain(key: str) -> list[Explanation]:
    """A key, or a table followed by all of its keys; of a plugin's parameter one entry per plugin.

    Raises:
        ConfigError: FS-CFG-014, there is no such key.
    """
    if key in TABLES:
        section = TABLES[key]
        doc = inspect.getdoc(section) or ""
        head = Explanation(key, "table", "", doc.partition("\n")[0], _used_by(key))
        return [head, *_own_keys(key), *_plugin_names(key)]
    table, _, name = key.rpartition(".")
    if table in TABLES:
        found = [e for e in _own_keys(table) if e.key == key] or _plugin_keys(table, name)
        if found:
            return found
    known = [e.key for t in TABLES for e in _own_keys(t)] + list(TABLES)
    near = difflib.get_close_matches(key, known, n=3)
    raise ConfigError(
        f"no configuration key is called {key!r}",
        code="FS-CFG-014",
        where="fedsim config explain",
        hint=f"did you mean {' or '.join(near)}?" if near else "fedsim config show prints every key",
    )


def as_markdown() -> str:
    """Every table with its keys, the end of ``docs/configuration.md``."""
    lines: list[str] = []
    for table in TABLES:
        head, *entries = explain(table)
        lines += [f"### [{table}]", "", f"{head.doc} Used by {head.used_by}.", ""]
        lines += ["| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
        for entry in entries:
            name = entry.key.rpartition(".")[2]
            cells = [entry.type, entry.default, entry.doc]
            if name == "*":
                cells = ["", "", "parameters of the plugin that is named: `fedsim plugins show NAME`"]
            row = " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in cells)
            lines.append(f"| `{name}` | {row} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _used_by(table: str) -> str:
    section = TABLES[table]
    return (
        section.used_by if issubclass(section, Section) else "the driver of local training, on every client"
    )


def _own_keys(table: str) -> list[Explanation]:
    section = TABLES[table]
    if issubclass(section, LocalSpec):
        return [_of(table, p, _used_by(table)) for p in describe(LocalSpec)]
    docs, entries = attribute_docs(section), []
    for name, info in section.model_fields.items():
        if f"{table}.{name}" in TABLES:
            continue
        default = info.get_default(call_default_factory=True, validated_data={})
        p = Parameter(name, type_name(info.annotation), default, False, docs.get(name, ""))
        entries.append(_of(table, p, _used_by(table)))
    return entries


def _of(table: str, p: Parameter, used_by: str) -> Explanation:
    default = (
        "required" if p.required else "none" if p.default is None else json.dumps(p.default, default=str)
    )
    return Explanation(f"{table}.{p.name}", p.type, default, p.doc, used_by)


def _plugin_names(table: str) -> list[Explanation]:
    if table not in PLUGIN_TABLES:
        return []
    entry = PLUGIN_TABLES[table]
    names = ", ".join(registry.names(entry.kind))
    return [
        Explanation(
            f"{table}.*",
            "",
            "",
            f"parameters of the plugin that is named: {names}",
            "fedsim plugins show NAME",
        )
    ]


def _plugin_keys(table: str, name: str) -> list[Explanation]:
    """The parameter `name` of every plugin that has one."""
    entry = PLUGIN_TABLES.get(table)
    if entry is None or name in entry.given:
        return []
    found = []
    for plugin in registry.names(entry.kind):
        try:
            parameters = describe(registry.load(entry.kind, plugin))
        except FedsimError:  # a third party's plugin that is broken explains nothing
            continue
        found += [_of(table, p, f"{entry.key} = {json.dumps(plugin)}") for p in parameters if p.name == name]
    return found
