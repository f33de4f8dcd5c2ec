"""Plans for models whose class has none: only where the names and kinds of a block's parts leave no doubt."""

from __future__ import annotations

from typing import Any

from torch import nn

# The linear layers of a block, all of them, with their styles. What else is in it has no parameters.
# Code of an attention without a plan may count on all heads, so they are gathered between its products.
_GATHERED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output")
_BLOCKS: tuple[dict[str, str], ...] = (
    *({**_GATHERED, name: "rowwise_split_input"} for name in ("o_proj", "out_proj", "dense")),
    {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"},
    {"up_proj": "colwise", "down_proj": "rowwise"},
    {"fc1": "colwise", "fc2": "rowwise"},
)


def derived(model: Any) -> dict[str, str] | None:
    """Styles by module name for the blocks that are known; None unless every decoder layer has two of them."""
    plan: dict[str, str] = {}
    found = 0
    for name, module in model.named_modules():
        styles = _styles(module)
        if styles is not None:
            plan |= {f"{name}.{part}": style for part, style in styles.items()}
            found += 1
    layers = model.config.get_text_config().num_hidden_layers
    return plan if found == 2 * layers else None


def _styles(module: nn.Module) -> dict[str, str] | None:
    with_parameters = {
        name: child for name, child in module.named_children() if next(child.parameters(), None) is not None
    }
    for block in _BLOCKS:
        if with_parameters.keys() == block.keys() and all(type(c) is nn.Linear for c in with_parameters.values()):
            return None if next(module.parameters(recurse=False), None) is not None else block
    return None
