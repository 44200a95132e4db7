"""The far side of support.fuse_files: a process that serves a folder over /dev/fuse, with faults.

python fuse_server.py SOURCE MOUNT

The raw protocol of <linux/fuse.h>, version 7.31, and mount(2) by ctypes: nothing to install. One
thread answers the kernel and takes orders, a JSON object a line, from stdin; each is answered by
one line on stdout. A process of its own, because a fault that blocks a reader must not block the
thread that would let it go.
"""

import ctypes
import errno
import json
import os
import selectors
import stat
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux
ROOT_NODE = 1
MAX_READ_BYTES = 1 << 20
REQUEST_BYTES = MAX_READ_BYTES + 4096
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MNT_DETACH = 2

IN_HEADER = struct.Struct("<IIQQIIIHH")  # len opcode unique node uid gid pid extensions padding
OUT_HEADER = struct.Struct("<IiQ")  # len -errno unique
INIT_IN = struct.Struct("<IIII")
INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
ENTRY_OUT = struct.Struct("<QQQQII")
ATTR_OUT = struct.Struct("<QII")
OPEN_IN = struct.Struct("<II")
OPEN_OUT = struct.Struct("<QIi")
READ_IN = struct.Struct("<QQII")
DIRENT = struct.Struct("<QQII")
STATFS_OUT = struct.Struct("<QQQQQIIII24x")

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT = 25, 26, 27, 28, 29, 36
DESTROY, BATCH_FORGET = 38, 42
SILENT = {FORGET, BATCH_FORGET, INTERRUPT}  # the kernel wants no answer to these
WRITES = {4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45}  # setattr, mkdir, unlink, write...

FUSE_ASYNC_READ, FUSE_ASYNC_DIO, FUSE_MAX_PAGES = 1 << 0, 1 << 15, 1 << 22
FOPEN_DIRECT_IO = 1 << 0  # no page cache between a reader and the faults


@dataclass
class Fault:
    """What happens to reads that overlap [offset, end) of a file, `times` times (None: always)."""

    name: str
    kind: str  # error, short, hold
    offset: int
    end: int
    times: int | None
    value: int  # error: errno; short: bytes that come; hold: unused

    def matches(self, name: str, offset: int, num_bytes: int) -> bool:
        is_left = self.times is None or self.times > 0
        return (
            is_left and name == self.name and offset < self.end and offset + num_bytes > self.offset
        )


@dataclass(frozen=True)
class HeldRead:
    """A read that gets no answer until `release`."""

    unique: int
    handle: int
    offset: int
    num_bytes: int


