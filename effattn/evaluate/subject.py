"""The model under evaluation: a causal language model, its tokenizer, and facts that identify its results."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from effattn.compiler.report.model import versions
from effattn.errors import EvaluationError
from effattn.evaluate.rope import context_of
from effattn.evaluate.setting import Setting
from effattn.evaluate.tasks.perplexity import logits_of
from effattn.lowering.device import device_type
from effattn.runtime.machine import name_of
from effattn.versions import cache_argument

SAMPLE = 256  # values of each weight in the model's fingerprint


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and its tokenizer if it has one."""

    model: Any
    tokenizer: Any
    name: str

    @staticmethod
    def of(model: Any, tokenizer: Any, name: str | None) -> Subject:
        """Raises EvaluationError if it is not a transformers causal language model."""
        if not hasattr(model, "base_model") or not hasattr(model, "config"):
            raise EvaluationError(f"{type(model).__name__} is no causal language model of transformers")
        if model.get_output_embeddings() is None or getattr(model.config, "is_encoder_decoder", False):
            raise EvaluationError(
                f"{type(model).__name__} is no causal language model (it has no head over its vocabulary, or an "
                "encoder); take the class of this architecture that ends with ForCausalLM"
            )
        return Subject(model, tokenizer, name or getattr(model.config, "name_or_path", "") or type(model).__name__)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

    @property
    def cache(self) -> str:
        """The name of the layers' argument for the key/value cache."""
        return cache_argument(self.model.base_model.forward)

    def check(self, setting: Setting) -> None:
        """Check that a setting works with this model, before anything runs.

        Raises:
            EvaluationError: a length is beyond the context, a task needs a tokenizer, or a rule names a class that is
                not compiled.
            PolicyError: a rule names a layer that the model does not have.
        """
        limit = context_of(self.model, setting.rope)
        longest = max(setting.lengths)
        if limit is not None and longest > limit:
            plain = context_of(self.model) or limit
            factor = -(-longest // plain)
            raise EvaluationError(
                f"{longest:,} tokens are more than the {limit:,} that {self.name} was made for; ask for shorter texts, "
                f"or scale its positions: rope_scaling='yarn:{factor}' (--rope-scaling yarn:{factor})"
            )
        if "passkey" in setting.tasks and self.tokenizer is None:
            raise EvaluationError("the task passkey needs a tokenizer, and this model comes without one")
        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        inside = {type(module).__name__ for module in self.model.base_model.modules()}
        for policy in setting.policies:
            if layers is not None:
                policy.check_layers(layers, inside)
            for index, rule in enumerate(policy.rules):
                if rule.matches_model([type(self.model).__name__]) and not rule.matches_model(inside):
                    raise EvaluationError(
                        f"policy {policy.name!r}, rule[{index}]: model = {list(rule.model)} names the class with the "
                        f"head; evaluate runs the layers without it, so name {type(self.model.base_model).__name__}"
                    )

    def check_head(self, ids: Tensor) -> None:
        """Check that hidden states and head give the model's own logits, which perplexity relies on.

        Raises:
            EvaluationError: the model changes its logits in another way.
        """
        own = self.model(ids, use_cache=False).logits.float()
        states = self.model.base_model(ids, use_cache=False).last_hidden_state
        if torch.linalg.vector_norm(logits_of(self.model, states) - own) > 0.02 * torch.linalg.vector_norm(own):
            raise EvaluationError(
                f"{type(self.model).__name__} changes its logits after its head (scales them?), so that a perplexity "
                "from its hidden states would be wrong; leave the task perplexity out"
            )

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Name, class, size, dtype and a fingerprint of the weights."""
        digest = hashlib.sha256()
        for name, weight in self.model.named_parameters():
            sample = weight.detach().flatten()[:SAMPLE].double().cpu().numpy()
            digest.update(f"{name} {list(weight.shape)}".encode() + sample.tobytes())
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "context": context_of(self.model),
            "weights": digest.hexdigest()[:16],
        }

    def machine(self) -> dict[str, Any]:
        """Device and versions."""
        if not device_type(self.device.type).on_host:
            device = name_of(self.device)
        else:
            device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        return {"device": device, "versions": versions()}
