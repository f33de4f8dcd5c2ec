"""How much of Transformers runs: every causal language model of the installed version, tiny and random, in float32.

    python tools/sweep.py                  all of them
    python tools/sweep.py llama gpt2       only these

Each result goes into the table of docs/transformers-backend.md as soon as it is there.

Each model is made by shrinking the defaults of its config class, saved as a checkpoint, loaded by the Transformers
backend, and compared with the unmodified model with eager attention: whole prompts, ragged chunks, a prefix hit and a
batch of mixed lengths, by logits and greedy tokens. Each runs in a process of its own with a time limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from octavo.errors import OctavoError, UnsupportedModel  # noqa: E402
from octavo.hub.checkpoint import open_checkpoint  # noqa: E402
from octavo.hub.configs import model_config, read_hf_dict  # noqa: E402
from octavo.hub.resolve import resolve  # noqa: E402
from octavo.models import registry  # noqa: E402
from octavo.runtime import loader  # noqa: E402
from tests.models.harness import Paged  # noqa: E402

REPORT = ROOT / "docs" / "transformers-backend.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
TIME_LIMIT = 240.0
TOLERANCE = 1e-4  # of the largest logit
MAX_PARAMETERS = 20_000_000
MAX_LEN = 128
PAGE_SIZE = 8
STD = 0.1

# Keys of configs -> tiny values; the first pattern that matches a whole key counts, only for keys that a class has.
SHRINK: tuple[tuple[str, Any], ...] = (
    ("vocab_size|vocab_size_per_layer_input|padded_vocab_size|text_vocab_size", 384),
    ("moe_intermediate_size|shared_expert_intermediate_size|moe_ffn_hidden_size|expert_ffn_hidden_size", 32),
    ("hidden_size_per_layer_input", 16),
    ("(dense_)?intermediate_size(_mlp)?|n_inner|ffn_dim|d_ff|ffn_hidden_size|decoder_ffn_dim|mlp_hidden_size", 96),
    ("hidden_size|n_embd|d_model|model_dim|embedding_size|word_embed_proj_dim|dim|decoder_hidden_size", 64),
    ("num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers", 4),
    ("num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads", 4),
    ("num_key_value_heads|num_kv_heads|n_head_kv|num_attention_groups", 2),
    ("head_dim|kv_channels|attention_head_size|v_head_dim|qk_nope_head_dim|swa_head_dim|swa_v_head_dim", 16),
    ("rotary_dim|qk_rope_head_dim", 8),
    ("global_head_dim", 32),
    ("q_lora_rank|kv_lora_rank", 24),
    ("expert_layer_period|attn_layer_period|full_attention_interval", 2),
    ("num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts", 8),
    ("num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token", 2),
    ("n_group|topk_group|num_expert_group", 1),
    ("n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    ("first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    ("max_position_embeddings|n_positions|max_seq_len|seq_length|max_sequence_length|n_ctx|max_seq_length", 256),
    ("sliding_window(_size)?|attention_window_size|local_window_size", 16),
    ("attention_chunk_size", 32),
    ("pad_token_id|(bos|eos|sep|cls)_token_id|decoder_start_token_id", 3),
    ("mamba_d_state|ssm_state_size|state_size", 16),
    ("mamba_n_heads|mamba_num_heads", 8),
    ("(mamba_)?chunk_size", 16),
    ("mamba_d_ssm", 128),
    ("linear_num_heads|linear_num_value_heads", 4),
    ("linear_num_key_heads", 2),
    ("mamba_d_head|mamba_head_dim|linear_head_dim|linear_key_head_dim|linear_value_head_dim", 16),
    ("laurel_rank|altup_num_inputs", 4),
)
HYBRID = ["linear_attention", "full_attention"] * 2
DOTS3 = {
    "head_dim": 24,
    **{f"swa_{key}": 4 for key in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{key}": 24 for key in ("q_lora_rank", "kv_lora_rank", "head_dim")},
    **{f"swa_{key}": 16 for key in ("qk_nope_head_dim", "v_head_dim")},
}
DRAFTER = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 500,
    "hc_lowrank": 8,
}
# What the defaults of a class imply beside its sizes.
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"num_kv_shared_layers": 0, "altup_num_inputs": 2, "intermediate_size": [96] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", "norm_topk_prob": False},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "longcat_flash": {"head_dim": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "bailing_hybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        "encoder_config": {"hidden_size": 64, "hidden_size_global": 64},
        "decoder_config": {"hidden_size": 64, "hidden_size_global": 64},
        "global_config": {"hidden_size": 64},
        "patch_in_forward": False,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS3,
    "gemma4_assistant": {"text_config": DRAFTER, "backbone_hidden_size": 64},
    "gemma4_unified_assistant": {"text_config": DRAFTER, "backbone_hidden_size": 64},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16, "num_heads": 8, "n_groups": 2},
    "phi3": {"original_max_position_embeddings": 256},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 6},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"] * 2,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "xlm": {"emb_dim": 64, "causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "kv_channels": 16,
        "num_query_groups": 4,
    },
}


STATUSES = ("fused", "slow", "refused", "wrong", "error", "untested")


@dataclass(frozen=True)
class Row:
    """``status`` is one of `STATUSES`. ``error`` is the greatest, of the largest logit."""

    model_type: str
    architecture: str
    status: str
    detail: str = ""
    error: float = 0.0
    seconds: float = 0.0


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A config of ``model_type`` with small sizes, and ``overrides`` over that."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    try:
        small = _shrunk(cls().to_dict())
    except Exception:  # a class that refuses its own defaults
        small = {}
    return cls(**{**_merged(small, SPECIAL.get(model_type, {})), **overrides})


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        key: _merged(below[key], value) for key, value in above.items() if key.endswith("_config") and key in below
    }
    return {**below, **above, **inner}


def _shrunk(defaults: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in defaults.items():
        if key.endswith("_config") and isinstance(value, dict):
            small[key] = _shrunk(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found = next((tiny for pattern, tiny in SHRINK if re.fullmatch(pattern, key)), None)
            if found is not None and found < value:
                small[key] = found
    if "qk_rope_head_dim" in small:
        small.pop("head_dim", None)  # which is the rotated part there
    heads, kv = defaults.get("num_attention_heads"), defaults.get("num_key_value_heads")
    if isinstance(heads, int) and heads == kv:
        small["num_key_value_heads"] = small.get("num_attention_heads", heads)
    if defaults.get("is_decoder") is False and not defaults.get("is_encoder_decoder"):
        small["is_decoder"] = True  # an encoder's class, which is a language model only so
    return small


def reference(config: Any, seed: int = 0) -> Any:
    """The unmodified model of ``config`` with eager attention and random weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and parameter.dim() == 1 else STD * noise)
    return model


