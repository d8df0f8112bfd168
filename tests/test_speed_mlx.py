"""studies/speed_mlx.py: every side is asked for the same number of tokens, of the same weights."""

import pytest
import torch

pytest.importorskip("mlx_lm")
from studies import speed_mlx as study  # noqa: E402


def test_all_sides_run_on_one_folder(tmp_path, monkeypatch):
    """The jobs assert themselves that each has made G x T tokens."""
    for name, n in (("STEPS", 1), ("G", 2), ("T", 3)):
        monkeypatch.setattr(study, name, n)
    study.write_model(str(tmp_path), study.SMALL | {"num_hidden_layers": 1}, torch.float32)
    for job in (study.sampling_ours, study.sampling_generate, study.sampling_batch, study.step_ours, study.step_torch):
        seconds, = job(str(tmp_path))
        assert seconds > 0
