"""Files that are whole or absent, and one run per folder. Nothing here knows what is in a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from hiperlab.errors import DiskFullError, UserError

LOCK_NAME, OWNER_NAME, MARKER_NAME = ".lock", ".lock.json", ".lock.marker"
LOG_NAME = "run.log"  # of a run folder
SHIPPED = "hiperlab:"  # begins a path inside the installed package


def expand(path: str) -> Path:
    """A path as people and configs write it: "~" is the home folder, "hiperlab:weights/mini" lies in the package."""
    if path.startswith(SHIPPED):
        return Path(__file__).parent / path.removeprefix(SHIPPED)
    return Path(path).expanduser()


@contextlib.contextmanager
def atomic_open(path: str | Path, size: int = 0) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` only when the block has ended well; otherwise what was there stays.

    The temporary file lies in the same folder, because a rename is atomic only within one file system.

    Args:
        path: of the file; its folder is made.
        size: bytes that it will have, where that is known; for the message of a full disk.

    Raises:
        DiskFullError: the disk or the quota is full.
        OSError: missing rights, say. In either case the temporary file is gone.
    """
    path = Path(path)
    raw, temporary = None, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        raw = _Watched(handle, "wb")
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private; a run folder is shared with colleagues
        os.replace(temporary, path)
    except BaseException as error:
        written = os.stat(temporary).st_size if os.path.exists(temporary) else 0
        full = _is_full(error) or (raw is not None and raw.full)
        if isinstance(error, OSError) and error.errno is None:  # numpy's writer says how much it wrote, not why
            full = full or free_bytes(path.parent) < 2**16
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if full:
            raise DiskFullError(path, max(size, written, raw.asked if raw else 0), free_bytes(path.parent)) from error
        raise
    _sync_folder(path.parent)


class _Watched(io.FileIO):
    """A file that remembers that its disk was full: torch's writer reports only what it noticed of it."""

    full = False
    asked = 0  # bytes, the refused ones too

    def write(self, data: Any, /) -> int:
        """Write, or take note of why not."""
        try:
            return super().write(data)
        except OSError as error:
            self.full = self.full or _is_full(error)
            self.asked = self.tell() + memoryview(data).nbytes
            raise


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_bytes(folder: str | Path) -> int:
    """Bytes that this user may still write where a folder is, or will be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def atomic_write(path: str | Path, content: bytes | str | Callable[[IO[bytes]], Any], size: int = 0) -> None:
    """Write bytes, text (UTF-8), or what a function writes into the open file, whole or not at all."""
    content = content.encode() if isinstance(content, str) else content
    with atomic_open(path, size if callable(content) else len(content)) as file:
        if callable(content):
            content(file)
        else:
            file.write(content)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN is refused: no other program could read the file."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, whole or not at all."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: str | Path, needed: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The lines of a file that `write_jsonl` wrote; none where there is no file.

    Args:
        path: the file.
        needed: columns that every line must have.

    Raises:
        UserError: a line is no JSON, no table of values, or lacks a column.
    """
    path, wanted = Path(path), set(needed)
    rows: list[dict[str, Any]] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            row = json.loads(line)
            if not isinstance(row, dict) or wanted - row.keys():
                lacks = f"no {', '.join(sorted(wanted - row.keys()))}" if isinstance(row, dict) else "no columns"
                raise ValueError(lacks)
            rows.append(row)
    except ValueError as error:
        where = f"{path}, line {len(rows) + 1}"
        raise UserError(f"{where}, is damaged ({error}). Delete the file: its stage writes it again.") from error
    return rows


def sha256(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sidecar(path: str | Path) -> Path:
    """Where the checksum of `path` lies: `x.ckpt` -> `x.ckpt.sha256`."""
    return Path(f"{path}.sha256")


def write_sidecar(path: str | Path) -> None:
    """Put the checksum beside a file, in the form `sha256sum --check` reads."""
    path = Path(path)
    atomic_write(sidecar(path), f"{sha256(path)}  {path.name}\n")


def broken(path: str | Path) -> str | None:
    """Why the file cannot be trusted ("its checksum is missing", ...), or None if every byte is as it was written."""
    path = Path(path)
    if not path.is_file():
        return "the file is missing"
    try:
        expected = sidecar(path).read_text(encoding="ascii").split()
    except FileNotFoundError:
        return f"its checksum {sidecar(path).name} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"its checksum cannot be read ({error})"
    if not expected or expected[0] != sha256(path):
        return "its bytes do not match its checksum"
    return None


def is_rank_zero() -> bool:
    """Whether this process is the first of a distributed job (or alone), from the launchers' environment."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name]) == 0
    # Lightning's own launcher sets these two: the first process of the first node has 0 in both.
    return not int(os.environ.get("LOCAL_RANK") or 0) and not int(os.environ.get("NODE_RANK") or 0)


class RunLock:
    """Holds a run folder for one run: a second run is refused, a dead run's lock is not in the way.

    The system drops a lock when its process ends, however it ends, and forked workers do not keep it. Where the file
    system has no locks (some NFS), a marker file stands in. It counts while its process lives or is on another host.

    Args:
        folder: the run folder; made if missing.
        rank_zero: whether this process locks; the other ranks belong to its run. None asks the environment.
    """

    def __init__(self, folder: str | Path, rank_zero: bool | None = None) -> None:
        self.folder = Path(folder).resolve()
        self.rank_zero = is_rank_zero() if rank_zero is None else rank_zero
        self._lock: BaseFileLock | None = None

    def acquire(self) -> RunLock:
        """Take the folder.

        Raises:
            UserError: another run holds it (one line naming its process and host).
        """
        if not self.rank_zero:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = self._locked()
        except Timeout:
            raise self._refusal() from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(self.folder / OWNER_NAME, owner)
        return self

    def release(self) -> None:
        """Give the folder back. The empty lock may stay: deleting it could let two runs lock two different files."""
        if self._lock is not None:
            (self.folder / OWNER_NAME).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def _locked(self) -> BaseFileLock:
        """The lock, held, or `Timeout`."""
        lock: BaseFileLock = FileLock(self.folder / LOCK_NAME, fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise
        except OSError:  # no locks here
            lock = SoftFileLock(self.folder / MARKER_NAME)
            lock.acquire(timeout=1)  # seconds; a marker that somebody left is noticed at the second look
        return lock

    def _refusal(self) -> UserError:
        try:
            owner = json.loads((self.folder / OWNER_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            owner = {}  # it holds the folder and has not said yet who it is
        who = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}"
        since = f" since {owner['since']}" if owner.get("since") else ""
        return UserError(
            f"run folder {self.folder} is in use by {who}{since}: two runs would overwrite each other. "
            "Wait for it, stop it, or choose another run_dir."
        )

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()


def _umask() -> int:
    """The process's umask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Some network file systems cannot, and say so; the rename still holds."""
    if os.name == "nt":  # it opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
