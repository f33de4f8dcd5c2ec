"""What a Transformers model asks of attention, found by running it once without memory.

The run uses an entry of our own in Transformers' registries of attention functions and of masks. The mask entry
evaluates the mask's own rule at a few points, so a sliding window is what the model's mask says, not what a keyword or
the config says (OLMoE passes a window on that its masks ignore). The attention entry takes down shapes and keywords.
What the engine could not compute as the model does is a `NotPaged`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from octavo.errors import UnsupportedModel
from octavo.models.hf.attention import AttentionShape

NAME = "octavo-trace"
TOKENS = 6  # of the run: no size of a model

# Keywords of attention calls that change nothing here: no dropout in inference, causality and windows are in the masks,
# and the rest is about caches and outputs that this engine does not ask for.
_NEUTRAL = frozenset(
    (
        *("dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "past_key_values", "use_cache"),
        *("output_attentions", "output_hidden_states", "return_dict", "layer_idx", "deterministic", "training"),
        *("target_dtype", "position_embeddings", "softmax_scale", "output_router_logits", "token_type_ids"),
        *("max_seqlen_q", "max_seqlen_k", "num_items_in_batch", "layer_type", "logits_to_keep"),
    )
)
_HANDLED = frozenset(("scaling", "softcap", "s_aux"))


class NotPaged(Exception):
    """Why a model cannot run over pages, as a clause. `models.hf.generic` may still run it, with its own cache."""


class Recorder:
    """The two registry entries of one run; `calls` has the attention modules in the order they ran."""

    def __init__(self, max_len: int) -> None:
        self.calls: list[tuple[nn.Module, AttentionShape]] = []
        self._max_len = max_len
        # By id of the tensor, which is kept alive: the window, or why the mask cannot be had.
        self._masks: dict[int, tuple[torch.Tensor, int | Exception | None]] = {}

    def mask(self, **arguments: Any) -> torch.Tensor:
        """As Transformers' mask functions: called with the mask's rule, returns what reaches attention.

        Some decoders make masks for layers that they do not have here, so only a mask that is used may be at fault.
        """
        window: int | Exception | None
        try:
            window = window_of(arguments["mask_function"], arguments.get("local_size"), self._max_len)
        except (NotPaged, UnsupportedModel) as error:
            window = error
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        marker = torch.zeros(shape, dtype=arguments.get("dtype") or torch.float32, device=arguments.get("device"))
        self._masks[id(marker)] = (marker, window)
        return marker

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, None]:
        """As an attention function; the output is empty, but of the right shape."""
        where = type(module).__name__
        if any(module is known for known, _ in self.calls):
            raise NotPaged(f"{where} calls attention twice in a forward, so one layer has two caches")
        if not query.shape[2] == key.shape[2] == value.shape[2] == TOKENS:
            raise NotPaged(f"{where} attends over {key.shape[2]} keys for {TOKENS} tokens (not self-attention)")
        if attention_mask is None:
            raise NotPaged(f"{where} attends without a mask: it is not causal")
        if id(attention_mask) not in self._masks:
            raise NotPaged(f"{where} gets a mask that Transformers' mask functions did not make")
        window = self._masks[id(attention_mask)][1]
        if isinstance(window, Exception):
            raise window
        if getattr(module, "is_causal", True) is False or keywords.get("is_causal") is False:
            raise NotPaged(f"{where} is not causal")
        for name, given in keywords.items():
            if given is not None and not isinstance(given, bool) and name not in _NEUTRAL | _HANDLED:
                raise NotPaged(f"{where} passes {name} to attention, which octavo does not have")
        shape = AttentionShape(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            window=window,
            scale=keywords.get("scaling"),
            plain=keywords.get("softcap") is None and keywords.get("s_aux") is None,
        )
        self.calls.append((module, shape))
        return query.new_empty(query.shape[0], TOKENS, shape.heads, shape.value_dim), None


def window_of(rule: Callable[..., torch.Tensor], local_size: int | None, max_len: int) -> int | None:
    """The sliding window of a mask with ``rule(batch, head, query, key) -> bool``; None if each token sees all before.

    Rules are compared with those two at lengths up to ``max_len``, since no longer ones run: a window or a chunk above
    that is none. Raises `NotPaged` for any other rule, `UnsupportedModel` HF031 for one that is not causal.
    """
    length = min(max_len, 2 * local_size + 3 if local_size else 67)
    edges = {0, 1, length // 2, length - 2, length - 1, *((local_size - 1, local_size) if local_size else ())}
    rows = sorted(row for row in edges if 0 <= row < length)
    with torch.device("cpu"):
        keys = torch.arange(length)
        zero = torch.zeros((), dtype=torch.long)
        seen = torch.stack([_row(rule, zero, row, keys) for row in rows])
        queries = torch.tensor(rows).unsqueeze(1)
        causal = keys <= queries
        count = int(seen[-1].sum())
        if torch.equal(seen, causal):
            return None
        if torch.equal(seen, causal & (keys > queries - count)):
            return count
    if bool((seen & ~causal).any()):
        raise UnsupportedModel(
            "Its tokens attend to later ones: this is no causal language model, or is not set up as one (is_decoder).",
            "Choose a causal language model.",
            id="HF031",
        )
    raise NotPaged("a mask is neither causal nor a sliding window (attention in chunks, or of another kind)")


def _row(rule: Callable[..., torch.Tensor], zero: torch.Tensor, query: int, keys: torch.Tensor) -> torch.Tensor:
    at = torch.full_like(keys, query)
    try:
        return torch.as_tensor(rule(zero, zero, at, keys)).expand(keys.shape).bool()
    except (IndexError, RuntimeError) as error:  # it looks into tensors that are as long as the traced run
        raise NotPaged("a mask depends on more than the order of tokens (on images among them, say)") from error


def _experts(module: nn.Module, hidden_states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """In Transformers' registry of experts: what they are chosen for is in values, which a trace does not have."""
    return torch.zeros_like(hidden_states)


