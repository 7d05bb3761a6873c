"""Threads that read images beside a network that computes, without taking its cores from it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

BLOCKS = 8
"""Pieces of memory, of 16 MB at most, that Pillow keeps from one picture to the next while many are read."""


def readers(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, each of which computes alone.

    Left to itself, every thread that resizes an image would bring as many helpers along as there are cores, and they
    would wait for one another and for the network's. Memory of large pictures is kept for the next: asked for anew,
    every page of it has to be found and emptied, one thread after the other, which takes longer than decoding.
    """
    Image.core.set_blocks_max(max(BLOCKS, Image.core.get_blocks_max()))
    most, together = torch.get_num_threads(), threading.Barrier(count + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # from now on this thread has a number of its own
        together.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="sightline-read", initializer=alone)
    for _ in range(count):
        pool.submit(int)  # a thread begins when there is work
    together.wait()
    torch.set_num_threads(most)  # of this thread it was not changed, but of those that begin later
    return pool
