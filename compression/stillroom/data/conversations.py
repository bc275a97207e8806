"""Conversations through the tokenizer's chat template, with the prompt masked from the loss."""

from collections.abc import Sequence
from typing import Any

from stillroom.data.documents import Document, Message
from stillroom.errors import DataError

NO_LOSS = -100
Encoded = tuple[list[int], list[int]]


def encode_conversation(document: Document, tokenizer: Any) -> Encoded:
    """Return (token ids, labels): labels are -100 but for the tokens of the assistant's turns.

    The template is rendered up to each assistant turn and after it; what lies between is the turn,
    with the mark that ends it. An assistant turn that opens the conversation is context, and a
    token that reaches over the edge of a turn has no loss. The end-of-text token follows unless
    the last of them holds it already; it is learned only where the assistant spoke last.

    Raises:
        DataError: there is no template, it refuses the conversation, it rewrites earlier turns
            when later ones come, or nobody answers.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"a tokenizer with a chat template expected for the conversation {document.title}: "
            "this one has none; use an instruction-tuned model, or plain text"
        )
    text, spans = _render_turns(document, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    labels = [
        token if _inside(start, end, spans) else NO_LOSS
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    last_turn = [
        token
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        if _inside(start, end, spans[-1:])
    ]
    if tokenizer.eos_token_id not in last_turn:
        ids.append(tokenizer.eos_token_id)
        answered = document.messages[-1]["role"] == "assistant"
        labels.append(tokenizer.eos_token_id if answered else NO_LOSS)
    return ids, labels


def _render_turns(document: Document, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    messages = document.messages
    turns = [i for i, m in enumerate(messages) if i > 0 and m["role"] == "assistant"]
    if not turns:
        raise DataError(
            f"an answer with the role 'assistant' expected in the conversation {document.title}: "
            f"its roles are {', '.join(m['role'] for m in messages)}"
        )
    whole = render(document, messages, tokenizer)
    spans = []
    for turn in turns:
        before = render(document, messages[:turn], tokenizer, prompt=True)
        after = render(document, messages[: turn + 1], tokenizer)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                "a chat template that leaves earlier turns as they are expected: this tokenizer's "
                f"rewrites them in the conversation {document.title} (message {turn}), so that "
                "the prompt cannot be told from the answer; use another template"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def render(
    document: Document, messages: Sequence[Message], tokenizer: Any, *, prompt: bool = False
) -> str:
    """Return messages of `document` in the chat template's words, `prompt`: up to an answer.

    Raises:
        DataError: the template refuses them.
    """
    from jinja2.exceptions import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses the conversation {document.title}: {error}"
        ) from error
    return str(rendered)


def _inside(start: int, end: int, spans: list[tuple[int, int]]) -> bool:
    return end > start and any(low <= start and end <= high for low, high in spans)
