"""The errors that fedsim raises on purpose.

    FedsimError
    ├── ConfigError            FS-CFG-*   a configuration, an argument or a command line is wrong     exit 2
    │   └── RegistryError      FS-REG-*   no plugin of that name                                      exit 2
    ├── DataError              FS-DAT-*   data cannot be read, or does not fit the model              exit 2
    ├── ModelError             FS-MOD-*   a model cannot be built, stacked or loaded                  exit 2
    ├── RunFailed              FS-RUN-*   the run ended and its outcome is failure                    exit 1
    │   ├── QuorumNotReached
    │   └── AllRefused
    ├── Interrupted            FS-INT-*   stopped on request, can be resumed                          exit 5
    └── EnvironmentProblem     FS-ENV-*   disk, memory, permissions, a missing extra                  exit 6

Every error says what happened, where, why it is wrong and what to do; the command line prints it in
that order and exits with the code of its class. A client's failure is data (an event), not an
exception in the server.
"""

from __future__ import annotations


class FedsimError(Exception):
    """An error that a user can act on.

    Args:
        what: one sentence, what happened.
        code: stable identifier such as ``FS-CFG-004``; ``fedsim explain CODE`` describes it.
        where: file, key, client or round it concerns.
        why: the reason it is wrong, with the numbers involved.
        hint: what to do about it.
    """

    exit_code = 1
    default_code = "FS-RUN-001"

    def __init__(
        self,
        what: str,
        *,
        code: str | None = None,
        where: str | None = None,
        why: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.code = code or self.default_code
        self.where = where
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.what}"]
        if self.where:
            lines.append(f"  --> {self.where}")
        if self.why:
            lines.extend(f"  {line}" for line in self.why.splitlines())
        if self.hint:
            lines.append(f"  help: {self.hint}")
        return "\n".join(lines)


class ConfigError(FedsimError):
    """A configuration, an argument or a command line is wrong."""

    exit_code = 2
    default_code = "FS-CFG-001"


class RegistryError(ConfigError):
    """No plugin of that name, or a plugin that cannot be loaded."""

    default_code = "FS-REG-001"


class DataError(FedsimError):
    """Data cannot be read, are malformed, or do not fit the model."""

    exit_code = 2
    default_code = "FS-DAT-001"


class ModelError(FedsimError):
    """A model cannot be built, stacked, trained on these data, or loaded from a file."""

    exit_code = 2
    default_code = "FS-MOD-001"


class RunFailed(FedsimError):
    """The run ended and its outcome is failure."""

    exit_code = 1
    default_code = "FS-RUN-001"


class QuorumNotReached(RunFailed):
    """Fewer clients answered than the round needs."""

    default_code = "FS-RUN-002"


class AllRefused(RunFailed):
    """Clients answered and every answer was refused."""

    default_code = "FS-RUN-003"


class Interrupted(FedsimError):
    """The run was stopped on request and can be resumed."""

    exit_code = 5
    default_code = "FS-INT-001"


class EnvironmentProblem(FedsimError):
    """Disk, memory, permissions or a missing extra."""

    exit_code = 6
    default_code = "FS-ENV-001"
