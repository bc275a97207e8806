import io
import logging
from collections.abc import Iterator

import pytest

from tasks.quiet_logs import hide_secrets_in_logs

SECRET = "planted-secret"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """A log of a process that holds a secret."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    make, handler = logging.getLogRecordFactory(), logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("quiet")
    logger.addHandler(handler)
    hide_secrets_in_logs()
    yield handler.stream
    logger.removeHandler(handler)
    logging.setLogRecordFactory(make)


def test_a_message_and_what_is_put_into_it(log: io.StringIO) -> None:
    logging.getLogger("quiet").warning("%d tries with %s", 3, SECRET)
    logging.getLogger("quiet").warning("%d tries", 4)
    assert log.getvalue() == "3 tries with ***\n4 tries\n"


def test_a_traceback_with_its_causes(log: io.StringIO) -> None:
    try:
        try:
            int(SECRET)
        except ValueError as error:
            raise RuntimeError("it failed") from error
    except RuntimeError:
        logging.getLogger("quiet").exception("ended")
    said = log.getvalue()
    assert "ValueError: invalid literal for int() with base 10: '***'" in said
    assert "RuntimeError: it failed" in said
    assert SECRET not in said


def test_it_is_done_once(log: io.StringIO) -> None:
    make = logging.getLogRecordFactory()
    hide_secrets_in_logs()
    assert logging.getLogRecordFactory() is make


def test_a_message_that_does_not_fit_what_is_put_into_it_ends_nothing(log: io.StringIO) -> None:
    for message in ("%d tries", "tries"):
        logging.getLogger("quiet").warning(message, SECRET)
    assert log.getvalue() == "%d tries\ntries\n"
