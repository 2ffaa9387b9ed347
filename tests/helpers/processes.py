"""Processes that form a group over gloo, and run functions of a test file."""

import contextlib
import datetime
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist

SECONDS = 120  # for a hang to be noticed, far more than anything here takes


def join(rank, world, meeting_point):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=SECONDS),
    )


class Processes:
    """A group of processes, each with its rank."""

    def __init__(self, world, meeting_point):
        spawn = torch.multiprocessing.get_context("spawn")
        self.world = world
        self.executors = [
            ProcessPoolExecutor(1, spawn, initializer=join, initargs=(rank, world, meeting_point))
            for rank in range(world)
        ]

    def run(self, function, *args):
        """What the function returns in each process."""
        futures = [executor.submit(function, *args) for executor in self.executors]
        return [future.result(timeout=SECONDS) for future in futures]

    def close(self):
        with contextlib.suppress(Exception):
            self.run(dist.destroy_process_group)
        for executor in self.executors:
            executor.shutdown(wait=False, cancel_futures=True)
