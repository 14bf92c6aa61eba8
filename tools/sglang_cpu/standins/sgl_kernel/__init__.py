"""Import-only stand-in for sgl_kernel, not the package: without its torch operators SGLang uses plain torch."""

from _import_only import ImportOnly, stand_in

__version__ = "0.4.10+standin"
stand_in(__name__, ImportOnly)
