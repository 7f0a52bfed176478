"""From a recipe to a run that can begin: names, then the plan (no data), then parts and federation (data, a model)."""

from fedllm_sec.build.federation import assemble, build, run, save
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import Plan, planned

__all__ = ["Plan", "assemble", "build", "checked", "planned", "run", "save"]
