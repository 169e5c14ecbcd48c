"""Messages -> token ids. The one place where the chat template is applied, for generation and training alike.

A learnt turn is rendered twice: its prompt ends where the model starts to write; the turn is what the template writes
from there to the end-of-turn token, and nothing after it. Several learnt turns are one row where each one's prompt
continues the last one's turn; a template that rewrites history (Qwen3 takes the reasoning out of earlier turns) has no
such row. Conversations are rendered once more, as their structure with markers in place of the texts: what a template
does not write (tool calls, reasoning, a system turn) is told and never lost in silence.

Control tokens typed inside a text ("<|im_end|>" in a user's question) stay text: they go through the template as
markers, so every control token of a rendering is the template's own, and come back when the text between these is
tokenised, as plain text. Any other conversation is tokenised as one string, exactly as transformers does.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spinfast.data.conversations import Message, RowError
from spinfast.errors import UserError

log = logging.getLogger("spinfast")

Ids = tuple[int, ...]
MARKER = "q7SPINFAST"
MARK = re.compile(rf"{MARKER}(\d+)Z([a-z_]+)Z")  # stands for a part of a message where its structure is rendered
PROBES = (("user",), ("system", "user"))  # some templates take no system turn, some require one
THINK = re.compile(r"<(\w+)>\s*\Z")  # a prompt that opens the block of reasoning
READS_REASONING = re.compile(r"reasoning_content|(?:\.|\[['\"])thinking\b")
NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Rendered:
    """A prompt and its answer; `scored` says which of the answer's tokens are learnt from, None: all of them."""

    prompt_ids: Ids
    answer_ids: Ids
    scored: tuple[bool, ...] | None = None


