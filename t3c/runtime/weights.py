"""The safetensors format in numpy: one JSON header, then raw little-endian bytes.

The writer pads the header so that the data starts at a multiple of 64 bytes, and puts first every
tensor whose size is a multiple of 64: those stay 64-byte aligned without holes, and a kernel can
read them where they lie in the file.
"""

import json
import mmap
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from t3c.core.errors import ArtifactError
from t3c.core.fields import Fields

ALIGNMENT = 64
SCHEMA = 1
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}
_CODES = {name: code for code, name in DTYPES.items()}
_MAX_HEADER = 100_000_000

Array = NDArray[Any]


def write(path: str | os.PathLike[str], tensors: Mapping[str, Array]) -> None:
    """Write tensors to a safetensors file that `Weights` can hand out without a copy.

    Args:
        path: The file; it is overwritten.
        tensors: Name -> array of any layout; stored C-contiguous and little-endian.

    Raises:
        TypeError: A dtype that the format or numpy does not have.
    """
    ordered = sorted(tensors, key=lambda name: tensors[name].nbytes % ALIGNMENT != 0)
    header: dict[str, object] = {"__metadata__": {"format": "t3c", "schema": str(SCHEMA)}}
    offset = 0
    for name in ordered:
        array = tensors[name]
        if (code := _CODES.get(array.dtype.name)) is None:
            raise TypeError(f"{name}: dtype {array.dtype}; allowed are {', '.join(_CODES)}")
        end = offset + array.nbytes
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with Path(path).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in ordered:
            array = tensors[name]
            if array.nbytes:
                stream.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)


class Weights(Mapping[str, Array]):
    """The tensors of a file, as views of its pages: nothing is read until it is used.

    The mapping is private (copy on write): what lies on disk cannot change through a view, and the
    views count as writable, which DLPack asks for.

    Attributes:
        path: The file.
        metadata: What the header says of the file.
        begins: Tensor name -> bytes of data in front of it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map the file and check its header.

        Raises:
            ArtifactError: The header is damaged, or does not fit the file.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                self._pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{self.path}: cannot be mapped: {error}") from error
        length = int.from_bytes(self._pages[:8], "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ArtifactError(f"{self.path}: the header does not fit the file; it is damaged")
        try:
            header = json.loads(self._pages[8 : 8 + length])
        except ValueError as error:
            raise ArtifactError(f"{self.path}: the header is not JSON: {error}") from error
        fields = Fields(header, str(self.path))
        self.metadata = cast(dict[str, str], fields.optional("__metadata__", fields.mapping) or {})
        schema = self.metadata.get("schema", "0")
        if not schema.isdigit() or int(schema) > SCHEMA:
            raise ArtifactError(
                f"{self.path}: weight schema {schema} is newer than {SCHEMA}; install a newer t3c"
            )
        self._start = 8 + length
        self._views: dict[str, Array] = {}
        self.begins: dict[str, int] = {}
        end = 0
        names = [name for name in fields.data if name != "__metadata__"]
        for name in sorted(names, key=lambda n: fields.within(n, _offsets)):
            end = self._add(name, fields.within(name, _entry), end)
        if self._start + end != size:
            raise ArtifactError(f"{self.path}: {size - self._start} bytes of data, not {end}")

    def _add(self, name: str, entry: tuple[str, tuple[int, ...], tuple[int, int]], at: int) -> int:
        dtype, shape, (begin, end) = entry
        count = prod(shape)
        if begin != at or end - begin != count * np.dtype(dtype).itemsize:
            raise ArtifactError(f"{self.path}: {name}: offsets {begin} to {end} do not fit {shape}")
        if self._start + end > len(self._pages):
            raise ArtifactError(f"{self.path}: {name}: ends behind the end of the file")
        self.begins[name] = begin
        flat: Array = np.frombuffer(self._pages, dtype, count, self._start + begin)
        self._views[name] = flat.reshape(shape)
        return end

    def __getitem__(self, name: str) -> Array:
        """A view; no bytes are copied."""
        return self._views[name]

    def __iter__(self) -> Any:
        """Names in file order."""
        return iter(self._views)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._views)


def aligned(array: Array) -> bool:
    """Whether the array starts at a multiple of 64 bytes, as compiled kernels need."""
    return array.ctypes.data % ALIGNMENT == 0


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array of undefined content that starts at a multiple of 64 bytes."""
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    shift = -raw.ctypes.data % ALIGNMENT
    made: Array = raw[shift : shift + size].view(dtype).reshape(shape)
    return made


def aligned_copy(array: Array) -> Array:
    """A C-contiguous copy that starts at a multiple of 64 bytes."""
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _offsets(f: Fields) -> tuple[int, ...]:
    return f.wholes("data_offsets")


def _entry(f: Fields) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    dtype: str = DTYPES[f.choice("dtype", tuple(DTYPES))]
    match f.wholes("data_offsets"):
        case (begin, end) if begin <= end:
            return dtype, f.wholes("shape"), (begin, end)
        case other:
            raise ArtifactError(f"{f.where('data_offsets')}: expected [begin, end], got {other}")
