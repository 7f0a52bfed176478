"""Conversations as the model's own chat template writes them, and which of their tokens are scored.

The template's text is tokenised as it stands: what it writes is all there is, so no begin token is added to it. What
the assistant says is found by the template's generation marks where it has them, else by growing prefixes: the text up
to a user's turn, ended by the template's invitation to answer, must be the beginning of the text with the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm_sec.errors import DataError
from fedllm_sec.protocols import turns_before
from fedllm_sec.tasks.encoding import Encoded, Plain, end_token, first_beyond

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedllm_sec.recipe.sections import Data

ASKED, SAID, NEXT = "Question", "Qanswer", "Another"  # words by which a template is tried
Message = dict[str, str]
Span = tuple[int, int]  # [start, end) of tokens


@dataclass(frozen=True)
class Scored:
    """Token ids of a conversation and where the assistant speaks: [start, end) of each turn, in order."""

    ids: list[int]
    spans: list[Span]


def template_file(path: str) -> str:
    """The chat template in a file; a DataError says what is wrong with the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.chat_template: {path}: cannot be read ({error.strerror}). Give a file.") from None
    except UnicodeDecodeError:
        raise DataError(f"data.chat_template: {path}: is not UTF-8 text. Save it so.") from None
    if not text.strip():
        raise DataError(f"data.chat_template: {path}: is empty.")
    return text


