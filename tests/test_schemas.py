"""Snapshots: the schema of every op, and the graph that ``torch.compile`` sees of a MoE block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from expecttest import TestCase
from torch import Tensor, fx, nn
from torch.nn import functional as F

from torch_lora_moe import MoELoRA, build_lora_hooks, fused_experts
from torch_lora_moe.testing import Case, make_inputs


class Block(nn.Module):
    """A router and a MoE layer with adapters; ``hooked`` runs plain GEMMs with the LoRA hooks in between."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        inputs = make_inputs(Case(num_experts=6))
        self.gate = nn.Linear(40, 6, bias=False)
        self.w13, self.w2, self.lora = inputs.w13, inputs.w2, inputs.lora
        self.hooked = hooked

    def forward(self, x: Tensor, token_lora_mapping: Tensor) -> Tensor:
        weights, ids = torch.topk(torch.softmax(self.gate(x), dim=-1), 2)
        lora = MoELoRA(*self.lora)
        if not self.hooked:
            return fused_experts(x, self.w13, self.w2, weights, ids, lora, token_lora_mapping, routing_cache={})
        hooks = build_lora_hooks(lora, ids, weights, token_lora_mapping)
        cache1 = torch.einsum("mkoh,mh->mko", self.w13[ids], x)
        hooks.after_gate_up(x, cache1)
        h = F.silu(cache1[..., :24]) * cache1[..., 24:]
        cache3 = torch.einsum("mkhi,mki->mkh", self.w2[ids], h) * weights[..., None]
        hooks.after_down(h.flatten(0, 1), cache3)
        return cache3.sum(1)


def calls_of(module: nn.Module) -> str:
    """Every call in the graph that Dynamo makes of ``module``, in order, one a line."""
    lines: list[str] = []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        for node in graph.graph.nodes:
            if node.op in ("call_function", "call_method", "call_module"):
                target = node.target if isinstance(node.target, str) else torch.typename(node.target)
                if isinstance(node.target, torch._ops.OpOverload):
                    target = str(node.target)
                lines.append(f"{target} <- {', '.join(str(arg) for arg in node.all_input_nodes)}")
        return graph.forward

    torch._dynamo.reset()
    inputs = make_inputs(Case())
    torch.compile(module, backend=backend, fullgraph=True)(inputs.hidden_states, inputs.token_lora_mapping)
    return "\n".join(lines)


class TestSnapshots(TestCase):
    maxDiff = None

    def test_schemas(self) -> None:
        names = ("route", "lora_shrink", "lora_expand_add_", "lora_add_", "fused_experts")
        schemas = [str(getattr(torch.ops.lora_moe, name).default._schema) for name in names]
        self.assertExpectedInline(
            "\n".join(schemas),
            """\
lora_moe::route(Tensor topk_ids, Tensor? token_lora_mapping, Tensor? adapter_enabled, SymInt num_experts, SymInt max_loras) -> Tensor
lora_moe::lora_shrink(Tensor hidden_states, Tensor lora_a, Tensor topk_ids, Tensor token_lora_mapping, Tensor? adapter_enabled, Tensor? schedule, SymInt num_experts, SymInt split_k=1) -> Tensor
lora_moe::lora_expand_add_(Tensor(a!) output, Tensor shrunk, Tensor lora_b, Tensor topk_ids, Tensor token_lora_mapping, Tensor? adapter_enabled, Tensor? schedule, Tensor? topk_weights, SymInt num_experts, SymInt num_slices=1) -> ()
lora_moe::lora_add_(Tensor(a!) output, Tensor hidden_states, Tensor lora_a, Tensor lora_b, Tensor topk_ids, Tensor token_lora_mapping, Tensor? adapter_enabled, Tensor? schedule, Tensor? topk_weights, SymInt num_slices=1) -> ()
lora_moe::fused_experts(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? schedule=None, Tensor? gate_up_a=None, Tensor? gate_up_b=None, Tensor? down_a=None, Tensor? down_b=None, Tensor? token_lora_mapping=None, Tensor? adapter_enabled=None, Tensor? w13_bias=None, Tensor? w2_bias=None, str activation="silu", bool is_gated=True, bool interleaved=False, float routed_scaling_factor=1., float swiglu_alpha=1.702, float swiglu_limit=7.) -> Tensor""",
        )

    def test_graph_of_the_fused_block(self) -> None:
        self.assertExpectedInline(
            calls_of(Block(hooked=False)),
            """\
torch._C._nn.linear <- l_x_, l_self_modules_gate_parameters_weight_
torch._VariableFunctionsClass.softmax <- linear
torch._VariableFunctionsClass.topk <- softmax
_operator.getitem <- topk
_operator.getitem <- topk
lora_moe.route.default <- ids, l_token_lora_mapping_
lora_moe.fused_experts.default <- l_x_, l_self_w13, l_self_w2, weights, ids, schedule, l_self_lora_gate_up_a, l_self_lora_gate_up_b, l_self_lora_down_a, l_self_lora_down_b, l_token_lora_mapping_""",
        )

    def test_graph_of_a_hooked_block(self) -> None:
        ours = [line for line in calls_of(Block(hooked=True)).splitlines() if line.startswith("lora_moe")]
        self.assertExpectedInline(
            "\n".join(ours),
            """\
lora_moe.route.default <- ids, l_token_lora_mapping_
lora_moe.lora_add_.default <- cache1, l_x_, l_self_lora_gate_up_a, l_self_lora_gate_up_b, ids, l_token_lora_mapping_, schedule
lora_moe.lora_add_.default <- cache3, flatten, l_self_lora_down_a, l_self_lora_down_b, ids, l_token_lora_mapping_, schedule, weights""",
        )
