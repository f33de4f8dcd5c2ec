"""`LLM`: the engine in this process, for scripts. Arguments and results are those of vLLM's class of this name."""

from __future__ import annotations

import itertools
import os
import random
import secrets
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from octavo import vllm_options
from octavo.config import EngineConfig
from octavo.errors import ConfigError, EngineDead, OctavoError, RequestError
from octavo.frontend.beams import BeamSearchOutput, BeamSearchParams, Search
from octavo.frontend.chat import ChatRenderer, Message, WantedFormat, load_template
from octavo.frontend.detokenize import TextDecoder
from octavo.frontend.foreground import Interrupts, Progress, UseTqdm
from octavo.frontend.inputs import InputProcessor, Params, Prepared, Prompt
from octavo.frontend.loading import TextModel, load_text_model
from octavo.frontend.outputs import OutputProcessor, error_of
from octavo.hub.configs import overrides_by
from octavo.hub.files import find_files
from octavo.hub.live import LiveModel, device_of, is_loaded
from octavo.sampling_params import PoolingParams, SamplingParams
from octavo.types import EmbeddingRequestOutput, EngineInfo, Request, RequestOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from octavo.core.process import Engine
    from octavo.hub.tokenizer import Tokenizer

SeveralParams = SamplingParams | Sequence[SamplingParams] | None
P = TypeVar("P", SamplingParams, PoolingParams)


