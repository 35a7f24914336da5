"""The C++ library: built here, compared with the Python schemas to the letter and with the oracle over all variants."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from stubs import ROOT, run

from torch_lora_moe import cpu, native, ops, reference
from torch_lora_moe.testing import Case, assert_within_budget, check_layer, make_inputs

NAN = float("nan")


@pytest.fixture
def kernels(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernels in place of the torch ones, for one test."""
    monkeypatch.setattr(native, "KERNELS", {})
    native.load(library)


def test_schemas_are_those_of_python_to_the_letter() -> None:
    source = (ROOT / "csrc_stubs" / "schemas.h").read_text()
    entries = source[source.index("{\n", source.index("kSchemas")) : source.index("};")].split("\n\n")
    assert ["".join(re.findall(r'"(.*)"', entry)) for entry in entries] == list(ops.SCHEMAS.values())


def test_without_python(library: Path) -> None:
    script = """
import sys, torch
torch.ops.load_library(sys.argv[1])
assert "torch_lora_moe" not in sys.modules
ops = torch.ops.lora_moe
print([str(getattr(ops, name).default._schema) for name in sys.argv[2:]])
op = ops.fused_experts.default
x, ids = torch.randn(3, 16), torch.tensor([[0, 1], [1, 3], [-1, 2]])
print(op(x, torch.randn(4, 16, 16), torch.randn(4, 16, 8), torch.rand(3, 2), ids).isfinite().all().item())
try:
    op(x.to("meta"), torch.randn(4, 16, 16), torch.randn(4, 16, 8), torch.rand(3, 2), ids)
except RuntimeError as error:
    print(error)
"""
    schemas, finite, message = run(script, library, *ops.SCHEMAS).stdout.splitlines()[:3]
    assert schemas == str([str(getattr(torch.ops.lora_moe, name).default._schema) for name in ops.SCHEMAS])
    assert finite == "True"
    assert message.startswith("lora_moe::fused_experts: no kernel for this device without Python; import torch_lora_")


@pytest.mark.parametrize("stubs_first", [True, False], ids=["stubs_first", "python_first"])
def test_either_order(library: Path, stubs_first: bool) -> None:
    script = """
import sys, torch
if sys.argv[2] == "True":
    torch.ops.load_library(sys.argv[1])
import torch_lora_moe
from torch_lora_moe.testing import Case, check_layer, make_inputs
if sys.argv[2] != "True":
    torch.ops.load_library(sys.argv[1])
inputs = make_inputs(Case())
check_layer(inputs, inputs.run())
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    fake = torch.ops.lora_moe.route(torch.zeros(5, 2, dtype=torch.int64), None, None, 4, 0)
print(tuple(fake.shape), fake.dtype)
try:
    torch.ops.lora_moe.route(torch.zeros(5), None, None, 4, 0)
except (TypeError, ValueError) as error:
    print(error)
"""
    done = run(script, library, stubs_first)
    assert done.stdout.splitlines()[0] == "(9, 11) torch.int32"
    assert done.stdout.splitlines()[1].startswith("topk_ids: got")
    assert "lora_moe" not in done.stderr, "nothing is defined twice and no kernel overridden"


@pytest.mark.parametrize("wanted", [True, False])
def test_a_built_package_loads_it(library: Path, tmp_path: Path, wanted: bool) -> None:
    shutil.copytree(ROOT / "torch_lora_moe", tmp_path / "torch_lora_moe", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(library, tmp_path / "torch_lora_moe")
    script = """
import torch_lora_moe.native
from torch_lora_moe.testing import Case, check_layer, make_inputs
inputs = make_inputs(Case())
check_layer(inputs, inputs.run())
print(torch_lora_moe.__file__, len(torch_lora_moe.native.KERNELS))
"""
    done = run(script, folder=tmp_path, environment={"LORA_MOE_STUBS": str(int(wanted))})
    assert done.stdout.split() == [str(tmp_path / "torch_lora_moe" / "__init__.py"), "5" if wanted else "0"]


def test_nothing_of_python_is_linked(library: Path) -> None:
    data = library.read_bytes()
    assert b"libpython" not in data
    assert b"PyObject" not in data


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="LORA_MOE_BUILD_STUBS=1"):
        native.load(tmp_path / native.LIBRARY)


