"""What all sections of a recipe share."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_WITH_LOGIN = r"^[A-Za-z][A-Za-z0-9+.-]*://[^/]*@"


def _without_login(source: str) -> str:
    if re.match(_WITH_LOGIN, source):
        raise ValueError(
            "a source holds no login, since recipes are kept; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the like, where the work is done"
        )
    return source


Source = Annotated[
    str,
    # The server that keeps a recipe goes by its schema, and refuses one with a login.
    Field(min_length=1, json_schema_extra={"pattern": f"^(?!{_WITH_LOGIN[1:]})"}),
    AfterValidator(_without_login),
]
Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the recipe: it cannot change, and it refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
