"""Instructions as tokens: in the chat template of a model or, where it has none, in Alpaca's format.

A conversation is a sequence of :class:`Piece`, of which only answers are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphprune.errors import GraphPruneError

# The format that instruction-tuned models without a template of their own were trained on.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n", "### Input:\n", "### Response:\n"
_ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, str]


@dataclass(frozen=True)
class Piece:
    """A part of a conversation; ``answers`` what is trained on, ``ends`` where the EOS token follows."""

    text: str
    answers: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Example:
    """The tokens of a conversation, and for each whether it counts in the loss."""

    tokens: list[int]
    counts: list[bool]

    def cut(self, length: int) -> Example | None:
        """At most ``length`` tokens; None when no answer is left."""
        return Example(self.tokens[:length], self.counts[:length]) if any(self.counts[:length]) else None


def encode(rows: Sequence[tuple[Any, str]], tokenizer: Any) -> list[Example | None]:
    """The examples of rows, each given with words for where it is; None of a row whose answers are all empty.

    Every turn of the assistant counts, with the token that ends it. Answers begin where the prompt ends when it is
    tokenised by itself, as it is when the model is used; where a token would reach across (a newline of the prompt with
    one of the answer), the answer is tokenised by itself too.

    Raises:
        GraphPruneError: naming the row, when it is neither of Alpaca's form nor a chat, or when the chat template
            does not write the beginning of a conversation as the beginning of what it writes of the whole.
    """
    conversations = [pieces(row, tokenizer, where) for row, where in rows]
    texts: list[str] = []
    for conversation in conversations:
        for start, end in _stretches(conversation):
            inside = conversation[start:end]
            texts.extend("".join(piece.text for piece in inside[: n + 1]) for n in range(len(inside)))
    tokens = iter(tokenise(texts, tokenizer))
    first = _begins_with(tokenizer)
    return [
        _example(conversation, tokens, first, tokenizer) if conversation else None for conversation in conversations
    ]


def pieces(row: Any, tokenizer: Any, where: str) -> list[Piece]:
    """The pieces of a row, in the chat template of the tokenizer or else in Alpaca's format; none without an answer."""
    messages = messages_of(row, where)
    if not any(message["content"].strip() for message in messages if message["role"] == "assistant"):
        return []
    if getattr(tokenizer, "chat_template", None):
        return _in_template(messages, tokenizer, where)
    return _in_alpaca_format(row if "messages" not in row else None, messages)


def messages_of(row: Any, where: str) -> list[Message]:
    """The messages of a row, up to the last of the assistant; Alpaca's instruction and input are one of the user.

    Raises :class:`GraphPruneError` naming the row and its keys.
    """
    if not isinstance(row, Mapping):
        raise GraphPruneError(f"{where} is no instruction, an object with fields, but {type(row).__name__}.")
    if "messages" in row:
        messages = [_message(message, n, where) for n, message in enumerate(_list(row["messages"], where))]
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise GraphPruneError(f"{where} has no message of the role 'assistant', so there is nothing to train on.")
        return messages[: answers[-1] + 1]
    if "instruction" not in row or "output" not in row:
        raise GraphPruneError(
            f"{where} has neither 'instruction' and 'output' nor 'messages'; it has: "
            f"{', '.join(map(str, row)) or 'none'}."
        )
    asked = _text(row["instruction"], "instruction", where)
    more = _text(row.get("input") or "", "input", where)
    asked = f"{asked}\n\n{more}" if more.strip() else asked
    answer = _text(row["output"], "output", where)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise GraphPruneError(f"{where}: 'messages' is {type(value).__name__}, not a list.")
    return value


def _message(message: Any, n: int, where: str) -> Message:
    here = f"{where}, message {n}"
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        keys = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise GraphPruneError(f"{here} has no 'role' and 'content'; it has: {keys or 'none'}.")
    if message["role"] not in _ROLES:
        raise GraphPruneError(f"{here}: the role {message['role']!r} is none of {', '.join(_ROLES)}.")
    return {"role": message["role"], "content": _text(message["content"], "content", here)}


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise GraphPruneError(f"{where}: the field {name!r} is {type(value).__name__}, not text.")
    return value.encode("utf-8", "ignore").decode()  # half a surrogate pair is no character, and tokenizers stop at it


