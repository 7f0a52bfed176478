"""What happens in a run: the one round loop, the one training loop, and the machine they run on.

federation  the parts of a run and a round, top to bottom      server  the server's side of a round
client      how a client trains                                remembering  what clients write down after it
source      where rows come from: trained here, or devices
compute     device, precision, processes; rows come together here
distillation  FedGKT's own loop
"""

from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run

__all__ = ["Federation", "Machine", "run"]
