"""The configuration as one pydantic model: tables, keys, types, defaults and what each key means.

The names of the keys are a public contract. A table that names a plugin also holds the keyword
parameters of its factory; those are checked against the factory (`fedsim.schema`), not here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from fedsim.local import LocalSpec
from fedsim.units import Seconds

Values = dict[str, Any]  # Any: whatever TOML holds

CLIENTS, ALPHA = 20, 0.3


def _cadence(text: str) -> str:
    if not re.fullmatch(r"never|final|every [1-9][0-9]*", text):
        raise ValueError(f'expected "never", "final" or "every N", such as "every 5", got {text!r}')
    return text


class Section(BaseModel):
    """A table; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    used_by: ClassVar[str] = ""


class PluginSection(Section):
    """A table that names a plugin and holds its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def parameters(self) -> Values:
        """The keyword parameters of the plugin's factory."""
        return dict(self.model_extra or {})


class RunSection(Section):
    """What the run is called and how long it is."""

    used_by: ClassVar[str] = "the simulation, the run folder"
    name: str | None = None
    """Name of the run; the default is made of strategy and data set."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Of everything random but the partition, availability, devices and membership, which have their own."""
    rounds: Annotated[int, Field(ge=0)] = 50
    """Rounds to complete."""
    clock_limit: Seconds | None = None
    """Seconds of the run's clock (or "2h") after which the run ends, whatever rounds are left."""


class PartitionSection(PluginSection):
    """How the training examples are divided among clients."""

    used_by: ClassVar[str] = "the data layer, before training"
    kind: str = "dirichlet"
    """Partitioner; `fedsim plugins` lists them."""
    clients: Annotated[int, Field(ge=1)] | None = CLIENTS
    """Number of clients; none takes all where the data know their clients (kind natural)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The partition's own seed: it stays the same when run.seed changes."""
    min_examples: Annotated[int, Field(ge=0)] = 1
    """Every client gets at least so many examples."""
    on_empty: Literal["error", "keep"] = "error"
    """What happens to clients that are still without any example."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, values: Any) -> Any:  # Any: as it was written
        if not isinstance(values, dict):
            return values
        kind = values.get("kind", "dirichlet")
        if kind in ("dirichlet", "dirichlet_client"):
            values = {"alpha": ALPHA, **values}
        if kind == "natural":
            return {"clients": None, **values}
        if values.get("clients", CLIENTS) is None:  # which a file could not say
            raise ValueError("clients must be a number for every kind but natural")
        return values


class DataSection(PluginSection):
    """The data set."""

    used_by: ClassVar[str] = "the data layer, before training"
    name: str = "digits"
    """Data set; `fedsim data ls` lists them."""
    path: str | None = None
    """Local folder or file to read, relative to the current folder."""
    partition: PartitionSection = Field(default_factory=lambda: PartitionSection.model_validate({}))
    """How it is divided among clients."""


class ModelSection(PluginSection):
    """The model that is trained."""

    used_by: ClassVar[str] = "every engine"
    name: str = "small_cnn"
    """Registered model; `fedsim plugins` lists them."""
    target: str | None = None
    """Your own model instead: `package.module:Class`, a class or function that returns an nn.Module."""
    weights: str | None = None
    """Safetensors file with the initial weights."""
    personal: list[str] = []
    """Beginnings of the names of parameters that stay on each client."""

    @model_validator(mode="before")
    @classmethod
    def _name_or_target(cls, values: Any) -> Any:  # Any: as it was written
        if isinstance(values, dict) and values.get("target") is not None and "name" in values:
            raise ValueError("a model is named by `name` or by `target`, not by both; remove one of them")
        return values


class RoundSection(Section):
    """Who takes part in a round and when it counts."""

    used_by: ClassVar[str] = "the sampler and the scheduler"
    sample: int | float | Literal["all"] = 10
    """Clients per round: a number, a fraction of the population, or "all"."""
    quorum: int | float | None = None
    """Answers without which a round fails, as a number or a fraction of the cohort; the default is 1."""
    deadline: Seconds | None = None
    """Seconds of the run's clock (or "10m") after which a round closes with the answers it has."""
    overcommit: float = 1.0
    """Factor by which more clients are asked than are needed; the slowest are cancelled."""
    on_failed: Literal["retry", "skip", "stop"] = "retry"
    """What follows a failed round: the same round with new clients, the next round, or the end."""
    max_failed: Annotated[int, Field(ge=1)] = 3
    """Failed rounds in a row that end the run."""


