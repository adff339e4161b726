"""The same rounds on a CUDA device: near the CPU's in float32, and sound in bfloat16."""

import pytest
import torch

from bellwether.recipe.file import load_recipe
from bellwether.runner.run import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
FIELDS = ["federation.rounds=2", "lora.dropout=0", "evaluation.max_rows_per_category=10"]


def two_rounds(folder, *fields):
    return run(load_recipe(None, [*FIELDS, f"output.folder={folder}", *fields]))


def test_two_rounds_on_cuda_end_near_those_on_the_cpu(tmp_path):
    cpu = two_rounds(tmp_path / "cpu", "model.device=cpu")
    cuda = two_rounds(tmp_path / "cuda", "model.device=cuda")
    assert cuda.before.loss == pytest.approx(cpu.before.loss, rel=1e-3)
    assert cuda.after.loss == pytest.approx(cpu.after.loss, rel=0.02)


def test_two_rounds_in_bfloat16_with_dropout_learn(tmp_path):
    result = two_rounds(tmp_path / "bf16", "model.device=cuda", "model.dtype=bfloat16", "lora.dropout=0.05")
    assert result.after.loss < 0.7 * result.before.loss


def test_going_on_with_a_run_on_cuda_ends_with_the_same_adapter(tmp_path):
    class Stopped(Exception):
        pass

    def stop(event):
        if getattr(getattr(event, "record", None), "round", 0) == 1:
            raise Stopped

    whole = two_rounds(tmp_path / "whole", "model.device=cuda")
    with pytest.raises(Stopped):
        run(load_recipe(None, [*FIELDS, f"output.folder={tmp_path / 'part'}", "model.device=cuda"]), watch=stop)
    rest = run(resume=tmp_path / "part")
    for key, value in whole.adapter.tensors.items():
        torch.testing.assert_close(torch.from_numpy(rest.adapter.tensors[key]), torch.from_numpy(value))
