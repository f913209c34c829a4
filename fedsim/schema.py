"""The keyword parameters of a factory as a schema: what they are, checking a table, calling it.

pydantic validates; the model is made from the factory's signature. Types are strict (``"3"`` is no
number, ``true`` is no number, a whole number is a float), a list serves where a tuple is wanted, and
parameters whose names end in ``_seconds`` or ``_bytes`` may be written with a unit.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from fedsim.errors import ConfigError, FedsimError, RegistryError
from fedsim.units import parse_bytes, parse_seconds

Factory = Callable[..., Any]  # Any: each group's factories return that group's own type
Values = dict[str, Any]  # Any: whatever TOML holds
M = TypeVar("M", bound=BaseModel)

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""pydantic's types of error for a key that is not there, in a model and in a dataclass."""

_UNITS: Mapping[str, Callable[[str], float]] = {"_seconds": parse_seconds, "_bytes": parse_bytes}


class Parameter(NamedTuple):
    """One keyword parameter of a factory.

    Args:
        name: as it is written in a table.
        type: in words, such as ``float``, ``"a" | "b"``, ``list of int``.
        default: None where there is none, see `required`.
        required: whether it must be given.
        doc: from the Args section of the docstring, "" without one.
    """

    name: str
    type: str
    default: Any
    required: bool
    doc: str


def describe(factory: Factory) -> list[Parameter]:
    """The keyword parameters of `factory` in the order of its signature.

    Raises:
        RegistryError: FS-REG-003, the signature cannot be read.
    """
    docs = documented(inspect.getdoc(factory) or "")
    hints = _hints(factory)
    return [
        Parameter(
            p.name,
            type_name(hints.get(p.name, Any)),
            None if p.default is inspect.Parameter.empty else p.default,
            p.default is inspect.Parameter.empty,
            docs.get(p.name, ""),
        )
        for p in _parameters(factory)
    ]


def validate(
    factory: Factory, parameters: Mapping[str, Any], where: str, *, given: Iterable[str] = ()
) -> Values:
    """`parameters` checked against the signature, with the factory's defaults filled in.

    Args:
        where: table for error messages, such as ``[strategy] name = 'fedprox'``.
        given: parameters that fedsim fills in by itself; a table must not hold them.

    Returns:
        Every parameter that is not `given`, in the order of the signature; units resolved.

    Raises:
        ConfigError: FS-CFG-004 unknown key, FS-CFG-005 wrong type, FS-CFG-007 missing key.
        RegistryError: FS-REG-003.
    """
    own = [p for p in _parameters(factory) if p.name not in set(given)]
    try:
        model = _model(factory, own)
    except (TypeError, ValueError, NameError) as error:
        raise _unreadable(factory, error) from error
    try:
        checked = check(model, parameters)
    except ValidationError as error:
        raise refusal(error, parameters, [p.name for p in own], where=where) from error
    return {p.name: getattr(checked, f"p_{p.name}") for p in own}


def build(
    factory: Factory,
    parameters: Mapping[str, Any],
    *,
    where: str,
    given: Mapping[str, Any] = types.MappingProxyType({}),
) -> Any:
    """Call `factory` with a checked table.

    Args:
        given: what fedsim fills in by itself, passed where the factory has a parameter of that name.

    Raises:
        ConfigError: as `validate`; FS-CFG-006, the factory refused a value.
        RegistryError: FS-REG-003.
    """
    values = validate(factory, parameters, where, given=given)
    names = {p.name for p in _parameters(factory)}
    values |= {name: value for name, value in given.items() if name in names}
    try:
        return factory(**values)
    except FedsimError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"a value in {where} is out of range",
            code="FS-CFG-006",
            where=where,
            why=str(error),
            hint="correct the value",
        ) from error


def check(model: type[M], values: Mapping[str, Any]) -> M:
    """`values` as an instance of `model`, strictly typed.

    Going through JSON takes lists for tuples and texts for paths, which strict Python values do not;
    what JSON cannot hold (an object given in a program) is checked as it is.

    Raises:
        ValidationError: pydantic's, for `refusal`.
    """
    try:
        text = json.dumps(values, default=_plain)
    except TypeError:
        return model.model_validate(dict(values), strict=True)
    return model.model_validate_json(text, strict=True)


def refusal(
    error: ValidationError, values: Mapping[str, Any], known: Iterable[str], *, where: str
) -> ConfigError:
    """The first mistake that pydantic found, in fedsim's words.

    Args:
        values: the table that was checked.
        known: the keys that it may hold.
    """
    found = error.errors(include_url=False, include_context=False)
    unknown = [e for e in found if e["type"] in UNKNOWN]
    first = (unknown or found)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if unknown:
        return unknown_key(key, known, where=where)
    if first["type"] == "missing":
        return ConfigError(
            f"the key `{key}` is missing",
            code="FS-CFG-007",
            where=where,
            why="it has no default",
            hint=f"add {key} = … to that table",
        )
    same = [e for e in found if e["loc"] and str(e["loc"][0]) == key]
    wanted = alternatives(same)
    return ConfigError(
        f"the value of `{key}` does not fit",
        code="FS-CFG-005",
        where=where,
        why=f"{key} = {shown(values.get(key))}; {wanted}",
        hint=f"correct {key}",
    )