class LLM:
    """A model, ready to generate or to embed. Not for several threads at once; for a service see `AsyncLLM`.

    ``model`` is a repo id, a folder or a ``.gguf`` file; options are the fields of `EngineConfig`, flat, such as
    ``dtype``, ``max_model_len``, ``max_num_seqs``, ``kv_cache_memory_bytes``, ``device``. ``hf_overrides`` may also
    be a function that gets the config as a dict and returns it changed. Raises `ConfigError`, `ModelError` or
    `OutOfMemory`.

    ``model`` may also be a loaded ``transformers.PreTrainedModel``, whose parameters are then shared: each call of
    `generate` or `chat` uses the values that they have at that time. ``tokenizer`` is Transformers' object or a name,
    by default that of the name the model was loaded by.
    """

    def __init__(self, model: str | os.PathLike[str] | PreTrainedModel, **options: Any) -> None:
        live = None
        if is_loaded(model):
            config, live = _live_model(model, options)
        else:
            config = _named_config(model, options)
        text = load_text_model(config, live)
        self._setup(config, text, _start_core(config, text, live))
        self._is_live = live is not None

    @classmethod
    def over(cls, core: Engine, text: TextModel, config: EngineConfig) -> LLM:
        """An LLM over a core that runs already; it is closed with the LLM."""
        llm = cls.__new__(cls)
        llm._setup(config, text, core)
        return llm

    _is_live = False  # whether weights may change between two calls
    _for_user: Any = None  # the tokenizer that `get_tokenizer` makes

    def _setup(self, config: EngineConfig, text: TextModel, core: Engine) -> None:
        self.config = config
        self._core: Engine | None = core
        self._tokenizer = text.tokenizer
        self._decoder = TextDecoder(text.tokenizer) if text.tokenizer is not None else None
        self._inputs = InputProcessor(
            text.tokenizer,
            core.info,
            eos_ids=text.eos_ids,
            defaults=text.defaults,
            seeds=random.Random(config.model.seed),
            clamp_max_tokens=True,
            pooler=text.pooler,
        )
        self._chat = ChatRenderer.of(text.tokenizer)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SeveralParams = None,
        use_tqdm: UseTqdm = True,
        *,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One result for each prompt, in order. Without ``sampling_params`` the model's defaults apply.

        All prompts are checked before any is run; a bad one raises `RequestError` and nothing is generated. Those of
        lower ``priority`` run first. There are no adapters: ``lora_request`` is for vLLM's callers.
        """
        _check_no_adapter(lora_request)
        several = _prompts(prompts)
        if priority is not None and len(priority) != len(several):
            cause = f"there are {len(several)} prompts and {len(priority)} priorities."
            raise RequestError(cause, "Give one for each.", param="priority")
        self._inputs.check_generates()
        params = _params_for(sampling_params, len(several), SamplingParams, "sampling_params")
        encoded = self._inputs.encode_prompts(several)
        return self._run(self._prepared(encoded, params, priority), use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """An embedding of each prompt, in order; for a model that embeds, such as ``LLM(model, runner="pooling")``.

        All prompts are checked before any is run; a bad one raises `RequestError`.
        """
        several = _prompts(prompts)
        params = _params_for(pooling_params or PoolingParams(), len(several), PoolingParams, "pooling_params")
        encoded = self._inputs.encode_prompts(several)
        return [result.embedded() for result in self._run(self._prepared(encoded, params), use_tqdm)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SeveralParams = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        *,
        chat_template: str | None = None,
        chat_template_content_format: WantedFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """One result for each conversation: a list of messages, or a list of such lists.

        ``chat_template`` is a file, a template itself or the name of one of the model's, instead of its usual one.
        ``chat_template_content_format`` is that of `ChatRenderer`.
        """
        _check_no_adapter(lora_request)
        self._chat.content_format = chat_template_content_format
        chats = _conversations(messages)
        self._inputs.check_generates()
        template = chat_template
        if template is not None and template not in self._chat.named:
            template = load_template(template)
        params = _params_for(sampling_params, len(chats), SamplingParams, "sampling_params")
        texts = [
            self._chat.render(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=template,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in chats
        ]
        ids = self._inputs.encode_texts(texts, add_special_tokens=False)
        return self._run(self._prepared(zip(texts, ids, strict=True), params), use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: UseTqdm = False
    ) -> list[BeamSearchOutput]:
        """The ``beam_width`` best answers to each prompt, in order; each holds its prompt, as vLLM's do.

        The end token is part of ``tokens``, and of ``text`` with ``include_stop_str_in_output``.
        """
        if not isinstance(params, BeamSearchParams):
            raise _wrong_type("params", params, "Give BeamSearchParams.")
        tokenizer, info = self._own_tokenizer(), self.info
        params.validate(info.max_logprobs)
        encoded = self._inputs.encode_prompts(_prompts(prompts))
        searches = [
            Search(ids, params, self._inputs.eos_ids, max(1, info.max_model_len - len(ids))) for _, ids in encoded
        ]
        bar = Progress(use_tqdm, params.max_tokens, "step")
        while asked := [ids for search in searches for ids in search.prompts()]:
            given = self._run(self._prepared([(None, ids) for ids in asked], [params.step()] * len(asked)), False)
            found = iter([(result.outputs[0].logprobs or [{}])[0] for result in given])
            for search in searches:
                search.take([next(found) for _ in search.prompts()])
            bar.advance(len(asked))
        bar.close()
        best = [search.best() for search in searches]
        for beam in itertools.chain(*best):
            hidden = beam.finish_reason == "stop" and not params.include_stop_str_in_output
            shown = beam.tokens[:-1] if hidden else beam.tokens
            beam.text = tokenizer.decode(shown, skip_special_tokens=False)
        return [BeamSearchOutput(sequences) for sequences in best]

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself: the longest context, the pages of the KV cache, …"""
        return self._engine().info

    def get_tokenizer(self) -> Any:
        """The tokenizer as one of Transformers', with all its methods; raises `ConfigError` if the engine has none."""
        if self._for_user is None:
            self._for_user = self._own_tokenizer().for_transformers()
        return self._for_user

    def _own_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError("this engine has no tokenizer.", "Leave skip_tokenizer_init out.")
        return self._tokenizer

    def __getattr__(self, name: str) -> NoReturn:
        remedy = vllm_options.METHODS.get(name)
        raise AttributeError(f"LLM has no {name}" + (f": {remedy}" if remedy else ""), name=name, obj=self)

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when none are given: the model's own generation config over the usual defaults."""
        return self._inputs.default_params()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; always True, where vLLM's can refuse."""
        self._engine().reset_prefix_cache()
        return True

    def close(self) -> None:
        """Frees the model and its memory. May be called twice; nothing else works afterwards."""
        core, self._core = self._core, None
        if core is not None:
            core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _engine(self) -> Engine:
        if self._core is None:
            raise EngineDead("this LLM is closed.", "Make a new one.")
        return self._core

    def _prepared(
        self,
        encoded: Iterable[tuple[str | None, Sequence[int]]],
        params: Sequence[Params | None],
        priorities: Sequence[int] | None = None,
    ) -> list[Prepared]:
        return [
            self._inputs.process_ids(str(next(self._ids)), ids, one, text=text, priority=priority)
            for (text, ids), one, priority in zip(encoded, params, priorities or [0] * len(params), strict=True)
        ]

    def _run(self, prepared: list[Prepared], use_tqdm: UseTqdm) -> list[RequestOutput]:
        core = self._engine()
        if self._is_live:
            core.reset_prefix_cache()  # what is in it was computed with weights that may have changed since
        outputs = OutputProcessor(self._decoder, self._inputs.eos_ids)
        states = [outputs.add(one) for one in prepared]
        waiting = deque(request for one in prepared for request in one.requests)
        bar = Progress(use_tqdm, len(states))
        try:
            with Interrupts() as interrupts:
                while outputs.pending:
                    self._feed(core, waiting)
                    if not core.has_work():
                        raise EngineDead("the engine lost a request.", "This is a bug in octavo; please report it.")
                    changed, aborts = outputs.process(core.step())
                    core.abort(aborts)
                    for state, delta in changed:
                        bar.add(state, len(delta.token_ids))
                    interrupts.check()
        except (OctavoError, KeyboardInterrupt):
            core.abort(outputs.drop())
            raise
        except Exception:
            self.close()  # nobody knows what state a step that failed has left
            raise
        finally:
            bar.close()
        return [state.snapshot() for state in states]

    def _feed(self, core: Engine, waiting: deque[Request]) -> None:
        """Hands over as many requests as may wait in the core."""
        while waiting and core.stats().waiting < self.config.limits.max_waiting:
            refusal = core.add(waiting.popleft())
            if refusal is not None:
                raise error_of(refusal)


