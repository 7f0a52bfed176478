"""How this machine computes: device, precision and processes, all from accelerate.

Under several processes, whoever is free trains the next client of the cohort (placement: clients), or every rank
trains the same client on its part of each batch (placement: data). What a client sends does not depend on who trained
it. Rank 0 holds the update matrix and decides; the new vector goes to all.
Under placement: data a GAN's noise, mirrors and shifts are drawn for the whole batch and cut, so they are those of one
process; dropout inside a model is each rank's own, and so not that of one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix.storage import ON_DEVICE, Storage
from fedllm_sec.protocols import LocalResult, Task
from fedllm_sec.tasks.draws import Drawn

if TYPE_CHECKING:
    from accelerate import Accelerator

BEGUN = "fedllm_sec/begun"  # where the ranks count the clients of a round that were begun


class Machine:
    """The processes of one run; also the `Stepper` of local training."""

    def __init__(self, accelerator: Accelerator, placement: str = "clients") -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.placement = placement
        self.sharded = False  # DeepSpeed ZeRO-3: every forward pass gathers weights from all ranks, in step
        plugin = accelerator.state.deepspeed_plugin
        if plugin is not None:
            self.sharded = plugin.zero_stage == 3
            if placement != "data":
                raise RecipeError(
                    "compute.placement: 'clients': under DeepSpeed all processes work on one client at a time. "
                    "Set compute.placement: data, or launch with configs/multi_gpu.yaml."
                )

    @property
    def main(self) -> bool:
        return self.rank == 0

    def shard(self, base: Any) -> Any:
        """Under ZeRO-3, hook the frozen base model so that each layer's weights are gathered when it runs.

        Adapters are added afterwards and stay whole: the flat vector and its optimizer are DeepSpeed's to ignore.
        """
        if not self.sharded:
            return base
        import deepspeed

        plugin = self.accelerator.state.deepspeed_plugin
        config = {k: v for k, v in plugin.deepspeed_config.items() if v != "auto"}
        config = {**config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        config.pop("train_batch_size", None)
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        return deepspeed.initialize(model=base, config=config)[0].module

    # ------------------------------------------------------------ local training

    @property
    def alone(self) -> bool:
        """Whether this process trains every client, if not all of each batch."""
        return self.world == 1 or self.placement == "data"

    def turns(self, n: int) -> Iterator[int]:
        """Places of a cohort of n that this process trains.

        Ranks count together how many clients have been begun: a fast one takes more of them, and none waits for another
        before all are begun.
        """
        if self.alone or n == 0:
            yield from range(n)
            return
        while (place := self._store.add(BEGUN, 1) - 1) < n:
            yield place

    @property
    def _store(self) -> Any:
        """What the processes of torchrun write down for each other, a few bytes each."""
        return torch.distributed.distributed_c10d._get_default_store()

    def backward(self, task: Task, shard: Any, rows: Sequence[int]) -> Tensor:
        """Add the gradient of the loss over `rows` to `task.parameters.grad`; give that loss.

        Each mean that the loss is made of is cut into micro-batches, and under placement: data into the ranks' parts.
        They are weighed by what they score and get their share of the random numbers drawn for the whole batch, so that
        the gradient is that of the whole batch. Dropout is the exception: layers draw it anew in every pass.
        """
        split = self.placement == "data" and self.world > 1
        micro = self.accelerator.gradient_accumulation_steps
        loss_sum = torch.zeros((), device=self.device)
        means: list[Drawn] = task.draw(shard, rows) if hasattr(task, "draw") else [Drawn(rows)]
        if split and not any(whole.numbers for whole in means):
            torch.rand((), device=self.device)  # the generator moves on, else every batch had the same dropout
        with self._own_dropout() if split else contextlib.nullcontext():
            for whole in means:
                own = whole.every(self.rank, self.world) if split else whole
                total = task.weight(shard, whole.rows)
                # the same number of passes on every rank, because a sharded model gathers its weights in each
                for k in range(min(micro, -(-len(whole.rows) // self.world) if split else len(whole.rows))):
                    part = own.every(k, micro)
                    share = task.weight(shard, part.rows) / total if len(part.rows) else 0.0
                    used = part if len(part.rows) else whole.every(0, len(whole.rows))
                    with self.accelerator.autocast():
                        loss = task.loss(shard, used.rows, *used.numbers) * share
                    scaler = self.accelerator.scaler
                    (scaler.scale(loss) if scaler is not None else loss).backward()
                    loss_sum += loss.detach()
        if split:
            torch.distributed.all_reduce(task.parameters.grad)
            torch.distributed.all_reduce(loss_sum)
        return loss_sum

    @property
    def micro(self) -> int:
        """Passes that a batch is cut into."""
        return int(self.accelerator.gradient_accumulation_steps)

    def fewest(self, rows: int) -> int:
        """The fewest rows that `backward` gives the model at once where a mean is over so many."""
        own = rows // self.world if self.placement == "data" and self.world > 1 else rows
        return max(1, own // max(1, min(self.accelerator.gradient_accumulation_steps, own)))

    @contextlib.contextmanager
    def _own_dropout(self) -> Iterator[None]:
        """Random numbers of this rank alone; afterwards torch's generator is as before, so the same on all ranks."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), device=self.device)) + self.rank)
            yield

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.step(optimizer)
            self.accelerator.scaler.update()
        else:
            optimizer.step()

    def autocast(self) -> AbstractContextManager[None]:
        """The precision that accelerate is configured for."""
        return self.accelerator.autocast()

    # ------------------------------------------------------------ exchange

    def collect(
        self,
        results: Iterable[tuple[int, LocalResult]],
        n: int,
        d: int,
        everywhere: bool = False,
        beside: int = 0,
        storage: Storage = ON_DEVICE,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows (n, d) in cohort order, (n, 3) claims (count, steps, loss) and (n, beside) buffers, float64 on the CPU.

        On rank 0, or on every rank, else None. `results` are what this process trained, by `turns` of n. Rows are kept
        where `storage` says; another rank keeps its own there too until all are trained, and sends one after another.
        """
        rows = storage.rows(n, d, self.device) if self.main or everywhere else None
        claims = torch.zeros(n, 3 + beside, dtype=torch.float64)
        own: dict[int, Tensor] = {}  # place -> (d,)
        for place, result in results:
            own[place] = rows[place] if rows is not None else storage.rows(1, d, self.device)[0]
            own[place].copy_(result.delta)
            claims[place, :3] = torch.tensor([result.count, float(result.steps), result.loss], dtype=torch.float64)
            if result.buffers is not None:
                claims[place, 3:] = result.buffers.cpu()
        if n and not self.alone:
            owners = torch.zeros(n, dtype=torch.int64, device=self.device)
            owners[list(own)] = self.rank
            torch.distributed.all_reduce(owners)
            if self.main:  # all have stopped counting, and none counts anew before the next exchange
                self._store.delete_key(BEGUN)
            # as bits, of which all but the owner's are 0: so a nan and the sign of a zero come through
            bits = claims.to(self.device).view(torch.int64)
            torch.distributed.all_reduce(bits)
            claims = bits.view(torch.float64).cpu()
            row = torch.empty(d, device=self.device, dtype=storage.dtype)
            self._exchange(own, owners.tolist(), rows, row, everywhere)
        return (rows, claims[:, :3], claims[:, 3:]) if rows is not None else None

    def _exchange(
        self, own: dict[int, Tensor], owners: Sequence[int], rows: Tensor | None, row: Tensor, everywhere: bool
    ) -> None:
        """What each owner has trained comes to rank 0, or to every rank, through `row` (d,) and into `rows` (n, d)."""
        for place, owner in enumerate(owners):
            if owner == self.rank and (everywhere or owner):
                row.copy_(own.pop(place))
            if everywhere:
                torch.distributed.broadcast(row, src=owner)
            elif owner and self.rank == owner:
                torch.distributed.send(row, dst=0)
            elif owner and self.main:
                torch.distributed.recv(row, src=owner)
            if rows is not None and owner != self.rank:
                rows[place].copy_(row)

    def share(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank."""
        if self.world > 1:
            tensor = tensor.contiguous()
            torch.distributed.broadcast(tensor, src=0)
        return tensor

    def spread(self, batches: Sequence[Any], width: int, score: Any) -> Tensor:
        """`score(batch)`, (b, width) float64, for all batches, spread over the ranks: rows in batch order."""
        sizes = [len(batch) for batch in batches]
        out = torch.zeros(sum(sizes), width, dtype=torch.float64)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        own = range(len(batches)) if self.sharded else range(self.rank, len(batches), self.world)
        for i in own:
            out[starts[i] : starts[i] + sizes[i]] = score(batches[i])
        if self.world > 1 and not self.sharded:
            moved = out.to(self.device)
            torch.distributed.all_reduce(moved)  # every row is non-zero on one rank only
            out = moved.cpu()
        return out
