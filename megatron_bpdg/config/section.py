"""The base of all sections."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of the fields that do not have their default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
