"""Classes of the user's own, named in a config beside the built-in variants.

A section ``{name: "module:Class", args: {...}}`` stands for ``Class(**args)``. Validating the config imports the
module, and so runs the user's own code; nothing else of the config imports anything. What is not a class, such as a
function ``(response, answer) -> bool`` as a grader, stands for itself and takes no `args`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, Field, GetCoreSchemaHandler, ValidationInfo, field_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megatron_bpdg.config.section import Section

USER_TAG = "module:Class"


class UserClass(Section):
    """A class of your own, imported from PYTHONPATH: reading the config runs its module."""

    name: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:Class; the module is imported, which runs it"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class")

    @field_validator("name")
    @classmethod
    def _is_importable(cls, name: str) -> str:
        resolve(name)
        return name

    @field_validator("args")
    @classmethod
    def _args_fit(cls, args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        if name is None:  # It has an error of its own.
            return args
        found = resolve(name)
        if not isinstance(found, type):
            if args:
                raise PydanticCustomError("user_class", "{name} is not a class: remove args", {"name": name})
            return args
        try:
            signature = inspect.signature(found)
            signature.bind(**args)
        except (TypeError, ValueError) as error:
            reason = f"do not fit {name}{signature if isinstance(error, TypeError) else ''}: {error}"
            raise PydanticCustomError("user_class", "{reason}", {"reason": reason}) from error
        return args

    def make(self) -> Any:
        """The object: an instance of the class, or what is no class itself."""
        found = resolve(self.name)
        return found(**self.args) if isinstance(found, type) else found


def resolve(name: str) -> Any:
    """What ``module:attribute`` names, imported.

    Raises:
        ValueError: the module does not import, or has no such attribute that can be called.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name)
        remedy = "is it on PYTHONPATH?" if absent else "correct the module"
        raise PydanticCustomError(
            "user_class",
            "{reason}",
            {"reason": f"cannot import {module_name!r} ({type(error).__name__}: {error}); {remedy}"},
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        reason = f"{module_name!r} has no class or function {attribute!r}; it has {', '.join(known) or 'none'}"
        raise PydanticCustomError("user_class", "{reason}", {"reason": reason})
    return found


@dataclass(frozen=True)
class ByName:
    """Annotates a union of sections: `name` says which one is meant, and a name with a colon means `UserClass`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {tag: handler.generate_schema(model) for model in get_args(source) for tag in tags(model)}
        return core_schema.tagged_union_schema(choices, discriminator=_tag)


def tags(model: type[BaseModel]) -> tuple[str, ...]:
    """The names that mean this variant."""
    return (USER_TAG,) if issubclass(model, UserClass) else get_args(model.model_fields["name"].annotation)


def _tag(value: Any) -> Any:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return USER_TAG if isinstance(name, str) and ":" in name else name
