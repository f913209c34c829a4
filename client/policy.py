"""What the owner of a client allows: ``policy.toml``, read again whenever it changes.

Without a file everything is refused. A list of who and what may ask (coordinators, runs, strategies, models,
data sets) allows nothing unless it is written; a bound that is not written bounds nothing. The policy is
checked on the signed task, before anything of it is fetched, built or trained.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedsim.client.terms import Terms
from fedsim.errors import ConfigError
from fedsim.storage import unreadable
from fedsim.units import parse_bytes


def _server_id(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError(f"a server id has 64 hexadecimal digits, got {text!r}")
    return text.lower()


def _bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


def _clock(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value):
        return time.fromisoformat(value)
    if isinstance(value, time):
        return value
    raise ValueError(f"a time of day is written as '20:00', got {value!r}")


Clock = Annotated[time, BeforeValidator(_clock)]


class _Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )


class Coordinators(_Table):
    """Whose tasks are looked at."""

    allow: list[Annotated[str, AfterValidator(_server_id)]] = []
    """Server ids, 64 hexadecimal digits each."""


class RunNames(_Table):
    """Which runs."""

    names: list[str] = []
    """Patterns of names or identifiers, such as "digits-*"."""


class Plugins(_Table):
    """What may be run here; patterns."""

    strategies: list[str] = []
    """Names of strategies."""
    models: list[str] = []
    """Names of models."""
    datasets: list[str] = []
    """Names of data sets."""


class Limits(_Table):
    """What a task may ask for."""

    min_batch_size: Annotated[int, Field(ge=1)] = 1
    """Examples of a local step, at least: small batches show more of single examples."""
    min_examples: Annotated[int, Field(ge=0)] = 0
    """With fewer examples this client takes no part."""
    max_local_steps: Annotated[int, Field(ge=1)] | None = None
    """Local steps of one task."""
    max_local_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the client's data in one task, steps converted."""
    max_upload_bytes: Annotated[int, BeforeValidator(_bytes), Field(ge=1)] | None = None
    """Size of an answer, as a number or as "256MiB"."""
    schemas: list[str] | None = None
    """Digests of the layouts of models that are allowed; none for any."""
    metrics: list[str] | None = None
    """Patterns of the metrics that may leave; none for all."""


class Privacy(_Table):
    """Differential privacy that a run must have."""

    min_noise_multiplier: Annotated[float, Field(ge=0)] = 0.0
    """Least standard deviation of the noise, divided by the clipping norm."""
    max_clip: Annotated[float, Field(gt=0)] | None = None
    """Largest clipping norm."""


class Hours(_Table):
    """When this client works, in local time; over midnight where `to` is before `from`."""

    begin: Clock = Field(alias="from")
    end: Clock = Field(alias="to")


class Policy(_Table):
    """A whole policy."""

    coordinators: Coordinators = Coordinators()
    runs: RunNames = RunNames()
    plugins: Plugins = Plugins()
    limits: Limits = Limits()
    privacy: Privacy = Privacy()
    hours: Hours | None = None


def needs_examples(policy: Policy, terms: Terms) -> bool:
    """Whether `refusal` has to know how many examples this client has."""
    limits = policy.limits
    return (
        limits.min_examples > 0
        or limits.min_batch_size > 1
        or (limits.max_local_steps is not None and terms.steps is None)
        or (limits.max_local_epochs is not None and terms.steps is not None)
    )


def refusal(policy: Policy, terms: Terms, examples: int | None = None) -> str | None:
    """Why the owner does not allow a task; None where everything that can be checked is allowed.

    Args:
        examples: of this client, None where that is not known yet: what depends on it is not checked then.
    """
    return _stranger(policy, terms) or _demand(policy, terms) or _amount(policy.limits, terms, examples)


def _stranger(policy: Policy, terms: Terms) -> str | None:
    """Who and what is not on a list."""
    if terms.server_id not in policy.coordinators.allow:
        return f"[coordinators] allow does not name this coordinator ({terms.server_id[:16]}…)"
    if not (_named(terms.run_name, policy.runs.names) or _named(terms.run_id, policy.runs.names)):
        return f"[runs] names has no pattern for the run {terms.run_name!r}"
    for key, name in (("strategies", terms.strategy), ("models", terms.model), ("datasets", terms.dataset)):
        if not _named(name, getattr(policy.plugins, key)):
            return f"[plugins] {key} does not allow {name!r}"
    schemas = policy.limits.schemas
    if schemas is not None and terms.schema not in schemas:
        return f"[limits] schemas does not allow the model layout {terms.schema[:16]!r}…"
    return None


