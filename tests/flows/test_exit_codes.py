import argparse

import pytest

import flows.__main__ as command_line
from stillroom.errors import SourceError


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SourceError("no such text\nfind it"), 2, "error: no such text find it\n"),
        (ZeroDivisionError("by postgresql://me:passphrase@db/x"), 3, "by postgresql://***@db/x\n"),
    ],
)
def test_what_a_user_can_mend_is_a_line_and_what_we_must_a_traceback(
    error: Exception,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(command_line, "_down", fail)
    assert command_line.main(["down"]) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.startswith("Traceback") == (code == 3)
    assert "passphrase" not in printed
