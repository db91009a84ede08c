"""Examples to train on: rows become messages, messages become tokens by the model's chat template, and what is learned is marked.

Of the strategies qa and rag only the answers are learned (with the template's own end of a turn); of pretrain all of the text. The order of an
epoch follows from the seed and the epoch alone, so that a position in it is a few numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from .._errors import InvalidArgument, NotSupported
from ._sources import Row, rows
from ._yaml import Section

#: What cross entropy passes over.
IGNORED = -100

Messages = List[Dict[str, str]]
_ABSENT = object()


@dataclass(frozen=True)
class Example:
    """Tokens, and for each token whether it is learned."""

    ids: array
    learned: bytes


class Data:
    """All examples of some data sets, in memory."""

    def __init__(self, sets: Sequence[Section], tokenizer: Any, max_seq_len: int) -> None:
        self.examples: List[Example] = []
        #: Examples that were cut, and that were left out because nothing to learn was left of them.
        self.cut = self.left_out = 0
        #: The highest token id, which the model must have a row for.
        self.highest = 0
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self._pad is None:
            raise NotSupported("the tokenizer has neither a pad token nor an end token to fill batches with")
        digest = hashlib.blake2b(digest_size=16)
        for each in sets:
            before = len(self.examples)
            for example in _examples(each, tokenizer, max_seq_len):
                if example is None:
                    self.left_out += 1
                    continue
                if len(example.ids) > max_seq_len:
                    self.cut += 1
                    example = Example(example.ids[:max_seq_len], example.learned[:max_seq_len])
                    # The first token is never predicted.
                    if not any(example.learned[1:]):
                        self.left_out += 1
                        continue
                digest.update(len(example.ids).to_bytes(8, "little") + example.ids.tobytes() + example.learned)
                self.highest = max(self.highest, max(example.ids))
                self.examples.append(example)
            if len(self.examples) == before:
                raise InvalidArgument(
                    f"{each.where('data_path')}: {each.data_path} gives no example to learn from: it is empty, or no answer begins "
                    f"within max_seq_len, {max_seq_len} tokens"
                )
        #: Changes with any token, mark or the order of rows.
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.ids) for example in self.examples)

    def batch(self, indexes: Sequence[int]) -> Dict[str, torch.Tensor]:
        """Some examples, filled up on the right to the longest."""
        chosen = [self.examples[index] for index in indexes]
        longest = max(len(example.ids) for example in chosen)
        ids = torch.full((len(chosen), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros((len(chosen), longest), dtype=torch.int64)
        labels = torch.full((len(chosen), longest), IGNORED, dtype=torch.int64)
        for row, example in enumerate(chosen):
            held = len(example.ids)
            tokens = torch.tensor(example.ids, dtype=torch.int64)
            ids[row, :held] = tokens
            mask[row, :held] = 1
            learned = torch.frombuffer(bytearray(example.learned), dtype=torch.bool)
            labels[row, :held] = torch.where(learned, tokens, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Order:
    """Which examples are a batch: a permutation for each epoch, and a position in it that a small dict keeps."""

    def __init__(self, examples: int, batch_size: int, seed: int, max_iter: int = -1) -> None:
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        whole = -(-examples // batch_size)
        #: Batches of an epoch.
        self.iterations = whole if max_iter < 0 else min(whole, max_iter)
        self.epoch = 0
        #: The next batch of the epoch.
        self.iteration = 0
        self._permuted: Tuple[int, List[int]] = (-1, [])

    def take(self) -> List[int]:
        """The next batch; the position moves on, into the next epoch by ``next_epoch`` alone."""
        if self._permuted[0] != self.epoch:
            key = hashlib.blake2b(f"{self._seed}/{self.epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            self._permuted = (self.epoch, torch.randperm(self._examples, generator=generator).tolist())
        start = self.iteration * self._batch_size
        self.iteration += 1
        return self._permuted[1][start : start + self._batch_size]

    def next_epoch(self) -> None:
        self.epoch, self.iteration = self.epoch + 1, 0

    def state(self) -> Dict[str, int]:
        return {"epoch": self.epoch, "iteration": self.iteration}

    def restore(self, state: Dict[str, int]) -> None:
        self.epoch, self.iteration = state["epoch"], state["iteration"]


def _examples(found: Section, tokenizer: Any, max_seq_len: int) -> Iterator[Optional[Example]]:
    """Examples of a data set; None for one in which nothing is learned."""
    for where, row in rows(found.data_path, found.file):
        if found.strategy == "pretrain":
            yield from _text(_string(_get(row, found.text, where), where, found.text), tokenizer, max_seq_len)
        else:
            yield _conversation(_messages(found, row, where), tokenizer, where)


def _text(text: str, tokenizer: Any, max_seq_len: int) -> Iterator[Optional[Example]]:
    """Plain text with the end token, in pieces of the longest sequence; a document never shares one with another."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False):
        ids = [tokenizer.bos_token_id, *ids]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    for start in range(0, len(ids), max_seq_len):
        piece = array("i", ids[start : start + max_seq_len])
        # One token predicts nothing.
        yield Example(piece, b"\1" * len(piece)) if len(piece) > 1 else None


