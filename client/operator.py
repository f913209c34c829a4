"""An operator's hands on a coordinator: submit runs, watch, stop and look at them, from ordinary code.

    with fedsim.connect("lab") as lab:
        run = lab.submit(Path("fedsim.toml"), name="digits")
        for event in lab.watch(run.run_id):
            print(event.type, event.data)
        lab.artifact(run.run_id, "final", Path("final.safetensors"))

The coordinator is named by an entry of ``connections.toml`` or by its address. Calls wait for their answer;
a broken link is tried again for a while, and a watch that is cut goes on behind its last event.
"""

from __future__ import annotations

import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from fedsim.client.operator_link import PATIENCE_SECONDS, Link
from fedsim.client.operator_problems import no_key, timed_out
from fedsim.client.operator_views import (
    Invitation,
    RemoteEvent,
    RemoteNode,
    RemoteRun,
    event_of,
    node_of,
    run_of,
)
from fedsim.client.statuses import Lost
from fedsim.connections import Connection, connection_of, home
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.storage import problem, sync_folder, unreadable, write_all

KEY_FILE = "operator.key"
SUBMIT_SECONDS = 300.0  # the coordinator reads the data set before it says yes
WATCH_PATIENCE_SECONDS = 600.0


def connect(
    target: str,
    *,
    ca: Path | None = None,
    key: Path | None = None,
    insecure: bool = False,
    patience: float | None = None,
) -> Operator:
    """The coordinator that `target` names.

    Args:
        target: entry of ``connections.toml``, or ``host:port``.
        ca: certificates to trust; key: file of the operator's private key. Both replace the entry's own.
        insecure: plain text, on loopback alone.
        patience: seconds for which a call is repeated while nobody answers; by default 15.

    Raises:
        ConfigError: FS-CFG-127 … 129, no such connection or no key.
        EnvironmentProblem: the key is readable by others.
    """
    connection = connection_of(target, ca=ca, key=key, insecure=insecure)
    seconds = PATIENCE_SECONDS if patience is None else patience
    return Operator(connection, operator_key(connection), patience=seconds)


def operator_key(connection: Connection) -> Key:
    """The key of an entry, or else the one in ``$FEDSIM_HOME/operator.key``.

    Raises:
        ConfigError: FS-CFG-129, there is none.
    """
    path = connection.key or home() / KEY_FILE
    if not path.is_file():
        raise no_key(path)
    return Key.load(path)


