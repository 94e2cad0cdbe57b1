import pytest
import torch
from torch import nn

from martlet.measure.size import file_bytes, params, weight_bytes
from martlet.nn.quantizers import ActivationQuantizer, WeightQuantizer


def test_a_plain_module():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert params(module) == 3 * 4 + 4 + 4 + 4
    assert weight_bytes(module) == 4 * (24 + 8) + 8  # running mean and variance, and an int64 counter


def test_shared_tensors_count_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert params(nn.Sequential(first, second)) == 9
    assert weight_bytes(nn.Sequential(first, second)) == 36


def test_quantized_weights_are_params_of_one_byte():
    weight = torch.randn(4, 8)
    module = nn.Module()
    module.weight = WeightQuantizer.round(weight, torch.full((4,), 0.02))
    module.act = ActivationQuantizer(torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8))
    module.bias = nn.Parameter(torch.zeros(4))
    assert params(module) == 32 + 4
    assert weight_bytes(module) == 32 + 4 * 4 + 4 + (4 + 1) + 4 * 4  # codes, scales, zeros; activation; bias


def test_half_precision_is_half():
    assert weight_bytes(nn.Linear(3, 4).to(torch.bfloat16)) * 2 == weight_bytes(nn.Linear(3, 4))


def test_only_the_files_named(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    assert file_bytes(tmp_path, ["a"]) == 5
    assert file_bytes(tmp_path, ["a", "b"]) == 8
    with pytest.raises(FileNotFoundError):
        file_bytes(tmp_path, ["c"])
