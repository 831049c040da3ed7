"""Phases of a report that tests run."""

import sys
import time

from bench.harness import phases
from bench.harness.commands import Machine
from bench.harness.phases import Phase

HOPPER = Machine(capability=(9, 0), workers=4)


def code(text, name="try", budget_s=20, **more):
    return Phase(name=name, command=[sys.executable, "-c", text], budget_s=budget_s, **more)


def run(folder, *planned, seconds=60.0, rewrite=lambda: None):
    outcomes = {}
    phases.run(planned, folder, time.monotonic() + seconds, outcomes, rewrite, lambda text: None)
    return outcomes
