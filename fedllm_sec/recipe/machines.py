"""What a recipe may say of the machines: how it is computed, where results go, and how real devices are asked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedllm_sec.recipe.section import Count, Folder, Section


class Compute(Section):
    """With what, and how spread, it is computed."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = None  # None: what accelerate is configured for
    gradient_accumulation: Count | None = None  # None: what accelerate is configured for
    placement: Literal["clients", "data"] = "clients"  # spread clients, or each batch, over the processes
    rows: Literal["device", "host", "disk"] | None = None  # where they are kept; None: by size and free memory
    rows_dtype: Literal["float32", "bfloat16"] = "float32"  # and as what
    chunk_mb: float | None = Field(None, ge=1e-3, le=1e6)  # of a column block in the defense; None: by free memory
    threads: int | None = Field(None, ge=1, le=1024)  # CPU threads of each process


class Output(Section):
    folder: Folder = "runs/{name}"  # {name} is the recipe's file name
    save: Literal["adapter", "merged"] = "adapter"  # of a LoRA run: the adapter, or the model that it makes of its base
    adapter_every: Count | None = None  # also keep the adapter of every k-th round
    tracker: Literal["tensorboard", "wandb", "mlflow"] | None = None  # also log there what a round measured


class Deploy(Section):
    """How the server of a deployment asks its devices; `clients.per_round` says how many are asked."""

    wire: Literal["float32", "bfloat16", "int8"] = "float32"  # what a device sends of each number of its update
    wait_for: Count | None = None  # replies that close a round, where more clients are asked; None: all of them
    min_replies: Count = 1  # usable replies without which a round is skipped
    timeout_s: float = Field(600.0, ge=1e-3, le=1e8)  # a round closes so long after it was asked
