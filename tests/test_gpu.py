"""The same rounds on a CUDA device: those of the CPU but for rounding, and sound in bfloat16."""

import numpy as np
import pytest
import torch
from rounding import FLOAT64, assert_as_near, gamma
from tiny_models import let_runs_compute_in_float64

from bellwether.recipe.file import load_recipe
from bellwether.runner.run import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
FIELDS = ["federation.rounds=2", "lora.dropout=0", "evaluation.max_rows_per_category=10"]


def two_rounds(folder, *fields):
    return run(load_recipe(None, [*FIELDS, f"output.folder={folder}", *fields]))


def values(result):
    """The numbers of the adapter that a run ends with, as one vector."""
    return np.concatenate([value.ravel() for value in result.adapter.tensors.values()])


def test_in_float64_two_rounds_on_cuda_end_with_the_adapter_of_the_cpu(tmp_path, monkeypatch):
    let_runs_compute_in_float64(monkeypatch)
    cpu = two_rounds(tmp_path / "cpu", "model.device=cpu")
    cuda = two_rounds(tmp_path / "cuda", "model.device=cuda")
    assert values(cuda).dtype == np.float64
    np.testing.assert_allclose(values(cuda), values(cpu), rtol=0, atol=FLOAT64)
    assert cuda.after.loss == pytest.approx(cpu.after.loss, rel=FLOAT64)


def test_in_float32_two_rounds_on_cuda_end_as_near_to_float64_as_on_the_cpu(tmp_path, monkeypatch):
    cpu = two_rounds(tmp_path / "cpu", "model.device=cpu")
    cuda = two_rounds(tmp_path / "cuda", "model.device=cuda")
    let_runs_compute_in_float64(monkeypatch)
    exact = two_rounds(tmp_path / "exact", "model.device=cpu")
    # Sums over 128 numbers, 6 of them in each of 4 layers, over up to 384 and 100 more, and over the logits.
    assert cuda.before.loss == pytest.approx(exact.before.loss, rel=gamma(torch.float32, 4 * (6 * 128 + 484) + 1758))
    assert_as_near(values(cuda), values(cpu), values(exact))
    assert cuda.after.loss < 0.7 * cuda.before.loss


def test_two_rounds_in_bfloat16_with_dropout_learn(tmp_path):
    result = two_rounds(tmp_path / "bf16", "model.device=cuda", "model.dtype=bfloat16", "lora.dropout=0.05")
    assert result.after.loss < 0.7 * result.before.loss


def test_going_on_with_a_run_on_cuda_ends_with_the_same_adapter(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(event):
        if getattr(getattr(event, "record", None), "round", 0) == 1:
            raise Stopped

    let_runs_compute_in_float64(monkeypatch)  # a sum whose order changes from run to run is the same but for last bits
    whole = two_rounds(tmp_path / "whole", "model.device=cuda")
    with pytest.raises(Stopped):
        run(load_recipe(None, [*FIELDS, f"output.folder={tmp_path / 'part'}", "model.device=cuda"]), watch=stop)
    rest = run(resume=tmp_path / "part")
    np.testing.assert_allclose(values(rest), values(whole), rtol=0, atol=FLOAT64)
