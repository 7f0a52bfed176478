"""An update matrix on disk: a safetensors file with one (n, d) tensor "rows"; ids and counts are metadata.

The file is memory-mapped: the kernels of the CPU compute on the system's own pages, which are never copied. Blocks for
other devices are read with `preadv`.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedllm_sec.errors import DefenseError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class RowFile:
    """Where the (n, d) rows lie in an open file."""

    path: Path
    file: io.FileIO  # open for as long as this object is referenced
    offset: int  # bytes before the first row
    n: int
    d: int
    dtype: torch.dtype

    def mapped(self) -> Tensor:
        """The rows as a memory-mapped (n, d) tensor: nothing is read before it is looked at."""
        length = self.offset + self.n * self.d * self.dtype.itemsize
        memory = mmap.mmap(self.file.fileno(), length, access=mmap.ACCESS_COPY)
        if self.n * self.d == 0:
            return torch.empty(self.n, self.d, dtype=self.dtype)
        if self.offset % self.dtype.itemsize:  # legal in safetensors, though its writers pad
            return torch.frombuffer(bytearray(memory[self.offset :]), dtype=self.dtype).view(self.n, self.d)
        flat = torch.frombuffer(memory, dtype=self.dtype, offset=self.offset, count=self.n * self.d)
        return flat.view(self.n, self.d)

    def check(self) -> None:
        """The file must still be whole: behind its end, mapped memory cannot be looked at."""
        if os.fstat(self.file.fileno()).st_size < self.offset + self.n * self.d * self.dtype.itemsize:
            raise DefenseError(f"{self.path}: the file was cut while it was read. Write it again.")

    def read(self, place: slice) -> Tensor:
        """Columns `place` of all rows, (n, c)."""
        width = place.stop - place.start
        flat = torch.empty(self.n * width, dtype=self.dtype)
        raw = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        size = self.dtype.itemsize
        for i in range(self.n):
            self._read_into(raw[i * width * size : (i + 1) * width * size], (i * self.d + place.start) * size)
        return flat.view(self.n, width)

    def expect(self, place: slice) -> None:
        """Ask the system to read these columns ahead."""
        size = self.dtype.itemsize
        for i in range(self.n):
            start = self.offset + (i * self.d + place.start) * size
            os.posix_fadvise(self.file.fileno(), start, (place.stop - place.start) * size, os.POSIX_FADV_WILLNEED)

    def _read_into(self, target: memoryview, start: int) -> None:
        done = 0
        while done < len(target):
            got = os.preadv(self.file.fileno(), [target[done:]], self.offset + start + done)
            if got == 0:
                raise DefenseError(f"{self.path}: the file ended while it was read. Write it again.")
            done += got


def open_rows(path: Path) -> tuple[RowFile, dict[str, str]]:
    """The rows of a safetensors file and its metadata; a truncated or other file is a DefenseError."""

    def wrong(why: str) -> DefenseError:
        return DefenseError(f"{path}: {why} Write it again with UpdateMatrix.save.")

    try:
        file = io.FileIO(path)
    except OSError as error:
        raise wrong(f"cannot be opened ({error.strerror}).") from error
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise wrong(f"the file is truncated: its header does not fit into {size} bytes.")
    try:
        header = json.loads(file.read(length))
        entry = header["rows"]
        (n, d), (start, stop) = entry["shape"], entry["data_offsets"]
        dtype, metadata = entry["dtype"], dict(header.get("__metadata__", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise wrong(f'not a safetensors file with one (n, d) tensor "rows" ({error!r}).') from error
    if dtype not in DTYPES:
        raise wrong(f"rows are {dtype}, but an update is one of {', '.join(DTYPES)}.")
    if start < 0 or stop - start != n * d * DTYPES[dtype].itemsize:
        raise wrong(f"{stop - start} bytes of data do not hold ({n}, {d}) values of {dtype}.")
    if size < 8 + length + stop:
        raise wrong(f"the file is truncated: {8 + length + stop} bytes expected, {size} found.")
    return RowFile(path, file, 8 + length + start, n, d, DTYPES[dtype]), metadata


def save_rows(
    path: Path,
    blocks: Iterator[tuple[slice, Tensor]],
    n: int,
    d: int,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write (n, d) rows from their column blocks, with no more than one block in memory; atomic."""
    header = json.dumps(
        {
            "__metadata__": dict(metadata),
            "rows": {"dtype": NAMES[dtype], "shape": [n, d], "data_offsets": [0, n * d * dtype.itemsize]},
        }
    ).encode()
    header += b" " * ((56 - len(header)) % 64)  # rows start at a multiple of 64 bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.write(handle, len(header).to_bytes(8, "little") + header)
        os.ftruncate(handle, 8 + len(header) + n * d * dtype.itemsize)
        for place, block in blocks:
            for i, row in enumerate(block.to(device="cpu", dtype=dtype)):
                data = memoryview(row.contiguous().view(torch.uint8).numpy())
                start, done = 8 + len(header) + (i * d + place.start) * dtype.itemsize, 0
                while done < len(data):
                    done += os.pwrite(handle, data[done:], start + done)
        os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