class Renderer:
    """A tokenizer with its chat template; `template_kwargs` are extra variables, such as enable_thinking.

    `end_ids` are the model's own end tokens: they end an answer beside the template's.
    `template`, in its methods, are the variables of one row ("tools" among them), which go over `template_kwargs`.
    What a row is refused for is a RowError; a template that cannot be used at all is a UserError of the constructor.
    """

    def __init__(self, tokenizer, template_kwargs: Mapping[str, Any] | None = None, end_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self._name = f"tokenizer {tokenizer.name_or_path}"
        self._template = str(tokenizer.chat_template or "")
        self._check_template()
        self._reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._typed = [MARKER, *special]
        self._typed_pattern = re.compile("|".join(map(re.escape, self._typed)))
        self._unwritten = functools.lru_cache(maxsize=1024)(self._find_unwritten)
        self._warned: set[str] = set()
        self._warn_of_unknown(self.template_kwargs, "prompt.template")
        without = ([], "", tokenizer.eos_token, "")  # a template: a base model, which learns plain text
        self._asked, self._header, self._end, self._after = self._probe() if self._template else without
        self._gap = "\n" if self._encode("x", behind=True) != self._encode("x") else ""
        self.end_id: int = tokenizer.convert_tokens_to_ids(self._end)
        self.stop_ids: Ids = tuple(sorted({self.end_id, tokenizer.eos_token_id, *end_ids} - {None}))
        self.pad_id: int = tokenizer.pad_token_id
        if self.pad_id is None or self.pad_id in self.stop_ids:
            raise UserError(
                f"{self._name}: expected a pad token that does not end an answer, got {tokenizer.pad_token!r}; "
                "load it with spinfast.models.load_tokenizer, which chooses one"
            )

    def prompt_ids(self, messages: Sequence[Message], template: Mapping[str, Any] = NONE) -> Ids:
        """The conversation up to the point where the assistant starts to write."""
        messages, template = self._prepared(messages, template)
        self._check_written(messages, template, prompt=True)
        return self._encode(self._prompt(messages, template))

    def example_ids(
        self, messages: Sequence[Message], answer: str, template: Mapping[str, Any] = NONE
    ) -> tuple[Ids, Ids]:
        """(prompt_ids, the ids of what the template writes after it for this answer, end-of-turn token included)."""
        whole = [*messages, {"role": "assistant", "content": answer}]
        rendered = self.conversation(whole, [len(messages)], template)
        return rendered.prompt_ids, rendered.answer_ids

    def conversation(
        self, messages: Sequence[Message], learnt: Sequence[int], template: Mapping[str, Any] = NONE
    ) -> Rendered:
        """The prompt of the first of the assistant turns at `learnt`, and all from there to the end of the last.

        Scored are the learnt turns' own tokens, their end-of-turn tokens included.
        """
        messages, template = self._prepared(messages[: learnt[-1] + 1], template)
        pieces: list[tuple[Ids, Ids]] = []
        written = ""
        for position in learnt:
            self._check_written(messages[: position + 1], template, prompt=False)
            prompt, turn = self._learnt_turn(messages[: position + 1], template)
            if not prompt.startswith(written):
                raise RowError(
                    "the template rewrites history",
                    "the chat template writes an earlier assistant turn otherwise than as an answer, so no row holds "
                    "the conversation as generation meets it; learn from one turn of a conversation (data.turns: last) "
                    "or use a template that keeps its history",
                )
            pieces.append(self._encode_turn(prompt[len(written) :], turn, behind=bool(written)))
            written = prompt + turn
        (prompt_ids, first_ids), *more = pieces
        answer_ids, scored = list(first_ids), [True] * len(first_ids)
        for between_ids, turn_ids in more:
            answer_ids += between_ids + turn_ids
            scored += [False] * len(between_ids) + [True] * len(turn_ids)
        return Rendered(prompt_ids, tuple(answer_ids), tuple(scored) if more else None)

    def text_ids(self, text: str) -> Rendered:
        """Plain text without a template, control tokens taken as such and the end token appended, as TRL does.

        The prompt is the first token: nothing predicts it.
        """
        eos = self.tokenizer.eos_token or ""
        ids = self.tokenizer(text if text.endswith(eos) else text + eos).input_ids
        if len(ids) < 2:
            raise RowError("text too short", f"expected a text of two tokens or more, got {text!r}")
        return Rendered(tuple(ids[:1]), tuple(ids[1:]))

    def given_ids(self, ids: Ids, learnt: Sequence[bool]) -> Rendered:
        """Token ids as they are; the prompt is what stands before the first that is learnt, one token at the least."""
        known = len(self.tokenizer)
        if odd := [token for token in ids if not 0 <= token < known]:
            raise RowError("strange token ids", f"input_ids: {odd[0]} is none of the tokenizer's {known}")
        start = next((place for place, one in enumerate(learnt) if one and place), None)
        if start is None:
            raise RowError("nothing to learn", "expected two token ids or more, and one after the first to learn")
        scored = tuple(learnt[start:])
        return Rendered(ids[:start], ids[start:], None if all(scored) else scored)

    @property
    def has_template(self) -> bool:
        return bool(self._template)

    def has_control_tokens(self, text: str) -> bool:
        """Whether the text spells a special token."""
        return self._special.search(text) is not None

    def text(self, ids: Iterable[int]) -> str:
        """An answer's text, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # -- the template -------------------------------------------------------------------------------------------------

    def _check_template(self) -> None:
        if not self._template and not self.tokenizer.eos_token:
            raise UserError(f"{self._name}: neither a chat template nor an end token; set eos_token in its files")
        if "strftime_now" in self._template and "date_string" not in self.template_kwargs:
            raise UserError(
                f"{self._name}: the chat template writes today's date, so a run could not be resumed tomorrow; "
                'set prompt.template to {date_string: "26 Jul 2024"} (eval: --template date_string="26 Jul 2024")'
            )

    def _warn_of_unknown(self, variables: Mapping[str, Any], where: str) -> None:
        for name, value in variables.items():
            unknown = value not in ("", [], {}) and not re.search(rf"\b{re.escape(name)}\b", self._template)
            if unknown and name != "tools" and name not in self._warned:  # tools without effect are a row's fault
                self._warned.add(name)
                log.warning("%s: the chat template has no variable %r; it has no effect", where, name)

    def _probe(self) -> tuple[list[dict[str, str]], str, str, str]:
        """(turns it takes, header before an answer that prompts lack, end-of-turn token, what ends a rendering)."""
        faults = []
        for roles in PROBES:
            messages = [{"role": role, "content": MARKER + role} for role in (*roles, "assistant")]
            try:
                before, found, closing = self._render(messages, NONE, prompt=False).partition(MARKER + "assistant")
                prompt, asked = (self._render(messages[:-1], NONE, prompt) for prompt in (True, False))
            except RowError as error:
                faults.append(error)
                continue
            if not found:
                raise UserError(f"{self._name}: the chat template drops the assistant turn; use an instruct model")
            if (end := self._special.search(closing)) is None:
                raise UserError(
                    f"{self._name}: the chat template ends an answer with {closing!r}, expected a special token, or "
                    "the model cannot learn to stop; mark the end-of-turn token as special in tokenizer_config.json"
                )
            header = before.removeprefix(prompt) if prompt == asked and before.startswith(prompt) else ""
            if header.strip():
                log.warning(
                    "%s: the chat template knows no add_generation_prompt; prompts end with what it writes before an "
                    "answer, %r, and whoever serves the model must write that too",
                    *(self._name, header),
                )
            return messages[:-1], header if header.strip() else "", end.group(), closing[end.end() :]
        raise UserError(
            f"{self._name}: the chat template refuses the turns user, assistant: {_reason(faults[0].__cause__)}; "
            "use an instruct model with its own template"
        )

    def _prepared(
        self, messages: Sequence[Message], template: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
        """Messages and variables in the words that the template knows, typed control tokens as markers."""
        if not self._template:
            raise UserError(
                f"{self._name}: no chat template, which questions and answers need (plain `text` does not); use the "
                "instruct model, or put its template into chat_template.jinja beside the tokenizer"
            )
        if taken := sorted(self._reserved & template.keys()):
            raise RowError("not template variables", f"chat_template_kwargs: {taken[0]!r} is no variable of a template")
        self._warn_of_unknown(template, "chat_template_kwargs")
        return [self._prepared_message(message) for message in messages], self._hidden(template)

    def _prepared_message(self, message: Message) -> dict[str, Any]:
        message = self._hidden(message)
        if message["role"] == "developer" and "developer" not in self._template:
            message["role"] = "system"
        if reasoning := message.get("reasoning_content"):
            if READS_REASONING.search(self._template) or "</think>" not in self._template:
                message["thinking"] = reasoning
            else:
                del message["reasoning_content"]
                message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
        if calls := message.get("tool_calls"):
            message["content"] = message["content"] or None
            if self._arguments_are_text:
                message["tool_calls"] = [_with_arguments_as_text(call) for call in calls]
        return message

    @functools.cached_property
    def _arguments_are_text(self) -> bool:
        """Whether the template takes a call's arguments as JSON text only; as an object, it fails or shows Python's."""
        call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {MARKER: MARKER}}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        try:
            return f"'{MARKER}'" in self._render([*self._asked, turn], NONE, prompt=False)
        except RowError:
            turn["tool_calls"] = [_with_arguments_as_text(call)]
            try:
                return f'"{MARKER}"' in self._render([*self._asked, turn], NONE, prompt=False)
            except RowError:
                return False

    def _check_written(self, messages: Sequence[Message], template: Mapping[str, Any], prompt: bool) -> None:
        """Raises where the template drops a part of the conversation (but for the reasoning of earlier turns)."""
        last = len(messages) - 1
        marked = [_marked(message, i, learnt=i == last) for i, message in enumerate(messages)]
        tools = [_named(tool, _mark(i, "tools")) for i, tool in enumerate(template.get("tools") or [])]
        key = json.dumps([marked, {**template, "tools": tools} if tools else template], default=str)
        for number, part in self._unwritten(key, prompt):
            roles = ", ".join(message["role"] for message in messages)
            what = f"the {messages[int(number)]['role']} turn" if part == "turn" else f"the {part}"
            raise RowError(
                f"the template drops {what}",
                f"{self._name}: the chat template drops {what} of {roles}; leave such turns out or use a model whose "
                "template keeps them",
            )

    def _find_unwritten(self, key: str, prompt: bool) -> list[tuple[str, str]]:
        messages, template = json.loads(key)
        written = set(MARK.findall(self._render(messages, template, prompt)))
        return [found for found in MARK.findall(key) if found not in written]

    def _prompt(self, messages: Sequence[Message], template: Mapping[str, Any]) -> str:
        return self._render(messages, template, prompt=True) + self._header

    def _learnt_turn(self, messages: Sequence[Message], template: Mapping[str, Any]) -> tuple[str, str]:
        """(the prompt, what is written behind it) for the last of the messages, up to its end-of-turn token."""
        prompt, full = self._prompt(messages[:-1], template), self._render(messages, template, prompt=False)
        if not full.endswith(self._end + self._after):
            raise RowError(
                "the template ends the answer otherwise",
                f"the chat template ends this answer with {self._shown(full)[-40:]!r}, expected "
                f"{self._end + self._after!r}; leave such answers out",
            )
        full, content, think = full.removesuffix(self._after), messages[-1]["content"] or "", THINK.search(prompt)
        start = think.start() if think else len(prompt)  # where the turn of a template that opens no block starts
        if full.startswith(prompt) and _squashed(content) in _squashed(full[start:]):
            return prompt, full[len(prompt) :]
        if full.startswith(prompt[:start]):
            turn = _with_reasoning(content, full[start:], think and think[1])
            if turn is not None:
                return prompt, turn
        raise RowError(
            "the template does not keep the answer",
            "chat template: the conversation with its answer does not continue the prompt or lacks a part of the "
            f"answer, so the answer's tokens cannot be told apart; the prompt ends with {self._shown(prompt)[-40:]!r}, "
            f"the answered one with {self._shown(full)[-60:]!r}; take the template's control words (such as <think>) "
            "out of the answer or set prompt.template",
        )

    def _render(self, messages: Sequence[Message], template: Mapping[str, Any], prompt: bool) -> str:
        variables = {**self.template_kwargs, **template}
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **variables
            )
            text.encode("utf-8")
            return text
        except Exception as error:  # a template is somebody's program: it may raise anything
            reason = _reason(error)
            roles = [message["role"] for message in messages]
            advice = "data.bad_rows: skip leaves such conversations out"
            if "system" in roles:
                advice = "if it takes no system turn, leave prompt.system out and learn from conversations without one"
            elif "system" in reason.casefold():
                advice = "if it wants a system turn, set prompt.system"
            raise RowError(
                "the template refuses the turns",
                f"{self._name}: the chat template refuses the turns {', '.join(roles)}: {reason}; {advice}",
            ) from error

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _encode_turn(self, before: str, turn: str, behind: bool) -> tuple[Ids, Ids]:
        before_ids, ids = self._encode(before, behind), self._encode(before + turn, behind)
        if ids[: len(before_ids)] == before_ids:
            return before_ids, ids[len(before_ids) :]
        # The tokenizer merged the turn's first characters into the prompt's last; sampling never does.
        return before_ids, self._encode(turn, behind=True)

    def _encode(self, rendered: str, behind: bool = False) -> Ids:
        """Token ids of a rendering, or of a part of one that stands `behind` another."""
        if behind:
            return self._encode(self._end + rendered)[1:]
        if MARKER not in rendered:
            return tuple(self.tokenizer(rendered, add_special_tokens=False).input_ids)
        ids, position = [], 0
        for own in [*self._special.finditer(rendered), None]:
            text = self._shown(rendered[position : own.start() if own else None])
            if text:
                gap = self._gap if position else ""  # some tokenizers put a space before a text's first word
                gap_ids, text_ids = (
                    self.tokenizer(t, add_special_tokens=False, split_special_tokens=True).input_ids
                    for t in (gap, gap + text)
                )
                ids += text_ids[len(gap_ids) :]
            if own:
                ids.append(self.tokenizer.convert_tokens_to_ids(own.group()))
                position = own.end()
        return tuple(ids)

    def _hidden(self, value: Any) -> Any:
        """The value with markers in place of the control tokens in its texts."""
        if isinstance(value, str):
            return self._typed_pattern.sub(lambda found: f"{MARKER}{self._typed.index(found.group())}p", value)
        if isinstance(value, Mapping):
            return {self._hidden(key): self._hidden(inner) for key, inner in value.items()}
        return [self._hidden(inner) for inner in value] if isinstance(value, list) else value

    def _shown(self, text: str) -> str:
        return re.sub(rf"{MARKER}(\d+)p", lambda found: self._typed[int(found[1])], text)


def plain_ids(tokenizer, text: str) -> Ids:
    """Token ids of text outside a conversation, with the begin-of-text token that the tokenizer writes, written once:
    a rendered template brings its own."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tuple(tokenizer(text, add_special_tokens=not begun).input_ids)


def _with_reasoning(content: str, turn: str, opened: str | None) -> str | None:
    """The turn as generation writes it behind the prompt, or None where it lacks a part of its content.

    Templates of reasoning models leave the reasoning of a finished turn out, and prompts may have `opened` its block
    ("think") already; an answer without reasoning closes it at once.
    """
    close, opening = f"</{opened or 'think'}>", rf"\A\s*<{opened}>\s*"
    if close in turn:  # the template writes the block
        return re.sub(opening, "", turn) if opened and _squashed(content) in _squashed(turn) else None
    reasoning, closed, answer = content.rpartition(close)
    if not (closed or opened) or _squashed(answer) not in _squashed(turn):
        return None
    if not closed:
        return f"\n{close}\n\n{turn}"
    space = answer[: len(answer) - len(answer.lstrip())]
    return (re.sub(opening, "", reasoning) if opened else reasoning) + close + space + turn.lstrip()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _squashed(text: str) -> str:
    return "".join(text.split())


def _mark(number: int, part: str) -> str:
    return f"{MARKER}{number}Z{part}Z"


def _marked(message: Message, number: int, learnt: bool) -> dict[str, Any]:
    """The message's structure: marks where its texts were."""
    marked = {key: "-" if key in ("reasoning_content", "thinking") else value for key, value in message.items()}
    if message["content"]:
        marked["content"] = _mark(number, "turn")
    if learnt and "reasoning_content" in message:
        marked["reasoning_content"] = marked["thinking"] = _mark(number, "reasoning_content")
    if "tool_calls" in message:
        marked["tool_calls"] = [_marked_call(call, _mark(number, "tool_calls")) for call in message["tool_calls"]]
    return marked


def _marked_call(call: Mapping[str, Any], mark: str) -> dict[str, Any]:
    text = isinstance(call["function"]["arguments"], str)
    call = _named({**call, "function": {"arguments": {mark: mark}}}, mark)
    return _with_arguments_as_text(call) if text else call


def _named(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tool's schema, or a call, with another name."""
    if "function" in schema:
        return {**schema, "function": {**schema["function"], "name": name}}
    return {**schema, "name": name}


def _with_arguments_as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
