"""Several processes of one run, as torchrun starts them; one process is the ordinary case."""

import os
import sys

import torch
import torch.distributed as dist


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def print0(*words) -> None:
    """Prints on the main process only."""
    if is_main_process():
        try:
            print(*words, flush=True)
        except BrokenPipeError:  # nobody reads on, as with "| head -1": the run goes on all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shard_items(items: list) -> list:
    """This process's items, as many on each process: the last ones are made up by repeating the
    first.

    `gather(...)[: len(items)]` puts what was made of them together again."""
    padded = -(-len(items) // world_size()) * world_size()
    return [items[i % len(items)] for i in range(padded)][rank() :: world_size()]


def gather(items: list) -> list:
    """All processes' items on every process: the first ones of each, then the second ones, ..."""
    if world_size() == 1:
        return items
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, on every process; in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if world_size() > 1:
        dist.barrier()
