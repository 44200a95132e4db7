"""Fixtures of the tests with nodes: the small model that they serve, and their processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.artifact import Artifact
from support.cluster import Cluster
from support.tiny_model import make_tiny_artifact


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sparse model: 3 layers, 16 experts, 4 a token. One for all: copy it to damage it."""
    return make_tiny_artifact(tmp_path_factory.mktemp("model"), "qwen3_moe", "q8_0")


@pytest.fixture(scope="session")
def artifact(path: Path) -> Artifact:
    return Artifact.open(path)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Nodes of one test."""
    with Cluster() as cluster:
        yield cluster
