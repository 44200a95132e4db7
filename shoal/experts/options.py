"""What a command line says of expert stores; apart from them, as --help can do without NumPy."""

from enum import StrEnum


class Backend(StrEnum):
    """How bytes are read, the fastest first; the values are those of `--io`."""

    IO_URING = "io_uring"  # O_DIRECT, batches of chunks in one system call
    PREAD = "pread"  # O_DIRECT, threads
    BUFFERED = "buffered"  # through the page cache, threads


class Io(StrEnum):
    """What `--io` takes: a backend, or the best that works."""

    AUTO = "auto"
    IO_URING = "io_uring"
    PREAD = "pread"
    BUFFERED = "buffered"

    @property
    def backend(self) -> Backend | None:
        """None: the best that works here."""
        return None if self is Io.AUTO else Backend(self.value)


class Verify(StrEnum):
    """When an expert's bytes are hashed and compared with the manifest.

    FIRST: the first time that it is read from a file, and again once the file has changed.
    """

    FIRST = "first"
    ALWAYS = "always"
    NEVER = "never"


class Mode(StrEnum):
    """What `--prefetch` takes. The named predictors run ungoverned, to be measured alone."""

    OFF = "off"
    AUTO = "auto"  # all predictors, fused; the governor switches it off where it does not win
    PREGATE = "pregate"
    MARKOV = "markov"
    LOCALITY = "locality"
