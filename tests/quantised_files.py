"""Quantised weights as the tools that are known for them write them, with the floats that they stand for.

Each function makes the tensors of one linear layer ``name`` of ``[out, size]``, packed number by number from the
description of the layout, and returns them with the weight in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Layer = tuple[Tensors, torch.Tensor]
Make = Callable[[str, int, int, int], Layer]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(numbers: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Numbers packed along ``dim`` into int32, number ``order[i]`` of a word at its bits ``i * bits`` on."""
    count = 32 // bits
    numbers = numbers.movedim(dim, -1).long()
    numbers = numbers.reshape(*numbers.shape[:-1], -1, count)[..., list(order or range(count))]
    packed = sum(numbers[..., i] << (i * bits) for i in range(count))
    assert isinstance(packed, torch.Tensor)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    return packed.movedim(-1, dim).contiguous()


def _parts(out: int, size: int, bits: int, group: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, size), generator=generator)
    zeros = torch.randint(0, 1 << bits, (out, size // group), generator=generator)
    scales = (torch.rand(out, size // group, generator=generator) * 0.02 + 0.002).half()
    return codes, zeros, scales


def gptq(
    name: str,
    out: int,
    size: int,
    seed: int,
    *,
    bits: int = 4,
    group: int = 32,
    order: bool = False,
    zero: int | None = None,
) -> Layer:
    """``zero``: the one of all groups. A word of zeros is stored less a one at each place, as GPTQModel writes it: a 0
    borrows from the next."""
    codes, zeros, scales = _parts(out, size, bits, group, seed)
    if zero is not None:
        zeros.fill_(zero)
    groups = torch.arange(size) // group
    if order:
        groups = groups[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]
    weight = (codes - zeros[:, groups]) * scales.float()[:, groups]
    tensors = {
        f"{name}.qweight": words(codes.T, bits, 0),
        f"{name}.qzeros": words(zeros.T, bits, 1) - sum(1 << place for place in range(0, 32, bits)),
        f"{name}.scales": scales.T.contiguous(),
        f"{name}.g_idx": groups.to(torch.int32),
        f"{name}.bias": torch.zeros(out, dtype=torch.float16),
    }
    return tensors, weight


def awq(name: str, out: int, size: int, seed: int, *, group: int = 32) -> Layer:
    codes, zeros, scales = _parts(out, size, 4, group, seed)
    weight = (codes - zeros.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)
    tensors = {
        f"{name}.qweight": words(codes.T, 4, 1, AWQ_ORDER),
        f"{name}.qzeros": words(zeros.T, 4, 1, AWQ_ORDER),
        f"{name}.scales": scales.T.contiguous(),
    }
    return tensors, weight


def packed(
    name: str, out: int, size: int, seed: int, *, bits: int = 4, group: int = 32, zero: str | None = None
) -> Layer:
    """compressed-tensors, pack-quantized; ``zero``: with zeros, in "words" or, as its first versions, in "bytes"."""
    codes, zeros, scales = _parts(out, size, bits, group, seed)
    own = zeros if zero else torch.full_like(zeros, 1 << bits - 1)
    weight = (codes - own.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)
    tensors = {
        f"{name}.weight_packed": words(codes, bits, 1),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor([out, size]),
    }
    if zero:
        signed = (zeros - (1 << bits - 1)).to(torch.int8)
        tensors[f"{name}.weight_zero_point"] = words(zeros, bits, 0) if zero == "words" else signed
    return tensors, weight


def int8(name: str, out: int, size: int, seed: int) -> Layer:
    """compressed-tensors, int-quantized: a scale for each row."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (out, size), generator=generator).to(torch.int8)
    scales = (torch.rand(out, 1, generator=generator) * 1e-3 + 1e-4).bfloat16()
    return {f"{name}.weight": codes, f"{name}.weight_scale": scales}, codes.float() * scales.float()


def fp8(
    name: str,
    out: int,
    size: int,
    seed: int,
    *,
    scale: str = "tiles",
    tile: tuple[int, int] = (16, 32),
    leaf: str = "weight_scale_inv",
) -> Layer:
    """``scale``: "tiles" (DeepSeek's way, smaller), "rows" or "one"; ``leaf`` is the name of those of tiles."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(out, size, generator=generator).to(torch.float8_e4m3fn)
    tensors = {f"{name}.weight": values}
    if scale == "tiles":
        scales = torch.rand(-(-out // tile[0]), -(-size // tile[1]), generator=generator) * 0.02 + 0.01
        spread = scales.repeat_interleave(tile[0], 0)[:out].repeat_interleave(tile[1], 1)[:, :size]
        tensors[f"{name}.{leaf}"] = scales
    else:
        scales = torch.rand((out, 1) if scale == "rows" else (), generator=generator) * 0.02 + 0.01
        spread = scales
        tensors |= {f"{name}.weight_scale": scales, f"{name}.input_scale": torch.tensor(0.5)}
    return tensors, values.float() * spread


NF4 = torch.tensor([-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0])


def bnb4(
    name: str, out: int, size: int, seed: int, *, nested: bool = True, storage: torch.dtype = torch.uint8
) -> Layer:
    """bitsandbytes in four bits; the 16 values are the file's own, so they need not be the real ones."""
    generator, block, inner = torch.Generator().manual_seed(seed), 64, 8
    codes = torch.randint(0, 16, (out * size,), generator=generator)
    count = out * size // block
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [out, size]}
    pairs = codes.reshape(-1, 2)
    tensors = {
        f"{name}.weight": (pairs[:, 0] << 4 | pairs[:, 1]).to(torch.uint8).view(storage).reshape(-1, 1),
        f"{name}.weight.quant_map": NF4.clone(),
    }
    if nested:
        listed = torch.linspace(-1, 1, 256)
        own = torch.randint(0, 256, (count,), generator=generator).to(torch.uint8)
        outer = torch.rand(-(-count // inner), generator=generator) * 0.01
        state |= {"nested_blocksize": inner, "nested_dtype": "float32", "nested_offset": 0.03}
        scales = listed[own.long()] * outer.repeat_interleave(inner)[:count] + 0.03
        tensors |= {
            f"{name}.weight.absmax": own,
            f"{name}.weight.nested_absmax": outer,
            f"{name}.weight.nested_quant_map": listed,
        }
    else:
        scales = torch.rand(count, generator=generator) * 0.05
        tensors[f"{name}.weight.absmax"] = scales
    written = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"{name}.weight.quant_state.bitsandbytes__nf4"] = written
    return tensors, (NF4[codes] * scales.repeat_interleave(block)).reshape(out, size)


def bnb8(name: str, out: int, size: int, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (out, size), generator=generator).to(torch.int8)
    greatest = torch.rand(out, generator=generator) * 0.1
    tensors = {f"{name}.weight": codes, f"{name}.SCB": greatest, f"{name}.weight_format": torch.tensor(0).byte()}
    return tensors, codes.float() * (greatest[:, None] / 127)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4(name: str, out: int, size: int, seed: int, *, leaf: str = "weight_global_scale") -> Layer:
    """compressed-tensors' ("weight_global_scale", which divides) or ModelOpt's ("weight_scale_2", which multiplies)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out, size), generator=generator)
    scales = (torch.rand(out, size // 16, generator=generator) * 4 + 0.5).to(torch.float8_e4m3fn)
    last = 0.004 if leaf == "weight_scale_2" else 250.0
    factor = last if leaf == "weight_scale_2" else 1 / last
    octets = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    own = "weight" if leaf == "weight_scale_2" else "weight_packed"
    tensors = {f"{name}.{own}": octets, f"{name}.weight_scale": scales, f"{name}.{leaf}": torch.tensor([last])}
    return tensors, E2M1[codes] * (scales.float() * factor).repeat_interleave(16, 1)


def mxfp4(name: str, experts: int, out: int, size: int, seed: int) -> Layer:
    """gpt-oss; the weight is ``[experts, size, out]``."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (experts, out, size // 32, 32), generator=generator)
    exponents = torch.randint(118, 124, (experts, out, size // 32), generator=generator).to(torch.uint8)
    weight = E2M1[codes] * torch.exp2(exponents.float() - 127)[..., None]
    octets = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    tensors = {f"{name}_blocks": octets, f"{name}_scales": exponents}
    return tensors, weight.reshape(experts, out, size).transpose(1, 2).contiguous()


def _compressed(format: str, *bits: int, kind: str = "int", **more: Any) -> dict[str, Any]:
    """With a group of layers for each of ``bits``; ``more`` is said of the weights of all."""
    groups = {
        f"group_{i}": {"targets": ["Linear"], "weights": {"num_bits": n, "type": kind, **more}}
        for i, n in enumerate(bits)
    }
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}


def _four_or_eight(make: Callable[..., Layer]) -> Make:
    """Layers of ``make`` in four bits and in eight."""
    return lambda name, out, size, seed: make(name, out, size, seed, bits=8 if seed % 2 else 4)


LAYOUTS: dict[str, tuple[dict[str, Any], Make]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}, gptq),
    "gptq-8": (
        {"quant_method": "gptq", "bits": 8, "group_size": 32},
        lambda *layer: gptq(*layer, bits=8, zero=128),
    ),
    "gptq-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        lambda *layer: gptq(*layer, order=True),
    ),
    "gptq-by-layer": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:up": {"bits": 8}}},
        _four_or_eight(gptq),
    ),
    "gptq-symmetric": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
        lambda *layer: gptq(*layer, group=64, zero=8),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq),
    "compressed-w4": (_compressed("pack-quantized", 4), packed),
    "compressed-w4-zero": (_compressed("pack-quantized", 4), lambda *layer: packed(*layer, zero="words")),
    "compressed-w4-zero-bytes": (_compressed("pack-quantized", 4), lambda *layer: packed(*layer, zero="bytes")),
    "compressed-w4-w8": (_compressed("pack-quantized", 4, 8), _four_or_eight(packed)),
    "compressed-w8": (_compressed("pack-quantized", 8), lambda *layer: packed(*layer, bits=8, group=64)),
    "compressed-int8": (_compressed("int-quantized", 8), int8),
    "compressed-fp8": (_compressed("float-quantized", 8, kind="float"), lambda *layer: fp8(*layer, scale="rows")),
    "compressed-fp8-tiles": (
        _compressed("float-quantized", 8, kind="float", strategy="block", block_structure=[20, 48]),
        lambda *layer: fp8(*layer, tile=(20, 48), leaf="weight_scale"),  # which do not divide the weight
    ),
    "compressed-nvfp4": (_compressed("nvfp4-pack-quantized", 4, kind="float"), nvfp4),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, fp8),
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static"}, lambda *layer: fp8(*layer, scale="one")),
    "modelopt-fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        lambda *layer: fp8(*layer, scale="one"),
    ),
    "modelopt-nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda *layer: nvfp4(*layer, leaf="weight_scale_2"),
    ),
    "bitsandbytes-4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, bnb4),
    "bitsandbytes-4-in-bfloat16": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        lambda *layer: bnb4(*layer, storage=torch.bfloat16),
    ),
    "bitsandbytes-4-plain": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda *layer: bnb4(*layer, nested=False),
    ),
    "bitsandbytes-8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
}
"""By name: what a config says of it, and the layout of a layer."""
