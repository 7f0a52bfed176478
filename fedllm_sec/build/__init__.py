"""From a recipe to a run that can begin. The way is one line: checked, planned, assembled.

names       raw -> checked recipe: names and settings of methods against the menus
plan        what follows without data or model; what cannot work is refused here (also: threat, transfer)
federation  assemble: data, model, everything together; what only they can tell is refused here
parts, text, arrays, characters    what each kind of task brings: rows, shards, the task, held-out rows
loaded      what a process reads once for several runs
rehearsal, explain, cost           what is tried, said and counted before training
"""

from fedllm_sec.build.federation import assemble, build, run, save
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import Plan, planned

__all__ = ["Plan", "assemble", "build", "checked", "planned", "run", "save"]
