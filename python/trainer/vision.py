"""torchvision and timm for the trainer: ImageFolder, the transforms and the models need them."""

from __future__ import annotations

from trainer.torchvision_import import import_torchvision

import_torchvision()

import timm  # noqa: E402 - timm imports torchvision
import timm.optim  # noqa: E402
import timm.scheduler  # noqa: E402
import timm.utils  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from timm.data import auto_augment  # noqa: E402


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """timm's, with a black image for 0 bits, which its largest level asks for: Pillow 13 raises for them."""
    if bits_to_keep >= 8:
        return image
    return image.point(lambda value: 0) if bits_to_keep < 1 else ImageOps.posterize(image, bits_to_keep)


auto_augment.NAME_TO_OP |= {name: posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")}

__all__ = ["import_torchvision", "timm"]