def _demand(policy: Policy, terms: Terms) -> str | None:
    """What the run as such asks too much or grants too little of."""
    most = policy.limits.max_upload_bytes
    if most is not None and terms.upload_bytes > most:
        return f"[limits] max_upload_bytes = {most}, an answer has {terms.upload_bytes}"
    least, clip = policy.privacy.min_noise_multiplier, policy.privacy.max_clip
    # Written so that NaN is refused.
    if least > 0 and not (terms.noise_multiplier is not None and terms.noise_multiplier >= least):
        return f"[privacy] min_noise_multiplier = {least:g}, the run has {_shown(terms.noise_multiplier)}"
    if clip is not None and not (terms.clip is not None and 0 < terms.clip <= clip):
        return f"[privacy] max_clip = {clip:g}, the run has {_shown(terms.clip)}"
    steps = policy.limits.max_local_steps
    if steps is not None and terms.steps is not None and terms.steps > steps:
        return f"[limits] max_local_steps = {steps}, the task has {terms.steps}"
    epochs = policy.limits.max_local_epochs
    if epochs is not None and terms.steps is None and terms.epochs > epochs:
        return f"[limits] max_local_epochs = {epochs:g}, the task has {terms.epochs}"
    if 0 < terms.batch_size < policy.limits.min_batch_size:
        return f"[limits] min_batch_size = {policy.limits.min_batch_size}, the task has {terms.batch_size}"
    if terms.batch_size < 0:
        return f"the batch size {terms.batch_size} is no number of examples"
    return None


def _amount(limits: Limits, terms: Terms, examples: int | None) -> str | None:
    """What depends on the client's number of examples."""
    if examples is None:
        return None
    if examples < limits.min_examples:
        return f"[limits] min_examples = {limits.min_examples}, this client has {examples}"
    batch = min(terms.batch_size or examples, examples)
    if batch < limits.min_batch_size:
        return f"[limits] min_batch_size = {limits.min_batch_size}, this client's batches have {batch}"
    per_epoch = math.ceil(examples / batch) if batch else 0
    steps = terms.epochs * per_epoch if terms.steps is None else terms.steps
    if limits.max_local_steps is not None and steps > limits.max_local_steps:
        return f"[limits] max_local_steps = {limits.max_local_steps}, the task has {steps} with these data"
    if limits.max_local_epochs is not None and steps > limits.max_local_epochs * per_epoch:
        return f"[limits] max_local_epochs = {limits.max_local_epochs:g}, the task has {steps} steps"
    return None


def open_in(policy: Policy, now: datetime) -> float:
    """Seconds until the owner's hours begin; 0 inside them.

    Args:
        now: local time.
    """
    if policy.hours is None or policy.hours.begin == policy.hours.end:
        return 0.0
    begin, end, at = policy.hours.begin, policy.hours.end, now.time()
    inside = begin <= at < end if begin < end else at >= begin or at < end
    if inside:
        return 0.0
    start = datetime.combine(now.date(), begin)
    start += timedelta(days=1) if begin <= at else timedelta()
    return max((start - now).total_seconds(), 0.001)


def leaving(policy: Policy, metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of `metrics` that may leave this client."""
    allowed = policy.limits.metrics
    return {k: v for k, v in metrics.items() if allowed is None or _named(k, allowed)}


def read_policy(path: Path) -> Policy | None:
    """The policy in `path`, None where there is no such file.

    Raises:
        ConfigError: FS-CFG-115, it is not a policy. EnvironmentProblem: FS-ENV-024.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode())
        return Policy.model_validate(values)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(error, path) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _no_policy(path, f"{where}: {first['msg']}") from error
    except ValueError as error:  # of TOML, or no UTF-8
        raise _no_policy(path, str(error)) from error


@dataclass(slots=True)
class PolicyFile:
    """A policy as it is on disk now.

    Args:
        path: of ``policy.toml``.
    """

    path: Path
    _seen: tuple[int, int, int] | None = None
    _policy: Policy | None = None

    def policy(self) -> Policy | None:
        """The policy, None without a file.

        Raises:
            ConfigError: the file is wrong; nothing is allowed until it is right again.
        """
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            self._seen = self._policy = None
            return None
        except OSError as error:
            raise unreadable(error, self.path) from error
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if seen != self._seen:
            self._policy = read_policy(self.path)
            self._seen = seen
        return self._policy


def _no_policy(path: Path, why: str) -> ConfigError:
    return ConfigError(
        "the policy of this client cannot be understood",
        code="FS-CFG-115",
        where=str(path),
        why=why,
        hint="until it is right, every task is refused; docs/deployment.md lists the keys",
    )


def _named(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
