"""What an update gives away: an honest-but-curious observer's attacks on what clients send.

`seen` has the types: an `Observation` goes in, a `Reconstruction` or `LabelCounts` comes out. Every method is a pure
function of an observation; no truth reaches it. For images: `linear`, `matching`, `inversion`, `reveal`.
"""

from fedllm_sec.attacks.privacy.calls import reconstruct, reveal_labels
from fedllm_sec.attacks.privacy.seen import LabelCounts, Observation, Reconstruction

__all__ = ["LabelCounts", "Observation", "Reconstruction", "reconstruct", "reveal_labels"]
