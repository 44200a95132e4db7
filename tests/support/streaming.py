"""Stores that stream, for tests: a tiny artifact's experts through a cache of any size."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import ops
from shoal.artifact import Artifact
from shoal.errors import UsageError
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor
from shoal.experts.open_store import open_store
from shoal.experts.ownership import Ownership
from shoal.experts.store import ExpertStore, StoreOptions
from support.forward_passes import ForwardPasses


def expert_bytes(artifact: Artifact, layer: int = 0) -> int:
    """Bytes of one expert's record: what a cache counts."""
    return artifact.expert_location(layer, 0).num_bytes


def num_experts(artifact: Artifact) -> int:
    """Experts of all layers together."""
    return sum(len(experts) for experts in artifact.owned_experts.values())


@contextmanager
def streaming_store(path: Path, slots: int | None, **options: Any) -> Iterator[ExpertStore]:
    """A store of all experts whose cache holds `slots`; skips where the backend does not work."""
    artifact = Artifact.open(path)
    budget = None if slots is None else slots * expert_bytes(artifact)
    ownership = Ownership(dict(artifact.owned_experts))
    try:
        store = open_store(artifact, ownership, StoreOptions(cache_bytes=budget, **options))
    except UsageError as error:
        if options.get("backend") is None:
            raise
        pytest.skip(str(error))
    try:
        yield store
    finally:
        store.close()


def call_of(artifact: Artifact, layer: int, experts: list[int], seed: int = 0) -> ExpertCall:
    """One row that goes to those experts."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, artifact.spec.model_dim)).astype(np.float32)
    return ExpertCall(
        layer,
        ops.quantise_rows(artifact.scheme(layer), x),
        np.array([0, len(experts)], np.int32),
        np.array(experts, np.int32),
        rng.random(len(experts)).astype(np.float32),
    )


def continuation(
    path: Path, executor: ExpertExecutor | None, prompt: list[int], num_tokens: int
) -> tuple[list[int], list[bytes]]:
    """Return the greedy tokens, and the logits of each as bytes; executor None: all in memory."""
    passes = ForwardPasses(path, executor=executor)
    sequence = passes.sequence(prompt)
    num_rows, tokens, logits = len(prompt), list[int](), list[bytes]()
    for _ in range(num_tokens):
        row = passes.run((sequence, num_rows))[0]
        logits.append(row.tobytes())
        tokens.append(int(row.argmax()))
        sequence.extend(tokens[-1:])
        num_rows = 1
    return tokens, logits
