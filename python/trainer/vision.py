"""torchvision and timm for the trainer: ImageFolder, the transforms and the models need them."""

from __future__ import annotations

from trainer.torchvision_import import import_torchvision

import_torchvision()

import timm  # noqa: E402 - timm imports torchvision
import timm.optim  # noqa: E402
import timm.scheduler  # noqa: E402
import timm.utils  # noqa: E402

__all__ = ["import_torchvision", "timm"]
