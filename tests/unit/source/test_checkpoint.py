import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from martlet.core.errors import SourceError
from martlet.source import checkpoint, load_model


class Net(nn.Module):
    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, num_classes)


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def filled(path) -> nn.Module:
    net = Net()
    assert path.name in checkpoint.load_(net, path)
    return net


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.bin", "a.ckpt"])
def test_every_format(tmp_path, name):
    net, path = Net(), tmp_path / name
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(net.state_dict(), path)
    assert same(filled(path), net)
    assert not same(Net(), net)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("wrap", [(), ("state_dict",), ("model",), ("model_ema",), ("state_dict", "model")])
def test_what_training_scripts_save(tmp_path, prefix, wrap):
    net = Net()
    state = {prefix + key: value for key, value in net.state_dict().items()}
    for key in wrap:
        state = {"epoch": 3, "args": argparse.Namespace(lr=0.1), key: state}
    torch.save(state, tmp_path / "last.pth")
    assert same(filled(tmp_path / "last.pth"), net)


def test_the_counter_of_batch_norm_may_lack(tmp_path):
    net = Net()
    save_file({k: v for k, v in net.state_dict().items() if "num_batches" not in k}, tmp_path / "a.safetensors")
    assert same(filled(tmp_path / "a.safetensors"), net)


def test_keys_that_do_not_fit_are_named_and_counted(tmp_path):
    state = Net(num_classes=9).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    before = Net()
    kept = {key: value.clone() for key, value in before.state_dict().items()}
    with pytest.raises(
        SourceError, match=r"2 of another shape \(head.weight \(9, 4\) where the model has \(5, 4\)"
    ) as e:
        checkpoint.load_(before, tmp_path / "a.safetensors")
    assert "--num-classes 9" in str(e.value)
    assert all(torch.equal(kept[key], value) for key, value in before.state_dict().items())

    del state["conv.bias"], state["head.weight"], state["head.bias"]
    save_file({**state, "neck.weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(
        SourceError, match=r"3 missing \(conv.bias, head.weight, head.bias\); 1 unexpected \(neck.weight"
    ):
        checkpoint.load_(Net(), tmp_path / "b.safetensors")


def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("net.pth", Net()), ("runs.pt", {"state_dict": Runs()})):
        torch.save(value, name)
        with pytest.raises(SourceError, match=r"needs code to load .*refused.*safetensors.torch.save_file") as caught:
            checkpoint.read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with open("plain.pth", "wb") as file:
        pickle.dump(Runs(), file)
    with pytest.raises(SourceError):
        checkpoint.read(tmp_path / "plain.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("kept", [0, 10, 200, 0.5, 0.99])
def test_a_damaged_file_is_told(tmp_path, name, kept):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(Net().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(SourceError, match="damaged") as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_no_weights_is_told(tmp_path):
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "a.pth")
    with pytest.raises(SourceError, match="its keys are epoch, optimizer"):
        checkpoint.read(tmp_path / "a.pth")
    torch.save([torch.zeros(1)], tmp_path / "b.pth")
    with pytest.raises(SourceError, match="holds a list"):
        checkpoint.read(tmp_path / "b.pth")
    (tmp_path / "c.npz").write_bytes(b"")
    with pytest.raises(SourceError, match=r"not from '.npz'"):
        checkpoint.read(tmp_path / "c.npz")


def test_a_wrong_name_shows_the_nearest(tmp_path):
    save_file(Net().state_dict(), tmp_path / "vit_tiny.safetensors")
    with pytest.raises(SourceError, match=r"did you mean vit_tiny.safetensors\?"):
        checkpoint.read(tmp_path / "vit_tyni.safetensors")


def test_timm_renames_and_resamples_its_own_checkpoints(tmp_path):
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    small = load_model("timm:vit_tiny_patch16_224", model_kwargs={"img_size": 32, **shape}, num_classes=5)
    path = tmp_path / "small.safetensors"
    save_file(small.module.state_dict(), path)
    large = load_model(
        "timm:vit_tiny_patch16_224", model_kwargs={"img_size": 64, **shape}, num_classes=5, weights=path, seed=1
    )
    state, expected = large.module.state_dict(), small.module.state_dict()
    assert torch.equal(state["blocks.0.attn.qkv.weight"], expected["blocks.0.attn.qkv.weight"])
    assert state["pos_embed"].shape == (1, 65, 32)
    assert torch.equal(state["pos_embed"][:, 0], expected["pos_embed"][:, 0])


def test_weights_with_nan_are_told(tmp_path):
    from martlet.core.errors import NumericsError

    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=5)
    state = model.module.state_dict()
    state["blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(NumericsError, match="NaN"):
        load_model(
            "timm:vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=5, weights=tmp_path / "nan.safetensors"
        )
