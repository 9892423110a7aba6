"""Chats: what clients send as one, and the prompt that the model's chat template makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import orjson

from mlserver_hftasks.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
MAX_MESSAGES = 1024
_MESSAGE_KEYS = {"role", "content"}
_CONVERSATION_KEYS = {"past_user_inputs", "generated_responses", "new_user_input"}


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages, each with `role` and `content`, the oldest first."""

    messages: tuple[Message, ...]

    @property
    def continues(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        return self.messages[-1]["role"] == "assistant"

    def answered(self, text: str) -> list[Message]:
        """The messages with the model's own."""
        if self.continues:
            last = self.messages[-1]
            return [*self.messages[:-1], {"role": last["role"], "content": last["content"] + text}]
        return [*self.messages, {"role": "assistant", "content": text}]


def chats_of(values: Sequence[Any], where: str) -> list[Chat]:
    """The chats of an input: a list of messages is one chat, a list of lists several.

    A text is JSON of either. Conversations in the form of `transformers.Conversation` are chats too. Raises
    `InvalidRequest`.
    """
    values = [_from_json(value, f"{where}[{index}]") for index, value in enumerate(values)]
    if values and all(isinstance(value, Mapping) and "role" in value for value in values):
        return [_chat(values, where)]
    if len(values) == 1 and isinstance(values[0], list) and all(map(_is_chat, values[0])):
        values = values[0]
    return [_chat(value, f"{where}[{index}]") for index, value in enumerate(values)]


def is_chat(value: Any) -> bool:
    """Whether an item is a chat rather than a text."""
    return isinstance(value, Chat) or _is_chat(value)


def rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The prompt of a chat. Raises `InvalidRequest` if there is no template, or it refuses these messages.

    Templates run in a sandbox of transformers; they come with the model, never with a request.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest(f"got a chat, but the model has no chat template, expected a text @ {where}")
    try:
        text = tokenizer.apply_chat_template(
            list(chat.messages),
            tokenize=False,
            add_generation_prompt=not chat.continues,
            continue_final_message=chat.continues,
        )
    except Exception as error:  # whatever a template raises on messages that it was not made for
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRequest(
            f"the model's chat template refuses this chat ({reason:.200}), expected what it takes @ {where}"
        ) from None
    return str(text)


def contents_in(prompt: str, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]] | None:
    """Where in a rendered prompt what people wrote is, and not the template: starts and ends of contents.

    None if the template does more with contents than to trim them, or a role has the characters of the marks
    that stand for contents, so that nobody knows.
    """
    if any({"\ue000", "\ue001"} & set(each["role"]) for each in chat.messages):
        return None
    marks = [f"\ue000{index}\ue001" for index in range(len(chat.messages))]
    marked = tuple({**each, "content": mark} for each, mark in zip(chat.messages, marks, strict=True))
    try:
        pieces = re.split("\ue000([0-9]+)\ue001", rendered(Chat(marked), tokenizer, "messages"))
    except InvalidRequest:
        return None
    literals, order = pieces[::2], [int(index) for index in pieces[1::2]]
    written = [chat.messages[index]["content"] for index in order]
    for contents in (written, [content.strip() for content in written]):
        spans = _laid_out(literals, contents)
        if prompt == "".join(chain.from_iterable(zip_longest(literals, contents, fillvalue=""))):
            return spans
    return None


def _laid_out(literals: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]]:
    """Where contents are that lie between literals."""
    spans, position = [], 0
    for literal, content in zip(literals, contents, strict=False):
        start = position + len(literal)
        position = start + len(content)
        spans.append((start, position))
    return spans


def _is_chat(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(_CONVERSATION_KEYS & set(value)) or "messages" in value
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _from_json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"got a text that is no JSON ({error}), expected a list of messages @ {where}"
        ) from None


def _chat(value: Any, where: str) -> Chat:
    if isinstance(value, Chat):
        return value
    if isinstance(value, Mapping) and set(value) == {"messages"}:
        value = value["messages"]
    if isinstance(value, Mapping) and set(value) & _CONVERSATION_KEYS:
        value = _of_conversation(value, where)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidRequest(f"got {value!r:.60}, expected a list of 1..{MAX_MESSAGES} messages @ {where}")
    return Chat(tuple(_message(each, f"{where}[{index}]") for index, each in enumerate(value)))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping) or set(value) != _MESSAGE_KEYS:
        raise InvalidRequest(f"got {value!r:.60}, expected an object with role and content @ {where}")
    role, content = value["role"], _content(value["content"])
    if not isinstance(role, str) or content is None:
        raise InvalidRequest(f"got {value!r:.60}, expected texts as role and content @ {where}")
    return {"role": role, "content": content}


def _content(value: Any) -> str | None:
    """A text, also where it came as a list of parts of the type text."""
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    return value if isinstance(value, str) else None


def _of_conversation(value: Mapping[str, Any], where: str) -> list[Message]:
    """`transformers.Conversation` as JSON: past inputs and responses take turns, then comes the new input."""
    asked, told = value.get("past_user_inputs") or [], value.get("generated_responses") or []
    new = value.get("new_user_input")
    if not isinstance(asked, list) or not isinstance(told, list) or len(asked) < len(told):
        raise InvalidRequest(
            f"got {len(told)} responses to {len(asked)} inputs, expected lists that take turns @ {where}"
        )
    messages: list[Message] = []
    for index, text in enumerate(asked):
        messages.append({"role": "user", "content": text})
        messages += [{"role": "assistant", "content": text} for text in told[index : index + 1]]
    return messages if new is None else [*messages, {"role": "user", "content": new}]
