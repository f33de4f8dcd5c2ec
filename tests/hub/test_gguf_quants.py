from __future__ import annotations

import gguf
import numpy as np
import pytest

from octavo.hub.gguf_quants import FORMATS, BlockFormat, dequantise


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: FORMATS[kind].name)
def test_values_equal_those_of_ggml_bit_for_bit(kind: int) -> None:
    format = FORMATS[kind]
    rows = 3 * (1 << 16) // format.values // 2 + 1  # more than one chunk, and not a whole number of them
    blocks = np.random.default_rng(kind).integers(0, 256, (rows, format.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    ours = dequantise(blocks[:, None, :], format)
    assert ours.dtype == np.float32
    finite = np.isfinite(expected)
    assert finite.mean() > 0.9
    np.testing.assert_array_equal(ours[finite].view(np.uint32), expected[finite].view(np.uint32))
    np.testing.assert_array_equal(ours, expected)  # nan where ggml has nan


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: FORMATS[kind].name)
def test_block_sizes_are_those_of_ggml(kind: int) -> None:
    format = FORMATS[kind]
    assert (format.values, format.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    assert format.name == gguf.GGMLQuantizationType(kind).name


@pytest.mark.parametrize("kind", [2, 3, 6, 7, 8])
def test_a_quantised_matrix_comes_back_close(kind: int) -> None:
    weights = np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)
    packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(kind))
    format: BlockFormat = FORMATS[kind]
    back = dequantise(packed.reshape(16, -1, format.nbytes), format)
    assert back.shape == weights.shape
    assert np.abs(back - weights).max() < 0.35


def test_blocks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="18 bytes, not 20"):
        dequantise(np.zeros((1, 1, 20), np.uint8), FORMATS[2])
