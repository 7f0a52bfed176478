"""The state of a run as one safetensors file that knows its own hash.

Tensors are stored as such; numbers, text and dicts stand as JSON in the header, and so does the SHA-256 of the header's
other content and of the tensors. A file that was cut, changed or put together by accident is told from one that a run
wrote; without torch, so that many folders are looked through quickly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedllm_sec.errors import ResumeError

if TYPE_CHECKING:
    from torch import Tensor

# what reading a file that anybody may have made can raise
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError)


def pack(state: Mapping[str, Any]) -> tuple[bytes, memoryview]:
    """The two parts of the file: its header, and the bytes of the tensors."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    described = json.dumps(_take_tensors(state, "state", tensors))
    whole = save(tensors)
    header, body = _cut(whole)
    header["__metadata__"] = {"state": described}
    header["__metadata__"]["sha256"] = _digest(header, body)
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written, body


def unpack(data: bytes) -> dict[str, Any]:
    """The state of a file's bytes; ValueError and its like where they are not what a run wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    described = _described(data)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return dict(_put_tensors(described, tensors))


def marks(data: bytes) -> dict[str, Any]:
    """The numbers and texts of a state, without its tensors: which round it is of and which history it belongs to."""
    return {key: value["value"] for key, value in _described(data)["dict"] if "value" in value}


def _described(data: bytes) -> Any:
    header, body = _cut(data)
    metadata = header["__metadata__"]
    said = metadata.pop("sha256")
    if said != _digest(header, body):
        raise ValueError("its content is not that of its SHA-256")
    return json.loads(metadata["state"])


def _cut(data: bytes) -> tuple[dict[str, Any], memoryview]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), memoryview(data)[8 + size :]


def _digest(header: Mapping[str, Any], body: memoryview) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(body)
    return digest.hexdigest()


def _take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON value in which every tensor stands as {"tensor": its key}; the tensors go into `tensors`."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[str(k), _take_tensors(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_take_tensors(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ResumeError(
        f"checkpoint: {path} is a {type(value).__name__}; state may hold tensors, numbers, text and dicts."
    )


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {k: _put_tensors(v, tensors) for k, v in value["dict"]}
    if "list" in value:
        return [_put_tensors(v, tensors) for v in value["list"]]
    return value["value"]