def adopted(folder: Path, max_len: int = MAX_LEN, dtype: str = "float32") -> Any:
    """The model in ``folder`` on the Transformers backend, loaded on the CPU."""
    source = resolve(str(folder))
    config = model_config(read_hf_dict(source, {}), dtype=dtype, generation={}, traced=True)
    model_class, _ = registry.choose(config, "transformers")
    model = model_class(config, max_len)
    loader.load(model, open_checkpoint(source), torch.device("cpu"))
    return model


@torch.inference_mode()
def oracle(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Logits ``[T, vocab]`` of the unmodified model."""
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits


def divergence(model: Any, wanted: Any, vocab_size: int = 384) -> tuple[float, str]:
    """The greatest difference of logits, as a share of the largest, and the case it was in.

    Cases: a whole prompt, the same in ragged chunks, a hit of its first pages, all that in mixed batches with others.
    Instead of the hit, which a model with a cache of its own cannot have, its row begins anew.
    """
    generator = torch.Generator().manual_seed(1)
    first, second, third = (torch.randint(4, vocab_size, (n,), generator=generator).tolist() for n in (45, 29, 12))
    paged = Paged(model, page_size=PAGE_SIZE)
    logits = {id: oracle(wanted, tokens) for id, tokens in enumerate((first, second, third))}
    forked = [*first[:24], *third]
    logits[3] = oracle(wanted, forked)
    found: dict[str, float] = {}

    def check(case: str, row_logits: torch.Tensor, id: int, start: int) -> None:
        expected = logits[id][start : start + len(row_logits)]
        error = float((row_logits - expected).abs().max() / logits[id].abs().max())
        same = bool((row_logits.argmax(-1) == expected.argmax(-1)).all())
        found[case] = max(found.get(case, 0.0), error if same or error > TOLERANCE else 1.0, float(error != error))

    whole = paged.start()
    check("whole", paged.step({whole: first})[whole], 0, 0)
    a, b = paged.start(), paged.start()
    done = 0
    for count in (1, 7, 13, 8):  # beside another sequence that is prefilled, then decoded
        others = second[done : done + count] if done + count <= len(second) else second[done : done + 1]
        out = paged.step({a: first[done : done + count], b: others})
        check("chunks", out[a], 0, done)
        check("mixed", out[b], 1, done)
        done += count
    if model.own_cache is None:
        hit, start, case = paged.start(prefix_of=whole, pages=3), 24, "prefix hit"
    else:
        paged.stop(whole)
        hit, start, case = paged.start(), 0, "row used again"
    fork = forked[start:]
    out = paged.step({hit: fork[:5], a: first[done : done + 1]})
    check(case, out[hit], 3, start)
    check("mixed", out[a], 0, done)
    check(case, paged.step({hit: fork[5:]})[hit], 3, start + 5)
    case = max(found, key=lambda name: found[name])
    return found[case], case


def run(model_type: str) -> Row:
    """The row of one model; never raises."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    start, architecture = time.perf_counter(), ""
    try:
        from octavo.models.hf.build import causal_lm_class

        architecture = causal_lm_class(model_type) or ""
        wanted = _small_reference(model_type)
    except Exception as error:
        known = _refusal(model_type, architecture)
        status, why = ("refused", known) if known else ("untested", f"no tiny model: {_told(error)}")
        return Row(model_type, architecture, status, why)
    try:
        with tempfile.TemporaryDirectory() as folder:
            wanted.config.architectures = [architecture]
            wanted.save_pretrained(folder)
            model = adopted(Path(folder))
        worst, case = divergence(model, wanted, min(384, model.config.vocab_size))
    except UnsupportedModel as refusal:
        return Row(model_type, architecture, "refused", f"{refusal.id}: {refusal.cause}")
    except OctavoError as known:
        return Row(model_type, architecture, "error", f"{known.id}: {known.cause}")
    except Exception as unknown:
        return Row(model_type, architecture, "error", _told(unknown))
    status = "wrong" if worst > TOLERANCE else "fused" if model.fused else "slow"
    detail = "; ".join(part for part in (model.swapped, model.experts) if part)
    detail = detail if status != "wrong" else f"by {worst:.2g} ({case}); {detail}"
    return Row(model_type, architecture, status, detail, worst, time.perf_counter() - start)


def _refusal(model_type: str, architecture: str) -> str:
    """Why the backend cannot build the model of the shrunk config either; empty if it can, or there is no config."""
    try:
        hf = {**tiny_config(model_type).to_dict(), "architectures": [architecture]}
        config = model_config(hf, dtype="float32", generation={}, traced=True)
        registry.choose(config, "transformers")[0](config, MAX_LEN)
    except OctavoError as error:
        return f"{error.id}: {error.cause}"
    except Exception:
        return ""
    return ""


def _small_reference(model_type: str) -> Any:
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"the shrunk defaults still have {size / 1e6:.0f} million parameters")
    return reference(tiny_config(model_type))