def engine_config(model: str | os.PathLike[str], options: Mapping[str, Any]) -> EngineConfig:
    """The config for the arguments of `LLM`; raises `ConfigError` for those that octavo does not have."""
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(f"model is of type {type(model).__name__}.", "Give a repo id, a folder or a .gguf file.")
    known = vllm_options.without(options)
    if known.get("distributed_executor_backend") in (None, "uni"):
        known.pop("distributed_executor_backend", None)
    elif known["distributed_executor_backend"] == "ray":
        raise ConfigError(
            "distributed_executor_backend is ray, but the engines of LLM run on this machine.",
            "Take AsyncLLM or octavo serve, or leave it out.",
        )
    if "dtype" in known:
        known["dtype"] = str(known["dtype"]).removeprefix("torch.")
    return EngineConfig.of(model=os.fspath(model), **known)


def _named_config(model: str | os.PathLike[str], options: Mapping[str, Any]) -> EngineConfig:
    """As `engine_config`; ``hf_overrides`` may be a function, which is called here, once for all processes."""
    change = options.get("hf_overrides")
    if not callable(change):
        return engine_config(model, options)
    config = engine_config(model, {**options, "hf_overrides": {}})
    files = find_files(config.model, weights=False)
    overrides = overrides_by(change, files.config, config.model.config_format)
    return replace(config, model=replace(config.model, hf_overrides=overrides))


def _live_model(model: PreTrainedModel, options: dict[str, Any]) -> tuple[EngineConfig, LiveModel]:
    """The config for a loaded model: device and type are the model's, and options must not say otherwise."""
    tokenizer, device = options.pop("tokenizer", None), device_of(model)
    if options.get("device", "auto") not in ("auto", device):
        raise ConfigError(f"device is {options['device']}, but the model is on {device}.", "Move the model first.")
    given = {"dtype": str(model.dtype), **options, "device": device}
    config = engine_config(model.name_or_path or type(model).__name__, given)
    live = LiveModel(config.model, model, tokenizer)
    live.check()
    return config, live


def _start_core(config: EngineConfig, text: TextModel, live: LiveModel | None) -> Engine:
    if config.parallel.data_parallel_size > 1:
        return _start_cores(config, live)
    from octavo.core.engine import EngineCore
    from octavo.core.vocabulary import Vocabulary
    from octavo.runtime.worker import worker_for

    tokenizer = text.tokenizer
    if live is None or tokenizer is None:
        return EngineCore(config, worker_for(config, live))
    size = live.vocab_size
    worker = worker_for(config, live)
    return EngineCore(config, worker, vocabulary=lambda: Vocabulary.of(tokenizer, size, text.eos_ids))


def _start_cores(config: EngineConfig, live: LiveModel | None) -> Engine:
    from octavo.frontend.offline import SeveralCores

    if live is not None:
        raise ConfigError(
            f"data_parallel_size is {config.parallel.data_parallel_size}, but a loaded model is in one process.",
            "Leave it out, or give the model's name.",
        )
    return SeveralCores(config, secrets.token_bytes(32))


def _check_no_adapter(lora_request: object) -> None:
    if lora_request is not None:
        raise RequestError("there are no adapters.", "Merge the adapter into the model.", param="lora_request")


def _prompts(prompts: object) -> list[Prompt]:
    """A list of prompts, from one or several: a list of ints is one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise _wrong_type("prompts", prompts, "Give a prompt or a list of prompts.")
    several: list[Any] = list(prompts)
    if several and isinstance(several[0], int):
        return [several]
    return several


def _conversations(messages: object) -> list[Sequence[Message]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise _wrong_type("messages", messages, "Give a list of messages, or a list of such lists.")
    several: list[Any] = list(messages)
    return [several] if not several or isinstance(several[0], Mapping) else several


def _params_for(params: object, count: int, kind: type[P], name: str) -> Sequence[P | None]:
    if params is None or isinstance(params, kind):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(one, kind) for one in params):
        raise _wrong_type(name, params, f"Give a {kind.__name__}, or one for each prompt.")
    if len(params) != count:
        raise RequestError(
            f"there are {count} prompts and {len(params)} {name}.", "Give one for all, or one for each.", param=name
        )
    return params


def _wrong_type(param: str, value: object, remedy: str) -> RequestError:
    return RequestError(f"{param} is of type {type(value).__name__}.", remedy, param=param)
