import torch

from martlet.models.random_weights import randomize_
from martlet.source import load_model


def test_a_copy_forgets_what_followed_from_the_weights():
    """In evaluation mode timm's EfficientViT keeps its attention biases as they are added, gradient and all."""
    model = load_model("timm:efficientvit_m0", num_classes=5, weights="random", seed=0)
    x = torch.randn(2, 3, *model.preprocess.size)
    randomize_(model.module, images=x)
    model.module.eval().head.drop.train()
    logits = model.module(x)
    assert logits.requires_grad
    twin = model.copy()
    assert [part.training for part in twin.module.modules()] == [part.training for part in model.module.modules()]
    assert not twin.module.training
    assert twin.module.head.drop.training
    with torch.no_grad():
        for name, parameter in twin.module.named_parameters():
            if name.endswith("attention_biases"):
                parameter += torch.randn(parameter.shape)
        twin.module.eval()
        model.module.eval()
        assert not torch.allclose(twin.module(x), logits, rtol=0.01)
        assert torch.equal(model.module(x), logits)
