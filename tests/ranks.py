"""Processes that run functions together over a gloo group: started once, since a start costs seconds.

A function that `Pool.run` calls is one of a module's top level, takes the process group first, and raises to fail. All
ranks of the pool run it, or the first of them, in a group of their own.
"""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT_S = 60  # of a collective
START_S = 60  # of a process, at most
ANSWER_S = 300  # of what a function does beside its collectives, at most


class Pool:
    """``count`` processes, and a group of the first n of them for each n from 2."""

    def __init__(self, count, timeout_s=TIMEOUT_S):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.timeout_s = timeout_s
        self.processes, self.pipes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = rank, count, os.path.join(self.folder.name, "store"), theirs, timeout_s
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function, *args, ranks=None):
        """Call ``function(group, *args)`` in the first ``ranks`` processes; the list of what they returned."""
        pipes = self.pipes[: ranks or len(self.pipes)]
        for pipe in pipes:
            pipe.send((function, args, len(pipes)))
        replies = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(self.timeout_s + ANSWER_S):
                raise AssertionError(f"rank {rank} did not answer within {self.timeout_s + ANSWER_S} s")
            try:
                replies.append(pipe.recv())
            except EOFError:
                replies.append(("ended", None))
        failed = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(replies) if text not in (None, "ended")]
        assert not failed, "\n".join(failed)
        return [result for _, result in replies]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank, count, path, pipe, timeout_s):
    torch.set_num_threads(1)
    start, timeout = timedelta(seconds=START_S), timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=count, timeout=start)
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(2, count)}
    groups[count] = dist.group.WORLD
    while True:
        function, args, ranks = pipe.recv()
        try:
            pipe.send((None, function(groups[ranks], *args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