class SamplerSection(PluginSection):
    """How the cohort is drawn."""

    used_by: ClassVar[str] = "the start of each round"
    name: str = "uniform"
    """Sampler; `fedsim plugins` lists them."""


class AvailabilitySection(PluginSection):
    """Which clients could take part in a round."""

    used_by: ClassVar[str] = "the sampler"
    name: str | None = None
    """Model of availability; none has every client there in every round."""


class DevicesSection(PluginSection):
    """How fast and how reliable the clients' devices are."""

    used_by: ClassVar[str] = "the simulated clock"
    name: str | None = None
    """Model of the devices; none answers at once and never fails."""


class MembershipSection(PluginSection):
    """When clients are registered: who joins late and who leaves."""

    used_by: ClassVar[str] = "the sampler and the server"
    name: str | None = None
    """Model of membership; none has every client registered from the first round to the last."""


class StrategySection(PluginSection):
    """The algorithm: its server half and its choice of client half."""

    used_by: ClassVar[str] = "the server and every client"
    name: str = "fedavg"
    """Strategy; `fedsim plugins` lists them."""


class SchedulerSection(PluginSection):
    """When clients work and when a round closes."""

    used_by: ClassVar[str] = "the server"
    name: str = "sync"
    """Scheduler; `fedsim plugins` lists them."""


class EngineSection(Section):
    """How clients are trained on this machine."""

    used_by: ClassVar[str] = "the simulation"
    name: str = "auto"
    """Engine: auto, fused, stacked, flat, loop (docs/performance.md says what they are), or a plugin."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes that train; the default is one for each core, or 1 where a round is short. Any number gives
    the same results."""
    block: Annotated[int, Field(ge=1)] | None = None
    """Clients trained at once by fused and stacked; the default is sized to the caches."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of this process inside a tensor operation; further processes have one each."""
    device: str = "cpu"
    """Where tensors live: cpu, cuda, cuda:0, auto for a GPU where there is one, or "cuda:0,cuda:1" for
    workers on several."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the parameters."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which flat computes convolutions (on a GPU products too); bfloat16 keeps float32 weights."""
    layout: Literal["auto", "contiguous", "channels_last"] = "auto"
    """How flat lays out the weights of convolutions; auto takes channels_last, which is faster."""


class EvaluationSection(Section):
    """What is measured, and when a run has reached its end early."""

    used_by: ClassVar[str] = "the session, between rounds"
    every: Annotated[int, Field(ge=1)] = 1
    """Rounds between two evaluations; the last round is always evaluated."""
    central: bool = True
    """Evaluate on the central test set."""
    batch_size: Annotated[int, Field(ge=1)] = 500
    """Examples of one forward pass; changes nothing but speed and memory."""
    clients: Annotated[str, AfterValidator(_cadence)] = "final"
    """When clients are evaluated on their own examples: "never", "final" or "every N" rounds."""
    client_cap: Annotated[int, Field(ge=1)] = 1000
    """At most so many clients are evaluated, drawn once for the run."""
    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each client's examples kept back for its evaluation; without one, its training examples."""
    server_ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of a moving average of the global model that is evaluated and kept in its place; clients train on
    from the model itself. 0 for none."""
    metrics: list[str] = []
    """Names of metrics; empty takes those of the task."""
    target: str | None = None
    """End of the run when it is met, such as "accuracy >= 0.97"."""
    early_stop: Annotated[int, Field(ge=1)] | None = None
    """Evaluations without a new best value that end the run."""
    best: str | None = None
    """Which model is kept as the best, such as "accuracy:max"; the default goes by the task."""


class DeploymentSection(Section):
    """What a coordinator expects of real clients."""

    used_by: ClassVar[str] = "the coordinator; a simulation does not look at it"
    min_clients: Annotated[int, Field(ge=1)] | None = None
    """Clients that must be there before a round opens; the default is the cohort."""
    wait: Seconds = 600.0
    """Seconds (or "10m") that a round waits for them; then it fails."""
    on_expired: Literal["dropout", "wait"] = "dropout"
    """What follows when a client's lease ends: its task is lost, or it is offered to the client again."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Times that one task is offered before it is lost."""
    max_strikes: Annotated[int, Field(ge=1)] = 3
    """Refused updates of one client after which it is not asked any more in this run."""
    max_weight: Annotated[int, Field(ge=1)] = 10_000_000
    """Examples that a client may claim; an update with more is refused."""
    max_norm: Annotated[float, Field(gt=0.0)] | None = None
    """Largest L2 norm of an update; the default is none."""
    over_norm: Literal["reject", "clip"] = "reject"
    """What happens to an update above `max_norm`."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 1
    """Versions between two checkpoints of an asynchronous run; rounds are all saved."""


class OutputSection(Section):
    """What is written into the run folder."""

    used_by: ClassVar[str] = "the session and the command line"
    clients: bool = True
    """One line per client and round in clients.jsonl."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 10
    """Rounds between two checkpoints; 0 keeps only the last state."""
    report: bool = True
    """Write report.html (with its pictures) at the end."""
    plots: bool = True
    """Draw the pictures also without a report."""


