"""`martlet merge`: files of weights and artifacts in, an artifact out that all else takes; and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import save_file

from martlet.cli.options import parse_kwargs
from martlet.source import load_model


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """The model, and two files of weights that came of it."""
    folder = tmp_path_factory.mktemp("tuned")
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=parse_kwargs(tiny[2]), num_classes=10)
    files = []
    for i in range(2):
        torch.manual_seed(i)
        state = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in model.module.state_dict().items()}
        files.append(folder / f"{'ab'[i]}.safetensors")
        save_file(state, files[-1])
    return files


def test_merge_writes_what_is_loaded_and_merged_again(martlet, tiny, tuned, tmp_path):
    from safetensors.torch import load_file

    done = martlet("merge", *tiny[:1], *tuned, *tiny[1:], "--out", tmp_path / "soup", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["recipe"] == "soup"
    states = [load_file(file) for file in tuned]
    merged = load_model(str(tmp_path / "soup")).module.state_dict()
    torch.testing.assert_close(merged["head.weight"], (states[0]["head.weight"] + states[1]["head.weight"]) / 2)
    again = martlet(
        "merge", *tiny[:1], tmp_path / "soup", tuned[0], *tiny[1:], "--method", "opcm | bf16", "--out", tmp_path / "two"
    )
    assert again.status == 0, again.err
    assert "2 fine-tunes by opcm | bf16" in again.out


def test_fisher_takes_images_of_each(martlet, tiny, tuned, tmp_path):
    arguments = ["merge", *tiny[:1], *tuned, *tiny[1:], "--method", "fisher", "--num-images", 2]
    images = ["--images", "martlet:digits-train", "--images", "martlet:digits"]
    done = martlet(*arguments, *images, "--out", tmp_path / "fisher")
    assert done.status == 0, done.err
    bare = martlet(*arguments, "--out", tmp_path / "bare")
    assert bare.status == 2
    assert "fisher needs calibration images" in bare.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "fuse"], "one pass has to merge, and fuse has another number; see: martlet list techniques"),
        (["--method", "soup | ties"], "one pass has to merge"),
        (["--num-classes", 5], "doesn't fit the model: 2 of another shape (head.weight (10, 48)"),
        (
            ["--images", "a", "--images", "b", "--images", "c"],
            "give images once for all 2 fine-tunes, or once for each",
        ),
    ],
)
def test_bad_use_of_merge(martlet, tiny, tuned, tmp_path, more, said):
    done = martlet("merge", *tiny[:1], *tuned, *tiny[1:], "--out", tmp_path / "out", *more)
    assert done.status == 2
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_one_model_is_nothing_to_merge(martlet, tiny, tuned, tmp_path):
    done = martlet("merge", *tiny[:1], tuned[0], *tiny[1:], "--out", tmp_path / "out")
    assert done.status == 2
    assert "merging takes two fine-tunes or more, not 1" in done.err