@pytest.mark.usefixtures("kernels")
class TestKernels:
    """The C++ kernels against the oracle."""

    def test_layer(self, variant: Case) -> None:
        inputs = make_inputs(variant)
        check_layer(inputs, inputs.run())

    def test_they_are_the_ones_that_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unexpected(*args: object) -> None:
            raise AssertionError("the torch kernel ran")

        for name in ("route", "lora_shrink", "lora_expand_add_", "lora_add_", "fused_experts"):
            monkeypatch.setattr(f"torch_lora_moe.cpu.{name}", unexpected)
        make_inputs(Case()).run(routing_cache={})

    @pytest.mark.parametrize("sizes", [(1000, 600), (33, 17), (16, 16), (4, 2)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_sizes(self, sizes: tuple[int, int], dtype: torch.dtype, transposed: bool) -> None:
        hidden, inner = sizes
        case = Case(9, 2, 3, hidden_size=hidden, intermediate_size=inner, dtype=dtype, transposed=transposed, bias=True)
        inputs = make_inputs(case)
        check_layer(inputs, inputs.run())

    def test_route(self, variant: Case) -> None:
        inputs = make_inputs(variant)
        enabled = inputs.lora.adapter_enabled if inputs.lora is not None else None
        args = (inputs.topk_ids, inputs.token_lora_mapping, enabled, variant.num_experts, variant.max_loras)
        assert torch.equal(torch.ops.lora_moe.route(*args), cpu.route(*args))

    # on both sides of each height's end: 11.5, 28 and 60 pairs an expert
    @pytest.mark.parametrize("pairs", [30, 46, 47, 80, 112, 113, 180, 240, 241, 400])
    def test_tiles_as_high_as_in_python(self, pairs: int) -> None:
        ids = torch.randint(0, 4, (pairs, 1), generator=torch.Generator().manual_seed(pairs))
        # one expert has more than a tile of any height, up to its pairs
        ids[: pairs * 2 // 3] = 1
        args = (ids, None, None, 4, 0)
        assert torch.equal(torch.ops.lora_moe.route(*args), cpu.route(*args))

    @pytest.mark.parametrize("split_k", [1, 3, 64])
    def test_shrink_and_expand(self, split_k: int) -> None:
        inputs = make_inputs(Case(hidden_size=70))
        assert inputs.lora is not None
        tokens = (inputs.topk_ids, inputs.token_lora_mapping, None, None)
        planes = torch.ops.lora_moe.lora_shrink(inputs.hidden_states, inputs.lora.gate_up_a, *tokens, 6, split_k)
        exact, low = (
            reference.lora_shrink(inputs.hidden_states, inputs.lora.gate_up_a, inputs.topk_ids, inputs.slots, 6, dtype)
            for dtype in (torch.float64, torch.float32)
        )
        assert_within_budget(planes.sum(0), exact, low, torch.float32)
        # the strided half of a larger tensor, in place
        whole = torch.zeros(17, 2, 100)
        expected = torch.zeros(17, 2, 48)
        b = inputs.lora.gate_up_b
        torch.ops.lora_moe.lora_expand_add_(whole[:, :, 7:55], planes, b, *tokens, None, 6, 2)
        torch.ops.lora_moe.lora_add_(expected, inputs.hidden_states, inputs.lora.gate_up_a, b, *tokens, None, 2)
        assert torch.allclose(whole[:, :, 7:55], expected, rtol=1e-5, atol=1e-5)
        assert not whole[:, :, :7].any()
        assert not whole[:, :, 55:].any()

    def test_skipped_weights_are_never_read(self) -> None:
        inputs = make_inputs(Case(mapping=(1,) * 17))
        expected = inputs.run()
        assert inputs.lora is not None
        for part in inputs.lora[:4]:
            assert part is not None
            part[0], part[2] = NAN, NAN
        assert torch.equal(inputs.run(), expected)
