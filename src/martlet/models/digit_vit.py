"""A small vision transformer for handwritten digits: timm's plain ViT, trained by `examples/train_digits.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

__all__ = ["digit_vit"]

default_cfgs = generate_default_cfgs(
    {
        "digit_vit": {
            "file": str(Path(__file__).parent / "weights" / "digit_vit.safetensors"),
            "num_classes": 10,
            "label_names": tuple("0123456789"),
            "input_size": (3, 28, 28),
            "crop_pct": 1.0,
            "mean": (0.1307, 0.1307, 0.1307),  # of MNIST's pixels
            "std": (0.3081, 0.3081, 0.3081),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def digit_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT with 4 × 4 patches of 28 × 28 images (49 tokens and a class token), dimension 256, 4 blocks of 4 heads.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929, section 3.1. 3.2 M parameters.

    Shape: images (B, 3, 28, 28) -> logits (B, 10).
    """
    dims: dict[str, Any] = {"img_size": 28, "patch_size": 4, "embed_dim": 256, "depth": 4, "num_heads": 4}
    return build_model_with_cfg(
        VisionTransformer, "digit_vit", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **(dims | kwargs)
    )
