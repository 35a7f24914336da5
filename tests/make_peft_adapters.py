"""Makes the adapters of ``tests/fixtures/peft``: what a version of PEFT saves, and what it computes with it.

Run it with each version in turn, installed into a folder of its own and first on the path::

    pip install --no-deps --target FOLDER peft==0.18.1
    PYTHONPATH=FOLDER python tests/make_peft_adapters.py

Each adapter comes with the logits of PEFT's own forward for `TOKENS`, which the tests compare with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from models import gpt_oss, qwen3_moe, with_peft
from safetensors.torch import save_file
from transformers import PreTrainedModel

FIXTURES = Path(__file__).parent / "fixtures" / "peft"
TOKENS = [[3, 17, 42, 5, 60, 11]]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
# name of a case: model, options of its adapter
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "qwen3_moe": (qwen3_moe, {"r": 2, "lora_alpha": 4}),
    # twice 16 is the hidden size: the gate_up projection is square
    "square": (lambda: qwen3_moe(moe_intermediate_size=16), {"r": 2}),
    "square_gate_up": (lambda: qwen3_moe(moe_intermediate_size=16), {"r": 2, "target_parameters": [GATE_UP]}),
    "only_down": (qwen3_moe, {"r": 2, "target_parameters": [DOWN]}),
    "gpt_oss": (gpt_oss, {"r": 2, "use_rslora": True}),
}


def main() -> None:
    """Writes the adapters of the installed version."""
    folder = FIXTURES / peft.__version__
    shutil.rmtree(folder, ignore_errors=True)
    for name, (build, options) in CASES.items():
        torch.manual_seed(0)
        model = with_peft(build(), {name: options}, folder)
        with torch.no_grad():
            logits = model(torch.tensor(TOKENS)).logits
        save_file({"logits": logits.contiguous()}, folder / name / "logits.safetensors")
    (folder / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
