"""What a run leaves behind. Reports read this alone.

history      RoundRecord (what a round is remembered by), and its line
folder       RunFolder (line and checkpoint, which count only together), going on, refusing what was damaged
checkpoint   a state as one file that knows its own hash
inventory    size and hash of what a run made, and what has become of it; `verify` is the command that asks
files        writing whole or not at all, and by one process at a time
outcomes     what follows from the records of a whole run
summary      the line of a round, what a tracker gets, summary.json
environment  where and with what it was made
"""

from fedllm_sec.records.folder import RunFolder
from fedllm_sec.records.history import RoundRecord, read_history

__all__ = ["RoundRecord", "RunFolder", "read_history"]
