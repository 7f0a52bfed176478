"""The numerics alone, for other frameworks and notebooks: rows, state dicts or adapter folders in, one out."""

from __future__ import annotations

from fedllm_sec.api.cost import RoundCost as RoundCost
from fedllm_sec.api.cost import cost as cost
from fedllm_sec.api.rows import aggregate as aggregate
from fedllm_sec.api.states import Merged as Merged
from fedllm_sec.api.states import aggregate_state_dicts as aggregate_state_dicts
