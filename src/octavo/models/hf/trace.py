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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.errors import UnsupportedModel
from octavo.models.hf.attention import AttentionShape
from octavo.models.hf.mixers import Mixers, TracedMixer
from octavo.models.hf.states import Key, States, StateShape

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


class StateRecorder(States):
    """The cache of one run, which takes down the modules that ask it for states."""

    def __init__(self) -> None:
        super().__init__({})
        self.ran: set[nn.Module] = set()
        self._running: list[tuple[nn.Module, int | str | None]] = []  # and the argument that is the cache
        self._asked: dict[nn.Module, tuple[int | str, dict[Key, None]]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """What modules of ``model`` run inside, and ask for, is taken down."""
        hooks: list[Any] = []
        for module in model.modules():
            hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def mixers(self, body: nn.Module) -> Mixers | None:
        """The modules of ``body`` that asked, each with what the modules inside of it asked for; None: none did."""
        inner = {part for module in self._asked for part in module.modules() if part is not module}
        found = []
        for name, module in body.named_modules():
            if module in self._asked and module not in inner:
                keys = {key: None for part in module.modules() if part in self._asked for key in self._asked[part][1]}
                found.append(TracedMixer(name, self._asked[module][0], tuple(keys)))
        shapes = {key: StateShape(tuple(state.shape[1:]), state.dtype) for key, state in self.kept.items()}
        return Mixers(found, shapes) if found else None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """What attention keeps: nothing here."""
        return key_states, value_states

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"octavo's cache of states has no {name}")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def _get(self, key: Key) -> torch.Tensor | None:
        self._take_down(key)
        return super()._get(key)

    def _put(self, key: Key, state: torch.Tensor) -> torch.Tensor:
        self._take_down(key)
        return super()._put(key, state)

    def _take_down(self, key: Key) -> None:
        module, cache = self._running[-1]
        if cache is None:
            raise NotPaged(f"{type(module).__name__} keeps a state, but is not handed the cache")
        self._asked.setdefault(module, (cache, {}))[1][key] = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran.add(module)
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        self._running.append((module, next((place for place, given in places if given is self), None)))

    def _leave(self, *_: Any) -> None:
        self._running.pop()


@dataclass(frozen=True)
class Trace:
    """What a run showed: the attention modules in the order they ran, ``body``, the module that makes hidden states,
    and the modules of it that keep states. ``ran``: all modules that did anything."""

    attention: list[tuple[nn.Module, AttentionShape]]
    body: nn.Module
    takes_positions: bool
    mixers: Mixers | None
    ran: set[nn.Module]


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
def implementation(model: nn.Module, **names: str) -> Iterator[None]:
    """All configs inside ``model`` have other ``names``, of their ``attn`` and their ``experts``."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    kinds = {f"_{kind}_implementation_internal": name for kind, name in names.items()}
    before = [(config, kind, getattr(config, kind, None)) for config in configs.values() for kind in kinds]
    for config, kind, _ in before:
        setattr(config, kind, kinds[kind])
    try:
        yield
    finally:
        for config, kind, value in before:
            setattr(config, kind, value)


@contextmanager
def without_experts(model: nn.Module) -> Iterator[None]:
    """Experts inside ``model`` that Transformers has a registry for return zeros, and need no weights."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    with implementation(model, experts=NAME):
        yield


def _not_running(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no model is being traced")


CACHES = ("past_key_values", "cache_params")
"""Names of the argument by which decoders and their layers take a cache."""


@torch.inference_mode()
def record(model: nn.Module, device: torch.device, max_len: int, *, states: bool) -> Trace:
    """One forward of the causal language model ``model``; with ``states`` it is given a cache, to see what asks it.

    ``model`` is on ``device``, which may be "meta". Raises `NotPaged` for what the engine cannot do, and
    whatever the model raises where it cannot run on that device.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    recorder, kept = Recorder(max_len), StateRecorder()
    AttentionInterface.register(NAME, recorder.attention)
    AttentionMaskInterface.register(NAME, recorder.mask)
    ran: list[nn.Module] = []
    bodies = [model.base_model, model.get_decoder()]  # type: ignore[operator]
    hooks = [body.register_forward_pre_hook(lambda module, _: ran.append(module)) for body in bodies]
    try:
        with implementation(model, attn=NAME), without_experts(model), kept.watching(model), torch.device(device):
            model(
                input_ids=torch.ones(1, TOKENS, dtype=torch.long),
                position_ids=torch.arange(TOKENS).unsqueeze(0),
                use_cache=False,
                **_history(model, kept if states else None),
            )
    finally:
        for hook in hooks:
            hook.remove()
        # Transformers' registries live as long as the process, and would keep the recorder and the model alive.
        AttentionInterface.register(NAME, _not_running)
        AttentionMaskInterface.register(NAME, _not_running)
    takes_positions = bool(ran) and "position_ids" in inspect.signature(ran[0].forward).parameters
    body = ran[0] if ran else model
    return Trace(recorder.calls, body, takes_positions, kept.mixers(body), kept.ran)


def _history(model: nn.Module, states: States | None) -> dict[str, Any]:
    """Either argument keeps Transformers from looking into the positions for packed sequences."""
    if states is None:
        return {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
    names = inspect.signature(model.forward).parameters
    return {next((name for name in CACHES if name in names), CACHES[0]): states}
