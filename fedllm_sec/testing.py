"""The conformance kit: what every defense and attack must hold, for the menu and for outside code.

    from fedllm_sec.testing import check_attack, check_defense
    check_defense("my_lab.rules:norm_filter", {"factor": 1.5})
    check_attack("my_lab.attacks:drift", kind="update", scale=2.0)

A check returns nothing, or raises AssertionError with the name of the property that does not hold.
"""

from fedllm_sec.attacks.conformance import check_attack
from fedllm_sec.defenses.conformance import check_defense

__all__ = ["check_attack", "check_defense"]
