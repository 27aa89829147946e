"""The layers of a language model, uncompiled or compiled under a policy."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from effattn.compiler.backend import effattn as backend
from effattn.policy import Policy
from effattn.runtime.machine import in_use


@contextmanager
def body_of(model: Any, policy: Policy | None, rest: str) -> Iterator[Callable[..., Any]]:
    """``model.base_model`` compiled under ``policy`` with dynamic shapes; uncompiled for None.

    Call it with ids int64 [1, N]. The compiled code is freed on exit.
    """
    if policy is None:
        yield model.base_model
        return
    options: Any = {"policy": policy, "rest": rest}
    compiled = torch.compile(model.base_model, backend=backend, dynamic=True, options=options)
    with torch._dynamo.config.patch(recompile_limit=64):
        yield compiled
    del compiled
    forget()


def forget() -> None:
    """Reset torch.compile and free the memory of compiled code."""
    torch._dynamo.reset()
    gc.collect()
    for device in in_use():
        device.empty_cache()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of compilers and libraries that do not concern the evaluation."""
    named = [logging.getLogger("torch._inductor"), logging.getLogger("transformers")]
    levels = [logger.level for logger in named]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no GPU here")
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo).*")
        for logger in named:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(named, levels, strict=True):
                logger.setLevel(level)
