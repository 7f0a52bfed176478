"""What a round of n clients and d trained parameters moves and holds, in bytes: before anybody has such machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedllm_sec.errors import FedError
from fedllm_sec.matrix.quantise import BYTES, bytes_of
from fedllm_sec.matrix.storage import MOST_BYTES

WIRES, ROWS, PLACES = ("float32", "bfloat16", "int8"), ("float32", "bfloat16"), ("memory", "disk")
VECTORS = 3  # (d,) float32 that a round holds beside its rows: the model sent, its step, the step before
BLOCKS = 2**28  # bytes of scratch that a rule takes at most beside rows and vectors


@dataclass(frozen=True)
class RoundCost:
    """Bytes of one round; whole numbers. Headers, TLS and heartbeats of a transport come on top."""

    received: int  # by a client: the global vector, float32 whatever the wire
    sent: int  # by a client: its row
    wire: int  # of all clients together, both ways
    matrix: int  # the rows of a round where the server keeps them
    server: int  # the most that the process that decides holds beside its libraries and model
    rank: int  # rows that each other process keeps until all clients are trained, where all are as fast
    exchange: int  # from the other processes to the one that decides, and its new vector to them; the same holds


def cost(
    n: int, d: int, *, wire: str = "float32", rows_dtype: str = "float32", rows: str = "memory", processes: int = 1
) -> RoundCost:
    """The cost of a round of `n` clients that train `d` parameters.

    `wire` is deploy.wire; `rows_dtype` and `rows` ("memory" or "disk") are compute.rows_dtype and where compute.rows
    puts the matrix; `processes` are those of a simulation, of which a faster one trains, keeps and sends more rows.
    FL methods whose clients remember something (scaffold, feddyn, share_a, local buffers) are not in it: there every
    process gets all rows. Raises FedError for what none of these can be.
    """
    for name, count in (("n", n), ("d", d), ("processes", processes)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise FedError(f"cost: {name}: {count!r}: must be a whole number from 1 on.")
    for name, given, known in (("wire", wire, WIRES), ("rows_dtype", rows_dtype, ROWS), ("rows", rows, PLACES)):
        if given not in known:
            raise FedError(f"cost: {name}: {given!r}: unknown. Choose {', '.join(known)}.")
    vector, row = 4 * d, BYTES[rows_dtype] * d
    received, sent = vector, bytes_of(wire, d)
    elsewhere = n - math.ceil(n / processes)  # clients that another process trains, where all are as fast
    return RoundCost(
        received=received,
        sent=sent,
        wire=n * (received + sent),
        matrix=n * row,
        server=(n * row if rows == "memory" else MOST_BYTES) + VECTORS * vector + BLOCKS + 8 * n * n,
        rank=math.ceil(n / processes) * row if processes > 1 else 0,
        exchange=elsewhere * row + (processes - 1) * vector,
    )
