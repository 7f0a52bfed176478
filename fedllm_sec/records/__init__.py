"""What a run leaves behind: its folder, one record a round, and what follows from the records.

Reports read this alone.
"""

from fedllm_sec.records.history import RoundRecord, RunFolder, read_history

__all__ = ["RoundRecord", "RunFolder", "read_history"]
