"""The update matrix (n clients x d parameters) and where its rows lie: memory, a device, a file.

updates  UpdateMatrix: column blocks, lazy mixes      layout  named parameters in a flat vector
quantise  a flat vector in bytes
storage  where the rows of a round are kept
rowfile  rows on disk      fetching  how blocks reach their device      memory  what a phase takes
shown    whoever is shown rows or model may not change them      dense  tensors that hold their numbers
"""

from fedllm_sec.matrix.layout import Layout
from fedllm_sec.matrix.updates import UpdateMatrix

__all__ = ["Layout", "UpdateMatrix"]
