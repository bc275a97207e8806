"""Where adapters find their places in a base, be its layers dense or kept quantized."""

from torch import nn

from stillroom.blocks import find_blocks, find_linears, find_stacks, lists_of_blocks
from stillroom.quantization.linear import QuantizedLinear


def is_quantized(model: nn.Module) -> bool:
    """Return whether any layer of `model` is kept quantized."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def adaptable_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the dotted name and the list of the repeated blocks, the largest stack's.

    Raises:
        RecipeError: there are none.
    """
    dense = lists_of_blocks(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (name in dense or is_quantized(module))
    }
    return max(found.items(), key=lambda item: _size(item[1])) if found else find_blocks(model)


def adaptable_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return every list of repeated blocks by its dotted name: an encoder's and a decoder's.

    Raises:
        RecipeError: there are none.
    """
    packed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and is_quantized(module)
    }
    outermost = {
        name: module
        for name, module in packed.items()
        if not any(name.startswith(f"{other}.") for other in packed)
    }
    return outermost or find_stacks(model)


def adaptable_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer below `block`, dense or quantized, by its dotted name."""
    linears = find_linears(block)
    return {
        name: child
        for name, child in block.named_modules()
        if name in linears or isinstance(child, QuantizedLinear)
    }


def _size(module: nn.Module) -> int:
    """Return how many parameters there are, or would be if no layer were quantized."""
    packed = (each for each in module.modules() if isinstance(each, QuantizedLinear))
    dense = sum(parameter.numel() for parameter in module.parameters())
    return dense + sum(each.in_features * each.out_features for each in packed)


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return what a classifier has beside its backbone that holds parameters, by name."""
    backbone = getattr(model, "base_model_prefix", "")
    return {
        name: child
        for name, child in model.named_children()
        if name != backbone and any(True for _ in child.parameters())
    }
