"""Every failure of shoal, on one page.

ShoalError                     an operating error: message says what, where, why and the fix
|- UsageError                  the command line or configuration is wrong            exit 2
|  `- ShardMapError            --moe-shards: points at the character
|- ArtifactError               a model on disk cannot be used                        exit 3
|  |- CorruptArtifact          a hash, size or header is not what the manifest says
|  |- UnsupportedModel         an architecture, tensor type or tokenizer we do not have
|  |- NonFiniteWeights         NaN or infinity in weights or scales
|  `- CannotWrite              the disk is full or not writable; nothing was left behind
|- NodeError                   an expert node cannot do its part                     exit 4
|  |- NodeUnreachable          nobody answers at that address, or the connection broke
|  |  |- ShardUnavailable      nobody is left for a range of experts: waited --shard-wait
|  |  `- NodeUntrusted         TLS: a certificate is refused, or only one side speaks it
|  |- NodeMismatch             another model, numerics or protocol; a missing range
|  |- NotOwned                 an expert that the node does not own
|  |- NodeBusy                 its queue is full: try later or elsewhere
|  |- NodeDraining             it finishes what it has and leaves
|  |- ExpertUnavailable        it owns the expert but cannot read it, or it is damaged
|  |- CallCancelled            the coordinator took the call back
|  |- CallTimeout              no answer within --call-timeout
|  `- MalformedMessage         a peer sent what the protocol does not allow
|- NumericError                a non-finite or too large value in a row               exit 5
|- RequestError                a request that cannot be served: too long, bad parameter  exit 2
`- NumericsMismatch            this build's kernels do not reproduce the golden digests  exit 6
"""


class ShoalError(Exception):
    """An operating error. The message is for the user; `exit_code` is the process's status."""

    exit_code = 1


class UsageError(ShoalError):
    exit_code = 2


class ShardMapError(UsageError):
    pass


class RequestError(ShoalError):
    exit_code = 2


class ArtifactError(ShoalError):
    exit_code = 3


class CorruptArtifact(ArtifactError):
    pass


class UnsupportedModel(ArtifactError):
    pass


class NonFiniteWeights(ArtifactError):
    pass


class CannotWrite(ArtifactError):
    pass


class NodeError(ShoalError):
    exit_code = 4


class NodeUnreachable(NodeError):
    pass


class ShardUnavailable(NodeUnreachable):
    pass


class NodeUntrusted(NodeUnreachable):
    pass


class NodeMismatch(NodeError):
    pass


class NotOwned(NodeError):
    pass


class NodeBusy(NodeError):
    pass


class NodeDraining(NodeError):
    pass


class ExpertUnavailable(NodeError):
    pass


class CallCancelled(NodeError):
    pass


class CallTimeout(NodeError):
    pass


class MalformedMessage(NodeError):
    pass


class NumericError(ShoalError):
    """`rows`: indices of the failing rows, in the array or call that raised; the rest is right."""

    exit_code = 5

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class NumericsMismatch(ShoalError):
    exit_code = 6
