"""torchvision for the tests, as the trainer imports it: timm, torchdistill and transformers import it themselves."""

import functools
import importlib.util
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
from trainer.torchvision_import import import_torchvision


@functools.cache
def install() -> None:
    """Make ``import torchvision`` work in this process, where it is installed. Call it before the frameworks."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
