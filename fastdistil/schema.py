"""The base of every section of a configuration."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Documented keys, each with its type and range; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
