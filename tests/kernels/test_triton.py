"""The Triton kernels in Triton's own interpreter on the CPU: right results, without a GPU.

The interpreter is chosen before triton is imported, so these run in a process of their own. What it cannot show,
speed and the compiler's own choices, needs a GPU: tests marked `gpu`.
"""

import os
import subprocess
import sys

import pytest
import torch

from fedllm_sec import kernels
from fedllm_sec.matrix import UpdateMatrix

pytest.importorskip("triton", reason="triton is not installed")

PROGRAM = """
import torch
from fedllm_sec.kernels import networks, torch_backend, triton_backend
from fedllm_sec.kernels.sums import new_sums, plain_rows
from fedllm_sec.matrix import UpdateMatrix

torch_backend.WIDE = 0
rng = torch.Generator().manual_seed(0)
for n, d in ((1, 5), (5, 4099), (19, 8704), (40, 4096), (140, 4100)):
    rows = torch.randn(n, d, generator=rng) + 3
    updates = UpdateMatrix.of(rows)
    x = rows.double()
    direct = torch.stack([(x - row).square().sum(1) for row in x])
    gram, distances = triton_backend.pair_sums(updates, None, True)
    torch.testing.assert_close(gram, x @ x.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(distances, direct, rtol=1e-5, atol=1e-9)
    shifted = triton_backend.products_pass(updates, None, 0).triu()
    torch.testing.assert_close(shifted, ((x - x[0]) @ (x - x[0]).T).triu(), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(triton_backend.square_sums(updates), x.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(triton_backend.sign_sums(updates), rows.sign().sum(0), rtol=0, atol=0)
    more = torch.randn(2, d, generator=rng)  # rows that lie elsewhere
    both = torch.cat([rows, more]).double()
    torch.testing.assert_close(triton_backend.pair_sums(updates, more, False)[0], both @ both.T, rtol=1e-6, atol=1e-3)
    v = torch.rand(n + 2, generator=rng, dtype=torch.float64)
    found = triton_backend.combine(updates, v[:n], more, v[n:])
    torch.testing.assert_close(found.double(), v @ both, rtol=1e-6, atol=1e-6)
    halves = UpdateMatrix.of(rows.bfloat16())  # beside float32 rows
    both = torch.cat([rows.bfloat16().float(), more]).double()
    torch.testing.assert_close(triton_backend.pair_sums(halves, more, False)[0], both @ both.T, rtol=1e-6, atol=1e-3)
    found = triton_backend.combine(halves, v[:n], more, v[n:])
    torch.testing.assert_close(found.double(), v @ both, rtol=1e-6, atol=1e-6)
    weights = torch.rand(n, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        triton_backend.combine(updates, weights, None, weights[:0]).double(), weights @ x, rtol=1e-6, atol=1e-6
    )
rows, places = torch.randn(3, 4700, generator=rng), [4, 0, 2]
for chunk_mb in (None, 0.003):  # whole; in blocks of 256 columns, which begin within a tile
    for scale in (1, 1e20):
        sums, reference = new_sums(5, 4700), torch.zeros(5, 4700, dtype=torch.float64)
        for _ in range(2):
            gram = triton_backend.accumulate(sums, places, UpdateMatrix.of(rows * scale, chunk_mb=chunk_mb))
            reference[places] += (rows * scale).double()
            wanted = reference[places] @ reference[places].T
            torch.testing.assert_close(gram, wanted, rtol=1e-6, atol=1e-6 * float(wanted.max()))
        torch.testing.assert_close(plain_rows(sums, 4700).double(), reference, rtol=1e-6, atol=1e-6)
for n in (1, 2, 5, 8, 13, 20):
    rows = torch.randn(n, 600, generator=rng)
    for matrix in (UpdateMatrix.of(rows), UpdateMatrix.of(rows.half()), UpdateMatrix.of(rows).select([0])):
        n = matrix.n
        wanted = [networks.median(n), networks.mean_of_ranks(n, (n - 1) // 3, n - (n - 1) // 3)]
        for network in wanted + [networks.nearest_median(n, k) for k in {1, (n + 1) // 2, n}]:
            found = triton_backend.order_statistics(matrix, network)
            torch.testing.assert_close(found, torch_backend.order_statistics(matrix, network), rtol=0, atol=1e-6)
rows[0] = 1e30
exact = triton_backend.pair_sums(UpdateMatrix.of(rows), None, True)[1]
x = rows.double()
torch.testing.assert_close(exact, torch.stack([(x - row).square().sum(1) for row in x]), rtol=1e-5, atol=1e-9)
print("all right")
"""


def test_the_triton_kernels_are_right_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600)
    assert run.stdout.strip() == "all right", run.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gpu_gives_what_the_cpu_gives(dtype):
    rows = torch.randn(33, 50_001, generator=torch.Generator().manual_seed(1)).to(dtype)
    inside, there = UpdateMatrix.of(rows), UpdateMatrix.of(rows.cuda())
    fed = UpdateMatrix.of(rows, device="cuda", chunk_mb=1)  # blocks from host memory
    for updates in (there, fed):
        torch.testing.assert_close(kernels.gram(updates), kernels.gram(inside), rtol=1e-5, atol=1e-2)
        torch.testing.assert_close(kernels.sq_distances(updates), kernels.sq_distances(inside), rtol=1e-5, atol=1e-9)
        for statistic in (
            kernels.median,
            lambda u: kernels.trimmed_mean(u, 5),
            lambda u: kernels.mean_around_median(u, 9),
            lambda u: kernels.combine(u, torch.ones(33)),
            kernels.sign_sums,
        ):
            torch.testing.assert_close(statistic(updates).cpu(), statistic(inside), rtol=1e-6, atol=1e-5)
