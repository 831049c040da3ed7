"""The command line of the trainer: ``train.py --config FILE``, alone or under torchrun."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.harness import programs, screen
from trainer import checkpoint, settings
from trainer.config import Config
from trainer.engine import Run
from trainer.faults import EXIT_CODES, ConfigFault, Exit, OutputFault, RunFault
from trainer.ranks import Ranks
from trainer.record import Record, Silent

ROOT = Path(__file__).resolve().parents[2]
STATES = {Exit.OK: "done", Exit.STOPPED: "stopped", Exit.INTERRUPTED: "interrupted"}
AUTO = "auto"


def parser() -> argparse.ArgumentParser:
    made = programs.Parser(
        prog="train.py",
        description="Distil a student from a teacher by the settings of a YAML file (docs/training.md lists them). "
        "Over several processes: torchrun --nproc-per-node N python/train.py --config FILE.",
        epilog=EXIT_CODES,
    )
    made.add_argument(
        "--config", type=Path, metavar="FILE", help="the settings; with --resume: those of the checkpoint"
    )
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="a setting over that of the file, such as optimizer.rate=0.4; may be repeated",
    )  # fmt: skip
    made.add_argument(
        "--loss-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the same as --set loss.options.KEY=VALUE",
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="run folder; default: runs/NAME-DATE")
    made.add_argument(
        "--resume", nargs="?", const=AUTO, metavar="PATH",
        help="go on from a checkpoint, or from the newest of a run folder; without PATH: from the newest in --output, "
        "or from the beginning if there is none",
    )  # fmt: skip
    made.add_argument(
        "--try", type=programs.positive, metavar="STEPS", dest="trial",
        help="a trial of the file: so many steps on synthetic images with an untrained teacher, and how fast they are",
    )  # fmt: skip
    made.add_argument(
        "--compile", action="store_true",
        help="the same as --set precision.compile=true --set teacher.compile=true",
    )  # fmt: skip
    made.add_argument(
        "--profile", nargs="?", const=10, type=programs.positive, metavar="STEPS",
        help="record so many steps (default: 10) with torch.profiler",
    )  # fmt: skip
    return made


def trial(steps: int) -> list[str]:
    """The overrides of --try."""
    return [
        f"steps={steps}", "data.source=synthetic", "data.validation_images=0", "data.workers=0",
        "teacher.pretrained=false", "teacher.checkpoint=''", "teacher.allow_untrained=true", "student.pretrained=false",
        "student.checkpoint=''", "checkpoint.every_epochs=0", "checkpoint.every_steps=0",
        f"log.every={max(1, steps // 2)}", "log.tensorboard=false",
    ]  # fmt: skip


def prepare(options: argparse.Namespace) -> tuple[Config, dict[str, Any] | None, Path | None]:
    """The settings, and the checkpoint to go on from, if any, with its path."""
    path = None
    overrides = [*(trial(options.trial) if options.trial else ()), *options.overrides]
    if options.compile:
        overrides += ["precision.compile=true", "teacher.compile=true"]
    if options.profile:
        overrides.append(f"log.profile={options.profile}")
    if options.config is None and options.resume in (None, AUTO):
        raise ConfigFault("--config FILE is missing; --resume PATH takes the settings of its checkpoint")
    if options.resume not in (None, AUTO):
        path = checkpoint.find(Path(options.resume))
    config = None
    if options.config is not None:
        config = settings.load(options.config, overrides, options.loss_option)
        if options.output is not None:
            config = replace(config, output=str(options.output))
        if options.resume == AUTO:
            if not config.output:
                raise ConfigFault("--resume without a path goes on in --output, which is missing")
            with contextlib.suppress(ConfigFault):
                path = checkpoint.find(Path(config.output))
    state = None if path is None else checkpoint.read(path)
    if config is None:
        assert state is not None and path is not None
        config = settings.override(state["config"], overrides, options.loss_option, str(path))
        folder = options.output or (path.parent.parent if path.parent.name == "checkpoints" else None)
        config = replace(config, output=str(folder or ""))
    return config, state, path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns one of the exit codes of ``--help``."""
    options = parser().parse_args(arguments)
    programs.make_output_printable()
    first = os.environ.get("RANK", "0") == "0"
    console = screen.console(quiet=not first)
    threads = torch.get_num_threads()
    ranks = None
    try:
        config, state, path = prepare(options)
        if config.threads is not None:
            if config.threads > programs.MOST_THREADS:
                raise ConfigFault(
                    f"threads must be at most {programs.MOST_THREADS}, four times this machine's CPUs; "
                    f"got {config.threads}"
                )
            torch.set_num_threads(config.threads)
        ranks = Ranks(config)
        with contextlib.ExitStack() as stack:
            return _run(config, state, path, options, ranks, console, stack)
    except RunFault as fault:
        return _fail(console, str(fault), fault.code)
    except programs.FolderInUse as fault:
        return _fail(console, f"{str(fault).partition(':')[0]}: choose another --output, or --resume", Exit.USAGE)
    except OSError as fault:
        return _fail(console, f"the run folder cannot be written: {fault}", Exit.OUTPUT)
    finally:
        if ranks is not None:
            ranks.close()
        torch.set_num_threads(threads)


