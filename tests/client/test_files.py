from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import numpy as safetensors

from tpv import files
from tpv.errors import InvalidTensor

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
tensors = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=4), elements=finite)
GOOD = {"prompt": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}


def raw(header: Any, data: bytes = b"\0" * 8) -> bytes:
    """A file with this header, as JSON or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"prompt": {**GOOD["prompt"], **changes}}


@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), tensors, max_size=3)
)
def test_what_is_dumped_is_loaded_again(stored: dict[str, np.ndarray]) -> None:
    loaded = files.load(files.dump(stored))
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(loaded[name], tensor, strict=True)


def test_the_same_tensors_and_metadata_are_the_same_bytes() -> None:
    a, b = np.ones((2, 3), np.float32), np.zeros((1, 3), np.float32)
    metadata = {"initialization": "sha256:0", "x": "y"}
    assert files.dump({"a": a, "b": b}, metadata) == files.dump({"b": b, "a": a}, dict(reversed(metadata.items())))
    assert files.metadata(files.dump({"a": a}, metadata)) == metadata
    assert files.metadata(files.dump({"a": a})) == {}


def test_the_safetensors_library_reads_and_writes_the_same_file() -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((1, 3), np.float32)}
    ours = files.dump(tensors, {"initialization": "sha256:0"})
    assert ours == safetensors.save(tensors, {"initialization": "sha256:0"})
    loaded = safetensors.load(ours)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor, strict=True)


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "F16"), (np.float32, "F32"), (np.float64, "F64")])
def test_other_floats_become_float32(dtype: type, name: str) -> None:
    values = np.array([[0.5, -2.0]], dtype=dtype)
    header = {"t": {"dtype": name, "shape": [1, 2], "data_offsets": [0, values.nbytes]}}
    np.testing.assert_array_equal(
        files.load(raw(header, values.tobytes()))["t"], values.astype(np.float32), strict=True
    )


def test_bfloat16_becomes_float32() -> None:
    header = {"t": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    values = files.load(raw(header, b"\x00\x3f\x00\xc0"))["t"]  # 0x3f00 is 0.5, 0xc000 is -2
    assert values.tolist() == [0.5, -2.0]


def test_tensors_lie_at_their_offsets_whatever_the_order_of_the_header() -> None:
    data = np.arange(3, dtype="<f4").tobytes()
    header = {
        "late": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        "early": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    loaded = files.load(raw(header, data))
    assert (loaded["early"].tolist(), loaded["late"].tolist()) == ([0.0, 1.0], [2.0])


MALFORMED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": b"\0" * 8,
    "pickle": pickle.dumps({"prompt": [1.0, 2.0]}),
    "zip, as torch writes": b"PK\x03\x04" + b"\0" * 100,
    "header of 10 GB": (10 * 1024**3).to_bytes(8, "little") + b"{}",
    "header beyond the file": (100).to_bytes(8, "little") + b"{}",
    "header over the limit": raw(b" " * (files.HEADER_LIMIT + 1)),
    "not JSON": raw(b"{not json"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "nested beyond reason": raw(b"[" * 100_000),
    "a list": raw([GOOD]),
    "null": raw(None),
    "entry is a number": raw({"prompt": 1}),
    "entry is null": raw({"prompt": None}),
    "metadata is text": raw({"__metadata__": "x", **GOOD}),
    "metadata holds numbers": raw({"__metadata__": {"a": 1}, **GOOD}),
    "no dtype": raw({"prompt": {"shape": [1, 2], "data_offsets": [0, 8]}}),
    "dtype is a list": raw(entry(dtype=["F32"])),
    "integers": raw(entry(dtype="I32")),
    "booleans": raw(entry(dtype="BOOL", shape=[8])),
    "8-bit floats": raw(entry(dtype="F8_E4M3", shape=[8])),
    "unknown dtype": raw(entry(dtype="F99")),
    "shape is a number": raw(entry(shape=2)),
    "shape is text": raw(entry(shape="12")),
    "shape of text": raw(entry(shape=["1", "2"])),
    "shape of fractions": raw(entry(shape=[1.0, 2.0])),
    "shape of truths": raw(entry(shape=[True, 2])),
    "negative shape": raw(entry(shape=[-1, -2])),
    "shape too large": raw(entry(shape=[1 << 40, 1 << 40])),
    "shape too small": raw(entry(shape=[1, 1])),
    "no side, but an endless one": raw(entry(shape=[0, 1 << 80], data_offsets=[0, 0]), b""),
    "three offsets": raw(entry(data_offsets=[0, 8, 9])),
    "one offset": raw(entry(data_offsets=[0])),
    "offsets are text": raw(entry(data_offsets="08")),
    "offsets of text": raw(entry(data_offsets=["0", "8"])),
    "offsets that do not compare": raw({**GOOD, "b": {"dtype": "F32", "shape": [0], "data_offsets": ["8", None]}}),
    "negative offset": raw(entry(data_offsets=[-8, 0])),
    "backwards": raw(entry(data_offsets=[8, 0])),
    "beyond the data": raw(entry(data_offsets=[8, 16])),
    "truncated": files.dump({"prompt": np.ones((4, 4), np.float32)})[:-1],
    "bytes after the end": files.dump({"prompt": np.ones((4, 4), np.float32)}) + b"\0",
    "a hole": raw(entry(data_offsets=[4, 12]), b"\0" * 12),
    "overlap": raw({**GOOD, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
    "NaN": files.dump({"prompt": np.array([[1, np.nan]], np.float32)}),
    "infinite": files.dump({"prompt": np.array([[1, np.inf]], np.float32)}),
    "beyond float32": raw(entry(dtype="F64", shape=[1]), np.array([1e300], "<f8").tobytes()),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_file_of_tensors_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidTensor):
        files.load(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8"]) | json_values,
        "shape": st.lists(st.integers(0, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | json_values,
    }
)


@given(st.dictionaries(st.text(max_size=4), entries | json_values, max_size=3) | json_values, st.binary(max_size=16))
def test_any_header_is_loaded_or_refused_and_nothing_else(header: Any, data: bytes) -> None:
    try:
        loaded = files.load(raw(header, data))
    except InvalidTensor:
        return
    assert all(tensor.dtype == np.float32 for tensor in loaded.values())


@given(st.binary(max_size=64))
def test_any_bytes_are_loaded_or_refused_and_nothing_else(content: bytes) -> None:
    with pytest.raises(InvalidTensor):
        files.load(content)


def test_equal_tensors_have_one_fingerprint_whatever_their_type_and_layout() -> None:
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = files.fingerprint(tensor)
    assert files.fingerprint(tensor.astype(np.float64)) == expected
    assert files.fingerprint(tensor.astype(">f4")) == expected
    assert files.fingerprint(np.asfortranarray(tensor)) == expected
    assert files.fingerprint(tensor.reshape(3, 2)) != expected
    assert files.fingerprint(tensor + 1) != expected


def test_a_local_file_is_read(tmp_path: Any) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(files.dump({"t": np.ones((1, 1), np.float32)}))
    assert files.read(path)["t"].tolist() == [[1.0]]
