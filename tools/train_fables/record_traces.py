"""Record which experts held-out texts of several kinds go to, through shoal itself.

    python -m tools.train_fables.record_traces [ARTIFACT] [FOLDER]

Reads FOLDER/texts.jsonl (made from the held-out split and this project's README where it is not
there yet), writes FOLDER/fables.trace. docs/formats/routing-trace.md is the format.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from coordinator.tokenizer import Tokenizer
from shoal.artifact import Artifact
from shoal.experts.routing_trace import RoutingTrace, TraceSegment, encode_trace
from shoal.paths import default_model
from tools.train_fables.chat import END
from tools.train_fables.corpus import DOMAINS, document
from tools.train_fables.passes import Reader

ROOT = Path(__file__).resolve().parents[2]
CHARS_PER_KIND = 1_500
FIRST_DOCUMENT = 900_000  # far from those of the validation files


def held_out_texts() -> Iterator[dict[str, str]]:
    """Yield documents of the held-out split, some of each domain, and English of another sort."""
    left = dict.fromkeys(DOMAINS, CHARS_PER_KIND)
    index = FIRST_DOCUMENT
    while any(chars > 0 for chars in left.values()):
        found = document(index, "held-out")
        index += 1
        if left[found.domain] > 0:
            left[found.domain] -= len(found.text)
            yield {"name": f"{found.domain}-{index - 1}", "kind": found.domain, "text": found.text}
    readme = (ROOT / "README.md").read_text()
    start = readme.index("\n\n") + 2  # behind the title
    yield {"name": "readme", "kind": "english", "text": readme[start : start + 2 * CHARS_PER_KIND]}


def record(reader: Reader, texts: list[dict[str, str]]) -> RoutingTrace:
    """Return the trace of every text, each ended by the end-of-text token."""
    artifact: Artifact = reader.artifact
    tokenizer = Tokenizer.open(artifact.tokenizer_path, artifact.generation_config)
    ids = [tokenizer.encode_templated(item["text"] + END) for item in texts]
    routed = [(i, s.router) for i, s in enumerate(artifact.spec.layers) if s.router is not None]
    segments: list[TraceSegment | None] = [None] * len(texts)
    for reading in reader.read(ids):
        item = texts[reading.index]
        experts = np.sort(reading.routing, axis=-1).astype(np.uint16)
        segments[reading.index] = TraceSegment(item["name"], item["kind"], experts)
    return RoutingTrace(
        identity=artifact.identity,
        num_experts=routed[0][1].num_experts,
        top_k=routed[0][1].experts_per_token,
        moe_layers=tuple(index for index, _ in routed),
        segments=tuple(segment for segment in segments if segment is not None),
    )


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, nargs="?", default=default_model())
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "bench" / "traces")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    file = args.folder / "texts.jsonl"
    if not file.exists():
        lines = (json.dumps(item, ensure_ascii=False) for item in held_out_texts())
        file.write_text("\n".join(lines) + "\n")
    texts = [json.loads(line) for line in file.read_text().splitlines()]
    trace = record(Reader(args.artifact), texts)
    data = encode_trace(trace)
    (args.folder / "fables.trace").write_bytes(data)
    tokens = sum(segment.experts.shape[0] for segment in trace.segments)
    print(f"{len(texts)} texts, {tokens:,} tokens, {len(data):,} bytes")


if __name__ == "__main__":
    main()
