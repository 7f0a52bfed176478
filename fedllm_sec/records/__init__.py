"""What a run leaves behind. Reports read this alone.

history      RoundRecord (what a round is remembered by), RunFolder (line and checkpoint, which count only together)
outcomes     what follows from the records of a whole run
summary      the line of a round, what a tracker gets, summary.json
environment  where and with what it was made
"""

from fedllm_sec.records.history import RoundRecord, RunFolder, read_history

__all__ = ["RoundRecord", "RunFolder", "read_history"]
