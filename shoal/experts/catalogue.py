"""Catalogue: where every owned expert can be read, and what its bytes must be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import CorruptArtifact, UsageError
from shoal.experts.ownership import Ownership
from shoal.experts.readers import Source
from shoal.experts.store import ExpertFiles, Key


@dataclass(frozen=True, slots=True)
class Listing:
    """One expert.

    num_bytes: to read, a multiple of 4096. used_bytes: the part that the layout uses.
    """

    num_bytes: int
    used_bytes: int
    blake3: str
    sources: tuple[Source, ...]


class Catalogue:
    """Listings of everything owned. Immutable."""

    def __init__(
        self, files: ExpertFiles, ownership: Ownership, data_dirs: Sequence[Path] = ()
    ) -> None:
        """Look for each layer's file in the data directories; where none has it, in `files`.

        Raises:
            NotOwned: `files` lacks an owned expert.
            UsageError: a data directory has none of the files.
            CorruptArtifact: a file there is not as long as its experts need.
        """
        self.listings: dict[Key, Listing] = {}
        folders: dict[Path, list[Path]] = {}
        for layer in ownership.layers:
            used = files.expert_layout(layer).num_bytes
            for index in ownership.experts(layer):
                where = files.expert_location(layer, index)
                if where.path not in folders:
                    folders[where.path] = _copies(where.path, files.path, data_dirs)
                sources = tuple(Source(path, where.offset) for path in folders[where.path])
                self.listings[layer, index] = Listing(where.num_bytes, used, where.blake3, sources)
        self.paths = sorted({path for copies in folders.values() for path in copies})
        self.num_bytes = sum(listing.num_bytes for listing in self.listings.values())
        for folder in data_dirs:
            if folders and not any(path.is_relative_to(folder) for path in self.paths):
                example = _relative(next(iter(folders)), files.path)
                raise UsageError(
                    f"--data-dir {folder}: it has none of the expert files, such as {example}: "
                    f"copy them from {files.path}"
                )

    @property
    def sizes(self) -> dict[Key, int]:
        return {key: listing.num_bytes for key, listing in self.listings.items()}


def _relative(path: Path, root: Path) -> Path:
    # Where a file lies in its artifact; while one artifact takes another's place, `files` has both.
    return path.relative_to(root) if path.is_relative_to(root) else Path(*path.parts[-2:])


def _copies(path: Path, root: Path, data_dirs: Sequence[Path]) -> list[Path]:
    relative = _relative(path, root)
    copies = [folder / relative for folder in data_dirs if (folder / relative).is_file()]
    for copy in copies:
        expected, found = path.stat().st_size, copy.stat().st_size
        if found != expected:
            raise CorruptArtifact(
                f"{copy}: {found} bytes, but {path} has {expected}: copy it again"
            )
    return copies or [path]
