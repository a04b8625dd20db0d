"""``opticnerve verify`` on real stacks: equal for what is served, not for anything else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from opticnerve.cli import commands
from opticnerve.verification.cases import KINDS
from tests.checkpoints import DEMO

CASES = 4 * len(KINDS)
FEW = ["--cases", str(CASES), "--max-tokens", "4", "--dtype", "float32", "--json"]


def verify(capsys, *argv, status):
    assert commands.main(["verify", *map(str, argv), *FEW]) == status
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


@pytest.mark.slow
def test_a_running_stack_is_audited(stack, tmp_path, capsys):
    told = verify(capsys, "--against", stack.url, status=0)
    assert told["equal"]
    rows = {"cosine": 0.99999, "difference": 1e-3}
    assert told["rule"] == {"max_gap": 1e-3, "max_drift": 1e-3, "rows": rows}
    kinds = told["kinds"].values()
    assert len(kinds) == len(KINDS) and all(kind["cases"] == 4 for kind in kinds)
    assert sum(kind["tokens"] for kind in kinds) == CASES * 2 * 4
    assert not any(kind["pictures"] or kind["close_calls"] for kind in kinds)
    assert all(0 < kind["largest_drift"] < 1e-3 for kind in kinds)

    other = shutil.copytree(DEMO, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(0)
    name = next(name for name in weights if name.endswith("0.mlp.down_proj.weight"))
    weights[name] = torch.randn_like(weights[name])
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    told = verify(capsys, other, "--against", stack.url, status=1)
    assert not told["equal"]
    assert any(
        "whose logit leads by" in f for kind in told["kinds"].values() for f in kind["faults"]
    )


@pytest.mark.slow
def test_a_stack_of_its_own_is_compared_with_its_rows(capsys):
    told = verify(capsys, "--max-num-batched-tokens", "24", status=0)
    kinds = told["kinds"]
    assert kinds["several pictures"]["pictures"] == 12 and kinds["text alone"]["pictures"] == 0
    assert min(kind["least_cosine"] for kind in kinds.values()) > 0.99999
    assert 0 < max(kind["largest_difference"] for kind in kinds.values()) < 1e-3
