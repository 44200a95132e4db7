"""Every bound of the system, their relations asserted at import (core)."""

KIB = 1024
MIB = 1024 * KIB

PROTOCOL_VERSION = 1  # of proto/shoal/v1 and its meaning: both ends must name the same

MAX_ROWS_PER_CALL = 512  # a prefill chunk to one owner; bounds a node's scratch memory
MAX_EXPERTS = 4096  # per layer: expert indices travel as uint16
MAX_LAYERS = 1024  # the deepest model known has 126
MAX_MODEL_DIM = 65536  # the widest model known has 18432
MAX_EXPERTS_PER_TOKEN = 64  # the largest A known is 22; slices of a dense FFN: 16
INTERACTIVE_MESSAGE_BYTES = 256 * KIB  # a larger message goes to the bulk connection
MAX_MESSAGE_BYTES = 16 * MIB  # on the bulk connection; larger calls are split by rows
CREDIT_BYTES = 64 * MIB  # request bytes one stream may have in flight at a node
MAX_THREADS = 256  # of the kernels: kMaxPoolThreads of kernels/thread_pool.h
MAX_QUEUED_CALLS = 256  # per node: more are refused as OVERLOADED
MAX_CALLS_AHEAD = 128  # of a corrected pass, at each node: half of what may wait there
MAX_LOADING_CALLS = 8  # per node, waiting for reads together: a thread each; they take turns
MAX_SHARD_MAP_CHARS = 64 * KIB  # of --moe-shards: a thousand ranges
MAX_SOCKET_PATH_BYTES = 103  # sun_path of macOS less its final zero; Linux: 107
INLINE_PAIR_BYTES = 64 * MIB  # of weights: a smaller call is computed on the stream handler (~2 ms)
INLINE_TURN_S = 0.00025  # a call that takes longer lets the loop turn first: 85 may come at once
H2_WINDOW_BYTES = 16 * MIB  # of a connection and of each stream, each way: no message waits for it
H2_FRAME_BYTES = MIB  # the largest frame we take; what one peer can make us hold before we look
H2_HEADER_BYTES = 16 * KIB  # a header block, packed and unpacked; gRPC's own is under 1 KiB
MAX_H2_CONTINUATIONS = 16  # frames of one header block
MAX_H2_SETTINGS = 64  # in one frame; ten are known
MAX_H2_STREAMS = 256  # of one connection at a time
MAX_H2_UNFINISHED_BYTES = 4 * MAX_MESSAGE_BYTES  # of messages begun, on one connection's streams
MAX_H2_QUEUED_FRAMES = 65_536  # towards a peer that does not read: then the connection ends
MAX_LENT_SOCKETS = 64  # of a node, whose calls one thread answers: a buffer of 256 KiB each
MAX_CONNECTIONS = 1024  # of a node at a time; a coordinator has two
MAX_H2_CONTROL_FRAMES = 2000  # in one burst (shoal/http2/flood.py says what earns more)
DRAIN_TIMEOUT_S = 25.0  # Kubernetes kills 30 s after SIGTERM by default
PROGRESS_INTERVAL_S = 0.025  # while a node holds a call: silence then means that it is lost
PREFILL_CHUNK = 512  # rows of one forward pass
MAX_CALL_TIMEOUT_S = 3600.0  # --call-timeout: what waits longer is not a chat any more
MAX_SHARD_WAIT_S = 3600.0  # --shard-wait: a node that is away for longer is gone
MAX_DRAFT = 32  # guesses that one pass verifies: beyond, chances multiply to nothing
MAX_LOOKUP_TOKENS = 32_768  # that an index of suffixes holds, older ones go: some 20 MiB
MAX_HISTORY_TOKENS = MAX_LOOKUP_TOKENS  # on disk, of the user's own texts: 128 KiB
MAX_LEAD = 2 * MAX_DRAFT  # guesses in a row before a drafter starts from verified tokens again
KV_SCRATCH_BLOCKS = 4  # beyond the longest context: a drafter's copy of the last block, its guesses
MAX_SHADOW_TEXT_TOKENS = 1024  # of the text that says which columns matter to a shadow
KV_BLOCK_TOKENS = 64  # keys of a KV block: four lanes' worth, a quarter of a cut
ATTENTION_CUT = 256  # keys: exactness rule 6
MAX_MANIFEST_BYTES = 64 * MIB  # of an artifact; the largest model known needs 2 MiB
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # the safetensors library's own bound
MAX_MARKOV_BYTES = 128 * MIB  # of transition counts: 512 experts in 61 layers; more: none
MAX_PREFETCH_STREAMS = 256  # whose history is kept: the least recent one is forgotten
MAX_TRACE_HEADER_BYTES = MIB  # of a routing trace: ten thousand segments
MAX_HEAT_BYTES = 64 * MIB  # of a heat map: counts of the largest model known take 2 MiB
MAX_RECORDED_BYTES = 64 * MIB  # of routing that a node keeps for its trace: the oldest goes
MAX_CONFIG_BYTES = MIB  # of a node's configuration file
MAX_PEM_BYTES = MIB  # of certificates in one file: a system's authorities take 200 KiB
MAX_METRICS_REQUESTS = 16  # of /metrics, /health and /ready at a time
READ_ALIGNMENT = 4096  # of expert records and their places in memory: what every drive takes
MAX_READ_QUEUE_DEPTH = 256  # chunks at the device: beyond, its own queue is longer than its speed
MAX_READ_THREADS = 32  # of a reader without io_uring: more only wait for each other
MAX_BOUNCE_BYTES = 64 * MIB  # of a reader's buffers for misaligned chunks: then reads are buffered
READER_CLOSE_S = 5.0  # for reads at a drive: one that brings none in that time may never
LAST_READS_S = 0.5  # the part of it that a node has left when its calls took the whole drain
MIN_GRID, MAX_GRID = -64, 96  # g of exactness rule 5: 2^g and 2^-g are normal float32

assert ATTENTION_CUT % KV_BLOCK_TOKENS == 0, "a cut must be whole KV blocks"
assert INTERACTIVE_MESSAGE_BYTES < MAX_MESSAGE_BYTES <= CREDIT_BYTES
assert MAX_EXPERTS < 2**16
assert MAX_CALLS_AHEAD * 2 <= MAX_QUEUED_CALLS, "two coordinators must not refuse each other"
assert MAX_MODEL_DIM * 8 < MAX_MESSAGE_BYTES, "the widest row of a reply must fit in one message"
assert PREFILL_CHUNK <= MAX_ROWS_PER_CALL
assert 1 + MAX_DRAFT <= PREFILL_CHUNK, "one pass verifies a whole draft"
assert KV_BLOCK_TOKENS * (KV_SCRATCH_BLOCKS - 2) >= MAX_LEAD, "a copied block and the guesses"
assert MAX_MESSAGE_BYTES <= H2_WINDOW_BYTES and H2_FRAME_BYTES < 2**24
