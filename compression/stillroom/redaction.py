"""Take credentials out of a text before anyone else sees it."""

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote

_LOGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_SECRET_NAME = (
    r"[\w.-]*(?:secret|passw(?:or)?d|token|signature|credential|access[_-]?key|api[_-]?key"
    r"|auth[_-]?string)[\w.-]*"
)
_SECRET_QUERY = re.compile(rf"(?P<start>[?&;]{_SECRET_NAME}=)[^&;\s'\"]*", re.IGNORECASE)
# Of variables the last word counts: TOKENIZERS_PARALLELISM and AWS_SHARED_CREDENTIALS_FILE hold
# no secret.
_SECRET_VARIABLE = re.compile(
    r"(?:SECRET|PASSWORD|PASSWD|TOKEN|ACCESS_KEY|ACCESS_KEY_ID|API_KEY|SECRET_KEY|AUTH_STRING)$",
    re.IGNORECASE,
)
_PASSWORD = re.compile(r"://[^/\s:@]*:(?P<password>[^/\s@]+)@")
SHORTEST_SECRET = 8
"""Characters: what is shorter may be a word of any text."""
HIDDEN = "***"


def redact(text: str) -> str:
    """Return `text` without credentials: each is replaced by ***.

    They are logins in addresses, secrets in their queries, and the values of this process's own
    variables that are named as secrets, such as AWS_SECRET_ACCESS_KEY.
    """
    text = _SECRET_QUERY.sub(rf"\g<start>{HIDDEN}", _LOGIN.sub(rf"\g<scheme>{HIDDEN}@", text))
    for secret in known_secrets(os.environ):
        text = text.replace(secret, HIDDEN)
    return text


def known_secrets(variables: Mapping[str, str]) -> list[str]:
    """Return the secrets that variables hold by their names or as passwords in addresses.

    The longest come first: one may hold another.
    """
    found = set()
    for name, value in variables.items():
        if _SECRET_VARIABLE.search(name):
            # A login is a secret as a whole, and its password by itself.
            found |= {value, value.partition(":")[2]}
        for match in _PASSWORD.finditer(value):
            found |= {match["password"], unquote(match["password"])}
    return sorted((each for each in found if len(each) >= SHORTEST_SECRET), key=len, reverse=True)
