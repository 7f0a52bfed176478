"""Questions and replies as Flower's records: raw bytes inside, see wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedllm_sec.deploy.replies import Expected, packed
from fedllm_sec.deploy.wire import Packed, Refused, encode, pack, unpack
from fedllm_sec.protocols import LocalResult


def as_array(made: Packed) -> Array:
    """The same bytes as Flower carries them."""
    return Array(dtype=made.dtype, shape=made.shape, stype=made.kind, data=made.data)


def ask_records(expected: Expected, rounds: int, vectors: Mapping[str, Tensor]) -> RecordDict:
    """What a client is sent: the vectors exactly, and which question this is."""
    arrays = {
        name: as_array(pack(v, "float64" if v.dtype == torch.float64 else "float32")) for name, v in vectors.items()
    }
    of = {"client": expected.client, "round": expected.round, "nonce": expected.nonce}
    return RecordDict(
        {
            "ask": ArrayRecord(arrays),
            "of": ConfigRecord({**of, "rounds": rounds, "wire": expected.wire, "size": expected.size}),
        }
    )


def read_ask(content: RecordDict, size: int) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The vectors of a question, and which one it is; Refused where they are not of the client's own model."""
    of = content.config_records["of"]
    if of["size"] != size:
        raise Refused(f"the server asks about {of['size']} parameters, this device trains {size}")
    vectors = {}
    for name, array in content.array_records["ask"].items():
        own = packed(array)
        if name == "buffers":
            vectors[name] = unpack(own, name, "float64", own.shape[0])
        else:
            vectors[name] = unpack(own, name, "float32", size)
    return vectors, of


def reply_records(
    result: LocalResult, of: Mapping[str, Any], residual: Tensor | None
) -> tuple[RecordDict, Tensor | None]:
    """A client's reply, and the error of its wire that it adds to its next delta."""
    arrays, lost = encode(result.delta, str(of["wire"]), residual)
    if result.buffers is not None:
        arrays["buffers"] = pack(result.buffers, "float64")
    return (
        RecordDict(
            {
                "delta": ArrayRecord({name: as_array(made) for name, made in arrays.items()}),
                "claims": MetricRecord({"num-examples": result.count, "steps": result.steps, "loss": result.loss}),
                "of": ConfigRecord({key: of[key] for key in ("client", "round", "nonce")}),
            }
        ),
        lost,
    )
