"""Tensors as bytes: canonical safetensors files, and fingerprints of what is in them.

Only safetensors is read. A header is checked against the file's true size before anything is allocated, so a few
bytes cannot claim gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpv.errors import InvalidTensor

HEADER_LIMIT = 1 << 20  #: bytes; a file here holds a handful of tensors, its header a few hundred bytes
_LARGEST = 1 << 40  #: no side and no offset of a file here comes near
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

Float32 = NDArray[np.float32]


def fingerprint(tensor: NDArray[Any]) -> str:
    """`sha256:...` over the shape and the little-endian float32 bytes of a tensor: equal tensors have one fingerprint.

    >>> fingerprint(np.zeros((1, 2), dtype=np.float32))
    'sha256:7b0a91667ad8d58a00256b3e213b31e2ba8604b9db04b58e6fe5c8f1e693acfc'
    """
    digest = hashlib.sha256(struct.pack(f"<{tensor.ndim + 1}q", tensor.ndim, *tensor.shape))
    digest.update(np.ascontiguousarray(tensor, dtype="<f4").data)
    return f"sha256:{digest.hexdigest()}"


def digest(content: bytes) -> str:
    """`sha256:...` of a file's bytes: its address in the blob store, and its ETag."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def dump(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The canonical safetensors file of float32 tensors: same tensors and metadata, same bytes.

    Tensors and metadata are in the order of their names. (The safetensors library writes metadata in an order that
    changes from process to process.)
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    parts = [np.ascontiguousarray(arrays[name], dtype="<f4").tobytes() for name in sorted(arrays)]
    return b"".join([header({name: array.shape for name, array in arrays.items()}, metadata), *parts])


def header(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> bytes:
    """How `dump` of float32 tensors of these shapes begins; their data follows, in the order of their names."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 4 * math.prod(shapes[name])
        entries[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def metadata(content: bytes | memoryview) -> dict[str, str]:
    """The `__metadata__` of a safetensors file that `load` accepts; empty when it has none."""
    view = memoryview(content)
    size = int.from_bytes(view[:8], "little")
    return dict(json.loads(bytes(view[8 : 8 + size])).get("__metadata__", {}))


def load(content: bytes | memoryview) -> dict[str, Float32]:
    """The tensors of a safetensors file as float32 arrays of their shapes, by name.

    Raises InvalidTensor when the bytes are no safetensors file, the header does not fit the file, a dtype is not a
    float of 16, 32 or 64 bits, or a value is not finite once it is float32.
    """
    view = memoryview(content)
    tensors: dict[str, Float32] = {}
    for name, (dtype, shape, start, end) in _header(view).items():
        raw = np.frombuffer(view[start:end], dtype=np.uint8)
        if dtype == "BF16":  # the upper half of a float32
            values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, refused below
                values = raw.view(f"<f{_DTYPES[dtype]}").astype(np.float32)
        finite = np.isfinite(values)
        if not finite.all():
            first = [int(i) for i in np.unravel_index(np.argmin(finite), shape)]
            raise InvalidTensor(
                f"tensor {name!r} has {np.count_nonzero(~finite)} of {values.size} values that are NaN or infinite as "
                f"float32, the first at {first}",
                first=first,
            )
        tensors[name] = values.reshape(shape)
    return tensors


def read(path: str | Path) -> dict[str, Float32]:
    """`load` of a local file."""
    return load(Path(path).read_bytes())


def _header(view: memoryview) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """dtype, shape, first and last byte of each tensor, all checked against the file's size."""
    if len(view) < 8:
        raise InvalidTensor("the file is shorter than a safetensors header")
    size = int.from_bytes(view[:8], "little")
    if size > min(HEADER_LIMIT, len(view) - 8):
        raise InvalidTensor(
            f"this is no safetensors file: its first bytes claim a header of {size} bytes, the file has {len(view)} "
            "(pickle files such as .pt and .bin are never read here; bring them in with: tpv import pt FILE)"
        )
    try:
        entries = json.loads(bytes(view[8 : 8 + size]))
    except (ValueError, RecursionError) as error:
        raise InvalidTensor("this is no safetensors file: its header is no JSON") from error
    match entries:
        case {"__metadata__": texts} if not _is_text(texts):
            raise InvalidTensor("this is no safetensors file: its metadata is no mapping of text to text")
        case dict():
            found = {name: _entry(name, entry) for name, entry in entries.items() if name != "__metadata__"}
        case _:
            raise InvalidTensor("this is no safetensors file: its header is no JSON object")
    data = len(view) - 8 - size
    covered = 0
    for name, (dtype, shape, start, end) in sorted(found.items(), key=lambda item: item[1][2:]):
        if end > data:
            raise InvalidTensor(
                f"the file is truncated: tensor {name!r} ends at byte {end} of the data, {data} are there"
            )
        count = 1
        for n in shape:
            count *= n
        if start != covered or end - start != count * _DTYPES[dtype]:
            raise InvalidTensor(
                f"tensor {name!r} of shape {list(shape)} {dtype} does not fit its bytes {start} to {end}"
            )
        covered = end
    if covered != data:
        raise InvalidTensor(f"the file has {data - covered} bytes after its last tensor")
    return {
        name: (dtype, shape, 8 + size + start, 8 + size + end) for name, (dtype, shape, start, end) in found.items()
    }


def _entry(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of one tensor, as the header has them."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if all(
            type(n) is int and 0 <= n < _LARGEST for n in (*shape, start, end)
        ):
            if dtype not in _DTYPES:
                raise InvalidTensor(f"tensor {name!r} is {dtype}; a prompt is F32, F16, BF16 or F64")
            return dtype, tuple(shape), start, end
    raise InvalidTensor(f"tensor {name!r}: its header needs a dtype, a shape and two offsets, whole numbers from 0 on")


def _is_text(texts: object) -> bool:
    return isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())