class FuseServer:
    """Serves one folder, read-only."""

    def __init__(self, source: Path, mount: Path) -> None:
        self._source = source
        self._paths = {ROOT_NODE: Path()}
        self._nodes = {Path(): ROOT_NODE}
        self._handles: dict[int, tuple[int, str]] = {}  # handle: file descriptor, name
        self._next_handle = 1
        self._faults: list[Fault] = []
        self._sizes: dict[str, int] = {}
        self._refuses_direct = False
        self._held: list[HeldRead] = []
        self._waiting_for_held: int | None = None
        self._reads: list[tuple[str, int, int]] = []
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        mount_folder(mount, "fuse", MS_RDONLY | MS_NOSUID | MS_NODEV, options)
        self._handlers: dict[int, Callable[[int, int, bytes], bytes | None]] = {
            INIT: self._init,
            LOOKUP: self._lookup,
            GETATTR: self._getattr,
            OPEN: self._open,
            READ: self._read,
            RELEASE: self._release,
            OPENDIR: lambda unique, node, body: OPEN_OUT.pack(0, 0, 0),
            READDIR: self._readdir,
            STATFS: lambda unique, node, body: STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0),
            **dict.fromkeys((RELEASEDIR, FLUSH, DESTROY), lambda unique, node, body: b""),
        }

    def serve(self) -> None:
        """Answer the kernel and the test until stdin ends or the mount is gone."""
        os.set_blocking(self._device, False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._device, selectors.EVENT_READ)
            selector.register(sys.stdin.buffer, selectors.EVENT_READ)
            say({"ready": True})
            while True:
                for key, _ in selector.select():
                    if key.fd == self._device:
                        if not self._serve_kernel():
                            return
                    elif not self._serve_test():
                        return

    def _serve_kernel(self) -> bool:
        try:
            request = os.read(self._device, REQUEST_BYTES)
        except OSError as error:
            # ENODEV: unmounted. EAGAIN, EINTR; ENOENT: the request was interrupted.
            return error.errno != errno.ENODEV
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        body = request[IN_HEADER.size :]
        if opcode in SILENT:
            return True
        handler = self._handlers.get(opcode)
        try:
            if handler is None:
                raise OSError(errno.EROFS if opcode in WRITES else errno.ENOSYS, "not served")
            reply = handler(unique, node, body)
        except OSError as error:
            self._answer(unique, b"", error.errno or errno.EIO)
        else:
            if reply is not None:
                self._answer(unique, reply)
        return True

    def _answer(self, unique: int, body: bytes, error: int = 0) -> None:
        try:
            os.write(
                self._device, OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body
            )
        except OSError as failure:
            if failure.errno != errno.ENOENT:  # its caller was interrupted and is gone
                raise

    def _init(self, unique: int, node: int, body: bytes) -> bytes:
        major, minor, readahead, flags = INIT_IN.unpack_from(body)
        assert major == 7, f"FUSE {major}.{minor}"
        flags &= FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES
        pages = MAX_READ_BYTES // 4096
        return INIT_OUT.pack(7, 31, readahead, flags, 64, 48, 4096, 1, pages, 0, 0, 0)

    def _lookup(self, unique: int, node: int, body: bytes) -> bytes:
        path = self._paths[node] / os.fsdecode(body.rstrip(b"\0"))
        attributes = self._attributes(path)
        return ENTRY_OUT.pack(self._node(path), 0, 0, 0, 0, 0) + attributes

    def _getattr(self, unique: int, node: int, body: bytes) -> bytes:
        return ATTR_OUT.pack(0, 0, 0) + self._attributes(self._paths[node])

    def _node(self, path: Path) -> int:
        if path not in self._nodes:
            self._nodes[path] = len(self._nodes) + 1
            self._paths[self._nodes[path]] = path
        return self._nodes[path]

    def _attributes(self, path: Path) -> bytes:
        s = (self._source / path).stat()
        size = self._sizes.get(str(path), s.st_size)
        times = (int(s.st_atime), int(s.st_mtime), int(s.st_ctime), 0, 0, 0)
        owner = (s.st_nlink, s.st_uid, s.st_gid, 0, 4096, 0)
        return ATTR.pack(self._node(path), size, (size + 511) // 512, *times, s.st_mode, *owner)

    def _open(self, unique: int, node: int, body: bytes) -> bytes:
        flags, _ = OPEN_IN.unpack_from(body)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "read-only")
        if flags & O_DIRECT and self._refuses_direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        path = self._paths[node]
        descriptor = os.open(self._source / path, os.O_RDONLY | os.O_CLOEXEC)
        self._handles[self._next_handle] = descriptor, str(path)
        self._next_handle += 1
        return OPEN_OUT.pack(self._next_handle - 1, FOPEN_DIRECT_IO, 0)

    def _release(self, unique: int, node: int, body: bytes) -> bytes:
        (handle,) = struct.unpack_from("<Q", body)
        os.close(self._handles.pop(handle)[0])
        return b""

    def _read(self, unique: int, node: int, body: bytes) -> bytes | None:
        handle, offset, num_bytes, _ = READ_IN.unpack_from(body)
        name = self._handles[handle][1]
        self._reads.append((name, offset, num_bytes))
        for fault in self._faults:
            if not fault.matches(name, offset, num_bytes):
                continue
            if fault.times is not None:
                fault.times -= 1
            if fault.kind == "error":
                raise OSError(fault.value, "as the test asked")
            if fault.kind == "short":
                return self._data(handle, offset, min(num_bytes, fault.value))
            self._held.append(HeldRead(unique, handle, offset, num_bytes))
            self._note_held()
            return None
        return self._data(handle, offset, num_bytes)

    def _data(self, handle: int, offset: int, num_bytes: int) -> bytes:
        descriptor, name = self._handles[handle]
        if name in self._sizes:
            num_bytes = max(0, min(num_bytes, self._sizes[name] - offset))
        return os.pread(descriptor, num_bytes, offset)

    def _readdir(self, unique: int, node: int, body: bytes) -> bytes:
        _, offset, num_bytes, _ = READ_IN.unpack_from(body)
        folder = self._paths[node]
        entries = [".", "..", *sorted(p.name for p in (self._source / folder).iterdir())]
        out = b""
        for position, name in enumerate(entries[offset:], start=offset + 1):
            path = folder if name in (".", "..") else folder / name
            kind = stat.S_IFMT((self._source / path).stat().st_mode) >> 12
            raw = os.fsencode(name)
            entry = DIRENT.pack(self._node(path), position, len(raw), kind) + raw
            entry += bytes(-len(entry) % 8)
            if len(out) + len(entry) > num_bytes:
                break
            out += entry
        return out

    def _serve_test(self) -> bool:
        line = sys.stdin.buffer.readline()
        if not line:
            return False
        order: dict[str, Any] = json.loads(line)
        match order.pop("do"):
            case "fault":
                self._faults.append(Fault(**order))
            case "resize":
                self._sizes[order["name"]] = order["size"]
            case "refuse_direct":
                self._refuses_direct = True
            case "clear":
                self._faults.clear()
                self._sizes.clear()
            case "release":
                self._faults = [fault for fault in self._faults if fault.kind != "hold"]
                held, self._held = self._held, []
                for read in held:
                    data = self._data(read.handle, read.offset, read.num_bytes)
                    self._answer(read.unique, data)
            case "reads":
                say({"reads": self._reads})
                self._reads.clear()
                return True
            case "wait_held":
                self._waiting_for_held = order["count"]
                self._note_held()
                return True  # answered once so many are held
            case unknown:
                raise AssertionError(unknown)
        say({"done": True})
        return True

    def _note_held(self) -> None:
        if self._waiting_for_held is not None and len(self._held) >= self._waiting_for_held:
            self._waiting_for_held = None
            say({"held": len(self._held)})


def say(what: dict[str, Any]) -> None:
    """Answer the test."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def mount_folder(where: Path, kind: str, flags: int, options: str) -> None:
    """mount(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    source = f"shoal-test-{kind}".encode()
    if libc.mount(source, os.fsencode(where), kind.encode(), flags, options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount -t {kind} {where}: {os.strerror(number)}")


if __name__ == "__main__":
    try:
        server = FuseServer(Path(sys.argv[1]), Path(sys.argv[2]))
    except OSError as error:
        say({"error": str(error)})
    else:
        try:
            server.serve()
        finally:  # a test that was killed could not do it
            ctypes.CDLL(None).umount2(os.fsencode(sys.argv[2]), MNT_DETACH)
