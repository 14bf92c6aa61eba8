"""Validation errors in the user's words: dotted field, given value, what would be right, the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_bpdg.config.user import USER_TAG, tags

Location = Sequence[str | int]


def explain(error: ErrorDetails, root: type[BaseModel], raw: Mapping[str, Any]) -> str:
    """One line for one pydantic error of validating `raw` as `root`."""
    path = _without_tags(error["loc"], root)
    name = ".".join(map(str, path))
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return f"{name}: required, but not given{_meaning(_field_at(root, raw, path))}"
        case "extra_forbidden":
            return f"{name}: unknown key; {_suggestion(root, raw, path)}"
        case "union_tag_invalid":
            return f"{name}.name = {context['tag']!r}: should be {_one_of(context['tag'], context['expected_tags'])}"
        case "union_tag_not_found" if isinstance(error["input"], Mapping):
            return f"{name}.name: required, but not given{_choices(_field_at(root, raw, path))}"
        case "literal_error":
            return f"{name} = {_short(error['input'])}: should be {_one_of(error['input'], context['expected'])}"
        case "model_type" | "model_attributes_type" | "dict_type" | "union_tag_not_found":
            remedy = "; remove the line for the defaults" if error["input"] is None else ""
            return f"{name} = {_short(error['input'])}: should be a section, `field: value` lines{remedy}"
        case "value_error":
            return f"{name}: {context['error']}" if name else str(context["error"])
        case _:
            return f"{name} = {_short(error['input'])}: {error['msg'].removeprefix('Input ')}"


def section_at(root: type[BaseModel], raw: Mapping[str, Any], path: Location) -> type[BaseModel] | None:
    """The model that describes ``raw[path[0]][path[1]]...``; None where there is none or `raw` leaves it open."""
    model: type[BaseModel] | None = root
    field: FieldInfo | None = None
    node: Any = raw
    for part in path:
        if str(part).isdigit() and field is not None:  # An item of the field's list.
            place = int(part)
            node = node[place] if isinstance(node, list) and place < len(node) else None
        else:
            field = model.model_fields.get(str(part)) if model else None
            node = node.get(part) if isinstance(node, Mapping) else None
        if field is None:
            return None
        model = _chosen(field, node)
    return model


def _chosen(field: FieldInfo, node: Any) -> type[BaseModel] | None:
    models = _models(field)
    if len(models) > 1 and isinstance(node, Mapping):
        name = USER_TAG if ":" in str(node.get("name")) else node.get("name")
        models = [model for model in models if name in tags(model)]
    return models[0] if len(models) == 1 else None


def _models(field: FieldInfo) -> list[type[BaseModel]]:
    """The sections that a field may hold, itself or in a list."""

    def within(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for inner in get_args(annotation):
            yield from within(inner)

    return list(dict.fromkeys(within(field.annotation)))


def _without_tags(location: Location, root: type[BaseModel]) -> list[str | int]:
    """Pydantic puts the chosen variant of a union by name into the location; the YAML has no such level."""
    path: list[str | int] = []
    models = [root]
    for part in location:
        if len(models) > 1 and not isinstance(part, int):
            models = [model for model in models if part in tags(model)]
            continue
        path.append(part)
        if not isinstance(part, int):
            field = models[0].model_fields.get(str(part)) if models else None
            models = _models(field) if field else []
    return path


def _suggestion(root: type[BaseModel], raw: Mapping[str, Any], path: Location) -> str:
    *parents, key = map(str, path)
    section = section_at(root, raw, parents)
    known = list(section.model_fields) if section else []
    here = [".".join([*parents, name]) for name in difflib.get_close_matches(key, known, n=1)]
    elsewhere = [name for name in _all_fields(root) if name.endswith(f".{key}") and name != ".".join(map(str, path))]
    if candidates := list(dict.fromkeys(here + elsewhere))[:3]:
        return f"did you mean {' or '.join(candidates)}?"
    return f"known here: {', '.join(known)}"


def _all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for child in _models(field):
            yield from _all_fields(child, f"{prefix}{name}.")


def _field_at(root: type[BaseModel], raw: Mapping[str, Any], path: Location) -> FieldInfo | None:
    section = section_at(root, raw, path[:-1])
    return section.model_fields.get(str(path[-1])) if section else None


def _meaning(field: FieldInfo | None) -> str:
    return f" ({field.description})" if field and field.description else ""


def _choices(field: FieldInfo | None) -> str:
    return f"; one of {', '.join(tag for model in _models(field) for tag in tags(model))}" if field else ""


def _one_of(given: object, expected: str) -> str:
    """`expected` is pydantic's list: 'a', 'b' or 'c'."""
    names = [name.strip(" '") for name in expected.replace(" or ", ",").split(",")]
    close = difflib.get_close_matches(str(given), names, n=1)
    return f"one of {', '.join(names)}" + (f"; did you mean {close[0]}?" if close else "")


def _short(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
