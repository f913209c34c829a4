from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_STATE_UNSPECIFIED: _ClassVar[NodeState]
    PENDING: _ClassVar[NodeState]
    APPROVED: _ClassVar[NodeState]
    REVOKED: _ClassVar[NodeState]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    FETCHING: _ClassVar[Phase]
    TRAINING: _ClassVar[Phase]
    UPLOADING: _ClassVar[Phase]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    ACCEPTED: _ClassVar[Verdict]
    DUPLICATE: _ClassVar[Verdict]
    LATE: _ClassVar[Verdict]
    REJECTED: _ClassVar[Verdict]
    RETRY: _ClassVar[Verdict]
NODE_STATE_UNSPECIFIED: NodeState
PENDING: NodeState
APPROVED: NodeState
REVOKED: NodeState
PHASE_UNSPECIFIED: Phase
FETCHING: Phase
TRAINING: Phase
UPLOADING: Phase
VERDICT_UNSPECIFIED: Verdict
ACCEPTED: Verdict
DUPLICATE: Verdict
LATE: Verdict
REJECTED: Verdict
RETRY: Verdict

class Signed(_message.Message):
    __slots__ = ("body", "signature")
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    signature: bytes
    def __init__(self, body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("major", "minor", "build", "capabilities")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    build: str
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ..., build: _Optional[str] = ..., capabilities: _Optional[_Iterable[str]] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("major", "minor", "build", "capabilities", "server_id", "nonce", "limits", "server_time", "incarnation")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    build: str
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    server_id: bytes
    nonce: bytes
    limits: Limits
    server_time: float
    incarnation: int
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ..., build: _Optional[str] = ..., capabilities: _Optional[_Iterable[str]] = ..., server_id: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., server_time: _Optional[float] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("chunk_bytes", "object_bytes", "inline_bytes")
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    chunk_bytes: int
    object_bytes: int
    inline_bytes: int
    def __init__(self, chunk_bytes: _Optional[int] = ..., object_bytes: _Optional[int] = ..., inline_bytes: _Optional[int] = ...) -> None: ...

class EnrolBody(_message.Message):
    __slots__ = ("server_id", "nonce", "public_key", "token", "name", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    server_id: bytes
    nonce: bytes
    public_key: bytes
    token: str
    name: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, server_id: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., token: _Optional[str] = ..., name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("node_id", "state", "name")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    state: NodeState
    name: str
    def __init__(self, node_id: _Optional[str] = ..., state: _Optional[_Union[NodeState, str]] = ..., name: _Optional[str] = ...) -> None: ...

class LoginBody(_message.Message):
    __slots__ = ("server_id", "nonce", "public_key", "build", "client_time", "session")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    CLIENT_TIME_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    server_id: bytes
    nonce: bytes
    public_key: bytes
    build: str
    client_time: float
    session: bytes
    def __init__(self, server_id: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., build: _Optional[str] = ..., client_time: _Optional[float] = ..., session: _Optional[bytes] = ...) -> None: ...

class LoginReply(_message.Message):
    __slots__ = ("ticket", "ticket_seconds", "lease_seconds", "heartbeat_seconds", "node_id", "name", "role")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    ticket_seconds: float
    lease_seconds: float
    heartbeat_seconds: float
    node_id: str
    name: str
    role: str
    def __init__(self, ticket: _Optional[bytes] = ..., ticket_seconds: _Optional[float] = ..., lease_seconds: _Optional[float] = ..., heartbeat_seconds: _Optional[float] = ..., node_id: _Optional[str] = ..., name: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("task_id", "phase", "step", "steps", "bytes")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    task_id: bytes
    phase: Phase
    step: int
    steps: int
    bytes: int
    def __init__(self, task_id: _Optional[bytes] = ..., phase: _Optional[_Union[Phase, str]] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("held", "free_bytes")
    HELD_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedCompositeFieldContainer[Progress]
    free_bytes: int
    def __init__(self, held: _Optional[_Iterable[_Union[Progress, _Mapping]]] = ..., free_bytes: _Optional[int] = ...) -> None: ...

class HeldLease(_message.Message):
    __slots__ = ("task_id", "seconds", "cancelled")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    task_id: bytes
    seconds: float
    cancelled: bool
    def __init__(self, task_id: _Optional[bytes] = ..., seconds: _Optional[float] = ..., cancelled: bool = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("held", "draining", "ticket", "ticket_seconds")
    HELD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_SECONDS_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedCompositeFieldContainer[HeldLease]
    draining: bool
    ticket: bytes
    ticket_seconds: float
    def __init__(self, held: _Optional[_Iterable[_Union[HeldLease, _Mapping]]] = ..., draining: bool = ..., ticket: _Optional[bytes] = ..., ticket_seconds: _Optional[float] = ...) -> None: ...

class Plugin(_message.Message):
    __slots__ = ("kind", "name", "version")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    version: str
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("wait_seconds", "device", "memory_bytes", "examples", "plugins")
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    PLUGINS_FIELD_NUMBER: _ClassVar[int]
    wait_seconds: float
    device: str
    memory_bytes: int
    examples: int
    plugins: _containers.RepeatedCompositeFieldContainer[Plugin]
    def __init__(self, wait_seconds: _Optional[float] = ..., device: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., examples: _Optional[int] = ..., plugins: _Optional[_Iterable[_Union[Plugin, _Mapping]]] = ...) -> None: ...

class LeaseReply(_message.Message):
    __slots__ = ("offer", "delay_seconds", "reason")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    DELAY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    offer: Offer
    delay_seconds: float
    reason: str
    def __init__(self, offer: _Optional[_Union[Offer, _Mapping]] = ..., delay_seconds: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("body", "signature", "message", "lent")
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    signature: bytes
    message: bytes
    lent: bytes
    def __init__(self, body: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., message: _Optional[bytes] = ..., lent: _Optional[bytes] = ...) -> None: ...

class Object(_message.Message):
    __slots__ = ("digest", "size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    size: int
    def __init__(self, digest: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("server_id", "run_id", "run_name", "task_id", "attempt", "client", "version", "round_index", "round_attempt", "config", "schema", "local", "steps", "message", "lent", "update", "last_folded", "population", "lease_seconds")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_NAME_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_INDEX_FIELD_NUMBER: _ClassVar[int]
    ROUND_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    LAST_FOLDED_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    server_id: bytes
    run_id: str
    run_name: str
    task_id: bytes
    attempt: int
    client: int
    version: int
    round_index: int
    round_attempt: int
    config: bytes
    schema: str
    local: bytes
    steps: int
    message: Object
    lent: Object
    update: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    last_folded: bytes
    population: int
    lease_seconds: float
    def __init__(self, server_id: _Optional[bytes] = ..., run_id: _Optional[str] = ..., run_name: _Optional[str] = ..., task_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., client: _Optional[int] = ..., version: _Optional[int] = ..., round_index: _Optional[int] = ..., round_attempt: _Optional[int] = ..., config: _Optional[bytes] = ..., schema: _Optional[str] = ..., local: _Optional[bytes] = ..., steps: _Optional[int] = ..., message: _Optional[_Union[Object, _Mapping]] = ..., lent: _Optional[_Union[Object, _Mapping]] = ..., update: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., last_folded: _Optional[bytes] = ..., population: _Optional[int] = ..., lease_seconds: _Optional[float] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("digest", "offset", "length")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    length: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data", "crc32")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    crc32: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class UploadStatusRequest(_message.Message):
    __slots__ = ("upload_id",)
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    upload_id: bytes
    def __init__(self, upload_id: _Optional[bytes] = ...) -> None: ...

class UploadStatusReply(_message.Message):
    __slots__ = ("offset", "complete", "generation")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    offset: int
    complete: bool
    generation: int
    def __init__(self, offset: _Optional[int] = ..., complete: bool = ..., generation: _Optional[int] = ...) -> None: ...

class UploadStart(_message.Message):
    __slots__ = ("upload_id", "generation", "task_id", "object")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    upload_id: bytes
    generation: int
    task_id: bytes
    object: Object
    def __init__(self, upload_id: _Optional[bytes] = ..., generation: _Optional[int] = ..., task_id: _Optional[bytes] = ..., object: _Optional[_Union[Object, _Mapping]] = ...) -> None: ...

class UploadFrame(_message.Message):
    __slots__ = ("start", "chunk")
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: UploadStart
    chunk: Chunk
    def __init__(self, start: _Optional[_Union[UploadStart, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class DpStatement(_message.Message):
    __slots__ = ("clip", "noise_multiplier", "sampling_rate", "steps")
    CLIP_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_RATE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    clip: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    def __init__(self, clip: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., sampling_rate: _Optional[float] = ..., steps: _Optional[int] = ...) -> None: ...

class SubmitBody(_message.Message):
    __slots__ = ("server_id", "run_id", "task_id", "attempt", "key", "update", "upload_id", "examples", "local_steps", "normaliser", "train_seconds", "metrics", "dp")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    NORMALISER_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    DP_FIELD_NUMBER: _ClassVar[int]
    server_id: bytes
    run_id: str
    task_id: bytes
    attempt: int
    key: bytes
    update: Object
    upload_id: bytes
    examples: int
    local_steps: int
    normaliser: float
    train_seconds: float
    metrics: _containers.ScalarMap[str, float]
    dp: DpStatement
    def __init__(self, server_id: _Optional[bytes] = ..., run_id: _Optional[str] = ..., task_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., key: _Optional[bytes] = ..., update: _Optional[_Union[Object, _Mapping]] = ..., upload_id: _Optional[bytes] = ..., examples: _Optional[int] = ..., local_steps: _Optional[int] = ..., normaliser: _Optional[float] = ..., train_seconds: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., dp: _Optional[_Union[DpStatement, _Mapping]] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("body", "signature", "update")
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    signature: bytes
    update: bytes
    def __init__(self, body: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., update: _Optional[bytes] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("verdict", "reason", "text", "first", "delay_seconds")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    DELAY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    verdict: Verdict
    reason: str
    text: str
    first: Verdict
    delay_seconds: float
    def __init__(self, verdict: _Optional[_Union[Verdict, str]] = ..., reason: _Optional[str] = ..., text: _Optional[str] = ..., first: _Optional[_Union[Verdict, str]] = ..., delay_seconds: _Optional[float] = ...) -> None: ...

class FailRequest(_message.Message):
    __slots__ = ("task_id", "attempt", "code", "text")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    task_id: bytes
    attempt: int
    code: str
    text: str
    def __init__(self, task_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., code: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class FailReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ByeRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class ByeReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubmitRunRequest(_message.Message):
    __slots__ = ("config", "name", "run_key", "nodes")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    RUN_KEY_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    config: str
    name: str
    run_key: str
    nodes: str
    def __init__(self, config: _Optional[str] = ..., name: _Optional[str] = ..., run_key: _Optional[str] = ..., nodes: _Optional[str] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("run_id", "name", "state", "detail", "rounds_done", "rounds", "clients", "online", "record", "folder", "bytes_down", "bytes_up", "client_seconds")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_DONE_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    name: str
    state: str
    detail: str
    rounds_done: int
    rounds: int
    clients: int
    online: int
    record: str
    folder: str
    bytes_down: int
    bytes_up: int
    client_seconds: float
    def __init__(self, run_id: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ..., rounds_done: _Optional[int] = ..., rounds: _Optional[int] = ..., clients: _Optional[int] = ..., online: _Optional[int] = ..., record: _Optional[str] = ..., folder: _Optional[str] = ..., bytes_down: _Optional[int] = ..., bytes_up: _Optional[int] = ..., client_seconds: _Optional[float] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRunsReply(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    def __init__(self, runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("run_id", "after_revision")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_REVISION_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    after_revision: int
    def __init__(self, run_id: _Optional[str] = ..., after_revision: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("revision", "run_id", "type", "data", "time")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    revision: int
    run_id: str
    type: str
    data: str
    time: float
    def __init__(self, revision: _Optional[int] = ..., run_id: _Optional[str] = ..., type: _Optional[str] = ..., data: _Optional[str] = ..., time: _Optional[float] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("run_id", "now")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    now: bool
    def __init__(self, run_id: _Optional[str] = ..., now: bool = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("node_id", "name", "state", "role", "labels", "online", "last_seen", "build", "device", "fingerprint")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    name: str
    state: NodeState
    role: str
    labels: _containers.ScalarMap[str, str]
    online: bool
    last_seen: float
    build: str
    device: str
    fingerprint: str
    def __init__(self, node_id: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[_Union[NodeState, str]] = ..., role: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., online: bool = ..., last_seen: _Optional[float] = ..., build: _Optional[str] = ..., device: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNodesReply(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ...) -> None: ...

class NodeRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class LabelRequest(_message.Message):
    __slots__ = ("node", "set", "remove")
    class SetEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NODE_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    node: str
    set: _containers.ScalarMap[str, str]
    remove: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, node: _Optional[str] = ..., set: _Optional[_Mapping[str, str]] = ..., remove: _Optional[_Iterable[str]] = ...) -> None: ...

class TokenRequest(_message.Message):
    __slots__ = ("role", "valid_seconds", "labels", "name")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VALID_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    role: str
    valid_seconds: float
    labels: _containers.ScalarMap[str, str]
    name: str
    def __init__(self, role: _Optional[str] = ..., valid_seconds: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ..., name: _Optional[str] = ...) -> None: ...

class TokenReply(_message.Message):
    __slots__ = ("token", "valid_seconds", "server_id")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    VALID_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    token: str
    valid_seconds: float
    server_id: bytes
    def __init__(self, token: _Optional[str] = ..., valid_seconds: _Optional[float] = ..., server_id: _Optional[bytes] = ...) -> None: ...

class ArtifactRequest(_message.Message):
    __slots__ = ("run_id", "name", "offset")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    name: str
    offset: int
    def __init__(self, run_id: _Optional[str] = ..., name: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class LogsRequest(_message.Message):
    __slots__ = ("run_id", "follow")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    follow: bool
    def __init__(self, run_id: _Optional[str] = ..., follow: bool = ...) -> None: ...

class LogLine(_message.Message):
    __slots__ = ("line",)
    LINE_FIELD_NUMBER: _ClassVar[int]
    line: str
    def __init__(self, line: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VersionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VersionReply(_message.Message):
    __slots__ = ("build", "major", "minor", "incarnation")
    BUILD_FIELD_NUMBER: _ClassVar[int]
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    build: str
    major: int
    minor: int
    incarnation: int
    def __init__(self, build: _Optional[str] = ..., major: _Optional[int] = ..., minor: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...
