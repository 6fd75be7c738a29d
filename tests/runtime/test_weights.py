"""The weight file: readable by the safetensors package, and by us without a copy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from t3c.core.errors import ArtifactError
from t3c.runtime import tvm_vm
from t3c.runtime.weights import ALIGNMENT, DTYPES, Weights, aligned, aligned_copy, write

Arrays = dict[str, np.ndarray[Any, Any]]


def some() -> Arrays:
    return {
        "odd": np.arange(3, dtype=np.float32),
        "block": np.arange(64, dtype=np.int8).reshape(4, 16),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 5), np.float32),
        "wide": np.arange(48, dtype=np.float32).reshape(3, 16).T,
    }


def test_what_we_write_the_safetensors_package_reads(tmp_path: Path) -> None:
    write(tmp_path / "w", some())
    read = load_file(tmp_path / "w")
    assert read.keys() == some().keys()
    for name, array in some().items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def test_what_the_safetensors_package_writes_we_read(tmp_path: Path) -> None:
    arrays = {name: np.ascontiguousarray(a) for name, a in some().items()}
    save_file(arrays, tmp_path / "w")
    for name, array in Weights(tmp_path / "w").items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_round_trips(tmp_path: Path, dtype: str) -> None:
    array = np.array([[0, 1], [1, 0]], dtype)
    write(tmp_path / "w", {"x": array})
    read = Weights(tmp_path / "w")["x"]
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_every_multiple_of_64_bytes_is_aligned_without_holes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("w") / "w"
    arrays = {f"t{i}": np.full(size, i, np.uint8) for i, size in enumerate(sizes)}
    write(path, arrays)
    weights = Weights(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights[name], array)
        if array.nbytes and array.nbytes % ALIGNMENT == 0:
            assert aligned(weights[name])


def test_views_reach_tvm_without_a_copy_and_never_the_disk(tmp_path: Path) -> None:
    write(tmp_path / "w", some())
    before = (tmp_path / "w").read_bytes()
    view = Weights(tmp_path / "w")["block"]
    shared = tvm_vm.to_numpy(tvm_vm.share(view))
    assert shared.ctypes.data == view.ctypes.data
    view[:] = 0
    assert (tmp_path / "w").read_bytes() == before


def test_an_aligned_copy_is_aligned_and_equal() -> None:
    array = np.arange(10, dtype=np.float32)[1:].reshape(3, 3).T
    copy = aligned_copy(array)
    assert aligned(copy)
    assert copy.flags.c_contiguous
    np.testing.assert_array_equal(copy, array)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"z: dtype complex64; allowed are bool, uint8"):
        write(tmp_path / "w", {"z": np.zeros(1, np.complex64)})


def damage(path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "expected an object"),
        ({"x": {"dtype": "F32", "shape": [2]}}, r"x\.data_offsets: missing"),
        ({"x": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}, "'Q4' is none of"),
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "do not fit"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "do not fit"),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "ends behind"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "8 bytes of data, not 4"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, r"expected \[begin, end\]"),
        ({"__metadata__": {"schema": "2"}}, "weight schema 2 is newer than 1"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: object, message: str) -> None:
    damage(tmp_path / "w", header)
    with pytest.raises(ArtifactError, match=message):
        Weights(tmp_path / "w")


@pytest.mark.parametrize("content", [b"", b"\x02", b"\xff" * 16, b"\x02" + bytes(7) + b"{]"])
def test_what_is_no_weight_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ArtifactError, match=str(tmp_path / "w")):
        Weights(tmp_path / "w")