_CLIENT_RANGES: tuple[tuple[str, float, bool, float], ...] = (
    # key, least, whether the least itself is allowed, below which it must stay
    ("epochs", 1, True, float("inf")),
    ("steps", 1, True, float("inf")),
    ("batch_size", 0, True, float("inf")),
    ("lr", 0, False, float("inf")),
    ("lr_decay", 0, False, float("inf")),
    ("momentum", 0, True, 1.0),
    ("weight_decay", 0, True, float("inf")),
    ("clip_norm", 0, False, float("inf")),
)


class Config(Section):
    """A whole configuration; `fedsim config show` prints one with all its defaults."""

    run: RunSection = RunSection()
    data: DataSection = Field(default_factory=lambda: DataSection.model_validate({}))
    model: ModelSection = ModelSection()
    client: LocalSpec = LocalSpec()
    round: RoundSection = RoundSection()
    sampler: SamplerSection = SamplerSection()
    availability: AvailabilitySection = AvailabilitySection()
    devices: DevicesSection = DevicesSection()
    membership: MembershipSection = MembershipSection()
    strategy: StrategySection = StrategySection()
    scheduler: SchedulerSection = SchedulerSection()
    engine: EngineSection = EngineSection()
    evaluation: EvaluationSection = EvaluationSection()
    deployment: DeploymentSection = DeploymentSection()
    output: OutputSection = OutputSection()

    @field_validator("client")
    @classmethod
    def _client_ranges(cls, spec: LocalSpec) -> LocalSpec:
        for key, least, inclusive, below in _CLIENT_RANGES:
            value = getattr(spec, key)
            if value is None:
                continue
            if not (value >= least if inclusive else value > least) or not value < below:
                bound = f"at least {least:g}" if inclusive else f"above {least:g}"
                upper = "" if below == float("inf") else f" and below {below:g}"
                raise ValueError(f"{key} must be {bound}{upper}, got {value}")
        return spec


TABLES: dict[str, type[Section] | type[LocalSpec]] = {
    "run": RunSection,
    "data": DataSection,
    "data.partition": PartitionSection,
    "model": ModelSection,
    "client": LocalSpec,
    "round": RoundSection,
    "sampler": SamplerSection,
    "availability": AvailabilitySection,
    "devices": DevicesSection,
    "membership": MembershipSection,
    "strategy": StrategySection,
    "scheduler": SchedulerSection,
    "engine": EngineSection,
    "evaluation": EvaluationSection,
    "deployment": DeploymentSection,
    "output": OutputSection,
}
"""Every table of a configuration file."""


def keys_of(table: str) -> list[str]:
    """The keys of a table that are not a plugin's parameters."""
    section = TABLES[table]
    if issubclass(section, LocalSpec):
        return list(LocalSpec.__dataclass_fields__)
    return list(section.model_fields)
