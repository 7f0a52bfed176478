"""How column blocks reach their device: read ahead from a file, uploaded to a GPU, gathered over ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor


def free_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) / 2**20
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def ahead(read: Callable[[slice], Tensor], places: list[slice]) -> Iterator[tuple[slice, Tensor]]:
    """Read the next place in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as reader:
        pending = [reader.submit(read, place) for place in places[:1]]
        for i, place in enumerate(places):
            block = pending.pop().result()
            if i + 1 < len(places):
                pending.append(reader.submit(read, places[i + 1]))
            yield place, block


def uploaded(blocks: Iterator[tuple[slice, Tensor]], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Copy host blocks to a GPU from pinned memory on a side stream, one block ahead of the caller."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[slice, Tensor, torch.cuda.Event] | None = None
    for place, host in blocks:
        pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)
        with torch.cuda.stream(side):
            block = pinned.to(device, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(side)
        if waiting is not None:
            yield arrived(waiting)
        waiting = (place, block, done)
    if waiting is not None:
        yield arrived(waiting)


def arrived(waiting: tuple[slice, Tensor, torch.cuda.Event]) -> tuple[slice, Tensor]:
    place, block, done = waiting
    current = torch.cuda.current_stream(block.device)
    current.wait_event(done)
    block.record_stream(current)
    return place, block


def gathered(
    own: Iterator[tuple[slice, Tensor]], owners: Sequence[int], group: dist.ProcessGroup | None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of all ranks' rows, from blocks of the own ones: row i is the next unused one of `owners[i]`."""
    world = dist.get_world_size(group)
    most = max(owners.count(rank) for rank in range(world))
    taken = [0] * world
    order = []
    for owner in owners:
        order.append(owner * most + taken[owner])
        taken[owner] += 1
    for place, block in own:
        padded = block.new_zeros(most, block.shape[1])
        padded[: block.shape[0]] = block
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded, group=group)
        yield place, torch.cat(parts)[torch.tensor(order, device=block.device)]
