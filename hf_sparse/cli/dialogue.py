"""A dialogue in the terminal on one cache: of every turn the model reads only what is new."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import StoppingCriteria

from .running_text import RunningText

LEAVE = "/exit"
_ANSWER = "<<the answer>>"  # stands for what the model wrote, whose tokens are in the cache as they came


class Stop(StoppingCriteria):
    """Ends an answer after the token at hand once it is asked to, so that the cache stays whole."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool, device=input_ids.device)


def talk(text: RunningText) -> None:
    """Read lines and let the model answer each, until /exit or the end of the input."""
    print(f"Ctrl-C stops an answer, {LEAVE} or Ctrl-D ends.", file=sys.stderr)
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        added = new_turn(text, line)
        try:
            with stopped_by_interrupt() as stop:
                text.go_on(added, stop)
        except KeyboardInterrupt:
            text.read_again()
            print(
                "\nstopped at once: question and answer are dropped, the next turn reads the rest again",
                file=sys.stderr,
            )
        else:
            if stop.asked:
                print("stopped: the dialogue goes on with what was written", file=sys.stderr)


def new_turn(text: RunningText, line: str) -> list[int]:
    """Return the tokens that a line adds: in the tokenizer's chat template, else the line itself.

    Raises:
        ValueError: the template is of no use for a dialogue.
    """
    if not text.tokenizer.chat_template:
        return text.encode(f"\n{line}" if text.ids else line)
    question = {"role": "user", "content": line}
    if not text.ids:
        return text.encode(_render(text.tokenizer, [question]), as_written=True)
    earlier = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    _, found, turn = _render(text.tokenizer, [*earlier, question]).partition(_ANSWER)
    if not found:
        raise ValueError(
            "the chat template of this model leaves earlier answers out, so that no dialogue can go on; "
            "give one text with --prompt or --file"
        )
    return text.encode(turn, as_written=True)


@contextmanager
def stopped_by_interrupt() -> Iterator[Stop]:
    """Let the first Ctrl-C ask the answer to stop; the second raises KeyboardInterrupt."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _ask() -> str | None:
    """Return the next line, None at the end; the prompt goes to stderr, so that stdout has the answers alone."""
    print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = input()
    except EOFError:
        print(file=sys.stderr)
        return None
    return None if line.strip() == LEAVE else line


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(
            f"the chat template of this model fails ({error}); give one text with --prompt or --file"
        ) from None
