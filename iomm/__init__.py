"""IOMM: image-only training for unified multimodal models.

In a source checkout `iomm.kernels` and `iomm.engine` are the neighbouring folders `kernels` and
`engine`, so the root of the checkout joins this package's path if it has them. An installed wheel
contains all three.
"""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "kernels").is_dir() and (_root / "engine").is_dir() and str(_root) not in __path__:
    __path__.append(str(_root))

__version__ = "0.1.0"
