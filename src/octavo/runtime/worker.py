"""The worker of one device: the five calls of `runtime.base`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from octavo import platforms
from octavo.config import EngineConfig, ModelConfig
from octavo.errors import ConfigError, OctavoError
from octavo.hub.checkpoint import WithoutPrefix, open_checkpoint
from octavo.hub.configs import max_model_len, model_config
from octavo.hub.files import ModelFiles, find_files
from octavo.hub.live import LiveModel
from octavo.hub.machines import bandwidth_of
from octavo.hub.quantised.checkpoint import unquantised
from octavo.hub.quantised.settings import check_wanted
from octavo.kernels import select
from octavo.log import get_logger
from octavo.models import registry
from octavo.models.base import Model
from octavo.parallel import group
from octavo.parallel.shards import MOST_RANKS
from octavo.platforms.base import NOTHING_CAPTURED
from octavo.runtime.base import Pending, TokenMask, WorkerBase
from octavo.runtime.embed import PoolingRunner
from octavo.runtime.graphs import captured
from octavo.runtime.loader import LoadReport, fill_dummy, load
from octavo.runtime.memory import few_rows, plan_cache, step_bytes
from octavo.runtime.progress import LoadProgress
from octavo.runtime.runner import Runner, RunnerLimits, largest_step, rehearse
from octavo.runtime.safetensors_packages import safetensors_reader
from octavo.runtime.torch_checkpoint import PyTorchCheckpoint
from octavo.types import StepPlan

NO_MEMORY = ("can't allocate memory", "not enough memory")  # torch's CPU allocator has no class of its own for it


class Worker:
    """Owns the model, the cache and the device. Decisions are logged, one line each.

    ``live`` is a model that is loaded already; what the config names is read from files otherwise. Of a model that
    several devices share, ``rank`` is this one's number; its worker is to `join` the others between init and load.
    ``anew``: what an earlier start has proven of a Transformers model does not count.
    """

    def __init__(self, live: LiveModel | None = None, *, rank: int = 0, anew: bool = False) -> None:
        self._live = live
        self._rank = rank
        self._anew = anew
        self._runner: Runner | None = None
        self.group = group.SINGLE

    def init(self, config: EngineConfig) -> ModelConfig:
        """See `runtime.base.WorkerBase.init`."""
        log, options = get_logger(), config.model
        self._config = config
        files: ModelFiles | LiveModel = self._live or self._find_files()
        ranks, engines = config.parallel.tensor_parallel_size, config.parallel.data_parallel_size
        self.platform = platforms.select(config.device.device, self._rank, ranks, engines)
        self.overlaps, self.device = self.platform.overlaps, str(self.platform.device)
        self.enough_tokens = self.platform.enough_tokens
        log.info("device: %s", self.platform.describe())
        hf, pooler = files.read_config()
        if pooler is not None:
            log.info("pooling: %s", pooler)
        check_wanted(options.quantization, hf)
        self._model_config = model_config(
            hf,
            dtype=options.dtype,
            generation=files.generation,
            device=self.platform.device.type,
            fast_bfloat16=self.platform.fast_bfloat16,
            kv_cache_dtype=config.memory.kv_cache_dtype,
            converts_float8=self.platform.converts_float8,
            traced=registry.is_traced(hf, options.model_impl),
            has_head=pooler is None,
        )
        self._max_len, reason = max_model_len(self._model_config, options.max_model_len)
        log.info("dtype: %s (%s)", self._model_config.dtype, self._model_config.dtype_reason)
        log.info("max length: %d (%s)", self._max_len, reason)
        if isinstance(files, ModelFiles):
            weights = None if self._anew else self._plain_weights(hf)
            self._make, reason = registry.choose(self._model_config, options.model_impl, files.code(), weights)
            log.info("implementation: %s", reason)
        return self._model_config

    def _plain_weights(self, hf: Mapping[str, Any]) -> Path | None:
        """The folder of weights that are plain floats and will be used as such."""
        options = self._config.model
        if options.load_format == "dummy" or options.quantization or hf.get("quantization_config"):
            return None
        return None if self._source.kind == "gguf" else self._source.path

    def _find_files(self) -> ModelFiles:
        options = self._config.model
        files = find_files(options, weights=options.load_format != "dummy")
        self._source = files.weights
        get_logger().info("model: %s", self._source.reason)
        return files

    def join(self, rank: int, folder: Path) -> None:
        """Meets the other ranks in ``folder``."""
        options = self._config.parallel
        limit = options.distributed_timeout_seconds * (1 if rank == 0 else 2)  # rank 0 is the one to tell of it
        self.group = group.connect(rank, options.tensor_parallel_size, self.platform.device, folder, limit)

    @property
    def model(self) -> Model:
        """The loaded model."""
        return self._model

    def load(self) -> None:
        """See `runtime.base.WorkerBase.load`."""
        ranks = self._config.parallel.tensor_parallel_size
        if ranks != self.group.size:
            raise ConfigError(f"tensor_parallel_size is {ranks}, but this is for one device.", "Leave it out.")
        if self._live is None:
            with group.use(self.group):
                self._model = self._make(self._model_config, self._max_len)
                get_logger().info("weights: %s", self._fill())
        else:
            from octavo.models.hf.live import share

            self._model = share(self._live.model, self._model_config, self._max_len, self.platform.device)
        self._model_config = self._model.config  # the Transformers backend finds out the layers itself
        for line in select.report():
            get_logger().info("kernels: %s", line)

    def _fill(self) -> LoadReport:
        options = self._config.model
        if options.load_format == "dummy":
            return fill_dummy(self._model, options.seed, self.platform.device, options.rounding)
        safetensors = safetensors_reader(options.load_format)
        stored = open_checkpoint(self._source, options.load_format, pytorch=PyTorchCheckpoint, safetensors=safetensors)
        checkpoint = unquantised(WithoutPrefix.over(stored), self._model_config.hf)
        nbytes = sum(info.nbytes for info in checkpoint.tensors().values())
        with LoadProgress(nbytes, shown=self.group.rank == 0) as told:
            return load(
                self._model,
                checkpoint,
                self.platform.device,
                progress=told,
                keep_blocks=options.dtype == "auto",  # who names a type wants the values in it
                quantization=options.rounding,
            )

    def plan_memory(self, announce: Callable[[], None] | None = None) -> tuple[int, int]:
        """See `runtime.base.WorkerBase.plan_memory`; for ``announce`` see `Runner`."""
        limits, memory = self._config.limits, self._config.memory
        page_size = int(memory.block_size)
        tokens = min(limits.max_num_batched_tokens, self._max_len * limits.max_num_seqs)
        graphs = self.platform.captures and self._model.capturable and not self._config.device.enforce_eager
        rehearse(self._model, tokens, limits.max_num_seqs, page_size, self.platform)
        budget, why = self.platform.kv_budget(
            memory,
            lambda: largest_step(self._model, tokens, limits.max_num_seqs, page_size, self.platform),
            captured(self._model, limits.max_num_seqs, tokens, self.group.size) if graphs else NOTHING_CAPTURED,
        )
        budget, why = self._least_of_all(budget, why)
        plan = plan_cache(
            self._model_config,
            budget,
            why,
            page_size=page_size,
            max_len=self._max_len,
            fixed_len=self._config.model.max_model_len not in (None, -1),
            max_rows=limits.max_num_seqs,
            own=self._model.own_cache,
            pages=memory.num_gpu_blocks_override,
        )
        get_logger().info("kv cache: %s", plan.reason)
        self.max_rows, self.shares_prefixes = plan.max_rows, self._model.own_cache is None
        self.step_bytes = step_bytes(self._model)
        self.draft_tokens = few_rows(self._model, self.platform.few_tokens)
        self.bandwidth = bandwidth_of(self.platform.describe().partition(",")[0]) or 0.0
        cache = plan.allocate(self._model_config, self.platform)
        runner = Runner if self._model_config.has_head else PoolingRunner
        self._runner = runner(
            self._model,
            cache,
            self.platform,
            RunnerLimits(plan.max_rows, tokens, plan.max_len),
            graphs=graphs,
            group=self.group,
            announce=announce,
        )
        return plan.num_pages, plan.max_len

    def _least_of_all(self, budget: int, why: str) -> tuple[int, str]:
        """The budget of the rank that has the least."""
        least, rank = divmod(self.group.least(budget * MOST_RANKS + self.group.rank), MOST_RANKS)
        if least == budget:
            return budget, why
        return least, f"rank {rank} has the least; this one {budget / 2**30:.1f} GiB: {why}"

    def step(self, plan: StepPlan) -> None:
        """See `runtime.base.WorkerBase.step`; raises `MemoryError` if the device or the host has none left."""
        with MemoryErrors():
            self._running().step(plan)

    def sample(self, mask: TokenMask | None = None) -> Pending:
        """See `runtime.base.WorkerBase.sample`; raises as `step` does."""
        with MemoryErrors():
            return self._running().sample(mask)

    def take_tokens(self) -> None:
        """On other ranks than 0, in place of `sample`, where rank 0 broadcasts its tokens."""
        self._running().take_tokens()

    def _running(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("plan_memory comes first, and nothing after close")
        return self._runner

    def wait_for_device(self) -> None:
        """Until all that was launched is done, if there are other ranks, whose devices this one's may wait for."""
        if self.group.size > 1:
            self.platform.to_host(torch.zeros(1, device=self.platform.device)).wait()

    def close(self) -> None:
        """See `runtime.base.WorkerBase.close`. Graphs go first: NCCL waits for those that have its kernels."""
        if self.group.size > 1:
            self._runner = None
            gc.collect()
            self.group.close()
            self.group = group.SINGLE


class MemoryErrors:
    """A context that makes a `MemoryError` of what torch raises where a device or the host has no memory left.

    A class, since a generator costs several times as much, and every step enters it twice.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY):
            raise MemoryError(str(error)) from None


def worker_for(
    config: EngineConfig, live: LiveModel | None = None, *, on_death: Callable[[OctavoError], None] | None = None
) -> WorkerBase:
    """The worker that ``config`` asks for; for ``on_death`` see `runtime.parallel.ParallelWorker`."""
    ranks = config.parallel.tensor_parallel_size
    if ranks == 1:
        return Worker(live)
    if live is not None:
        raise ConfigError(
            f"tensor_parallel_size is {ranks}, but the model is loaded in this process already.",
            "Give the model's name or folder, or leave tensor_parallel_size out.",
        )
    from octavo.runtime.parallel import ParallelWorker

    return ParallelWorker(on_death=on_death)
