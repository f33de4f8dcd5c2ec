"""``generation_config.json``: what a model's makers set for sampling, where a request does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from octavo.errors import ModelError, RequestError
from octavo.hub.configs import read_json
from octavo.hub.source import Source
from octavo.log import get_logger
from octavo.sampling_params import SamplingParams


def generation_config(source: Source) -> dict[str, Any]:
    """The model's ``generation_config.json``, or nothing where there is none; raises `ModelError` HF002."""
    path = source.file("generation_config.json")
    return read_json(path) if path is not None else {}


_KEPT: Final = ("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_k", "top_p", "min_p")
_GENERATION_KEYS: Final = {**{key: key for key in _KEPT}, "max_new_tokens": "max_tokens"}  # to those of requests

# What Transformers' generation would do with such a file, and this engine does not; a value of these changes nothing.
_NOT_APPLIED: Final = {
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("exponential_decay_length_penalty", "sequence_bias", "stop_strings", "suppress_tokens")),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length", "min_new_tokens", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p"), 1),
}


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation config says on sampling, under the names of `SamplingParams`.

    ``do_sample: false`` means greedy unless the file names a temperature, too. Raises `ModelError` HF002 for a value
    that no request could have, and warns of what is not applied.
    """
    ignored = [key for key, idle in _NOT_APPLIED.items() if generation.get(key) not in (None, idle)]
    if ignored:
        get_logger().warning("generation_config.json sets %s, which octavo does not apply", ", ".join(ignored))
    out = {ours: generation[key] for key, ours in _GENERATION_KEYS.items() if generation.get(key) is not None}
    if generation.get("do_sample") is False and "temperature" not in out:
        out["temperature"] = 0.0
    try:
        SamplingParams(**out).validate()
    except RequestError as error:
        raise ModelError(
            f"generation_config.json: {error.cause}", "Correct it, or pass --generation-config vllm.", id="HF002"
        ) from None
    return out
