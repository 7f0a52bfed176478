"""The update matrix (n clients x d parameters) and where its rows lie: memory, a device, a file."""

from fedllm_sec.matrix.layout import Layout
from fedllm_sec.matrix.updates import UpdateMatrix

__all__ = ["Layout", "UpdateMatrix"]
