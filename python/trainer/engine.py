"""The training of one student: build everything from the settings, train, validate, save, stop together."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.harness import machine
from trainer import checkpoint, data, models, settings
from trainer.assembly import Parts
from trainer.cache import LogitCache
from trainer.config import Config
from trainer.faults import ConfigFault, DataFault, Diverged, OutputFault, RunFault, Stopped
from trainer.interval import Interval
from trainer.ranks import Ranks
from trainer.record import SHARES, Silent
from trainer.sources import open_sources, some
from trainer.step import Micro, Outcome
from trainer.validation import accuracy

# What the ranks agree on before a step: the largest code wins.
GO, STOP, DIVERGED, BAD_DATA, FAILED = range(5)


class Run:
    """One training. ``state`` is the checkpoint that it goes on from."""

    def __init__(self, config: Config, ranks: Ranks, state: dict[str, Any] | None = None, path: Path | None = None):
        """Everything that does not fit raises here, on every rank, before any step."""
        self.config, self.ranks, self.device = config, ranks, ranks.device
        torch.set_float32_matmul_precision(config.precision.matmul)
        self.training_source, self.validation_source = ranks.from_first(lambda: open_sources(config.data))
        self.classes = self.training_source.classes
        self.order = data.TrainingOrder(
            self.training_source, batch=config.batch, accumulate=config.accumulate, rank=ranks.rank, size=ranks.size,
            seed=config.seed,
        )  # fmt: skip
        self.mix = None
        if config.augment.mixup or config.augment.cutmix:
            self.mix = data.Mix(config, len(self.classes), self.order.micro)
        limit = config.epochs * self.order.steps
        self.total_steps = limit if config.steps is None else min(config.steps, limit)
        self.parts = Parts(config, ranks, self.classes, self.order.steps)
        self.model = self.parts.model
        self.epoch = self.steps = 0
        self.best, self.average_is_better = -1.0, self.parts.average is not None
        self.sums: dict[str, float] = {}  # of the epoch so far: means over the ranks, the same on each
        self.faults: set[str] = set()  # training images that this rank could not read
        self.validation_faults: set[str] = set()
        self.signal: int | None = None
        data.seed_all(config.seed, ranks.rank, 0)  # each rank draws its own dropout, now that all have the same models
        if state is not None:
            assert path is not None
            self._restore(state, path)

    # Checkpoints

    def state(self, step_in_epoch: int) -> dict[str, Any]:
        """Everything that a resumed run needs. Every rank calls it."""
        average = self.parts.average_model
        own = {
            "random": checkpoint.random_state(self.device),
            "buffers": checkpoint.buffers(checkpoint.unwrapped(self.model)),
            "ema_buffers": checkpoint.buffers(average),
            "sums": dict(self.sums),
        }
        scaler = None if self.parts.scaler is None else self.parts.scaler.state_dict()
        return {
            "kind": models.KIND,
            "schema": checkpoint.SCHEMA,
            "model_name": self.config.student.name,
            "classes": list(self.classes),
            "images": len(self.training_source),
            "config": settings.tree(self.config),
            "epoch": self.epoch,
            "step_in_epoch": step_in_epoch,
            "steps": self.steps,
            "best": self.best,
            "average_is_better": self.average_is_better,
            "faults": sorted(set().union(*self.ranks.gather(self.faults))),
            "model": checkpoint.model_state(self.model),
            "ema": None if average is None else checkpoint.model_state(average),
            "optimizer": checkpoint.optimizer_state(self.model, self.parts.optimizer),
            "scaler": scaler,
            "loss": self.parts.objective.state_dict(),
            "ranks": self.ranks.gather(own),
        }

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        checkpoint.check_classes(state, self.classes, path)
        checkpoint.check_images(state, len(self.training_source), path)
        try:
            checkpoint.load_model_state(self.model, state["model"])
            if self.parts.average is not None:  # of a run without one it begins at the student
                average = state["model"] if state["ema"] is None else state["ema"]
                checkpoint.load_model_state(self.parts.average.module, average)
            self.parts.load_optimizer(state["optimizer"])
            self.parts.objective.load_state_dict(state["loss"])
        except (RuntimeError, KeyError, ValueError) as fault:
            lines = str(fault).splitlines()
            raise ConfigFault(
                f"the checkpoint {path} is of another model, optimizer or loss: {' '.join(lines[:3])}"
            ) from None
        if self.parts.scaler is not None and state["scaler"] is not None:
            self.parts.scaler.load_state_dict(state["scaler"])
        self.epoch, self.order.first, self.steps = state["epoch"], state["step_in_epoch"], state["steps"]
        self.parts.scheduler.step_update(self.steps)  # the rate is a function of the step alone
        self.average_is_better = state["average_is_better"]
        self.best, self.faults = state["best"], set(state["faults"])
        same = len(state["ranks"]) == self.ranks.size
        own = state["ranks"][self.ranks.rank if same else 0]
        checkpoint.load_buffers(checkpoint.unwrapped(self.model), own["buffers"])
        checkpoint.load_buffers(self.parts.average_model, own["buffers" if state["ema"] is None else "ema_buffers"])
        if same:
            checkpoint.set_random_state(own["random"], self.device)
        else:
            data.seed_all(self.config.seed, self.ranks.rank, self.steps)
        self.sums = dict(own["sums"])

    # Training

    def train(self, record: Silent, folder: Path) -> None:
        """Train to the end. Raises a RunFault, the same one on every rank, where it ends before."""
        self.record, self.folder = record, folder
        self.checkpoints = checkpoint.Checkpoints(folder, self.config.checkpoint.keep, self.ranks)
        if later := self.checkpoints.set_aside_after(self.steps):
            record.line(f"later checkpoints are renamed abandoned-step-*.pt: {some(later)}", "yellow")
        self.cache = self._make_cache(folder)
        samples = data.Samples(self.training_source, self.config, training=True)
        batches = data.loader(samples, self.order, self.config.data, self.device)
        self.validation = None
        if self.validation_source is not None:
            order = data.ValidationOrder(
                self.validation_source, batch=max(self.order.micro, 64), rank=self.ranks.rank, size=self.ranks.size
            )
            validation = data.Samples(self.validation_source, self.config, training=False)
            self.validation = data.loader(validation, order, self.config.data, self.device)
        self._report_start()
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._on_signal)
        try:
            while self.epoch < self.config.epochs and self.steps < self.total_steps:
                self._train_epoch(batches)
        finally:
            signal.signal(signal.SIGTERM, before)
        record.line(f"done: {self.steps} steps")

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signal = number

    def _make_cache(self, folder: Path) -> LogitCache | None:
        teacher, source = self.parts.teacher, self.training_source
        if not self.config.teacher.cache or teacher is None:
            return None
        cache, is_stale = self.ranks.from_first(lambda: LogitCache.make(folder, self.config, source, teacher))
        if is_stale:
            self.record.line(
                "the kept logits are of another teacher, or of images prepared otherwise: they are computed anew",
                "yellow",
            )
        return cache

    def _report_start(self) -> None:
        config, ranks, record = self.config, self.ranks, self.record
        student = sum(x.numel() for x in self.parts.student.parameters())
        teacher = {} if self.parts.teacher is None else {"model": config.teacher.name}
        if self.parts.teacher is not None:
            teacher["parameters"] = sum(x.numel() for x in self.parts.teacher.parameters())
        kinds = f"{ranks.size} rank{'s' * (ranks.size > 1)} ({config.parallel.kind}), {self.device.type}"
        record.line(
            f"{config.teacher.name or 'no teacher'} to {config.student.name} ({student / 1e6:.2f} M parameters), "
            f"{config.loss.name}, {config.data.source}: {len(self.training_source)} images, {len(self.classes)} "
            f"classes; {kinds}"
        )
        record.line(
            f"{self.order.steps} steps an epoch of {config.batch} images, {self.total_steps} in all; "
            f"{config.optimizer.name} at rate {self.parts.rate:.6g} ({config.optimizer.scaling} scaling)"
        )
        faults = [*self.training_source.faults, *(self.validation_source.faults if self.validation_source else ())]
        if faults:
            record.line(f"left out: {some(faults)}", "yellow")
            if not self.steps and ranks.first:
                record.faults(faults)
        record.save(
            ranks=ranks.size, machine=machine.describe(self.device), config=settings.tree(config), teacher=teacher,
            student={"model": config.student.name, "parameters": student}, rate=self.parts.rate,
            steps_an_epoch=self.order.steps,
        )  # fmt: skip
        if self.parts.teacher is not None and self.validation is not None:
            top1, top5, _ = self._validate(self.parts.teacher)
            teacher |= {"accuracy": top1, "accuracy_top5": top5}
            record.line(f"teacher: {100 * top1:.2f} % of the validation images")
            if top1 < 2 / len(self.classes) and not config.teacher.allow_untrained:
                record.line(
                    "the teacher is no better than chance: are its classes those of the data, in the same order, and "
                    "its images normalized as these?", "yellow",
                )  # fmt: skip
            record.save(teacher=teacher)

    def _train_epoch(self, batches: Any) -> None:
        config, first = self.config, self.order.first
        self.order.epoch = self.epoch
        self.model.train()
        self.parts.objective.train()
        self.record.begin_epoch(self.epoch, self.order.steps, first)
        self.interval = Interval(self.parts.step)
        profiler = self._profiler() if self.epoch == 0 or first else contextlib.nullcontext()
        with profiler as profile:
            iterator = iter(batches)
            for number in range(first, self.order.steps):
                micros = self._next(iterator, number)
                self.parts.objective.set_epoch(self.epoch + number / self.order.steps)
                norms = config.loss.gradient_norms
                outcome = self.parts.step(micros, norms=bool(norms) and self.steps % norms == 0)
                self._after_step(outcome, micros, number)
                if profile is not None:
                    profile.step()
                if self.steps >= self.total_steps:
                    break
                every = config.checkpoint.every_steps
                if every and self.steps % every == 0 and number + 1 < self.order.steps:
                    self._save(number + 1)
        self._log_interval()
        self._end_epoch(number + 1)

    def _next(self, iterator: Iterator[data.Batch], number: int) -> list[Micro]:
        """The micro-batches of a step, once every rank has its own and none has a reason to stop."""
        code, text, micros = GO, "", []
        start = time.perf_counter()
        try:
            for part in range(self.config.accumulate):
                batch = next(iterator)
                self._note_faults(batch.faults, batch.fatal)
                micros.append(self._to_device(batch, number, part))
        except DataFault as fault:
            code, text = BAD_DATA, str(fault)
        except Exception as fault:  # a worker that was killed, memory: the other ranks must hear of it
            code, text = FAILED, f"the images of a step cannot be made: {type(fault).__name__}: {fault}"
        self.interval.data += time.perf_counter() - start
        if code == GO and self._is_diverged(self.device.type == "cpu"):
            code, text = DIVERGED, self.bad_loss
        if code == GO and self.signal is not None:
            code, text = STOP, "SIGTERM"
        self._agree(code, text, number)
        return micros

    def _agree(self, code: int, text: str, number: int) -> None:
        """End on every rank with the worst that any rank has to say."""
        worst = self.ranks.agree(code)
        if worst == GO:
            return
        texts = [f"rank {rank}: {each}" if self.ranks.size > 1 else each
                 for rank, (other, each) in enumerate(self.ranks.gather((code, text))) if other == worst]  # fmt: skip
        message = "; ".join(texts)
        if worst == STOP:
            path = self._save(number)
            raise Stopped(
                f"stopped by SIGTERM after step {self.steps}; {path} is saved: go on with --resume {self.folder}"
            )
        if worst == DIVERGED:
            kept = checkpoint.newest_first(self.checkpoints.folder)
            hint = f"the last checkpoint is {kept[0]}" if kept else "no checkpoint was due before it"
            raise Diverged(f"{message}; {hint}. A lower rate, a warm-up or optimizer.clip_norm may help")
        raise (DataFault if worst == BAD_DATA else RunFault)(message)

    def _to_device(self, batch: data.Batch, number: int, part: int) -> Micro:
        images, target = batch.images, batch.labels
        if self.mix is not None:
            images, target = self.mix(images, target, self.epoch, number, part, self.ranks.rank)
        cached = None
        if self.cache is not None:
            cached = self.cache.get(self.epoch, batch.indices)
        memory = torch.channels_last if self.config.precision.channels_last else torch.preserve_format
        dtype = getattr(torch, self.config.precision.dtype)
        images = images.to(self.device, non_blocking=True).to(dtype=dtype, memory_format=memory)
        # The cache holds wider numbers than autocast's: these are exact in them.
        cache_dtype = dtype if self.config.precision.amp == "none" else getattr(torch, self.config.precision.amp)
        if cached is not None:
            cached = cached.to(self.device, cache_dtype, non_blocking=True)
        micro = Micro(images=images, target=target.to(self.device, non_blocking=True), teacher=cached)
        if self.cache is not None and cached is None and self.parts.teacher is not None:
            logits = self.parts.step.ask_teacher(micro)
            assert logits is not None
            micro.teacher = self.cache.put(self.epoch, batch.indices, logits.cpu()).to(self.device, cache_dtype)
        return micro

    def _note_faults(self, names: list[str], fatal: str) -> None:
        new = [name for name in names if name not in self.faults]
        self.faults.update(new)
        self.record.faults(new)
        if fatal:
            raise DataFault(fatal)
        if new and (text := self._too_many(self.faults)):
            raise DataFault(text)

    def _too_many(self, faults: set[str]) -> str:
        """The fault that ends the run, where these are more images than the limit."""
        limit, images = self.config.data.faulty_limit, len(self.training_source)
        if len(faults) <= limit * images:
            return ""
        return (
            f"{len(faults)} images cannot be read, more than data.faulty_limit={limit:g} of {images}: "
            f"{some(sorted(faults))}"
        )

    def _after_step(self, outcome: Outcome, micros: list[Micro], number: int) -> None:
        self.steps += 1
        if self.parts.objective.queue is not None:
            teacher = torch.cat([logits for logits in outcome.teacher if logits is not None])
            target = torch.cat([micro.target for micro in micros])
            rows = [self.ranks.all_rows(x, parts=len(micros)) for x in (teacher, target)]
            self.parts.objective.enqueue(*rows)
        self.parts.scheduler.step_update(self.steps)
        if self.parts.average is not None:
            self.parts.average.update(checkpoint.unwrapped(self.model), step=self.steps)
        self.interval.add(outcome)
        self.record.advance(self.interval.text)
        if self.steps % self.config.log.every == 0:
            self._log_interval()

    bad_loss = ""

    def _is_diverged(self, read: bool) -> bool:
        """Has any loss since the last reading not been finite? Reading it waits for the GPU."""
        total = self.interval.sums.get("loss")
        if read and total is not None and not math.isfinite(float(total)):
            shown = ", ".join(f"{name} {float(value):g}" for name, value in self.interval.last.items())
            self.bad_loss = f"the loss is not finite at step {self.steps} ({shown})"
        return bool(self.bad_loss)

    def _log_interval(self) -> None:
        """A line for the steps since the last one. Every rank comes here at the same steps."""
        if not self.interval.steps:
            return
        means, seconds, wall = self.interval.read()
        # The gradient of the whole batch: that of each rank's rows, over the number of ranks.
        squares = [value**2 if name.startswith("norm_") else value for name, value in means.items()]
        totals = zip(means, self.ranks.sum_floats(squares))
        means = {
            name: (math.sqrt(total) if name.startswith("norm_") else total) / self.ranks.size for name, total in totals
        }
        if not math.isfinite(means["loss"]):
            self.bad_loss = self.bad_loss or f"the loss is not finite at step {self.steps} or just before"
        count = self.interval.steps
        for name in means:
            if not name.startswith("norm_"):
                self.sums[name] = self.sums.get(name, 0.0) + means[name] * count
        self.sums["steps"] = self.sums.get("steps", 0.0) + count
        shares = {f"share_{name}": seconds.get(name, 0.0) / wall for name in SHARES}
        row = {"step": self.steps, "epoch": self.epoch + 1, **means}
        row |= {f"weight_{name}": value for name, value in self.parts.objective.weights().items()}
        row |= {
            "rate": self.parts.optimizer.param_groups[0]["lr"],
            "images_per_s": count * self.config.batch / wall,
            **shares,
        }
        if self.parts.scaler is not None:
            row["scale"] = self.parts.scaler.get_scale()
        self.record.step(row)
        parts = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if not name.startswith("norm_"))
        self.record.line(
            f"step {self.steps}: {parts}  rate {row['rate']:.4g}  {row['images_per_s']:.1f} images/s  "
            f"loss {100 * shares['share_loss']:.1f} % of the time"
        )
        self.last_row = row
        self.interval = Interval(self.parts.step)

    def _end_epoch(self, number: int) -> None:
        """Validate and save. ``number``: steps of this epoch."""
        config = self.config
        self._agree(DIVERGED if self._is_diverged(True) else GO, self.bad_loss, number)
        whole = number >= self.order.steps
        last = self.steps >= self.total_steps or (whole and self.epoch + 1 == config.epochs)
        done = self.epoch + 1
        steps = self.sums.pop("steps", 0.0) or 1.0
        row: dict[str, Any] = {"step": self.steps, "epoch": done}
        row |= {name: value / steps for name, value in self.sums.items()}
        better = False
        if self.validation is not None and (last or done % config.validate_every == 0):
            better = self._validate_student(row)
        every = {str(fault) for each in self.ranks.gather(self.faults) for fault in each}
        self.faults |= every  # so that no other rank names them again
        row["faulty_images"] = len(every)
        self.record.epoch(row)
        if whole:
            self.epoch, self.order.first, self.sums = self.epoch + 1, 0, {}
        else:
            self.sums["steps"] = steps
        if last or better or (config.checkpoint.every_epochs and done % config.checkpoint.every_epochs == 0):
            self._save(0 if whole else number, better)
        if every:
            self.record.line(
                f"{len(every)} images could not be read: {some(sorted(every))}; faults.txt has all", "yellow"
            )
        self.record.save(epoch=done, steps=self.steps, best=self.best, last=row, speed=getattr(self, "last_row", {}),
                         faulty=len(every))  # fmt: skip
        if text := self._too_many(every):  # each rank has seen some of them
            raise DataFault(text)

    def _validate_student(self, row: dict[str, Any]) -> bool:
        """Validate the student and its average; is either better than any before?"""
        average = self.parts.average_model
        self.ranks.average_buffers(*(x for x in (checkpoint.unwrapped(self.model), average) if x is not None))
        row["accuracy"], row["accuracy_top5"], skipped = self._validate(self.model)
        top1, top5 = 100 * row["accuracy"], 100 * row["accuracy_top5"]
        text = f"epoch {self.epoch + 1}: {top1:.2f} % of the validation images, top 5 {top5:.2f} %"
        if average is not None:
            row["ema_accuracy"], row["ema_accuracy_top5"], _ = self._validate(average)
            text += f"; average {100 * row['ema_accuracy']:.2f} %"
        if skipped:
            text += f"; {skipped} images could not be read and are left out"
        self.record.line(text)
        score = max(row["accuracy"], row.get("ema_accuracy", 0.0))
        self.average_is_better = row.get("ema_accuracy", -1.0) >= row["accuracy"]
        better = score > self.best
        self.best = max(score, self.best)
        return better

    def _validate(self, model: nn.Module) -> tuple[float, float, int]:
        top1, top5, skipped, names, fatal = accuracy(
            model, self.validation, self.config, len(self.classes), self.device, self.parts.autocast
        )
        self.record.faults([name for name in names if name not in self.validation_faults])
        self.validation_faults.update(names)
        self._agree(BAD_DATA if fatal else GO, fatal, 0)
        return top1, top5, int(sum(self.ranks.gather(skipped)))

    def _save(self, step_in_epoch: int, better: bool = False) -> Path:
        """Save a checkpoint, unless the loss has stopped being finite."""
        self._agree(DIVERGED if self._is_diverged(True) else GO, self.bad_loss, step_in_epoch)
        if step_in_epoch:
            self._log_interval()  # the sums of the epoch are complete
        return self.checkpoints.save(self.state(step_in_epoch), self.steps, best=better)

    def _profiler(self) -> contextlib.AbstractContextManager:
        """torch.profiler over a few steps of the first rank, or nothing."""
        wanted = self.config.log.profile
        if not wanted or not self.ranks.first:
            return contextlib.nullcontext()
        skipped, active = profiled(wanted, min(self.order.steps - self.order.first, self.total_steps - self.steps))
        if active < wanted:
            self.record.line(f"--profile {wanted}: this epoch has no more than {active} for it", "yellow")
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")

        def write(result: Any) -> None:
            try:
                result.export_chrome_trace(str(self.folder / "trace.json"))
                key = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
                table = result.key_averages().table(sort_by=key, row_limit=25)
                (self.folder / "profile.txt").write_text(table, encoding="utf-8")
            except OSError as fault:
                raise OutputFault(f"the profile cannot be written: {fault}") from None
            steps = f"{active} step{'' if active == 1 else 's'}"
            self.record.line(f"profile.txt and trace.json are written: {steps}, after {skipped} other(s)")

        warm = min(1, skipped)
        return profile(activities=activities, on_trace_ready=write,
                       schedule=schedule(wait=skipped - warm, warmup=warm, active=active, repeat=1))  # fmt: skip


def profiled(wanted: int, steps: int) -> tuple[int, int]:
    """How many of ``steps`` go by before the profile and how many it takes: 5 and ``wanted``, or what there is."""
    skipped = min(5, max(steps - wanted, min(1, steps - 1)))  # the first step allocates and compiles
    return skipped, min(wanted, steps - skipped)