def _messages(found: Section, row: Row, where: str) -> Messages:
    messages: Messages = []
    if found.system_prompt:
        messages.append({"role": "system", "content": found.system_prompt})
    if found.message_key:
        given = _get(row, found.message_key, where)
        if not isinstance(given, list) or not all(isinstance(each, dict) and {"role", "content"} <= set(each) for each in given):
            raise InvalidArgument(f"{where}: {found.message_key} must be a list of messages, each with role and content")
        messages += [{"role": str(each["role"]), "content": _string(each["content"], where, found.message_key)} for each in given]
        if not any(each["role"] == "assistant" for each in messages):
            raise InvalidArgument(f"{where}: {found.message_key} has no message of the role assistant to learn from")
        return messages
    context = [_get(row, key, where) for key in found.rag_key or ()]
    turns = list(_turns(found, row, where))
    for index, (question, answer) in enumerate(turns):
        prompt = found.user_prompt or "{question}"
        if context:
            retrieved = context[index] if len(context) > 1 else context[0]
            # Both at once: what was retrieved may well speak of {question}.
            parts = [part.replace("{rag}", _joined(retrieved)) for part in prompt.split("{question}")]
            prompt = question.join(parts)
        else:
            prompt = prompt.replace("{question}", question)
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return messages


def _turns(found: Section, row: Row, where: str) -> Iterator[Tuple[str, str]]:
    """Questions and answers: of several keys, or lists below one. A conversation may be shorter than the keys allow."""
    pairs: List[Tuple[Any, Any]] = []
    many = len(found.question_key) > 1
    for question_key, answer_key in zip(found.question_key, found.answer_key):
        question = _get(row, question_key, where, absent=_ABSENT if many and pairs else None)
        answer = _get(row, answer_key, where, absent=_ABSENT if many and pairs else None)
        if isinstance(question, list) or isinstance(answer, list):
            if not isinstance(question, list) or not isinstance(answer, list) or len(question) != len(answer) or not question:
                raise InvalidArgument(f"{where}: {question_key} and {answer_key} are not lists of as many questions as answers")
            pairs += zip(question, answer)
        else:
            pairs.append((question, answer))
    if many:
        while len(pairs) > 1 and all(part is _ABSENT or part in (None, "") for part in pairs[-1]):
            pairs.pop()
    for index, (question, answer) in enumerate(pairs):
        key = found.question_key[min(index, len(found.question_key) - 1)]
        if question is _ABSENT or answer is _ABSENT:
            raise InvalidArgument(f"{where}: turn {index + 1} of the conversation has a question or an answer, not both")
        yield _string(question, where, key), _string(answer, where, found.answer_key[min(index, len(found.answer_key) - 1)])


def _get(row: Row, key: str, where: str, absent: Any = None) -> Any:
    """The value of a key; ``context.sentences`` is a key below another."""
    if key in row:
        return row[key]
    value: Any = row
    for word in key.split("."):
        if isinstance(value, list) and all(isinstance(item, dict) and word in item for item in value):
            value = [item[word] for item in value]
        elif isinstance(value, dict) and word in value:
            value = value[word]
        elif absent is not None:
            return absent
        else:
            raise InvalidArgument(f"{where}: there is no key `{key}`, it has {', '.join(map(str, row)) or 'none'}")
    return value


def _string(value: Any, where: str, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    shown = "nothing" if value is None else type(value).__name__
    raise InvalidArgument(f"{where}: `{key}` must be text, not {shown}")


def _joined(value: Any) -> str:
    """What was retrieved, a passage a line, from lists in lists."""
    if isinstance(value, (list, tuple)):
        return "\n".join(part for part in map(_joined, value) if part)
    return "" if value is None else str(value)


def _conversation(messages: Messages, tokenizer: Any, where: str) -> Optional[Example]:
    """Tokens of a conversation. What the assistant says is learned, from behind the words that make it speak to the end of its turn."""
    if not tokenizer.is_fast:
        raise NotSupported("the tokenizer cannot say which characters a token stands for (it is not a fast one): answers cannot be marked")
    text, spans = _render(messages, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = array("i", encoded["input_ids"])
    learned = bytearray(len(ids))
    at = 0
    for index, (start, end) in enumerate(encoded["offset_mapping"]):
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        if at < len(spans) and end > start >= spans[at][0]:
            learned[index] = 1
    return Example(ids, bytes(learned)) if any(learned[1:]) else None


def _render(messages: Messages, tokenizer: Any, where: str) -> Tuple[str, List[Tuple[int, int]]]:
    """The text of a conversation, and where in it the assistant speaks."""
    if not tokenizer.chat_template:
        return _plain(messages, tokenizer)

    def render(count: int, ask: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        except Exception as error:
            # Templates raise what they like, and not all have a place for a system prompt.
            raise InvalidArgument(f"{where}: the tokenizer's chat template refuses the conversation: {error}") from error

    whole, spans = render(len(messages), False), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, True), render(index + 1, False)
        if not (whole.startswith(before) and whole.startswith(after) and len(after) > len(before)):
            raise NotSupported(
                f"{where}: the tokenizer's chat template writes an answer in another way when the conversation goes on, so that it cannot be "
                "found in it; train on one turn an example"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _plain(messages: Messages, tokenizer: Any) -> Tuple[str, List[Tuple[int, int]]]:
    """Without a template: messages with an empty line between them, and the end token behind an answer."""
    text, spans = tokenizer.bos_token or "", []
    for message in messages:
        start = len(text)
        text += message["content"]
        if message["role"] == "assistant":
            text += tokenizer.eos_token or ""
            spans.append((start, len(text)))
        text += "\n\n"
    return text.rstrip("\n"), spans
