"""Making a model from what a configuration or a program names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from fedsim.errors import FedsimError, ModelError
from fedsim.registry import load

Source = str | type[nn.Module] | Callable[..., nn.Module] | nn.Module


def make_model(
    source: Source,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    params: Mapping[str, Any] | None = None,  # Any: the factory's own parameters
) -> nn.Module:
    """A model from its name, its target, its factory, or the module itself.

    `input_shape` and `classes` are passed to a factory that has parameters of these names, unless
    `params` sets them; a class without them is called with `params` alone. The weights come from
    torch's global generator.

    Args:
        source: a name registered under ``fedsim.models``; ``package.module:Name``; a class or
            function that returns an `nn.Module`; or an `nn.Module`, returned as it is.
        input_shape: shape of one example, without the batch dimension.
        classes: K, or 1 for regression.
        params: further keyword arguments.

    Raises:
        RegistryError: no model of that name.
        ModelError: FS-MOD-002 the target cannot be imported, FS-MOD-003 parameters that the factory
            does not take or lacks, FS-MOD-004 the factory failed, FS-MOD-005 what it made is no
            `nn.Module`; and the refusals of the zoo's own factories.
    """
    given = dict(params or {})
    name = source if isinstance(source, str) else _name_of(source)
    made: object = source
    if isinstance(source, str):
        made = _target(source) if ":" in source else load("models", source)
    if isinstance(made, nn.Module):
        if given:
            raise _does_not_fit(name, given, [], "a finished module takes no parameters")
        return made
    if not callable(made):
        raise _no_module(name, made)
    module = _call(name, made, {"input_shape": input_shape, "classes": classes}, given)
    if not isinstance(module, nn.Module):
        raise _no_module(name, module)
    return module


def _name_of(source: object) -> str:
    return str(getattr(source, "__qualname__", type(source).__qualname__))


def _target(target: str) -> object:
    """The object that ``package.module:Name`` names; ``Name`` may have dots."""
    module_name, _, attribute = target.partition(":")
    try:
        found: object = import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    # Importing runs the user's file, and that can fail in any way.
    except Exception as error:
        raise ModelError(
            f"the model {target!r} cannot be imported",
            code="FS-MOD-002",
            where="model.target",
            why=f"{type(error).__name__}: {error}",
            hint=_import_hint(module_name, error),
        ) from error
    return found


def _import_hint(module_name: str, error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return "a target is written package.module:Name; check both parts"
    if f"{module_name}.".startswith(f"{error.name}."):
        return "run from the folder that contains it, or install its package"
    return f"it imports {error.name}, which is not installed"


def _call(
    name: str,
    factory: Callable[..., object],
    offered: Mapping[str, Any],
    given: Mapping[str, Any],
) -> object:
    """The factory's result, given what it takes of `offered` and all of `given`."""
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some compiled callables have none: nothing can be offered to them
        signature = inspect.Signature()
        arguments = dict(given)
    else:
        # Only parameters of these very names: behind **kwargs may be anything.
        arguments = {k: v for k, v in offered.items() if k in signature.parameters} | dict(given)
        try:
            signature.bind(**arguments)
        except TypeError as error:
            accepted = [k for k in signature.parameters if k not in offered]
            raise _does_not_fit(name, given, accepted, str(error)) from error
    try:
        return factory(**arguments)
    except FedsimError:
        raise
    # The user's constructor can fail in any way; the reason is what it said.
    except Exception as error:
        shown = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        raise ModelError(
            f"the model {name!r} could not be built",
            code="FS-MOD-004",
            where=f"{name}({shown})",
            why=f"{type(error).__name__}: {error}",
            hint="call it with these arguments in a Python session to see where it fails",
        ) from error


def _does_not_fit(name: str, given: Mapping[str, Any], accepted: list[str], why: str) -> ModelError:
    near = [
        match
        for key in given
        if key not in accepted
        for match in difflib.get_close_matches(key, accepted, n=1)
    ]
    return ModelError(
        f"the parameters do not fit the model {name!r}",
        code="FS-MOD-003",
        where="model",
        why=why,
        hint=f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(accepted) or 'no parameters'}",
    )


def _no_module(name: str, made: object) -> ModelError:
    return ModelError(
        f"{name!r} is not a model",
        code="FS-MOD-005",
        where="model",
        why=f"expected an nn.Module or a function that returns one, got {type(made).__name__}",
        hint="name a class derived from torch.nn.Module, or a factory of one",
    )