def _run(
    config: Config, state: dict[str, Any] | None, path: Path | None, options: argparse.Namespace, ranks: Ranks,
    console: Console, stack: contextlib.ExitStack,
) -> int:  # fmt: skip
    lines = []
    checkpoint.check_ranks(ranks.gather((settings.tree(config), None if state is None else state["steps"])))
    if state is not None and path is not None:
        lines = [f"goes on from {path}, after step {state['steps']}"]
        lines += checkpoint.check_settings(state["config"], config, path)
        mixes = bool(config.augment.mixup or config.augment.cutmix)
        by_rank = config.loss.over == "rank"
        lines += checkpoint.world_size_lines(state, ranks.size, by_rank=by_rank, mixes=mixes)
    run = Run(config, ranks, state, path)  # whatever does not fit is found before a folder is made
    if state is not None:
        lines += checkpoint.image_lines(state, len(run.training_source))
    name = options.config.stem if options.config is not None else "resumed"
    folder = ranks.from_first(lambda: _folder(config, name, options.resume is not None, stack))
    record: Silent = Silent(folder)
    if ranks.first:
        record = Record(
            folder, replace(config, output=str(folder)), console, step=None if state is None else state["steps"]
        )
    code: Exit | None = None
    try:
        for line in lines:
            record.line(line, "yellow" if line != lines[0] else "")
        run.train(record, folder)
        code = Exit.OK
        if options.trial:
            _report_trial(record)
    except RunFault as fault:
        code = fault.code
        record.line(f"{'' if code == Exit.STOPPED else 'error: '}{fault}", "yellow" if code == Exit.STOPPED else "red")
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
        record.line("interrupted; --resume goes on from the last checkpoint, if there is one", "yellow")
    except OSError as fault:
        code = Exit.OUTPUT
        raise OutputFault(f"the run folder {folder} cannot be written: {fault}") from None
    except RuntimeError as fault:
        if not ranks.is_lost(fault):
            raise
        code = Exit.FAILED
        text = (
            f"error: rank {ranks.rank}: another rank has ended, or does not answer ({str(fault).splitlines()[0]}). Its "
            "own message, or torchrun's, says why; --resume goes on from the last checkpoint, if there is one"
        )
        record.line(text, "red")
        if not ranks.first:  # the first one may be the lost one
            screen.say(screen.console(), text, "red")
    finally:
        done = Exit.FAILED if code is None else code
        try:
            record.save(state=STATES.get(done, "failed"), exit=int(done))
            record.close()
        except OSError as fault:
            screen.say(console, f"error: the record of the run cannot be completed in {folder}: {fault}", "red")
            code = Exit.OUTPUT if code == Exit.OK else code
    if ranks.first:
        screen.say(console, f"written to {folder}")
    return code


def _report_trial(record: Silent) -> None:
    if isinstance(record, Record):
        row = record.steps.rows[-1]
        record.line(
            f"trial: {row['images_per_s']:.1f} images/s, the loss takes {100 * row['share_loss']:.2f} % of a step "
            f"(last {record.config.log.every} steps)"
        )


def _folder(config: Config, name: str, resumes: bool, stack: contextlib.ExitStack) -> Path:
    """The run folder, claimed for this run; one that is resumed is in use already."""
    requested = Path(config.output) if config.output else None
    if resumes and requested is not None and (requested / "results.json").exists():
        return requested
    default = ROOT / "runs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return stack.enter_context(programs.claimed(requested, default, "results.json"))


def _fail(console: Console, message: str, code: Exit) -> Exit:
    screen.say(console, f"error: {message}", "red")
    return code