def _in_alpaca_format(row: Mapping[str, Any] | None, messages: Sequence[Message]) -> list[Piece]:
    """One instruction; of a chat every turn of the user is one, and a system message takes the place of the header."""
    if row is not None:
        asked, more = _text(row["instruction"], "", ""), _text(row.get("input") or "", "", "")
        context = f"{INPUT}{more}\n\n" if more.strip() else ""
        prompt = f"{WITH_INPUT if context else WITHOUT_INPUT}{INSTRUCTION}{asked}\n\n{context}{RESPONSE}"
        return [Piece(prompt), Piece(messages[-1]["content"], answers=True, ends=True)]
    found: list[Piece] = []
    prompt = "" if messages[0]["role"] == "system" else WITHOUT_INPUT
    for message in messages:
        if message["role"] == "assistant":
            found += [Piece(f"{prompt}{RESPONSE}"), Piece(message["content"], answers=True, ends=True)]
            prompt = "\n\n"
        else:
            header = {"system": "", "user": INSTRUCTION, "tool": INPUT}[message["role"]]
            prompt += f"{header}{message['content']}\n\n"
    return found


def _in_template(messages: Sequence[Message], tokenizer: Any, where: str) -> list[Piece]:
    whole = _render(messages, tokenizer, where)
    found: list[Piece] = []
    done = 0
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:n], tokenizer, where, add_generation_prompt=True)
        upto = _render(messages[: n + 1], tokenizer, where)
        if not whole.startswith(upto) or not upto.startswith(prompt) or len(prompt) < done:
            raise GraphPruneError(
                f"{where}: the chat template writes the messages before message {n} in another way than within "
                "the whole conversation, so the answer cannot be told from the prompt. Give the turns as rows of their "
                "own, or a tokenizer with another chat_template (None for Alpaca's format)."
            )
        answer = _up_to_end(upto[len(prompt) :], tokenizer)
        found += [Piece(whole[done : len(prompt)]), Piece(answer, answers=True)]
        done = len(prompt) + len(answer)
    if not _stops(found[-1].text, tokenizer):
        found[-1] = Piece(found[-1].text, answers=True, ends=True)
    return found


def _render(messages: Sequence[Message], tokenizer: Any, where: str, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # templates are code, and raise what they like
        raise GraphPruneError(f"{where} does not fit the chat template: {type(error).__name__}: {error}") from error


def _up_to_end(answer: str, tokenizer: Any) -> str:
    """An answer without what a template writes behind the EOS token, such as a newline: the model has stopped there."""
    end = getattr(tokenizer, "eos_token", None) or ""
    at = answer.rfind(end) if end else -1
    return answer if at < 0 else answer[: at + len(end)]


def _stops(answer: str, tokenizer: Any) -> bool:
    """Whether there is a token in an answer that is no text: the template's own way to end a turn."""
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    return any(token in answer for token in added)


# ------------------------------------------------------------------------------------------------------------- tokens


def tokenise(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each text, without those that tokenizers put around a text.

    Raises :class:`GraphPruneError` when the tokenizer is not one like those of transformers.
    """
    if not texts:
        return []
    try:
        ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    except (TypeError, KeyError, AttributeError) as error:
        raise GraphPruneError(
            "tokenizer= turns a list of texts into {'input_ids': [[...], ...]}, as those of transformers do; "
            f"this {type(tokenizer).__name__} does not: {error!r}"
        ) from error
    return [list(one) for one in ids]


def _begins_with(tokenizer: Any) -> list[int]:
    """The BOS token, where the tokenizer puts one in front of a text and no chat template does."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None or getattr(tokenizer, "chat_template", None):
        return []
    return [begin] if list(tokenizer("", verbose=False)["input_ids"])[:1] == [begin] else []


def _stretches(conversation: Sequence[Piece]) -> list[tuple[int, int]]:
    """Pieces with no EOS token between them, which only tokens are joined at: (first, one after the last)."""
    ends = [n + 1 for n, piece in enumerate(conversation) if piece.ends or n + 1 == len(conversation)]
    return list(zip([0, *ends], ends, strict=False))


def _example(conversation: Sequence[Piece], tokens: Any, first: list[int], tokenizer: Any) -> Example:
    ids, counts = list(first), [False] * len(first)
    for start, end in _stretches(conversation):
        inside = conversation[start:end]
        before: list[int] = []
        for piece, upto in zip(inside, [next(tokens) for _ in inside], strict=True):
            apart = upto[: len(before)] != before
            new = tokenise([piece.text], tokenizer)[0] if apart else upto[len(before) :]
            ids += new
            counts += [piece.answers] * len(new)
            before = before + new if apart else upto
        end_token = getattr(tokenizer, "eos_token_id", None)
        if inside[-1].ends and end_token is not None:
            ids.append(end_token)
            counts.append(True)
    return Example(ids, counts)
