"""The file in which settings may stand, beside the environment."""

import os
from pathlib import Path
from typing import Any, get_args

from dotenv import dotenv_values
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from stillroom.errors import SettingsError

VARIABLE = "STILLROOM_SETTINGS"
OTHERS = 0o077
"""The bits of a file's mode that let group and others at it."""


class SettingsFile(PydanticBaseSettingsSource):
    """What the settings file says: NAME=value a line, # before a remark, nothing is expanded."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Refuse: the file is read as a whole."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Return the fields that the file gives.

        Raises:
            SettingsError: it is missing where one is named, says what is no setting, or holds a
                secret that others can read.
        """
        path = settings_path()
        if path is None:
            return {}
        try:
            lines = dotenv_values(path, interpolate=False)
            mode = path.stat().st_mode
        except OSError as error:
            raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
        fields = {variable_of(self.settings_cls, name): name for name in self._fields}
        for variable in lines:
            if variable not in fields:
                raise SettingsError(
                    f"{path}: {variable} is no setting; expected one of {', '.join(sorted(fields))}"
                )
        secret = [each for each in lines if lines[each] and is_secret(self._fields[fields[each]])]
        if secret and mode & OTHERS:
            raise SettingsError(
                f"{path} holds {secret[0]} and others can read it (mode {mode & 0o777:o}); "
                f"run: chmod 600 {path}"
            )
        return {
            str(self._fields[fields[variable]].validation_alias or fields[variable]): text
            for variable, text in lines.items()
            if text
        }

    @property
    def _fields(self) -> dict[str, FieldInfo]:
        return self.settings_cls.model_fields


def settings_path() -> Path | None:
    """Return the settings file: the one that is named, or settings.env in the home, if there."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    own = Path(os.environ.get("STILLROOM_HOME") or ".stillroom").expanduser() / "settings.env"
    return own.absolute() if own.exists() else None


def variable_of(settings: type[BaseSettings], field: str) -> str:
    """Return the name of the variable that sets a field."""
    alias = settings.model_fields[field].validation_alias
    return str(alias or f"{settings.model_config['env_prefix']}{field}".upper())


def is_secret(field: FieldInfo) -> bool:
    """Return whether a field holds what nobody else may read."""
    return SecretStr in get_args(field.annotation)


def refusal(error: ValidationError, settings: type[BaseSettings]) -> str:
    """Return in a line what is wrong with which settings; secrets stay hidden."""
    wrong = []
    for each in error.errors(include_url=False):
        at = str(each["loc"][0])
        known = {variable_of(settings, name): name for name in settings.model_fields}
        field = known.get(at, at)
        came = "" if is_secret(settings.model_fields[field]) else f"; {each['input']!r} came"
        said = each["msg"].removeprefix("Value error, ")
        wrong.append(f"{variable_of(settings, field)}: {said[0].lower()}{said[1:]}{came}")
    return "; ".join(wrong)