def unknown_key(key: str, known: Iterable[str], *, where: str) -> ConfigError:
    """``unknown key `alhpa` in [data.partition], did you mean `alpha`?``"""
    keys = list(known)
    # One wrong letter of two is half of the name.
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5 if len(key) <= 3 else 0.6)
    asked = f", did you mean `{near[0]}`?" if near else ""
    table = re.search(r"\[[\w.]+\]", where)
    return ConfigError(
        f"unknown key `{key}` in {table[0] if table else where}{asked}",
        code="FS-CFG-004",
        where=where,
        why=f"known keys: {', '.join(keys) or 'none'}",
        hint=f"write `{near[0]}`" if near else "remove the key",
    )


def expected(error: Mapping[str, Any]) -> str:
    """What pydantic wanted, without its jargon."""
    words = {
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "float_type": "expected a number",
        "string_type": "expected a text",
        "bool_type": "expected true or false",
        "list_type": "expected a list",
        "tuple_type": "expected a list",
        "dict_type": "expected a table",
        "none_required": "expected nothing",
        "model_type": "expected a table",
        "dataclass_type": "expected a table",
    }
    kind, message = str(error["type"]), str(error["msg"])
    if kind in words:
        return words[kind]
    if kind == "literal_error":
        return "expected " + message.removeprefix("Input should be ")
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    return message.replace("Input should be", "it must be")


def alternatives(errors: Iterable[Mapping[str, Any]]) -> str:
    """What would have fitted, where each alternative of a union has its own error."""
    first, *others = dict.fromkeys(expected(e) for e in errors)
    return " or ".join([first, *(text.removeprefix("expected ") for text in others)])


def shown(value: object) -> str:
    """A value as TOML writes it, cut where it is long."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def type_name(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "none"
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " | ".join(json.dumps(a) if isinstance(a, str) else str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
    if origin in (list, tuple, set, frozenset) or (inspect.isclass(origin) and issubclass(origin, Iterable)):
        if issubclass(origin, Mapping):
            return "table"
        inner = [a for a in arguments if a is not ...]
        return "list of " + " | ".join(dict.fromkeys(type_name(a) for a in inner)) if inner else "list"
    if hint is Any:
        return "any"
    return {"str": "text", "Path": "path", "PurePath": "path"}.get(
        getattr(hint, "__name__", ""), getattr(hint, "__name__", str(hint))
    )


def documented(docstring: str) -> dict[str, str]:
    """The entries of the Args section of a docstring: name to text, lines joined."""
    section = re.search(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return {}
    lines = inspect.cleandoc("x\n" + section[1]).splitlines()[1:]
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        entry = re.match(r"(\w+(?:, ?\w+)*): ?(.*)", line)
        if entry is not None:
            # "start: text; stop: text" describes two in one entry.
            names = [name.strip() for name in entry[1].split(",")]
            texts |= dict.fromkeys(names, entry[2].strip())
        elif names and line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}".strip() for name in names}
    return texts


def _parameters(factory: Factory) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise _unreadable(factory, error) from error
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p for p in signature.parameters.values() if p.kind in named]


def _hints(factory: Factory) -> dict[str, Any]:
    try:
        return typing.get_type_hints(factory, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise _unreadable(factory, error) from error


def _model(factory: Factory, parameters: list[inspect.Parameter]) -> type[BaseModel]:
    """A pydantic model with one field per parameter; prefixed, since some names are taken there."""
    from pydantic import Field

    hints = _hints(factory)
    fields: dict[str, Any] = {}
    for p in parameters:
        hint = hints.get(p.name, Any)
        for ending, parse in _UNITS.items():
            if p.name.endswith(ending):
                hint = Annotated[hint, BeforeValidator(_with_unit(parse))]
        required = p.default is inspect.Parameter.empty
        default = {} if required else {"default": p.default}
        fields[f"p_{p.name}"] = (hint, Field(alias=p.name, **default))
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return create_model("Parameters", __config__=config, **fields)


def _with_unit(parse: Callable[[str], float]) -> Callable[[object], object]:
    return lambda value: parse(value) if isinstance(value, str) else value


def _plain(value: object) -> object:
    """What `json` does not know but TOML or a program may hold."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _unreadable(factory: Factory, error: Exception) -> RegistryError:
    return RegistryError(
        f"the parameters of {getattr(factory, '__qualname__', factory)!r} cannot be read",
        code="FS-REG-003",
        where=str(getattr(factory, "__module__", "")),
        why=f"{type(error).__name__}: {error}",
        hint="give every keyword parameter of the factory a type that can be imported at run time",
    )
