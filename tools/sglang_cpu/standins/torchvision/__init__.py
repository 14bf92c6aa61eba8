"""Import-only stand-in for torchvision, not the package: text models never call it."""

from enum import Enum
from typing import Any, ClassVar

from _import_only import ImportOnly, stand_in

__version__ = "0.28.0+standin"


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _TorchVision(ImportOnly):
    known: ClassVar[dict[str, Any]] = {"InterpolationMode": InterpolationMode}


stand_in(__name__, _TorchVision)
