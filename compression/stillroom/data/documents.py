"""What a text is before it becomes tokens."""

import json
import re
import unicodedata
from dataclasses import dataclass
from hashlib import blake2b

Message = dict[str, str]


@dataclass(frozen=True)
class Document:
    """One text, or one conversation of messages with `role` and `content`.

    Documents of one `family` (a sentence and its phrases, a topic, a module) never stand on both
    sides of a split. Without a family a document is its own.
    """

    text: str = ""
    messages: tuple[Message, ...] = ()
    label: str | None = None
    name: str = ""
    family: str = ""

    @property
    def content(self) -> str:
        """Return the text, or what everybody but the system says in the conversation.

        The system's message is often the same in all conversations: it is no sign of a leak.
        """
        if not self.messages:
            return self.text
        return "\n\n".join(m["content"] for m in self.messages if m["role"] != "system")

    @property
    def group(self) -> str:
        """Return the family, or a name made of the content where there is none."""
        if self.family:
            return self.family
        whole = json.dumps([self.text, self.messages], ensure_ascii=False, sort_keys=True)
        return "content:" + blake2b(whole.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @property
    def title(self) -> str:
        """Return a short name for messages to the user."""
        return self.name or repr(self.content[:40])


def normalise(text: str) -> str:
    """Return the text with NFC characters, single spaces and folded case."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().casefold()


def paragraphs(text: str) -> list[str]:
    """Return the blocks of lines that stand between blank lines."""
    return [block for block in re.split(r"\n[^\S\n]*\n+", text) if block.strip()]


def number_groups(documents: list[Document]) -> list[int]:
    """Return one number a document: families numbered from 0 in order of appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(document.group, len(numbers)) for document in documents]
