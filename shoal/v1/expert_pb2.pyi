from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lane(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LANE_UNSPECIFIED: _ClassVar[Lane]
    LANE_INTERACTIVE: _ClassVar[Lane]
    LANE_BULK: _ClassVar[Lane]

class Scheme(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCHEME_UNSPECIFIED: _ClassVar[Scheme]
    SCHEME_F32: _ClassVar[Scheme]
    SCHEME_INT8_32: _ClassVar[Scheme]
    SCHEME_INT8_256: _ClassVar[Scheme]

class ReplyFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLY_FORMAT_EXACT: _ClassVar[ReplyFormat]
    REPLY_FORMAT_BF16: _ClassVar[ReplyFormat]
LANE_UNSPECIFIED: Lane
LANE_INTERACTIVE: Lane
LANE_BULK: Lane
SCHEME_UNSPECIFIED: Scheme
SCHEME_F32: Scheme
SCHEME_INT8_32: Scheme
SCHEME_INT8_256: Scheme
REPLY_FORMAT_EXACT: ReplyFormat
REPLY_FORMAT_BF16: ReplyFormat

class DescribeRequest(_message.Message):
    __slots__ = ("protocol_version",)
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ...) -> None: ...

class OwnedRange(_message.Message):
    __slots__ = ("first_layer", "last_layer", "first_expert", "last_expert")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_EXPERT_FIELD_NUMBER: _ClassVar[int]
    LAST_EXPERT_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    last_layer: int
    first_expert: int
    last_expert: int
    def __init__(self, first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., first_expert: _Optional[int] = ..., last_expert: _Optional[int] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol_version", "shoal_version", "identity", "numerics", "instance_epoch", "owned", "quantisation", "isa", "num_threads", "max_rows_per_call", "max_message_bytes", "credit_bytes", "ready", "draining", "model_name")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SHOAL_VERSION_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    OWNED_FIELD_NUMBER: _ClassVar[int]
    QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    ISA_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_PER_CALL_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    shoal_version: str
    identity: str
    numerics: str
    instance_epoch: str
    owned: _containers.RepeatedCompositeFieldContainer[OwnedRange]
    quantisation: str
    isa: str
    num_threads: int
    max_rows_per_call: int
    max_message_bytes: int
    credit_bytes: int
    ready: bool
    draining: bool
    model_name: str
    def __init__(self, protocol_version: _Optional[int] = ..., shoal_version: _Optional[str] = ..., identity: _Optional[str] = ..., numerics: _Optional[str] = ..., instance_epoch: _Optional[str] = ..., owned: _Optional[_Iterable[_Union[OwnedRange, _Mapping]]] = ..., quantisation: _Optional[str] = ..., isa: _Optional[str] = ..., num_threads: _Optional[int] = ..., max_rows_per_call: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., credit_bytes: _Optional[int] = ..., ready: _Optional[bool] = ..., draining: _Optional[bool] = ..., model_name: _Optional[str] = ...) -> None: ...

class ClientFrame(_message.Message):
    __slots__ = ("open", "call", "cancel", "hint")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    open: Open
    call: ExpertCall
    cancel: Cancel
    hint: Hint
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., call: _Optional[_Union[ExpertCall, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., hint: _Optional[_Union[Hint, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol_version", "identity", "numerics", "lane", "coordinator_nonce", "stream_epoch")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_NONCE_FIELD_NUMBER: _ClassVar[int]
    STREAM_EPOCH_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    identity: str
    numerics: str
    lane: Lane
    coordinator_nonce: bytes
    stream_epoch: int
    def __init__(self, protocol_version: _Optional[int] = ..., identity: _Optional[str] = ..., numerics: _Optional[str] = ..., lane: _Optional[_Union[Lane, str]] = ..., coordinator_nonce: _Optional[bytes] = ..., stream_epoch: _Optional[int] = ...) -> None: ...

class ExpertCall(_message.Message):
    __slots__ = ("call_id", "layer", "deadline_ms", "scheme", "num_rows", "dim", "values", "scales", "pairs_per_row", "experts", "weights", "reply_format")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    PAIRS_PER_ROW_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    REPLY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    layer: int
    deadline_ms: int
    scheme: Scheme
    num_rows: int
    dim: int
    values: bytes
    scales: bytes
    pairs_per_row: bytes
    experts: bytes
    weights: bytes
    reply_format: ReplyFormat
    def __init__(self, call_id: _Optional[int] = ..., layer: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., scheme: _Optional[_Union[Scheme, str]] = ..., num_rows: _Optional[int] = ..., dim: _Optional[int] = ..., values: _Optional[bytes] = ..., scales: _Optional[bytes] = ..., pairs_per_row: _Optional[bytes] = ..., experts: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., reply_format: _Optional[_Union[ReplyFormat, str]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("call_id",)
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    def __init__(self, call_id: _Optional[int] = ...) -> None: ...

class Hint(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: bytes
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[bytes] = ...) -> None: ...

class NodeFrame(_message.Message):
    __slots__ = ("opened", "reply", "failure", "progress", "draining")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    reply: Reply
    failure: Failure
    progress: Progress
    draining: Draining
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., reply: _Optional[_Union[Reply, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("credit_bytes", "max_rows_per_call", "wants_hints")
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_PER_CALL_FIELD_NUMBER: _ClassVar[int]
    WANTS_HINTS_FIELD_NUMBER: _ClassVar[int]
    credit_bytes: int
    max_rows_per_call: int
    wants_hints: bool
    def __init__(self, credit_bytes: _Optional[int] = ..., max_rows_per_call: _Optional[int] = ..., wants_hints: _Optional[bool] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("call_id", "num_rows", "dim", "grid", "widths", "sums", "queue_us", "compute_us", "load_us", "format")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    WIDTHS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    LOAD_US_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    num_rows: int
    dim: int
    grid: int
    widths: bytes
    sums: bytes
    queue_us: int
    compute_us: int
    load_us: int
    format: ReplyFormat
    def __init__(self, call_id: _Optional[int] = ..., num_rows: _Optional[int] = ..., dim: _Optional[int] = ..., grid: _Optional[int] = ..., widths: _Optional[bytes] = ..., sums: _Optional[bytes] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., load_us: _Optional[int] = ..., format: _Optional[_Union[ReplyFormat, str]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("call_id", "code", "message", "rows")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CODE_UNSPECIFIED: _ClassVar[Failure.Code]
        MALFORMED: _ClassVar[Failure.Code]
        NOT_OWNED: _ClassVar[Failure.Code]
        OVERLOADED: _ClassVar[Failure.Code]
        DEADLINE: _ClassVar[Failure.Code]
        CANCELLED: _ClassVar[Failure.Code]
        NON_FINITE: _ClassVar[Failure.Code]
        UNAVAILABLE: _ClassVar[Failure.Code]
        DRAINING: _ClassVar[Failure.Code]
        INTERNAL: _ClassVar[Failure.Code]
    CODE_UNSPECIFIED: Failure.Code
    MALFORMED: Failure.Code
    NOT_OWNED: Failure.Code
    OVERLOADED: Failure.Code
    DEADLINE: Failure.Code
    CANCELLED: Failure.Code
    NON_FINITE: Failure.Code
    UNAVAILABLE: Failure.Code
    DRAINING: Failure.Code
    INTERNAL: Failure.Code
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    code: Failure.Code
    message: str
    rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, call_id: _Optional[int] = ..., code: _Optional[_Union[Failure.Code, str]] = ..., message: _Optional[str] = ..., rows: _Optional[_Iterable[int]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("call_ids",)
    CALL_IDS_FIELD_NUMBER: _ClassVar[int]
    call_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, call_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("calls_in_flight",)
    CALLS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    calls_in_flight: int
    def __init__(self, calls_in_flight: _Optional[int] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadReply(_message.Message):
    __slots__ = ("error", "changed", "kept")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    error: str
    changed: _containers.RepeatedScalarFieldContainer[str]
    kept: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, error: _Optional[str] = ..., changed: _Optional[_Iterable[str]] = ..., kept: _Optional[_Iterable[str]] = ...) -> None: ...
