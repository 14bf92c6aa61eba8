"""What the stand-ins beside this file share: packages of which any name can be imported and nothing can be used.

SGLang imports some packages that its CPU path never calls and whose releases need CUDA. They are not those packages:
calling into one raises NotImplementedError.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar


class ImportOnly(ModuleType):
    """A module in which every name exists: a capitalised one as an empty class, any other as another such module."""

    known: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"
        if name in self.known:
            value = self.known[name]
        elif name[0].isupper():
            # Instances are made at import time (triton.Config), so any arguments must do.
            value = type(name, (), {"__module__": self.__name__, "__init__": lambda self, *_, **__: None})
        else:
            value = sys.modules.setdefault(full_name, type(self)(full_name))
        setattr(self, name, value)
        return value

    def __call__(self, *_: Any, **__: Any) -> Any:
        package = self.__name__.partition(".")[0]
        raise NotImplementedError(f"{self.__name__}: only a stand-in for {package} is installed, which does nothing")


class _Submodules:
    """Finds every submodule of a stand-in, as a module of its kind."""

    def __init__(self, package: str, kind: type[ImportOnly]) -> None:
        self._prefix = f"{package}."
        self._kind = kind

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(self._prefix) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._kind(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in(package: str, kind: type[ImportOnly]) -> None:
    """Turn a package that is being imported into a stand-in of this kind."""
    sys.modules[package].__class__ = kind
    sys.meta_path.append(_Submodules(package, kind))  # type: ignore[arg-type]
