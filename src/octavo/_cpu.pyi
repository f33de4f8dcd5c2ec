# The C++ extension (csrc/); arguments named `*_at` are addresses, strides count elements.
# Only octavo.kernels.cpu calls it.

INTERFACE: int

def names() -> list[str]: ...
def emulated() -> list[str]: ...
def use(name: str, /) -> None: ...
def active() -> str: ...
def set_threads(count: int, /) -> None: ...
def threads() -> int: ...
def norm(
    bf16: bool,
    wide: bool,
    x_at: int,
    residual_at: int,
    weight_at: int,
    out_at: int,
    sum_at: int,
    rows: int,
    cols: int,
    x_stride: int,
    residual_stride: int,
    eps: float,
    /,
) -> None: ...
def gate(bf16: bool, silu: bool, x_at: int, out_at: int, rows: int, cols: int, x_stride: int, /) -> None: ...
def rotary(
    bf16: bool,
    x_at: int,
    out_at: int,
    cos_sin_at: int,
    positions_at: int,
    tokens: int,
    heads: int,
    dim: int,
    rotated: int,
    x_stride: int,
    max_len: int,
    /,
) -> None: ...
def store(
    cache_at: int,
    key_at: int,
    value_at: int,
    slots_at: int,
    tokens: int,
    heads: int,
    dim: int,
    page_size: int,
    pages: int,
    key_stride: int,
    value_stride: int,
    element: int,
    /,
) -> None: ...
def argmax(bf16: bool, x_at: int, out_at: int, rows: int, cols: int, x_stride: int, /) -> None: ...
def greedy(bf16: bool, x_at: int, out_at: int, rows: int, cols: int, x_stride: int, /) -> None: ...
def sample(bf16: bool, x_at: int, settings_at: int, out_at: int, rows: int, cols: int, x_stride: int, /) -> None: ...
def logprobs(
    bf16: bool, x_at: int, tokens_at: int, out_at: int, rows: int, cols: int, x_stride: int, count: int, /
) -> None: ...
def group(
    experts_at: int, tokens: int, each: int, count: int, rows_at: int, places_at: int, starts_at: int, /
) -> None: ...
def combine(
    bf16: bool, y_at: int, out_at: int, weights_at: int, places_at: int, tokens: int, each: int, cols: int, /
) -> None: ...
def panel_bytes(kind: str, out_features: int, in_features: int, /) -> int: ...
def pack(kind: str, blocks_at: int, out_features: int, in_features: int, panels_at: int, /) -> None: ...
def quantise(bf16: bool, weight_at: int, out_features: int, in_features: int, panels_at: int, /) -> None: ...
def attention(
    bf16: bool,
    query_at: int,
    cache_at: int,
    out_at: int,
    query_start_at: int,
    seq_lens_at: int,
    rows_at: int,
    block_table_at: int,
    sinks_at: int,
    items: int,
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
    pages: int,
    table_rows: int,
    table_width: int,
    query_stride: int,
    tokens: int,
    window: int,
    scale: float,
    softcap: float,
    /,
) -> None: ...

class Weight:
    def __init__(self, parts: list[tuple[str, int, int]], bias_at: int, in_features: int, /) -> None: ...
    def product(self, bf16: bool, x_at: int, out_at: int, rows: int, x_stride: int, /) -> None: ...
    def gather(self, bf16: bool, ids_at: int, out_at: int, count: int, /) -> None: ...

class Experts:
    def __init__(self, panels_at: int, bias_at: int, experts: int, in_features: int, out_features: int, /) -> None: ...
    def product(self, x_at: int, out_at: int, rows_at: int, starts_at: int, x_stride: int, /) -> None: ...

class Step:
    def __init__(
        self,
        positions_at: int,
        slots_at: int,
        cos_sin_at: int,
        rotated: int,
        max_len: int,
        query_start_at: int,
        seq_lens_at: int,
        rows_at: int,
        block_table_at: int,
        items: int,
        heads: int,
        kv_heads: int,
        dim: int,
        page_size: int,
        pages: int,
        table_rows: int,
        table_width: int,
        tokens: int,
        window: int,
        scale: float,
        softcap: float,
        /,
    ) -> None: ...

class Layer:
    def __init__(
        self,
        qkv: Weight,
        o: Weight,
        gate_up: Weight,
        down: Weight,
        input_norm_at: int,
        post_norm_at: int,
        q_norm_at: int,
        k_norm_at: int,
        eps: float,
        silu: bool,
        /,
    ) -> None: ...
    def run(self, step: Step, x_at: int, residual_at: int, cache_at: int, out_at: int, sum_at: int, /) -> None: ...

class Decoder:
    def __init__(self, layers: list[Layer], kinds: list[int], norm_at: int, eps: float, /) -> None: ...
    def run(
        self,
        count: int,
        steps: list[Step],
        x_at: int,
        cache_at: int,
        cache_stride: int,
        out_at: int,
        wanted_at: int,
        wanted: int,
        /,
    ) -> None: ...