@contextmanager
def _implementation(model: nn.Module, name: str) -> Iterator[None]:
    """All configs inside ``model`` name ``name`` as their attention and their experts."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    kinds = ("_attn_implementation_internal", "_experts_implementation_internal")
    before = [(config, kind, getattr(config, kind, None)) for config in configs.values() for kind in kinds]
    for config, kind, _ in before:
        setattr(config, kind, name)
    try:
        yield
    finally:
        for config, kind, value in before:
            setattr(config, kind, value)


def _not_running(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no model is being traced")


@torch.inference_mode()
def record(model: nn.Module, device: torch.device, max_len: int) -> tuple[Recorder, nn.Module]:
    """One forward of the causal language model ``model``: its attention calls, and the module that makes hidden states.

    ``model`` is on ``device``, which may be "meta". Raises `NotPaged` for what the engine cannot do, and
    whatever the model raises where it cannot run on that device.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    recorder = Recorder(max_len)
    AttentionInterface.register(NAME, recorder.attention)
    AttentionMaskInterface.register(NAME, recorder.mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    ran: list[nn.Module] = []
    bodies = [model.base_model, model.get_decoder()]  # type: ignore[operator]
    hooks = [body.register_forward_pre_hook(lambda module, _: ran.append(module)) for body in bodies]
    try:
        with _implementation(model, NAME), torch.device(device):
            model(
                input_ids=torch.ones(1, TOKENS, dtype=torch.long),
                # With a mask of ones Transformers does not look into the positions for packed sequences.
                attention_mask=torch.ones(1, TOKENS, dtype=torch.long),
                position_ids=torch.arange(TOKENS).unsqueeze(0),
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
        # Transformers' registries live as long as the process, and would keep the recorder and the model alive.
        AttentionInterface.register(NAME, _not_running)
        AttentionMaskInterface.register(NAME, _not_running)
    if not ran or "position_ids" not in inspect.signature(ran[0].forward).parameters:
        raise NotPaged(f"{type(model).__name__} takes no position_ids")
    return recorder, ran[0]
