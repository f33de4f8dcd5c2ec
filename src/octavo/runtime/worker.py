"""The worker of one device: the five calls of `runtime.base`."""

from __future__ import annotations

import torch

from octavo import platforms
from octavo.config import EngineConfig, ModelConfig
from octavo.hub.checkpoint import open_checkpoint
from octavo.hub.configs import max_model_len, model_config
from octavo.hub.files import ModelFiles, find_files
from octavo.hub.live import LiveModel
from octavo.kernels import select
from octavo.log import get_logger
from octavo.models import registry
from octavo.runtime.base import Pending, Progress, TokenMask
from octavo.runtime.loader import LoadReport, fill_dummy, load
from octavo.runtime.memory import plan_cache
from octavo.runtime.runner import Runner, largest_step
from octavo.runtime.torch_checkpoint import PyTorchCheckpoint
from octavo.types import StepPlan


class Worker:
    """Owns the model, the cache and the device. Decisions are logged, one line each.

    ``live`` is a model that is loaded already; what the config names is read from files otherwise.
    """

    def __init__(self, live: LiveModel | None = None) -> None:
        self._live = live

    def init(self, config: EngineConfig) -> ModelConfig:
        """See `runtime.base.WorkerBase.init`."""
        log, options = get_logger(), config.model
        self._config = config
        files: ModelFiles | LiveModel = self._live or self._find_files()
        self.platform = platforms.select(config.device.device)
        self.overlaps, self.device = self.platform.overlaps, str(self.platform.device)
        log.info("device: %s", self.platform.describe())
        hf = files.hf_dict()
        self._model_config = model_config(
            hf,
            dtype=options.dtype,
            generation=files.generation,
            device=self.platform.device.type,
            fast_bfloat16=self.platform.fast_bfloat16,
            kv_cache_dtype=config.memory.kv_cache_dtype,
            converts_float8=self.platform.converts_float8,
            traced=registry.is_traced(hf, options.model_impl),
        )
        self._max_len, reason = max_model_len(self._model_config, options.max_model_len)
        log.info("dtype: %s (%s)", self._model_config.dtype, self._model_config.dtype_reason)
        log.info("max length: %d (%s)", self._max_len, reason)
        if isinstance(files, ModelFiles):
            self._make, reason = registry.choose(self._model_config, options.model_impl, files.code())
            log.info("implementation: %s", reason)
        return self._model_config

    def _find_files(self) -> ModelFiles:
        options = self._config.model
        files = find_files(options, weights=options.load_format != "dummy")
        self._source = files.weights
        get_logger().info("model: %s", self._source.reason)
        return files

    def load(self, progress: Progress) -> None:
        """See `runtime.base.WorkerBase.load`."""
        if self._live is None:
            self._model = self._make(self._model_config, self._max_len)
            get_logger().info("weights: %s", self._fill(progress))
        else:
            from octavo.models.hf.live import share

            self._model = share(self._live.model, self._model_config, self._max_len, self.platform.device)
        self._model_config = self._model.config  # the Transformers backend finds out the layers itself
        for line in select.report():
            get_logger().info("kernels: %s", line)

    def _fill(self, progress: Progress) -> LoadReport:
        options = self._config.model
        if options.load_format == "dummy":
            return fill_dummy(self._model, options.seed, self.platform.device)
        checkpoint = open_checkpoint(self._source, options.load_format, pytorch=PyTorchCheckpoint)
        return load(self._model, checkpoint, self.platform.device, progress)

    def plan_memory(self) -> tuple[int, int]:
        """See `runtime.base.WorkerBase.plan_memory`."""
        limits, memory = self._config.limits, self._config.memory
        page_size = int(memory.block_size)
        tokens = min(limits.max_num_batched_tokens, self._max_len)
        budget, why = self.platform.kv_budget(
            memory, lambda: largest_step(self._model, tokens, limits.max_num_seqs, page_size, self.platform)
        )
        plan = plan_cache(
            self._model_config,
            budget,
            why,
            page_size=page_size,
            max_len=self._max_len,
            fixed_len=self._config.model.max_model_len not in (None, -1),
            max_rows=limits.max_num_seqs,
        )
        get_logger().info("kv cache: %s", plan.reason)
        cache = plan.allocate(self._model_config, self.platform)
        self._runner = Runner(
            self._model,
            cache,
            self.platform,
            max_rows=limits.max_num_seqs,
            max_len=plan.max_len,
            graphs=not self._config.device.enforce_eager,
        )
        return plan.num_pages, plan.max_len

    def step(self, plan: StepPlan) -> None:
        """See `runtime.base.WorkerBase.step`; raises `MemoryError` if the device or the host has none left."""
        try:
            self._runner.step(plan)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from None
        except RuntimeError as error:
            if "not enough memory" in str(error):  # torch's CPU allocator has no class of its own for it
                raise MemoryError(str(error)) from None
            raise

    def sample(self, mask: TokenMask | None = None) -> Pending:
        """See `runtime.base.WorkerBase.sample`."""
        return self._runner.sample(mask)
