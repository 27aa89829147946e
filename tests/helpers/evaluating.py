"""A random Llama that takes milliseconds, and a tokenizer of single characters for it."""

from __future__ import annotations

import architectures
import torch
from transformers import LlamaForCausalLM

from effattn.evaluate.show.progress import Silent
from effattn.policy import Policy

CONTEXT = 1024
POWER = {"block": 16, "window": 32, "sinks": 16}
WINDOW = {"window": 37, "sinks": 5}


def llama(layers: int = 2) -> LlamaForCausalLM:
    return architectures.llama(num_hidden_layers=layers, max_position_embeddings=CONTEXT, pad_token_id=None)


def policy(form: str, name: str | None = None, **params) -> Policy:
    """One form everywhere."""
    return Policy.of({"schema": 1, "name": name or form, "rule": [{"forms": [form], "params": {form: params}}]})


def ids(length: int = 512) -> torch.Tensor:
    return torch.randint(3, 99, (1, length), generator=torch.Generator().manual_seed(1))


class Characters:
    """As much of a tokenizer as is asked for: every printable character is a token."""

    chat_template = None
    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        found = [min(max(ord(char) - 29, 3), 98) for char in text]
        return {"input_ids": [self.bos_token_id, *found] if add_special_tokens else found}

    def decode(self, found, skip_special_tokens: bool = False) -> str:
        return "".join(chr(token + 29) for token in found if token > 2)


class Heard(Silent):
    """Remembers what was said."""

    def __init__(self):
        self.said: list[str] = []
        self.worked: list[str] = []
        self.total = self.finished = 0.0

    def say(self, text: str) -> None:
        self.said.append(text)

    def work(self, text: str) -> None:
        self.worked.append(text)

    def begin(self, seconds: float) -> None:
        self.total = seconds

    def done(self, seconds: float) -> None:
        self.finished += seconds
