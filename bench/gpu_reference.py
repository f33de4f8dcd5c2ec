"""Tokens of a run against Transformers' own model on the same card, with the same weights, run eagerly (SDPA).

The reference is given the prompt and our answer, and says at each place how far our token is behind its greatest
logit. **Tie rule**: bfloat16 logits near m are 2^(floor(log2 m) - 7) apart. A token counts as the reference's if its
logit is at most `TIE` such steps below the greatest: the two sum in different orders, layer after layer, and cannot
tell such tokens apart. Of logits with a standard deviation of one, as here, most tokens are 100 steps behind and more.
"""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch

TIE = 16.0


@dataclass(frozen=True)
class Verdict:
    """Of ``tokens`` looked at, ``equal`` are the reference's first choice; ``worst``: most steps that one is behind."""

    tokens: int
    equal: int
    worst: float

    @property
    def passed(self) -> bool:
        return self.worst <= TIE

    def __str__(self) -> str:
        return f"{self.equal}/{self.tokens} equal, worst {self.worst:.1f} steps {'ok' if self.passed else 'FAILED'}"


@torch.inference_mode()
def judge(model: Any, prompt: list[int], answer: list[int]) -> Verdict:
    """Of one request, by a causal language model of Transformers."""
    ids = torch.tensor([prompt + answer], device=model.device)
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[0, len(prompt) - 1 :]
    logits = model.lm_head(hidden).float()
    own = logits.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    top = logits.amax(-1)
    steps = [
        (most - value) / 2.0 ** (math.floor(math.log2(abs(most))) - 7)
        for most, value in zip(top.tolist(), own.tolist(), strict=True)
    ]
    return Verdict(len(answer), int((own == top).sum()), max(steps))


class Reference:
    """Transformers' model of ``config`` with the dummy weights of the engine's ``model``."""

    def __init__(self, config: dict[str, Any], model: Any, impl: str) -> None:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        ours = copy.deepcopy(config)
        hf = CONFIG_MAPPING[ours.pop("model_type")].from_dict(ours)
        parameter = next(model.parameters())
        with parameter.device:
            made = AutoModelForCausalLM.from_config(hf, dtype=parameter.dtype, attn_implementation="sdpa")
        self._model = made.eval()
        if impl == "native":
            state = _native_weights(model)
            missing, unexpected = self._model.load_state_dict(state, strict=False, assign=True)
            assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
            self._model.tie_weights()
        else:
            _as_the_backend_fills(self._model)

    def judge(self, prompt: list[int], answer: list[int]) -> Verdict:
        """Of one request."""
        return judge(self._model, prompt, answer)


def _native_weights(model: Any) -> dict[str, torch.Tensor]:
    """The model's parameters under the checkpoint's names, in the same memory."""
    from octavo.layers.base import Layer

    state = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Layer):
            for rule in layer.load_rules(name):
                whole = layer.get_parameter(rule.parameter)
                state[rule.source] = whole[rule.start : rule.start + rule.rows]
    return state


@torch.no_grad()
def _as_the_backend_fills(model: Any) -> None:
    """As `models.hf.backend` makes dummy weights, for seed 0."""
    generator = torch.Generator(next(model.parameters()).device)
    for name, parameter in model.named_parameters():
        generator.manual_seed(zlib.crc32(name.encode()))
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


def joined(verdicts: list[Verdict]) -> Verdict:
    """Of several requests."""
    return Verdict(sum(v.tokens for v in verdicts), sum(v.equal for v in verdicts), max(v.worst for v in verdicts))
