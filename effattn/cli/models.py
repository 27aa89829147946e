"""A model and an example input from a command-line argument."""

from __future__ import annotations

import difflib
import inspect
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from effattn.cli.user_code import function_named
from effattn.errors import EffattnError

NAMES = ("smollm2",)
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


class ModelError(EffattnError):
    """The argument does not give a model."""


@dataclass(frozen=True)
class Example:
    """A model and the arguments to call it with."""

    model: Any
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load(name: str, *, length: int, batch: int, attention: str | None, mask: bool) -> Example:
    """The model called ``name``, with ``batch`` sequences of ``length`` tokens.

    Raises:
        ModelError: there is no such model, or the user's code does not make one.
    """
    if ":" in name and not os.path.exists(name):
        return _from_code(name)
    if name in NAMES:
        model, notes = _smollm2(attention), list[str]()
    else:
        model, notes = _from_transformers(name, attention)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        notes.append(f"{length} tokens are more than the {limit} that this model was made for")
    return Example(model.eval(), kwargs=_tokens(model, length, batch, mask), notes=tuple(notes))


def language_model(name: str, *, device: str, dtype: str) -> tuple[Any, Any, tuple[str, ...]]:
    """(model, tokenizer or None, notes): a causal language model by name, on a device, in evaluation mode.

    Raises:
        ModelError: there is no such model, or it has no language model head.
    """
    import torch

    kind = getattr(torch, dtype)
    if name in NAMES:
        from effattn.models import load_smollm2

        model, tokenizer = load_smollm2(kind, device)
        return model, tokenizer, ()
    model, notes = _from_transformers(name, None)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} is {type(model).__name__}, which has no language model head")
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what a missing or broken tokenizer raises depends on its kind
        tokenizer = None
        notes.append(f"{name} has no tokenizer that transformers can load ({type(error).__name__})")
    return model.to(device, kind).eval(), tokenizer, tuple(notes)


def _smollm2(attention: str | None):
    from effattn.models import load_smollm2

    model, _tokenizer = load_smollm2()
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def _from_transformers(name: str, attention: str | None) -> tuple[Any, list[str]]:
    try:
        import transformers
    except ImportError as error:
        raise ModelError("models by name need transformers: pip install 'effattn[models]'") from error
    folder = pathlib.Path(name)
    if folder.is_file():
        raise ModelError(f"{name} is a file; give its directory, or file.py:function for your own code")
    if name.startswith(("/", "./", "../", "~")) and not folder.expanduser().is_dir():
        raise ModelError(f"there is no directory {name}")
    here = folder.expanduser().is_dir()
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.7)
    if near and not here:  # do not ask the hub, which is slow to answer
        raise ModelError(f"there is no model {name!r}; did you mean {near[0]!r}?")
    options = {} if attention is None else {"attn_implementation": attention}
    place = str(folder.expanduser()) if here else name
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        kind = _auto_class(transformers, config)
        if here and not any(file.suffix in WEIGHTS for file in folder.expanduser().iterdir()):
            return kind.from_config(config, **options), [f"{name} holds no weights: random ones are used"]
        return kind.from_pretrained(place, config=config, **options), []
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(_why_not(name, here, error)) from error


def _auto_class(transformers: ModuleType, config: Any) -> Any:
    """The class with a language model head if the architecture has one, else the bare model's."""
    architectures = getattr(config, "architectures", None) or []
    decoder = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if known and (decoder or not architectures) else transformers.AutoModel


def _why_not(name: str, here: bool, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if here:
        return f"cannot load a model from the directory {name}: {reason}"
    return (
        f"cannot load {name!r}: it is no directory here, and the Hugging Face hub did not give it ({reason}) "
        f"Without a network, give a model directory, or a name that needs none: {', '.join(NAMES)}."
    )


def _tokens(model: Any, length: int, batch: int, mask: bool) -> dict[str, Any]:
    """Token ids (int64 [batch, length], deterministic) and the other arguments of the model's forward."""
    import torch

    takes = inspect.signature(model.forward).parameters
    text = model.config.get_text_config()
    ids = torch.randint(0, text.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    example: dict[str, Any] = {"input_ids": ids}
    if mask:
        example["attention_mask"] = torch.ones_like(ids)
    if getattr(model.config, "is_encoder_decoder", False):
        example["decoder_input_ids"] = ids
    if "use_cache" in takes:
        example["use_cache"] = False
    return example


def _from_code(name: str) -> Example:
    function = function_named(name)
    try:
        made = function()
    except Exception as error:
        raise ModelError(f"{name} failed: {type(error).__name__}: {error}") from error
    parts = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    model, args, kwargs = (*parts, (), {})[:3] if len(parts) == 1 else (*parts, {})[:3]
    right = (
        len(parts) in (1, 2, 3) and callable(model) and isinstance(args, (tuple, list)) and isinstance(kwargs, Mapping)
    )
    if not right:
        raise ModelError(
            f"{name} must return (model, args, kwargs): a callable, a tuple and a dict; got {_types(made)}"
        )
    return Example(model, tuple(args), dict(kwargs))


def _types(made: Any) -> str:
    if isinstance(made, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in made)})"
    return type(made).__name__
