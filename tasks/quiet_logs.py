"""Keep secrets out of logs, this process's own and those that Prefect's server keeps."""

import logging
from typing import Any

from stillroom.redaction import redact

_MARK = "hides_secrets"


def hide_secrets_in_logs() -> None:
    """Have what this process logs from now on, tracebacks too, go through `redact`."""
    make = logging.getLogRecordFactory()
    if hasattr(make, _MARK):
        return

    def make_clean(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):
            # A library's slip: without what does not fit, which Python would print as it is.
            record.args = None
            message = str(record.msg)
        clean = redact(message)
        if clean != message:
            record.msg, record.args = clean, None
        if record.exc_info and record.exc_info[0]:
            # A formatter takes this text where it is there, and makes it where it is not.
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return record

    setattr(make_clean, _MARK, True)
    logging.setLogRecordFactory(make_clean)
