"""Exit codes of a run, and the faults that end one with a message instead of a traceback."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """The exit codes of the trainer; 0 to 4 and 130 mean what they mean in the other programs."""

    OK = 0
    FAILED = 1  # the loss is not finite, or a rank has failed
    USAGE = 2  # the configuration, a model or a checkpoint does not fit
    NO_DEVICE = 3
    OUTPUT = 4  # the run folder cannot be written
    DATA = 5  # the images cannot be read
    STOPPED = 75  # SIGTERM: a checkpoint is saved, start again with --resume
    INTERRUPTED = 130


EXIT_CODES = (
    "exit codes: 0 done; 1 the loss is not finite, or a rank failed; 2 the configuration, a model or a checkpoint does "
    "not fit; 3 no CUDA device; 4 the run folder cannot be written; 5 images cannot be read; 75 stopped by SIGTERM "
    "with a checkpoint saved: --resume goes on; 130 interrupted. Under torchrun the launcher's own code is 1 for all "
    "of these but 0; results.json of the run folder has the rank's as `exit`."
)


class RunFault(Exception):
    """A fault that ends the run on every rank with one message."""

    code = Exit.FAILED


class ConfigFault(RunFault):
    """A setting, a model or a checkpoint that does not fit."""

    code = Exit.USAGE


class DataFault(RunFault):
    """Images that cannot be read."""

    code = Exit.DATA


class Diverged(RunFault):
    """The loss is not finite."""


class Stopped(RunFault):
    """SIGTERM."""

    code = Exit.STOPPED


class DeviceFault(RunFault):
    """No CUDA device where one is asked for."""

    code = Exit.NO_DEVICE


class OutputFault(RunFault):
    """The run folder cannot be written."""

    code = Exit.OUTPUT
