"""Messages -> token ids. The one place where the chat template is applied, for generation and training alike.

A conversation is rendered twice: the prompt ends where the model starts to write; the answer is what the template
writes from there to the end-of-turn token, and nothing after it.

Control tokens typed inside a text ("<|im_end|>" in a user's question) stay text. A rendering cannot show which
"<|im_end|>" is the template's own, so such conversations are laid over the template's skeleton, its rendering with
markers in place of the contents, and all that is not the skeleton is tokenised as plain text. Any other
conversation is tokenised as one string, exactly as transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spinfast.errors import UserError

Message = Mapping[str, str]
Ids = tuple[int, ...]
MARKER = "q7SPINFAST{}7p"
# How templates write a content: as it is, or trimmed in one of these ways.
TRIMS = (str, str.strip, str.lstrip, str.rstrip, lambda s: s.strip("\n"), lambda s: s.lstrip("\n"))


class Renderer:
    """A tokenizer with its chat template; `template_kwargs` are extra variables, such as enable_thinking."""

    def __init__(self, tokenizer, template_kwargs: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self._name = f"tokenizer {tokenizer.name_or_path}"
        self._skeletons: dict[tuple[tuple[str, ...], bool], list[str]] = {}
        self._check_template()
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        end = self._special.findall(self._answered_skeleton(("user",))[-1])[-1]
        self.end_id: int = tokenizer.convert_tokens_to_ids(end)
        self.stop_ids: Ids = tuple(sorted({self.end_id, tokenizer.eos_token_id} - {None}))
        self.pad_id: int = tokenizer.pad_token_id
        if self.pad_id is None or self.pad_id in self.stop_ids:
            raise UserError(
                f"{self._name}: expected a pad token that does not end an answer, got {tokenizer.pad_token!r}; "
                "load it with spinfast.models.load_tokenizer, which chooses one"
            )

    def prompt_ids(self, messages: Sequence[Message]) -> Ids:
        """The conversation up to the point where the assistant starts to write."""
        skeleton = self._skeleton(_roles(messages), prompt=True)
        return self._encode(self._render(messages, prompt=True), _contents(messages), skeleton)

    def answer_ids(self, messages: Sequence[Message], answer: str) -> Ids:
        """What the template writes after `prompt_ids(messages)` for this answer, end-of-turn token included."""
        return self.example_ids(messages, answer)[1]

    def example_ids(self, messages: Sequence[Message], answer: str) -> tuple[Ids, Ids]:
        """(prompt_ids, answer_ids) in one go."""
        roles, contents = _roles(messages), _contents(messages)
        prompt = self._render(messages, prompt=True)
        full = self._render([*messages, {"role": "assistant", "content": answer}], prompt=False)
        skeleton = self._answered_skeleton(roles)
        after_turn = self._skeleton((*roles, "assistant"), prompt=False)[-1].removeprefix(skeleton[-1])
        if not (full.startswith(prompt) and full.endswith(skeleton[-1] + after_turn)):
            raise UserError(
                "chat template: the conversation with its answer does not continue the prompt, so the answer's tokens "
                f"cannot be told apart; the prompt ends with {prompt[-40:]!r}, the answered one reads "
                f"{full[max(len(prompt) - 40, 0) : len(prompt) + 20]!r} there; take the template's control words "
                "(such as <think>) out of the answer or set prompt.template"
            )
        full = full[: len(full) - len(after_turn)]
        prompt_skeleton = self._skeleton(roles, prompt=True)
        prompt_ids = self._encode(prompt, contents, prompt_skeleton)
        whole_ids = self._encode(full, [*contents, answer], skeleton)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, whole_ids[len(prompt_ids) :]
        # The tokenizer merged the answer's first characters into the prompt's last; sampling never does.
        lead = skeleton[-2].removeprefix(prompt_skeleton[-1])
        return prompt_ids, self._encode(full[len(prompt) :], [answer], [lead, skeleton[-1]])

    def has_control_tokens(self, text: str) -> bool:
        """Whether the text spells a special token."""
        return self._special.search(text) is not None

    def text(self, ids: Iterable[int]) -> str:
        """An answer's text, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _check_template(self) -> None:
        template = str(self.tokenizer.chat_template or "")
        if not template:
            raise UserError(f"{self._name}: no chat template; use an instruct model or set chat_template in its files")
        if "strftime_now" in template and "date_string" not in self.template_kwargs:
            raise UserError(
                f"{self._name}: the chat template writes today's date, so a run could not be resumed tomorrow; "
                'set prompt.template to {date_string: "26 Jul 2024"}'
            )

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=prompt, **self.template_kwargs
            )
            text.encode("utf-8")
            return text
        except Exception as error:  # a template is somebody's program: it may raise anything
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._name}: the chat template refuses the turns {', '.join(_roles(messages))}: {reason}; "
                "if it takes no system turn, leave prompt.system out"
            ) from error

    def _skeleton(self, roles: tuple[str, ...], prompt: bool) -> list[str]:
        """The template's own text around the contents: one string more than there are turns."""
        if (roles, prompt) not in self._skeletons:
            messages = [{"role": role, "content": MARKER.format(i)} for i, role in enumerate(roles)]
            rest, literals = self._render(messages, prompt), []
            for message in messages:
                literal, found, rest = rest.partition(message["content"])
                if not found:
                    raise UserError(
                        f"{self._name}: the chat template drops the {message['role']} turn of "
                        f"{', '.join(roles)}; leave such turns out or use a model whose template keeps them"
                    )
                literals.append(literal)
            self._skeletons[roles, prompt] = [*literals, rest]
        return self._skeletons[roles, prompt]

    def _answered_skeleton(self, roles: tuple[str, ...]) -> list[str]:
        """The skeleton of a conversation and its answer, cut after the end-of-turn token."""
        skeleton = self._skeleton((*roles, "assistant"), prompt=False)
        end = self._special.search(skeleton[-1])
        if end is None:
            raise UserError(
                f"{self._name}: the chat template ends an answer with {skeleton[-1]!r}, expected a special token, or "
                "the model cannot learn to stop; mark the end-of-turn token as special in tokenizer_config.json"
            )
        return [*skeleton[:-1], skeleton[-1][: end.end()]]

    def _encode(self, rendered: str, contents: Sequence[str], skeleton: Sequence[str]) -> Ids:
        if not any(map(self.has_control_tokens, contents)):
            return tuple(self.tokenizer(rendered, add_special_tokens=False).input_ids)
        ids: list[int] = []
        for position, text in enumerate(self._split_at_own_tokens(rendered, contents, skeleton)):
            if position % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(text))
            elif text:
                ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return tuple(ids)

    def _split_at_own_tokens(self, rendered: str, contents: Sequence[str], skeleton: Sequence[str]) -> list[str]:
        """[text, token, text, token, ..., text] where only the template's own special tokens are tokens."""
        parts, position = [""], 0
        for content, literal in zip(["", *contents], skeleton, strict=True):
            written = next((t for trim in TRIMS if rendered.startswith((t := trim(content)) + literal, position)), None)
            if written is None:
                raise UserError(
                    f"{self._name}: a text spells a control token and the chat template rewrites it, so the two "
                    f"cannot be told apart; take the token out of {content[:60]!r}"
                )
            position += len(written) + len(literal)
            texts, tokens = self._special.split(literal), self._special.findall(literal)
            parts[-1] += written + texts[0]
            for token, text in zip(tokens, texts[1:], strict=True):
                parts += [token, text]
        return parts


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(m["role"] for m in messages)


def _contents(messages: Sequence[Message]) -> list[str]:
    return [m["content"] for m in messages]
