"""Compile every Triton kernel for GPUs that are not here, and print what the compiler made of it.

Registers and stack are cuobjdump's, which lies inside the triton wheel; shared memory and warps are the compiler's.
`programs` is how many programs one multiprocessor holds at once by these figures. Ends with 1 if a kernel uses the
stack: a spilled register is a read and a write of memory for every column.

    python scripts/gpu_compile.py                  sm_80, sm_90, sm_100; float32, bfloat16, float16
    python scripts/gpu_compile.py --sm 90 --dtype float32
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedllm_sec.kernels import networks, triton_backend, triton_kernels

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Per multiprocessor: bytes of shared memory that programs can have, and threads.
MACHINES = {80: (164 * 1024, 2048), 90: (228 * 1024, 2048), 100: (228 * 1024, 2048)}
POINTERS = {"offsets": "*i64", "left": "*i64", "right": "*i64", "places": "*i64", "weights": "*fp64", "sums": "*fp32"}
NUMBERS = {"n": "i32", "pivot": "i32", "stride": "i64"}


def jobs(dtype: str) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int], str]]:
    """(name, kernel, constants, options, type of `out`) of all that the backend launches for rows of one type."""
    vector, halves = 16 // SIZES[dtype], dtype != "float32"
    for n, shift in itertools.product((16, 32, 64), (False, True)):
        split = shift or not halves
        cut = triton_backend.programs(n, split, halves)
        for same in (True, False) if n > cut.tile or n == 64 else (True,):
            yield (
                f"products, {n} rows{'' if same else ', two tiles'}{', shifted' if shift else ''}",
                triton_kernels.products_kernel,
                triton_backend.products_settings(cut, vector, same, shift, split),
                {"num_warps": cut.warps, "num_stages": cut.stages},
                "*fp32",
            )
    width = {"WIDTH": triton_backend.WIDTH, "VECTOR": vector}
    yield "weighted sum", triton_kernels.weighted_sum_kernel, width, {}, "*fp32"
    yield "sign sums", triton_kernels.sign_sums_kernel, width, {}, "*fp32"
    steps = triton_kernels.COLUMNS // triton_backend.WIDTH
    yield "square sums", triton_kernels.square_sums_kernel, {**width, "STEPS": steps}, {}, "*fp64"
    yield "running sums", triton_kernels.add_rows_kernel, {"VECTOR": vector}, {}, "*fp32"
    for n in (16, 32, 64, 100, 128):
        f = n // 4
        statistics = {
            "median": networks.median(n),
            f"trimmed mean, f = {f}": networks.mean_of_ranks(n, f, n - f),
            f"mean around the median, f = {f}": networks.nearest_median(n, n - f),
        }
        for name, network in statistics.items():
            if network.nearest and n > triton_backend.CHOSEN:
                continue
            constants = {"WIDTH": triton_backend.network_width(n, halves), "VECTOR": vector}
            yield f"{name}, {n} rows", triton_kernels.network_kernel(network), constants, {}, "*fp32"


def compiled(kernel: Any, constants: dict[str, Any], options: dict[str, int], out: str, dtype: str, sm: int) -> Any:
    """The kernel for one machine, with the arguments aligned as the backend's are."""
    names = kernel.arg_names
    types = {"x": "*" + TYPES[dtype], "out": out, **POINTERS, **NUMBERS}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    if "stride" in names:
        aligned[(names.index("stride"),)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=aligned
    )
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": 4, **options})


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    (tool,) = (Path(triton.__file__).parent / "backends").glob("nvidia/**/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no registers: {listing[:300]}")
    return int(found[1]), int(found[2])


def programs_at_once(sm: int, registers: int, warps: int, shared: int) -> int:
    """By registers (65,536, given to a warp in 256s), shared memory (1 KiB a program is the system's), threads."""
    memory, threads = MACHINES[sm]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, memory // (shared + 1024), threads // (32 * warps), 32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for GPUs that are not here.")
    parser.add_argument("--sm", type=int, nargs="*", default=sorted(MACHINES), choices=sorted(MACHINES))
    parser.add_argument("--dtype", nargs="*", default=list(TYPES), choices=list(TYPES))
    args = parser.parse_args()
    print(f"triton {triton.__version__}\n")
    print("| kernel | rows | sm | registers | stack | shared memory, bytes | programs |")
    print("|---|---|---:|---:|---:|---:|---:|")
    spilled = []
    for sm in args.sm:
        for dtype in args.dtype:
            for name, kernel, constants, options, out in jobs(dtype):
                made = compiled(kernel, constants, options, out, dtype, sm)
                registers, stack = registers_and_stack(made.asm["cubin"])
                shared = made.metadata.shared
                programs = programs_at_once(sm, registers, options.get("num_warps", 4), shared)
                print(f"| {name} | {dtype} | {sm} | {registers} | {stack} | {shared:,} | {programs} |", flush=True)
                if stack:
                    spilled.append(f"{name}, {dtype}, sm_{sm}: {stack} bytes")
    if spilled:
        sys.exit("Spilled to the stack:\n  " + "\n  ".join(spilled))


if __name__ == "__main__":
    main()
