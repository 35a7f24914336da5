"""Activations between the two expert GEMMs, on fp32 tiles."""

import triton
import triton.language as tl


@triton.jit
def _act(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.maximum(x, 0.0)
        return positive * positive


@triton.jit
def activate(gate, up, swiglu_alpha, swiglu_limit, IS_GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """``act(gate) * up``, or ``act(gate)``; ``swigluoai`` clamps both and adds one to ``up``."""
    if ACTIVATION == "swigluoai":
        gate = tl.minimum(gate, swiglu_limit)
        up = tl.minimum(tl.maximum(up, -swiglu_limit), swiglu_limit)
        return (up + 1) * gate * tl.sigmoid(swiglu_alpha * gate)
    elif IS_GATED:
        return _act(gate, ACTIVATION) * up
    else:
        return _act(gate, ACTIVATION)
