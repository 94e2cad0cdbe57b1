"""Dynamic Perceiver: attention both ways is that of the paper, and exits read the code alone, before the rest runs."""

import math

import pytest
import torch
from families import CLASSES, FAMILIES, images, tiny

from martlet import models
from martlet.core.errors import SourceError
from martlet.models.dyn_perceiver import Write
from martlet.nn.latent import Attend, Read, Shrink

NAME = "dyn_perceiver_regnety_008"
SIZE = FAMILIES[NAME].size


def fresh():
    torch.manual_seed(0)
    return models.create(NAME, num_classes=CLASSES, **FAMILIES[NAME].tiny)


def norm(row, layer):
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return [
        (value - mean) / math.sqrt(variance + layer.eps) * w + b
        for value, w, b in zip(row, layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def linear(row, layer):
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [
        sum(w * value for w, value in zip(ws, row, strict=True)) + b
        for ws, b in zip(layer.weight.tolist(), bias, strict=True)
    ]


def attend(layer, tokens, others, heads):
    """One row of tokens at a time, one head at a time: softmax(q (k + position)ᵀ / √D) v, then an MLP; both added."""
    keys = [linear(norm(other, layer.norm_kv), layer.k) for other in others]
    if layer.position is not None:
        keys = [
            [a + b for a, b in zip(k, p, strict=True)] for k, p in zip(keys, layer.position[0].tolist(), strict=True)
        ]
    values = [linear(norm(other, layer.norm_kv), layer.v) for other in others]
    found = []
    for token in tokens:
        query, gathered = linear(norm(token, layer.norm_q), layer.q), []
        each = len(query) // heads
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            scores = [
                math.exp(sum(a * b for a, b in zip(query[part], k[part], strict=True)) / math.sqrt(each)) for k in keys
            ]
            gathered += [
                sum(s * v[part][c] for s, v in zip(scores, values, strict=True)) / sum(scores) for c in range(each)
            ]
        out = [a + b for a, b in zip(token, linear(gathered, layer.proj), strict=True)]
        hidden = [h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in linear(norm(out, layer.norm_mlp), layer.mlp.fc1)]
        found.append([a + b for a, b in zip(out, linear(hidden, layer.mlp.fc2), strict=True)])
    return torch.tensor(found, dtype=torch.float64)


def randomized(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


def test_reading_is_the_papers():
    read = randomized(Read(4, grid=(2, 2), depth=0, num_heads=1))
    x, z = torch.randn(1, 4, 4, 6).double(), torch.randn(1, 3, 4).double()
    seen = x[0] + torch.nn.functional.conv2d(x, read.conv.weight, read.conv.bias, padding=3, groups=4)[0]
    cells = [seen[:, i : i + 2, j : j + 3].mean((1, 2)).tolist() for i in (0, 2) for j in (0, 3)]
    with torch.no_grad():
        found = read(z, x)[0]
    torch.testing.assert_close(found, attend(read.cross, z[0].tolist(), cells, 1))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, attend(read.cross, z[0].tolist(), cells[::-1], 1))


def test_writing_is_the_papers():
    write = randomized(Write(16, 6))
    x, z = torch.randn(1, 16, 2, 3).double(), torch.randn(1, 3, 6).double()
    with torch.no_grad():
        found = write(x, z)[0].flatten(1).mT
    assert write.cross.q.out_features == 2  # an eighth
    torch.testing.assert_close(found, attend(write.cross, x[0].flatten(1).mT.tolist(), z[0].tolist(), 1))


def test_the_code_computes_for_itself_in_heads():
    block = randomized(Attend(6, num_heads=2, mlp_ratio=4.0))
    z = torch.randn(1, 3, 6).double()
    with torch.no_grad():
        found = block(z)[0]
    block.norm_kv = block.norm_q  # its own tokens, by the same norm
    torch.testing.assert_close(found, attend(block, z[0].tolist(), z[0].tolist(), 2))


def test_half_of_the_tokens_go_on():
    assert Shrink(8, 6, 10)(torch.randn(2, 8, 6)).shape == (2, 4, 10)


def test_the_last_exit_is_the_model_and_each_runs_no_more_than_it_reads():
    model, x, ran = fresh().eval(), images(SIZE), []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        exits = model.exits(x)
        first = next(exits)
        assert ran == [0, 1]
        second = next(exits)
        assert ran == [0, 1, 2]
        (last,) = exits
        assert ran == [0, 1, 2, 3]
        assert torch.equal(last, model(x))
    assert first.shape == second.shape == last.shape == (2, CLASSES)
    assert not torch.equal(first, second)


def test_a_surer_exit_is_asked_for_until_one_is():
    model, image = tiny(NAME), images(SIZE, 1)
    with torch.no_grad():
        every = list(model.exits(image))
    sure = [float(logits.softmax(-1).max()) for logits in every]
    assert model.until(image, 0.0)[1] == 0
    logits, number = model.until(image, 1.1)
    assert number == 2
    assert torch.equal(logits, every[2])
    assert model.until(image, sure[0])[1] == 0
    expected = 1 if sure[1] >= sure[0] + 1e-4 else 2
    assert model.until(image, sure[0] + 1e-4)[1] == expected


def test_in_training_the_backbone_has_its_say():
    model = fresh().train()
    every = list(model.exits(images(SIZE)))
    assert len(every) == 4
    sum(logits.square().sum() for logits in every).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("name", ["dyn_perceiver_mobilenetv3_large_100", "dyn_perceiver_resnet18"])
def test_other_hosts_have_the_stages_of_the_authors(name):
    with torch.device("meta"):
        model = models.create(name, depths=(1, 1, 1, 1)).eval()
        stages = model.forward_intermediates(torch.zeros(1, 3, 224, 224), intermediates_only=True)
    sides = [224 // its["reduction"] for its in model.feature_info]
    assert [stage.shape[1:] for stage in stages] == [(c, s, s) for c, s in zip(model.dims[1:], sides, strict=True)]
    dims = {"mobilenetv3": [24, 40, 80, 160, 960], "resnet18": [64, 64, 128, 256, 512]}
    assert model.dims == next(value for key, value in dims.items() if key in name)


def test_a_host_that_cannot_be_cut_is_refused():
    with pytest.raises(SourceError, match=r"no host 'vit_tiny_patch16_224': .* begins with regnet, resnet"):
        models.create(NAME, host="vit_tiny_patch16_224")
