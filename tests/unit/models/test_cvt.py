"""The whole model against transformers' own CvT, and how many keys its queries find."""

import re

import pytest
import torch
from families import CLASSES, FAMILIES, images, randomize_
from timm.layers import QuickGELU

from martlet import models
from martlet.models.cvt import ConvProjection

HEADS = (
    (r"stages\.(\d+)\.class_token", r"cvt.encoder.stages.\1.cls_token"),
    (r"stages\.(\d+)\.embed\.0\.", r"cvt.encoder.stages.\1.embedding.convolution_embeddings.projection."),
    (r"stages\.(\d+)\.embed\.1\.", r"cvt.encoder.stages.\1.embedding.convolution_embeddings.normalization."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.", r"cvt.encoder.stages.\1.layers.\2."),
    (r"^norm\.", r"layernorm."),
    (r"^head\.fc\.", r"classifier."),
)
PARTS = {"q": "query", "k": "key", "v": "value"}


def translated(name):
    """The name that transformers gives a parameter."""
    for ours, theirs in HEADS:
        name = re.sub(ours, theirs, name)
    for part, word in PARTS.items():
        at = f"attention.attention.convolution_projection_{word}.convolution_projection."
        name = name.replace(f".{part}.conv.", f".{at}convolution.").replace(f".{part}.norm.", f".{at}normalization.")
        name = name.replace(f".{part}.proj.", f".attention.attention.projection_{word}.")
    for ours, theirs in (
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ):
        name = name.replace(ours, theirs)
    return re.sub(r"(layers\.\d+)\.proj\.", r"\1.attention.output.dense.", name)


def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' isn't installed")
    dims = dict(FAMILIES["cvt_13"].tiny) | {"depths": (1, 2)}  # theirs can't be one block deep after the first stage
    ours = models.create("cvt_13", num_classes=CLASSES, **dims).eval()
    randomize_(ours)
    theirs = transformers.CvtForImageClassification(
        transformers.CvtConfig(
            num_labels=CLASSES,
            patch_sizes=[7, 3],
            patch_stride=[4, 2],
            patch_padding=[2, 1],
            embed_dim=list(dims["dims"]),
            depth=list(dims["depths"]),
            num_heads=list(dims["num_heads"]),
            mlp_ratio=[dims["mlp_ratio"]] * 2,
            cls_token=[False, True],
            attention_drop_rate=[0.0, 0.0],
            drop_rate=[0.0, 0.0],
            drop_path_rate=[0.0, 0.0],
            qkv_bias=[True, True],
            qkv_projection_method=["dw_bn", "dw_bn"],
            kernel_qkv=[3, 3],
            padding_kv=[1, 1],
            stride_kv=[2, 2],
            padding_q=[1, 1],
            stride_q=[1, 1],
        )
    ).eval()
    theirs.load_state_dict({translated(name): value for name, value in ours.state_dict().items()})
    for module in theirs.modules():
        if isinstance(getattr(module, "activation", None), torch.nn.GELU):
            module.activation = QuickGELU()  # the authors' activation
    x = images((32, 48))
    with torch.no_grad():
        logits = theirs(x).logits
        assert (ours(x) - logits).abs().max() < 1e-4 * logits.abs().max()
        assert (ours(x.flip(-1)) - logits).abs().max() > 1e-2 * logits.abs().max()


def test_keys_are_a_quarter_of_the_queries():
    image, token = torch.randn(1, 8, 14, 14), torch.randn(1, 1, 8)
    assert ConvProjection(8, 1)(token, image).shape == (1, 1 + 196, 8)
    assert ConvProjection(8, 2)(token, image).shape == (1, 1 + 49, 8)