class Chat:
    """How a tokenizer's chat template, or the one in `data.chat_template`, writes rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        self.tokenizer, self.loss_on = tokenizer, data.loss_on
        self.template = template_file(data.chat_template) if data.chat_template is not None else None
        own = tokenizer.chat_template
        if self.template is None and not own:
            raise DataError(
                f"data.template: chat: the tokenizer of {tokenizer.name_or_path} has no chat template. Give one as a "
                'file in data.chat_template, or write data.template out, as "{text}".'
            )
        text = self.template or str(own)
        self.marked = re.search(r"\{%[-+]?\s*generation\b", text) is not None
        self.place = f"data.chat_template: {data.chat_template}" if self.template is not None else "data.template: chat"

    # ------------------------------------------------------------ text

    def render(self, messages: Sequence[Message], invite: bool = False) -> str:
        """The template's text; with `invite` ended by what makes the assistant speak."""
        return str(self._apply(messages, tokenize=False, add_generation_prompt=invite))

    def _apply(self, messages: Sequence[Message], **settings: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=self.template, **settings)
        except Exception as error:  # a template is a program, and fails as programs do
            roles = " ".join(message["role"] for message in messages)
            begins = next((message["content"] for message in messages if message["role"] != "system"), "")[:40]
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{self.place}: the template does not render the roles {roles} ({reason}) of the "
                f"conversation that begins with {begins!r}. Bring turns into the order "
                "it wants, leave data.system out, or give another template in data.chat_template."
            ) from error

    def messages(self, row: Mapping[str, str]) -> list[Message]:
        """A row's conversation, with its answer."""
        system = row.get("system", "")
        asked = f"{row['text']}\n\n{row['context']}" if row.get("context") else row["text"]
        made = [{"role": "system", "content": system}] if system else []
        made += [{"role": role, "content": content} for role, content in turns_before(row)]
        return [*made, {"role": "user", "content": asked}, {"role": "assistant", "content": row["response"]}]

    # ------------------------------------------------------------ tokens

    def _ids(self, text: str) -> list[int]:
        """The tokens of a text as it stands."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    @cached_property
    def end(self) -> int:
        """The token that ends an answer: the template's mark behind it.

        Where nothing stands there, as in GLM's, it is the mark of the next turn; where that is none either, the
        tokenizer's end token.
        """
        asked, said, then = ({"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID},
                             {"role": "user", "content": NEXT})  # fmt: skip
        for messages in ([asked, said], [asked, said, then]):
            text = self.render(messages)
            if SAID not in text:
                raise DataError(f"{self.place}: the template does not write what the assistant says. Give another.")
            until = text.find(SAID) + len(SAID)
            ids = self._ids(text)
            behind = ids[_alike(ids, self._ids(text[:until])) :]
            if marks := [token for token in behind if token in self._marks]:
                return marks[0]
        return end_token(self.tokenizer)

    @cached_property
    def _marks(self) -> set[int]:
        added = {k for k, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return added | set(self.tokenizer.all_special_ids)

    def scored(self, messages: Sequence[Message]) -> Scored:
        """The tokens of a conversation that ends with an answer, and the assistant's turns among them.

        With `loss_on: response` all of them, else the last.
        """
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if self.loss_on != "response":
            turns = turns[-1:]
        if self.marked:
            return self._by_marks(messages, len(turns))
        whole = self.render(messages)
        ids, spans = self._ids(whole), []
        for k in turns:
            last = k == len(messages) - 1
            before, after = self.render(messages[:k], invite=True), whole if last else self.render(messages[: k + 1])
            if not whole.startswith(before):
                raise DataError(
                    f"{self.place}: with the answer {messages[k]['content'][:40]!r} the template writes what is asked "
                    f"otherwise: it invites an answer with {before[-40:]!r}, so the answer that is trained would not "
                    "be the one that is asked for. Give another template"
                    + (", or set data.loss_on: last_response." if not last else ".")
                )
            said = after.find(messages[k]["content"].strip(), len(before))
            if not last and _alike(whole, after) < said + len(messages[k]["content"].strip()):
                raise DataError(
                    f"{self.place}: with a later turn the template writes earlier ones otherwise (turn {k + 1} of "
                    f"{len(messages)}, {messages[k]['content'][:40]!r}), so the answer that is trained would not be "
                    "the one that is asked for. Set data.loss_on: last_response, or give another template."
                )
            asked = self._ids(before)
            start = _alike(ids, asked)
            if last and start < len(asked):  # a token would reach over the border: what is asked stays as it is
                ids, start = asked + self._ids(whole[len(before) :]), len(asked)
            elif start < len(asked):  # earlier turns are tokens of the whole: none of the invitation's is scored
                start = first_beyond(self.tokenizer, whole, len(before), start)
            spans.append((start, len(ids) if last else _alike(ids, self._ids(after))))
        return self._closed(ids, spans, messages)

    def _by_marks(self, messages: Sequence[Message], turns: int) -> Scored:
        """What the template marks of the last so many turns; the answer begins where the template invites it.

        Where a mark begins before that, what lies between is scored as part of the prompt.
        """
        ids, runs = self._marked_runs(messages)
        before = self.render(messages[:-1], invite=True)
        asked = self._ids(before)
        border = _alike(ids, asked)
        of_turns = self._of_turns(messages, runs)[-turns:] if runs else [[]]
        ahead, answer = _parted(of_turns[-1], border)
        if not answer:
            raise DataError(f"{self.place}: its generation marks mark nothing of the answer. Mend or remove them.")
        if len(answer) > 1:
            raise DataError(
                f"{self.place}: its generation marks cover {len(answer)} pieces of one answer "
                f"({messages[-1]['content'][:40]!r}), with text between them that would not be learnt. Let one mark "
                "cover the answer from its first word to the mark that ends it."
            )
        earlier = [run for runs in of_turns[:-1] for run in runs[:-1]] + ahead
        ends = [runs[-1] for runs in of_turns[:-1]]
        made = self._closed(ids, [*ends, *answer], messages)
        start, end = made.spans[-1]
        if border < len(asked):
            whole = self.render(messages)
            if not whole.startswith(before):
                raise DataError(
                    f"{self.place}: with the answer the template writes what is asked otherwise, so the answer that is "
                    "trained would not be the one that is asked for. Give another template."
                )
            # a token would reach over the border: what is asked stays as it is
            rest = self._ids(whole[len(before) :]) + made.ids[len(ids) :]
            behind = len(made.ids) - end  # tokens that the template writes behind the mark that ends the answer
            start, border, end = len(asked), len(asked), len(asked) + len(rest) - behind
            made = Scored(asked + rest, made.spans)
        split = [(start, border), (border, end)] if start < border < end else [(start, end)]
        return Scored(made.ids, [*sorted([*earlier, *made.spans[:-1]]), *split])

    def _marked_runs(self, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        """The tokens, and [start, end) of what the template marks of them, but for the first, for which nothing asks.

        A character of several tokens is marked whole: the libraries mark its first.
        """
        found = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, runs = list(found["input_ids"]), _runs(found["assistant_masks"])
        whole = self.tokenizer(self.render(messages), add_special_tokens=False, return_offsets_mapping=True)
        if list(whole["input_ids"]) == ids:
            places = whole["offset_mapping"]

            def end_of(run: Span) -> int:
                end = run[1]
                while end < len(ids) and places[end][0] < places[end - 1][1]:
                    end += 1
                return end

            runs = [(start, end_of((start, end))) for start, end in runs]
        return ids, [(max(1, start), end) for start, end in runs if end > 1]

    def _of_turns(self, messages: Sequence[Message], runs: Sequence[Span]) -> list[list[Span]]:
        """The marked runs of each assistant's turn; a turn may have several, or none, which is left out.

        Whose they are is seen in the same conversation with words in the users' turns that nobody says, which must be
        found again in what the template writes.
        """
        one = sum(message["role"] == "assistant" for message in messages) == 1
        if one and len(runs) == 1 and messages[0]["role"] != "system":
            return [list(runs)]
        asked = [m | {"content": f"{ASKED}{k}{NEXT}"} if m["role"] == "user" else m for k, m in enumerate(messages)]
        ids, likewise = self._marked_runs(asked)
        words = [_plain(m["content"]) for m in asked if m["role"] == "user"]
        lost = [word for word in words if word not in _plain(self.tokenizer.decode(ids))]
        if len(likewise) != len(runs) or lost:
            raise DataError(
                f"{self.place}: what its generation marks cover depends on what the user says, or it writes the user's "
                "words otherwise, so that nobody can say which turn a mark belongs to. Give another template, or take "
                "the marks out."
            )
        turns: list[list[Span]] = []
        end = 0
        for run, (start, until) in zip(runs, likewise, strict=True):
            between = _plain(self.tokenizer.decode(ids[end:start]))
            if any(word in between for word in words):
                turns.append([])
            if not turns:
                raise DataError(
                    f"{self.place}: its generation marks cover what stands before the first question, which no "
                    "assistant says. Let them cover answers alone."
                )
            turns[-1].append(run)
            end = until
        return turns

    def _closed(self, ids: list[int], spans: Sequence[Span], messages: Sequence[Message]) -> Scored:
        """With the mark that ends an answer scored as part of it, also where the template leaves it to the next."""
        made = []
        for start, end in spans:
            if end <= start:
                raise DataError(
                    f"{self.place}: the template writes no token of the answer {messages[-1]['content'][:40]!r}. Give "
                    "another, or take the row out."
                )
            if self.end not in ids[start:end] and ids[end - 1] not in self._marks:
                if end == len(ids):
                    ids = [*ids, self.end]
                end += ids[end] in self._marks  # some write another behind an earlier answer than behind the last
            made.append((start, end))
        return Scored(ids, made)

    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> Encoded:
        """Token ids of all rows, of any length; what the template writes behind a marked answer is left out."""
        prompts, answers, earlier = [], [], []
        for row in rows:
            made = self.scored(self.messages(row))
            start, end = made.spans[-1]
            prompts.append(made.ids[:start])
            answers.append(made.ids[start : None if self.loss_on == "all" else end])
            earlier.append(made.spans[:-1])
        return Encoded(prompts, answers, earlier)

    def unlike_joined(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Nothing: the text is tokenised as one, or apart where a token would reach over the border."""
        return []

    def answer_ids(self, responses: Sequence[str]) -> list[list[int]]:
        """The tokens of answers to any question, each to the end of the text."""
        asked = {"role": "user", "content": ASKED}
        made = [self.scored([asked, {"role": "assistant", "content": response}]) for response in responses]
        return [found.ids[slice(*found.spans[-1])] for found in made]


def _runs(mask: Sequence[int]) -> list[Span]:
    """[start, end) of each stretch of ones."""
    edges = [k for k, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _plain(text: str) -> str:
    """Without blanks and case, which templates and tokenizers may change."""
    return "".join(text.split()).casefold()


def _parted(runs: Sequence[Span], border: int) -> tuple[list[Span], list[Span]]:
    """The runs that end at a border or before it, and the others."""
    return [run for run in runs if run[1] <= border], [run for run in runs if run[1] > border]


def _alike(ids: Sequence[Any], others: Sequence[Any]) -> int:
    """With how many equal tokens, or characters, the two begin."""
    return next((k for k, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))


def writer_of(tokenizer: PreTrainedTokenizerBase, data: Data) -> Chat | Plain:
    """How rows are written: by the model's chat template, or by the recipe's own."""
    return Chat(tokenizer, data) if data.template == "chat" else Plain(tokenizer, data)
