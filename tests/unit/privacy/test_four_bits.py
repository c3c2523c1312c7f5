"""A layer of 4 bits in float64 is the product with its decoded weights, and PEFT's pair beside it stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora.privacy.four_bits import computed_exactly

pytest.importorskip("bitsandbytes")


@pytest.fixture
def model() -> nn.Module:
    import peft
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 8, compute_dtype=torch.float32, quant_type="nf4")
    packed, state = quantize_4bit(torch.randn(8, 64), quant_type="nf4", compress_statistics=True)
    layer.weight = Params4bit(packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True)
    layer.bias = nn.Parameter(torch.randn(8), requires_grad=False)
    adapted = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"]))
    nn.init.normal_(adapted.base_model.model[0].lora_B["default"].weight)
    return adapted


def test_the_product_is_that_of_the_decoded_weights(model: nn.Module) -> None:
    from bitsandbytes.functional import dequantize_4bit

    wrapper = model.base_model.model[0]
    layer = wrapper.base_layer
    W = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    A, B = (getattr(wrapper, name)["default"].weight for name in ("lora_A", "lora_B"))
    for pair in (A, B):
        pair.data = pair.data.double()
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    with computed_exactly(model):
        found = model(x)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
    whole = W + wrapper.scaling["default"] * B @ A
    assert torch.allclose(found, x @ whole.T + layer.bias, rtol=1e-12, atol=1e-12)
    assert torch.allclose(gradient, 2 * found @ whole, rtol=1e-12, atol=1e-12)


def test_the_layers_own_kernel_comes_back(model: nn.Module) -> None:
    x = torch.randn(3, 64)
    before = model(x)
    with pytest.raises(RuntimeError), computed_exactly(model):
        raise RuntimeError
    assert torch.equal(model(x), before)
    assert not any("forward" in vars(module) for module in model.modules())
