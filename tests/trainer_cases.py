"""Runs of the trainer for its tests: small settings, images on disk, and several processes as torchrun starts them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

# By their names alone: torchvision cannot be imported beside every build of torch (torchvision_shim.py).
_PACKAGES = ("matplotlib", "psutil", "rich", "tensorboard", "timm", "torchmetrics", "torchvision", "webdataset")
if _missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
    pytest.skip(f"not installed: {', '.join(_missing)}; the trainer is not tested", allow_module_level=True)
yaml = pytest.importorskip("yaml", reason="pyyaml is not installed: the trainer is not tested")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed: the trainer is not tested")

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT, ROOT / "python"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

SMALL = {
    "epochs": 2,
    "batch": 8,
    "device": "cpu",
    "threads": 1,
    "data": {"source": "synthetic", "classes": 4, "image_size": 8, "images": 40, "workers": 0},
    "teacher": {"name": "tiny-cnn", "allow_untrained": True},
    "student": {"name": "tiny-cnn"},
    "loss": {"name": "kd"},
    "optimizer": {"name": "sgd", "rate": 0.05},
    "log": {"every": 2, "tensorboard": False},
}


def merged(below: dict, above: dict) -> dict:
    made = dict(below)
    for key, value in above.items():
        made[key] = merged(made[key], value) if isinstance(value, dict) and isinstance(made.get(key), dict) else value
    return made


def write_config(folder: Path, **changes: object) -> Path:
    """SMALL with changes, as a file in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(merged(SMALL, changes)))
    return path


def run(config: Path, output: Path, *more: str, curves: bool = False) -> int:
    """One run in this process. Drawing curves.png takes three quarters of so small a run."""
    from trainer import program, record

    with pytest.MonkeyPatch.context() as patch:
        if not curves:
            patch.setattr(record, "plot", lambda path, own: None)
        return program.main(["--config", str(config), "--output", str(output), *more])


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def last_state(output: Path) -> dict:
    """The newest checkpoint of a run folder."""
    from trainer import checkpoint

    return checkpoint.read(checkpoint.find(output))


def image(number: int, size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    image(number).save(stream, "JPEG")
    return stream.getvalue()


def image_folder(root: Path, each: int, classes: int = 4, broken: bool = False) -> Path:
    """ROOT/CLASS/N.jpg; with ``broken`` the first class also has a cut, an empty and a foreign file."""
    for label in range(classes):
        folder = root / f"class-{label}"
        folder.mkdir(parents=True)
        for number in range(each):
            (folder / f"{number:03}.jpg").write_bytes(jpeg(1000 * label + number))
    if broken:
        first = root / "class-0"
        (first / "cut.jpg").write_bytes(jpeg(1)[:300])
        (first / "empty.jpg").write_bytes(b"")
        (first / "text.jpg").write_bytes(b"this is no image")
    return root


def shard(path: Path, numbers: range, classes: int = 4, broken: bool = False) -> Path:
    """A tar file of NUMBER.jpg and NUMBER.cls; with ``broken`` one of its images is cut."""
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            data = jpeg(number)
            if broken and number == numbers[1]:
                data = data[:200]
            for name, content in ((f"{number:06}.jpg", data), (f"{number:06}.cls", str(number % classes).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# The server imports everything once; each rank is forked from it before any gradient was taken.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["trainer_cases", "trainer.program", "torchmetrics.classification", "torch._dynamo", "distillation.data"]
)


LAST_IS_KILLED = -signal.SIGKILL  # as a signal of in_processes: the last rank alone


def in_processes(size: int, arguments: list[str], *, signal_at: tuple[int, int] | None = None) -> list[int | None]:
    """Run the program on ``size`` ranks; each sends itself a signal after a step: ``signal_at`` (step, signal)."""
    port = free_port()
    processes = [_CONTEXT.Process(target=_rank, args=(rank, size, port, arguments, signal_at)) for rank in range(size)]
    with pytest.MonkeyPatch.context() as patch:  # before Python 3.13 the server does not get this process's sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / name) for name in ("tests", "python", "")))
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, f"{len(hung)} of {size} ranks did not end"
    return [process.exitcode for process in processes]


def _rank(rank: int, size: int, port: int, arguments: list[str], signal_at: tuple[int, int] | None) -> None:
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    import torch
    from trainer import engine, program, record

    record.plot = lambda path, own: None  # as in run()
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # workers of the loader need not import everything again
    if signal_at is not None:
        after_step = engine.Run._after_step

        def interrupted(self, *rest):
            after_step(self, *rest)
            if self.steps == signal_at[0] and (signal_at[1] == signal.SIGKILL or rank == size - 1):
                os.kill(os.getpid(), abs(signal_at[1]))

        engine.Run._after_step = interrupted
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = program.main(arguments)
    sys.stderr.write(shown.getvalue() if code else "")
    sys.exit(code)
