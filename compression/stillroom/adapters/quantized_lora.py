"""LoRA (2106.09685) beside a layer that is kept quantized (QLoRA, 2305.14314)."""

from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from stillroom.quantization.linear import QuantizedLinear


class LoraQuantizedLinear(nn.Module, LoraLayer):
    """y = q(x) + (α / r) · B A dropout(x), with q frozen and quantized.

    It cannot be merged: the sum of a grid and a low-rank matrix lies on no grid.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (..., out), for inputs (..., in)."""
        result: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                dtype = cast(Tensor, down.weight).dtype
                inputs = self.lora_dropout[name](x.to(dtype))
                update = up(down(inputs)) * self.scaling[name]
                result = result + update.to(result.dtype)
        return result


def register(config: LoraConfig) -> None:
    """Let peft put LoRA beside our quantized layers too.

    peft keeps this out of the saved config, so it is registered again at each load.
    """
    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
