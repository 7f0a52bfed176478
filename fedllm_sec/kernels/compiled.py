"""How functions are compiled for the CPU, and how a tile of columns gets into the cache.

Compiled with numba on first use and kept on disk next to the source, until a kernel's source changes. The functions
release the interpreter lock, so that a few Python threads each work on their own columns.
Letters: n rows, c tile width.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

F = TypeVar("F", bound=Callable[..., Any])

FULL, BFLOAT16, FLOAT16 = 0, 1, 2  # what the stored rows are
LINE = 64  # bytes that come from memory together


@functools.cache  # whoever names `fedllm_sec.aggregate` asks for it again
def ready() -> None:
    """Have numba look up what it knows of types and functions, as it else does in the first call of any of them."""
    context: Any = cpu_target.typing_context  # untyped
    context.refresh()


def compiled(function: F) -> F:
    """Strict arithmetic: comparisons with infinities mean what they say."""
    return _kept(function, njit(nogil=True, error_model="numpy")(function))


def compiled_sums(function: F) -> F:
    """Sums may be reordered, which is what lets them be vectorised; infinities still count."""
    options = {"reassoc", "contract", "nsz"}
    return _kept(function, njit(nogil=True, error_model="numpy", fastmath=options)(function))


def _kept(function: F, dispatcher: Any) -> F:
    """The compiled function, kept on disk for as long as no kernel's source changes.

    numba's own `cache=True` looks at the function's file alone: what it imports from other kernels, and has compiled
    in, could be old for ever. Where there is no folder to keep it in, it is compiled anew in every process.
    """
    path = function.__code__.co_filename
    make_cache: Any = FunctionCache  # untyped
    index: Any = IndexDataCacheFile
    try:
        cache = None if _nowhere(Path(path).parent) else make_cache(function)
    except RuntimeError:  # numba's "no locator available"
        cache = None
    if cache is None:
        _say_not_kept(Path(path).parent)
    else:
        cache._cache_file = index(cache.cache_path, cache._impl.filename_base, source_digest(path))
        dispatcher._cache = cache
    return cast(F, dispatcher)


def _nowhere(folder: Path) -> bool:
    """Whether numba would make a folder named "~" in the working one: there is no home, and no other place to write to.

    Such is a container whose user has no entry in /etc/passwd and no HOME.
    """
    if os.path.expanduser("~") != "~" or os.environ.get("XDG_CACHE_HOME"):
        return False
    places = [folder / "__pycache__", *([Path(given)] if (given := os.environ.get("NUMBA_CACHE_DIR")) else [])]
    return not any(_can_be_written(place.absolute()) for place in places)


def _can_be_written(folder: Path) -> bool:
    """Whether it is there and can be, or could be made."""
    return os.access(next(place for place in (folder, *folder.parents) if place.exists()), os.W_OK)


@functools.cache  # once is enough
def _say_not_kept(folder: Path) -> None:
    warnings.warn(
        f"kernels: neither {folder}/__pycache__ nor a folder of the user's own can be written, so those there are "
        "compiled anew in every process. Set NUMBA_CACHE_DIR to a folder that can.",
        stacklevel=4,
    )


@functools.cache
def source_digest(path: str) -> str:
    """Of the file at `path` and of all that it may import: every file in this folder."""
    digest = hashlib.sha256()
    for file in sorted({Path(path), *Path(__file__).parent.glob("*.py")}):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, without waiting for it: LLVM's prefetch, for reading, into all levels."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        form = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        tools: Any = cgutils  # untyped
        call = tools.get_or_insert_function(builder.module, form, "llvm.prefetch.p0")
        builder.call(call, [builder.inttoptr(arguments[0], byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.intp), code


def _window(typing: Any, address: Any, count: Any) -> Any:
    """The `count` float32 values at an address, unchecked: whoever calls keeps the memory alive."""
    kind: Any = types.Array(types.float32, 1, "C")

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(kind)(context, builder)
        size = context.get_constant(types.intp, 4)
        data = builder.inttoptr(arguments[0], array.data.type)
        populate: Any = populate_array  # untyped
        populate(array, data=data, shape=[arguments[1]], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return kind(types.intp, types.intp), code


def _chosen(name: str) -> Any:
    """LLVM's minnum or maxnum of two float64 that are no NaN: one instruction, and no branch."""

    def typed(typing: Any, x: Any, y: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = ir.DoubleType()
            form = ir.FunctionType(number, [number, number])
            function = builder.module.declare_intrinsic(f"llvm.{name}", [number], form)
            return builder.call(function, arguments, fastmath=("nnan", "nsz"))

        return types.float64(types.float64, types.float64), code

    return typed


smaller: Any = intrinsic(_chosen("minnum"))
larger: Any = intrinsic(_chosen("maxnum"))
prefetch: Any = intrinsic(_prefetch)
window: Any = intrinsic(_window)


@compiled
def address(array: Any) -> Any:
    """Where the first value lies."""
    return np.int64(array.ctypes.data)


@compiled
def addresses(tile):  # type: ignore[no-untyped-def]
    """Where each row of a contiguous (n, c) array lies."""
    return address(tile) + np.arange(tile.shape[0]) * tile.shape[1] * tile.itemsize


@compiled
def lines_of(array: Any, offsets: Any, width: Any) -> Any:
    """Addresses of the cache lines of `width` values from each of these places of a flat array on."""
    size, base = array.itemsize, address(array)
    lines = (width * size + LINE - 1) // LINE
    out = np.empty(offsets.size * lines, np.int64)
    for i in range(offsets.size):
        for line in range(lines):
            out[i * lines + line] = base + offsets[i] * size + line * LINE
    return out


@compiled
def stored_lines(full, half, kind, offsets, start, width):  # type: ignore[no-untyped-def]
    """`lines_of` the stored rows' columns from `start` on, and the bytes of a stored value."""
    if kind == FULL:
        return lines_of(full, offsets + start, width), 4
    return lines_of(half, offsets + start, width), 2


@compiled
def load_tile(full, half, kind, offsets, extra, start, extra_start, width, tile, bits):  # type: ignore[no-untyped-def]
    """Rows' columns start..start+width as float32 into `tile`, (n, c); `bits` is the same memory as uint32.

    Row i begins at `offsets[i]` of the flat array `full` (float32) or `half` (uint16); rows of `extra` follow.
    """
    n = offsets.size
    for i in range(n):
        begin = offsets[i] + start
        if kind == FULL:
            source = full[begin : begin + width]
            row = tile[i]
            for c in range(width):
                row[c] = source[c]
        elif kind == BFLOAT16:
            words = half[begin : begin + width]
            out = bits[i]
            for c in range(width):
                out[c] = np.uint32(words[c]) << np.uint32(16)
        else:
            words = half[begin : begin + width]
            out = bits[i]
            for c in range(width):
                word = np.uint32(words[c])
                magnitude = (word & np.uint32(0x7FFF)) << np.uint32(13)
                if magnitude >= np.uint32(0x0F800000):  # infinity or NaN: the largest float32 exponent
                    magnitude |= np.uint32(0x7F800000)
                out[c] = ((word & np.uint32(0x8000)) << np.uint32(16)) | magnitude
            row = tile[i]
            scale = np.float32(2.0**112)  # the exponents' biases are 15 and 127; right for subnormals too
            for c in range(width):
                row[c] *= scale
    for e in range(extra.shape[0]):
        source = extra[e, extra_start : extra_start + width]
        row = tile[n + e]
        for c in range(width):
            row[c] = source[c]
