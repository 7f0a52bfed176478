"""What an update gives away: an honest-but-curious observer's attacks on what clients send.

`seen` has the types: an `Observation` goes in, a `Reconstruction`, `LabelCounts`, `Suspicion`,
`Guessed` or `Recovered` comes out. Every method is a pure function of an observation; no truth reaches it. For images:
`linear`, `exclusive`, `matching`, `inversion`, `reveal`; for text: `membership`, `canary`, `tokens` and `sequences`, by
`reading` (losses) and `spans`.
"""

from fedllm_sec.attacks.privacy.calls import reconstruct, reveal_labels
from fedllm_sec.attacks.privacy.seen import (
    Guessed,
    LabelCounts,
    Observation,
    Question,
    Reconstruction,
    Recovered,
    Row,
    Suspicion,
)

__all__ = [
    "Guessed",
    "LabelCounts",
    "Observation",
    "Question",
    "Reconstruction",
    "Recovered",
    "Row",
    "Suspicion",
    "reconstruct",
    "reveal_labels",
]
