"""What happens in a run: the one round loop, the one training loop, and the machine they run on."""

from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run

__all__ = ["Federation", "Machine", "run"]
