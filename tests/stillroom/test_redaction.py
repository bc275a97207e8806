import pytest

from stillroom.redaction import known_secrets, redact


@pytest.mark.parametrize(
    ("variables", "secrets"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "/abc+def/"}, ["/abc+def/"]),
        ({"AWS_ACCESS_KEY_ID": "AKIA0123"}, ["AKIA0123"]),
        ({"PREFECT_API_AUTH_STRING": "ann:hush:hush"}, ["ann:hush:hush", "hush:hush"]),
        ({"ANY": "postgresql+asyncpg://u:p%40ssword@h/d"}, ["p%40ssword", "p@ssword"]),
        ({"http_proxy": "http://u:password@h:1"}, ["password"]),
        ({"HF_TOKEN": "short"}, []),
        ({"TOKENIZERS_PARALLELISM": "falsefalse"}, []),
        ({"AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}, []),
        ({"GOOGLE_APPLICATION_CREDENTIALS": "/etc/key.json"}, []),
    ],
)
def test_known_secrets(variables: dict[str, str], secrets: list[str]) -> None:
    assert known_secrets(variables) == secrets


def test_what_this_process_knows_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("HF_TOKEN", "hush-hush-hush")
    assert redact("tried hush-hush, then hush-hush-hush.") == "tried ***, then ***."
    assert redact("the cat sat") == "the cat sat"
