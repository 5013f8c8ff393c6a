"""Config base class: YAML + dotted overrides -> typed, frozen; readable errors."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of every config section: frozen, no unknown keys, attribute docstrings become `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
