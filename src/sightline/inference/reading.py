"""Threads that read images beside a network that computes, without taking its cores from it."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from PIL import Image

BLOCKS = 8
"""Pieces of memory, of 16 MB at most, that Pillow keeps from one picture to the next while many are read."""


LAST = 19
"""The least urgent of what a system lets run side by side, as `nice` counts."""


def readers(count: int, *, yielding: bool = False) -> ThreadPoolExecutor:
    """A pool of `count` threads, each of which computes alone.

    Left to itself, every thread that resizes an image would bring as many helpers along as there are cores, and they
    would wait for one another and for the network's. Memory of large pictures is kept for the next: asked for anew,
    every page of it has to be found and emptied, one thread after the other, which takes longer than decoding.

    `yielding` threads leave the cores to a network that computes beside them, and read when it has nothing to do: the
    network's threads wait for the slowest among them, so that time taken from one of them is lost to all.
    """
    Image.core.set_blocks_max(max(BLOCKS, Image.core.get_blocks_max()))
    most, together = torch.get_num_threads(), threading.Barrier(count + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # from now on this thread has a number of its own
        if yielding and sys.platform == "linux":  # elsewhere a thread has no priority of its own
            with suppress(OSError):  # a system that forbids it gets its images all the same
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)
        together.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="sightline-read", initializer=alone)
    for _ in range(count):
        pool.submit(int)  # a thread begins when there is work
    together.wait()
    torch.set_num_threads(most)  # of this thread it was not changed, but of those that begin later
    return pool
