"""Take credentials out of a text before anyone else sees it."""

import re

_LOGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_SECRET_NAME = (
    r"[\w.-]*(?:secret|passw(?:or)?d|token|signature|credential|access[_-]?key|api[_-]?key"
    r"|auth[_-]?string)[\w.-]*"
)
_SECRET_QUERY = re.compile(rf"(?P<start>[?&;]{_SECRET_NAME}=)[^&;\s'\"]*", re.IGNORECASE)
HIDDEN = "***"


def redact(text: str) -> str:
    """Return `text` with logins in addresses and secrets in their queries replaced by ***."""
    return _SECRET_QUERY.sub(rf"\g<start>{HIDDEN}", _LOGIN.sub(rf"\g<scheme>{HIDDEN}@", text))