class Operator:
    """A coordinator as its operators see it; use it in a ``with`` block, or `close` it.

    Args:
        connection: whom to call; key: who calls.
        patience: seconds for which a call is repeated while nobody answers.
    """

    def __init__(self, connection: Connection, key: Key, *, patience: float = PATIENCE_SECONDS) -> None:
        self.connection = connection
        self._key = key
        self._link = Link(connection, key, patience=patience)

    def __repr__(self) -> str:
        return f"Operator({str(self.connection)!r})"

    def __enter__(self) -> Operator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; runs go on."""
        self._link.close()

    # ------------------------------------------------------------ runs

    def submit(
        self, config: str | Path, *, name: str = "", run_key: str | None = None, nodes: str = ""
    ) -> RemoteRun:
        """Start a run.

        Args:
            config: TOML, or a file of it.
            name: of the run; the configuration's own without one.
            run_key: the same key and content is the same run; by default every call is another one.
            nodes: label expression; all approved clients without one.
        """
        text = config
        if isinstance(config, Path):
            try:
                text = config.read_text(encoding="utf-8")
            except OSError as error:
                raise unreadable(error, config) from error
        # A key in any case: a call whose answer was lost is repeated, and must not start a second run.
        request = pb.SubmitRunRequest(
            config=str(text), name=name, run_key=run_key or secrets.token_hex(16), nodes=nodes
        )
        return run_of(self._link.call("SubmitRun", request, seconds=SUBMIT_SECONDS))

    def list(self) -> Sequence[RemoteRun]:
        """All runs, the oldest first."""
        return [run_of(run) for run in self._link.call("ListRuns", pb.ListRunsRequest()).runs]

    def get(self, run: str) -> RemoteRun:
        """The run of this identifier, beginning of one, or name."""
        return run_of(self._link.call("GetRun", pb.RunRequest(run_id=run)))

    def pause(self, run: str) -> RemoteRun:
        """Halt a run at once, in the middle of its round, until `resume`."""
        return run_of(self._link.call("PauseRun", pb.RunRequest(run_id=run)))

    def resume(self, run: str) -> RemoteRun:
        """Go on with a run that is paused, was stopped or has failed."""
        return run_of(self._link.call("ResumeRun", pb.RunRequest(run_id=run)))

    def stop(self, run: str, *, now: bool = False) -> RemoteRun:
        """End a run after its open round, or at once."""
        return run_of(self._link.call("StopRun", pb.StopRequest(run_id=run, now=now)))

    def watch(
        self,
        run: str,
        *,
        after: int = 0,
        patience: float = WATCH_PATIENCE_SECONDS,
        seconds: float | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Iterator[RemoteEvent]:
        """The events of a run behind revision `after`, as they happen, until it is over; each once.

        Args:
            patience: seconds without a coordinator after which to give up; the run itself does not end.
            seconds: to watch at most.
            tick: called about once a second while nothing happens; what it raises ends the watch.

        Raises:
            TimedOut: FS-SRV-027, the run goes on after `seconds`.
        """
        reached = after
        until = None if seconds is None else time.monotonic() + seconds

        def fresh(event: pb.Event) -> bool:
            nonlocal reached
            new, reached = event.revision > reached, max(reached, event.revision)
            return new

        def request() -> pb.WatchRequest:
            return pb.WatchRequest(run_id=run, after_revision=reached)

        stream = self._link.stream("WatchRun", request, fresh, patience=patience, until=until, tick=tick)
        try:
            for event in stream:
                yield event_of(event)
        except TimeoutError as error:
            hint = f"the run goes on; fedsim watch {run} goes on watching"
            raise timed_out("the run has not ended in time", seconds or 0.0, where=run, hint=hint) from error

    def logs(self, run: str, *, follow: bool = False) -> Iterator[str]:
        """The lines of a run's log; with `follow` also those to come, until the run is over."""
        sent = given = 0

        def fresh(line: pb.LogLine) -> bool:
            nonlocal sent, given
            sent += 1
            new, given = sent > given, max(sent, given)
            return new

        def request() -> pb.LogsRequest:
            nonlocal sent
            sent = 0  # a log is always sent from its beginning
            return pb.LogsRequest(run_id=run, follow=follow)

        patience = WATCH_PATIENCE_SECONDS if follow else None
        for line in self._link.stream("GetLogs", request, fresh, patience=patience):
            yield line.line

    def artifact(self, run: str, name: str, path: Path) -> int:
        """Fetch a file of a run into `path`, whole or not at all; its size in bytes.

        Args:
            name: ``final``, ``best`` or ``latest`` for a model, or such as ``metrics.jsonl``.

        Raises:
            CoordinatorRefused: FS-SRV-024, there is no such file.
            EnvironmentProblem: it cannot be written.
        """
        unfinished = path.with_name(f".fetching-{secrets.token_hex(8)}")
        try:
            handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise problem(error, path) from error
        try:
            size = self._fetch(run, name, handle)
            os.fsync(handle)
            os.replace(unfinished, path)
            sync_folder(path.parent)
        except OSError as error:
            raise problem(error, path) from error
        finally:
            os.close(handle)
            unfinished.unlink(missing_ok=True)
        return size

    def _fetch(self, run: str, name: str, handle: int) -> int:
        reached = 0

        def fresh(chunk: pb.Chunk) -> bool:
            nonlocal reached
            if chunk.offset != reached or zlib.crc32(chunk.data) != chunk.crc32:
                raise Lost(f"the chunk at {reached} came damaged", link=False)
            reached += len(chunk.data)
            return True

        def request() -> pb.ArtifactRequest:
            return pb.ArtifactRequest(run_id=run, name=name, offset=reached)

        for chunk in self._link.stream("GetArtifact", request, fresh):
            write_all(handle, chunk.data)
        return reached

    # ------------------------------------------------------------ who takes part, and the coordinator

    def nodes(self) -> Sequence[RemoteNode]:
        """Everybody whose key the coordinator knows."""
        return [node_of(node) for node in self._link.call("ListNodes", pb.ListNodesRequest()).nodes]

    def approve(self, node: str) -> RemoteNode:
        """Let a key that asked for it take part."""
        return node_of(self._link.call("ApproveNode", pb.NodeRequest(node=node)))

    def revoke(self, node: str) -> RemoteNode:
        """Shut a key out, at once and for good; its answers of the open round are dropped."""
        return node_of(self._link.call("RevokeNode", pb.NodeRequest(node=node)))

    def label(self, node: str, labels: Mapping[str, str], remove: Sequence[str] = ()) -> RemoteNode:
        """Set and remove labels, by which runs select nodes."""
        request = pb.LabelRequest(node=node, set=dict(labels), remove=list(remove))
        return node_of(self._link.call("LabelNode", request))

    def invite(
        self,
        role: str = "client",
        *,
        valid_seconds: float = 86_400.0,
        labels: Mapping[str, str] | None = None,
        name: str = "",
    ) -> Invitation:
        """A token that lets one unknown key in.

        Args:
            role: client, viewer, operator or admin.
            name: that the node must take; any without one.
        """
        reply = self._link.call(
            "CreateEnrolToken",
            pb.TokenRequest(role=role, valid_seconds=valid_seconds, labels=labels or {}, name=name),
        )
        return Invitation(reply.token, reply.valid_seconds, reply.server_id)

    def drain(self) -> None:
        """Shut the coordinator down in good order; runs go on when it is started again."""
        self._link.call("Drain", pb.DrainRequest())

    def version(self) -> str:
        """Version of fedsim that the coordinator runs."""
        return str(self._link.call("Version", pb.VersionRequest()).build)
