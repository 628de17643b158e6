"""Content on its way: what is uploaded and downloaded, counted for progress bars and verified by digest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tpv import errors, files

Advance = Callable[[int], object]  #: told how many further bytes have moved
SAFETENSORS = "application/octet-stream"  #: the format has no registered media type


def as_array(values: Any) -> NDArray[Any]:
    """A NumPy array of an array of any library; a torch tensor may need gradients, be bfloat16 or lie on a device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
    return np.asarray(values)


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as JSON Lines."""
    return b"".join(json.dumps(dict(row), ensure_ascii=False).encode() + b"\n" for row in rows)


def rows_of(content: bytes) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in content.splitlines() if line.strip()]


def open_upload(source: str | Path | bytes) -> IO[bytes]:
    """A file to upload: of a path, or of bytes."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return Path(source).open("rb")  # closed by the caller


class Upload(io.RawIOBase):
    """A file that tells how much of it has been read; httpx reads it again from the start for a repeated call."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        self._file, self._advance, self._told = file, advance, 0

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._tell(self._told + len(content))
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = self._file.seek(offset, whence)
        if whence == io.SEEK_SET:  # httpx seeks to the end only to learn the size
            self._tell(position)
        return position

    def tell(self) -> int:
        return self._file.tell()

    def _tell(self, position: int) -> None:
        self._advance(position - self._told)
        self._told = position


class Sink:
    """Where a download goes: memory, or a file that appears under its name only when it is complete and verified."""

    def __init__(self, path: str | Path | None = None, advance: Advance | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.advance = advance or (lambda count: None)
        self.written = 0
        self._hash = hashlib.sha256()
        self._memory = io.BytesIO()
        self._file: IO[bytes] = self._memory
        if self.path is not None:
            handle, self._temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            self._file = os.fdopen(handle, "w+b")

    def begin(self) -> None:
        """Starts over: what an interrupted try has written is dropped."""
        self.advance(-self.written)
        self.written, self._hash = 0, hashlib.sha256()
        self._file.seek(0)
        self._file.truncate()

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.written += len(chunk)
        self.advance(len(chunk))

    def finish(self, expected: str | None, source: str) -> bytes:
        """Verifies the digest, then shows the file; gives the content that went to memory. Raises DamagedContent."""
        found = f"sha256:{self._hash.hexdigest()}"
        if expected is not None and found != expected:
            raise errors.DamagedContent(f"what came from {source} has the digest {found}, not {expected}; dropped")
        if self.path is None:
            return self._memory.getvalue()
        self._file.close()
        umask = os.umask(0)
        os.umask(umask)
        Path(self._temporary).chmod(0o666 & ~umask)  # mkstemp's own mode is the owner's only
        Path(self._temporary).replace(self.path)
        return b""

    def close(self) -> None:
        """Removes what was not finished."""
        self._file.close()
        if self.path is not None:
            Path(self._temporary).unlink(missing_ok=True)


def digest_of(etag: str | None) -> str | None:
    """The `sha256:...` that an ETag names; None for an ETag of another kind (an S3 server's own)."""
    value = (etag or "").removeprefix("W/").strip('"')
    return value if value.startswith("sha256:") else None


def size_of(file: IO[bytes]) -> int:
    """Bytes of an opened file."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def tensor_of(content: bytes, name: str, fingerprint: str) -> NDArray[np.float32]:
    """The one tensor of a downloaded file, verified against its fingerprint."""
    tensors = files.load(content)
    if name not in tensors:
        raise errors.InvalidTensor(f"the file has no tensor {name!r}; it has: {', '.join(tensors) or 'none'}")
    found = files.fingerprint(tensors[name])
    if found != fingerprint:
        raise errors.DamagedContent(f"the tensor that came has the fingerprint {found}, not {fingerprint}")
    return tensors[name]


@contextlib.contextmanager
def transfer(description: str, total: int, shown: bool) -> Iterator[Advance]:
    """A progress bar over bytes, where one is wanted."""
    if not shown:
        yield lambda count: None
        return
    from tpv import progress  # rich is loaded only when something is shown

    with progress.transfer(description, total) as advance:
        yield advance
