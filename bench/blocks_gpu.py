"""Weights of four and eight bits on one GPU: products of few rows, and a model's decode steps, beside bfloat16.

    python bench/blocks_gpu.py [--sweep]

Products are timed in replayed graphs, over copies of the weight that are larger together than the second-level cache.
The model is a Llama of 1.2 billion random weights in AWQ's layout, 4 bits in groups of 128, against random bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
import triton
from kernels_gpu import LINEARS, seconds

from octavo.kernels import blocks_triton, linear_triton
from octavo.kernels.blocks_triton import Launch

KINDS = ("Q4_1", "Q8_0")
ROWS = (1, 4, 16, 64)
LAUNCHES = [Launch(64, groups, warps, stages) for groups, stages in ((16, 2), (16, 3), (32, 2)) for warps in (4, 8)]
LAUNCHES += [Launch(128, 16, 8, 2), Launch(128, 8, 8, 3), Launch(64, 32, 8, 1), Launch(64, 16, 4, 1)]
FEW_LAUNCHES = [(8192, 4), (8192, 8), (16384, 4), (16384, 8), (32768, 8), (32768, 16)]
SIZE = 400 << 20  # bytes of the copies of a weight


def weights(kind: str, out: int, size: int) -> list[blocks_triton.BlockLinear]:
    nbytes = out * size // 32 * blocks_triton.SIZES[kind]
    made = []
    for _ in range(max(1, SIZE // nbytes)):
        blocks = torch.randint(0, 100, (out, nbytes // out), dtype=torch.uint8, device="cuda")
        made.append(blocks_triton.pack_blocks([(kind, blocks)], None, torch.bfloat16))
    return made


def each(products: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> float:
    """Seconds of one of ``products``, which take turns."""
    return seconds(lambda: [product(x) for product in products], 2) / len(products)


def products(sweep: bool) -> None:
    for model in ("8b", "1b"):
        for out, size in LINEARS[model][:4]:
            count = max(1, SIZE // (2 * out * size))
            plain = [torch.randn(out, size, device="cuda").bfloat16() for _ in range(count)]
            packed = {kind: weights(kind, out, size) for kind in KINDS}
            for rows in ROWS:
                x = torch.randn(rows, size, device="cuda").bfloat16()
                base = each([partial(linear_triton.linear, weight=weight) for weight in plain], x)
                line = f"{model} {out} x {size}, {rows} rows: bfloat16 {base * 1e6:.1f} us"
                for kind, made in packed.items():
                    took = each(made, x)
                    line += f"; {kind} {took * 1e6:.1f} us, {made[0].nbytes / took / 1e12:.2f} TB/s"
                    line += f" (best {best(made, x)})" if sweep else ""
                print(line, flush=True)


def best(made: list[blocks_triton.BlockLinear], x: torch.Tensor) -> str:
    """The three best launches of the kernel that multiplies as many rows as ``x`` has."""
    bits = made[0].parts[0].bits
    few = len(x) in blocks_triton.FEW
    table: dict[int, Any] = blocks_triton.FEW_LAUNCHES if few else blocks_triton.LAUNCHES
    found, kept = [], table[bits]
    for launch in FEW_LAUNCHES if few else LAUNCHES:
        table[bits] = launch
        try:
            made[0](x)
            found.append((each(made, x), launch))
        except triton.runtime.errors.OutOfResources:
            continue
    table[bits] = kept
    return ", ".join(f"{took * 1e6:.1f} {launch}" for took, launch in sorted(found, key=first)[:3])


def first(pair: tuple[float, Any]) -> float:
    return pair[0]


def checkpoint(folder: Path) -> None:
    """A Llama of the 1B's shape in AWQ's layout, of random numbers."""
    from safetensors.torch import save_file

    hidden, inner, layers, heads, kv = 2048, 8192, 16, 32, 8
    hf = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "vocab_size": 128256,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "eos_token_id": 0,
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    }
    (folder / "config.json").write_text(json.dumps(hf))
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 4, hidden)}
    shapes |= {"self_attn.v_proj": (hidden // 4, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    tensors = {"model.embed_tokens.weight": torch.randn(128256, hidden).mul_(0.02).bfloat16()}
    tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for layer in range(layers):
        for name, (out, size) in shapes.items():
            stem = f"model.layers.{layer}.{name}"
            tensors[f"{stem}.qweight"] = torch.randint(-(1 << 31), 1 << 31, (size, out // 8), dtype=torch.int32)
            tensors[f"{stem}.qzeros"] = torch.full((size // 128, out // 8), 0x77777777, dtype=torch.int32)
            tensors[f"{stem}.scales"] = torch.full((size // 128, out), 0.004).half()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden).bfloat16()
    save_file(tensors, folder / "model.safetensors")


def model(folder: Path, **options: object) -> None:
    from octavo import LLM, SamplingParams

    start = time.perf_counter()
    with LLM(str(folder), skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=64, **options) as llm:
        print(options, f"ready after {time.perf_counter() - start:.1f} s", flush=True)
        params = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True, detokenize=False)
        for rows in (1, 16, 64):
            prompts = [[(7 * i + j) % 1000 + 1 for j in range(64)] for i in range(rows)]
            took = []
            for _ in range(3):
                start = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                took.append(time.perf_counter() - start)
            print(
                f"  {rows} rows: {min(took) / 256 * 1e3:.3f} ms a token, {rows * 256 / min(took):.0f} tokens/s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other launches, too")
    parser.add_argument("--no-model", action="store_true", help="products alone")
    args = parser.parse_args()
    products(args.sweep)
    if not args.no_model:
        with tempfile.TemporaryDirectory() as name:
            checkpoint(Path(name))
            for options in ({}, {"dtype": "bfloat16"}):
                model(Path(name), **options)


if __name__ == "__main__":
    main()