def _told(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 160 else text[:157] + "..."


def _child(model_type: str, pipe: Any) -> None:
    pipe.send(run(model_type))


def in_child(model_type: str, limit: float = TIME_LIMIT) -> Row:
    """`run` in a forked process, which is killed after ``limit`` seconds."""
    context = multiprocessing.get_context("fork")  # torch and Transformers are imported once
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(model_type, theirs))
    child.start()
    theirs.close()
    try:
        if ours.poll(limit):
            row: Row = ours.recv()
            return row
        return Row(model_type, "", "untested", f"took more than {limit:.0f} s")
    except EOFError:
        return Row(model_type, "", "error", "the process died")
    finally:
        child.kill()
        child.join()


def model_types() -> list[str]:
    """All that Transformers maps to a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def write_report(rows: Sequence[Row]) -> None:
    """Puts ``rows`` into the table of the report; rows of other models stay, if they are of this Transformers."""
    import transformers

    text = REPORT.read_text()
    (head, rest), tail = text.split(BEGIN), text.split(END)[1]
    old = rest.split(END)[0].splitlines() if f"Transformers {transformers.__version__}," in rest else []
    lines = {line.split(" | ")[0].strip("| "): line for line in old if line.startswith("| ")}
    for row in rows:
        why = " ".join(row.detail.split()).replace("|", "\\|")
        lines[row.model_type] = f"| {row.model_type} | {row.architecture} | {row.status} | {why} |"
    table = [lines[model_type] for model_type in model_types() if model_type in lines]
    counts = Counter(line.split(" | ")[2] for line in table)
    shown = ", ".join(f"{counts[status]} {status}" for status in STATUSES)
    works = counts["fused"] + counts["slow"]
    known = f"Transformers {transformers.__version__}, {len(table)} of {len(model_types())} model types"
    summary = f"{known}: {works} work ({shown})."
    header = [summary, "", "| model_type | class | result | why, or what was replaced |", "| --- | --- | --- | --- |"]
    REPORT.write_text("\n".join([head + BEGIN, *header, *table, END]) + tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="default: all")
    parser.add_argument("--from", dest="first", default="", help="of all, only those from this name on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model_type in args.model_types or [name for name in model_types() if name >= args.first]:
        row = in_child(model_type)
        print(f"{row.status:9} {row.model_type:28} {row.error:8.1g}  {row.detail}", flush=True)
        write_report([row])


if __name__ == "__main__":
    main()
