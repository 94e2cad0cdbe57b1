"""expedit clusters and rebuilds as its paper says, in whole models, on an oracle that goes token by token."""

import math
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from token_oracle import images, logits_with, through, vit
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.functional.clustering import cluster, means_of_parts, near
from martlet.functional.tokens import Reduction, merge
from martlet.measure.macs import macs
from martlet.source import load_model
from martlet.techniques.tokens.expedit import Expedit

GRID = (5, 3)
DENSE = {"class_token": False, "global_pool": "avg"}


def clusters_by_hand(
    features: list[Tensor], clusters: tuple[int, int], iterations: int, temperature: float, reach: int
) -> tuple[list[list[float]], list[Tensor]]:
    """Shares of each token (N, M), and centroids."""
    (height, width), (h, w) = GRID, clusters
    places = [(y, x) for y in range(height) for x in range(width)]
    cells = [(i, j) for i in range(h) for j in range(w)]
    centroids = []
    for i, j in cells:
        rows = range(math.floor(i * height / h), math.ceil((i + 1) * height / h))
        columns = range(math.floor(j * width / w), math.ceil((j + 1) * width / w))
        part = [features[y * width + x] for y in rows for x in columns]
        centroids.append(sum(part) / len(part))
    for _ in range(iterations):
        shares = []
        for (y, x), feature in zip(places, features, strict=True):
            own = (math.floor(y * h / height), math.floor(x * w / width))
            weights = [
                math.exp(-float((feature - centroid).square().sum()) / temperature)
                if max(abs(i - own[0]), abs(j - own[1])) <= reach
                else 0.0
                for (i, j), centroid in zip(cells, centroids, strict=True)
            ]
            shares.append([weight / sum(weights) for weight in weights])
        totals = [sum(share[m] for share in shares) for m in range(len(cells))]
        centroids = [
            sum(share[m] * feature for share, feature in zip(shares, features, strict=True)) / totals[m]
            for m in range(len(cells))
        ]
    return shares, centroids  # type: ignore[return-value]


def normalized(x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() / math.sqrt(len(x))


def logits_by_hand(
    module: VisionTransformer,
    clusters: tuple[int, int],
    alpha: int,
    iterations: int = 5,
    temperature: float = 0.02,
    reach: int = 2,
    neighbours: int = 20,
) -> Tensor:
    out, prefix = [], module.num_prefix_tokens
    with torch.no_grad():
        for image in module.norm_pre(module._pos_embed(module.patch_embed(images()))):
            tokens = [(1.0, x) for x in image]
            for block in module.blocks[:alpha]:
                tokens = through(block, tokens, None, False)
            values = [x for _, x in tokens]
            features = [normalized(x) for x in values[prefix:]]
            shares, centroids = clusters_by_hand(features, clusters, iterations, temperature, reach)
            tokens = tokens[:prefix]
            for m in range(len(centroids)):
                total = sum(share[m] for share in shares)
                tokens.append(
                    (1.0, sum(s[m] * x for s, x in zip(shares, values[prefix:], strict=True)) / total)  # type: ignore[arg-type]
                )
            for block in module.blocks[alpha:]:
                tokens = through(block, tokens, None, False)
            if module.global_pool == "token":
                out.append(module.head(module.norm(tokens[0][1])))
                continue
            rebuilt = []
            for feature in features:
                far = sorted((float((feature - c).square().sum()), m) for m, c in enumerate(centroids))[:neighbours]
                weights = [math.exp(-distance / temperature) for distance, _ in far]
                parts = [w * tokens[prefix + m][1] for w, (_, m) in zip(weights, far, strict=True)]
                rebuilt.append(sum(parts) / sum(weights))
            out.append(module.head(module.fc_norm(torch.stack(rebuilt).mean(0))))
    return torch.stack(out)


@pytest.mark.parametrize("kwargs", [{}, DENSE, {"reg_tokens": 2, "qk_norm": True}])
@pytest.mark.parametrize(("clusters", "alpha"), [((3, 2), 2), ((4, 1), 0), ((5, 2), 4)])
def test_expedit_is_the_papers(kwargs: dict[str, object], clusters: tuple[int, int], alpha: int) -> None:
    module = vit(**kwargs)
    settings: dict[str, Any] = {"iterations": 3, "reach": 1, "temperature": 0.3, "neighbours": 2}
    found = logits_with(module, Expedit(clusters=clusters, alpha=alpha, **settings))
    torch.testing.assert_close(found, logits_by_hand(module, clusters, alpha, **settings), rtol=1e-9, atol=1e-9)


def test_this_can_fail() -> None:
    module = vit(**DENSE)
    right: dict[str, Any] = {
        "clusters": (3, 2),
        "alpha": 2,
        "iterations": 3,
        "reach": 1,
        "temperature": 0.3,
        "neighbours": 2,
    }
    found = logits_with(module, Expedit(**right))
    faults: tuple[dict[str, Any], ...] = (
        {"clusters": (2, 3)},
        {"alpha": 3},
        {"iterations": 2},
        {"reach": 0},
        {"temperature": 0.2},
        {"neighbours": 3},
    )
    for wrong in faults:
        assert not torch.allclose(found, logits_by_hand(module, **(right | wrong)), rtol=1e-5, atol=1e-5), wrong


def test_as_many_clusters_as_patches_is_the_untouched_model_to_the_bit() -> None:
    module = vit(**DENSE)
    with torch.no_grad():
        assert torch.equal(logits_with(module, Expedit(clusters=GRID)), module(images()))


def test_parts_and_neighbours_are_constants_of_the_grids() -> None:
    x = torch.randn(2, 4, 7, 5)
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, (3, 4))
    torch.testing.assert_close(means_of_parts((7, 5), (3, 4)) @ x.flatten(2).mT, pooled.flatten(2).mT)
    assert near((4, 2), (2, 2), 0).sum(0).tolist() == [1] * 8
    assert near((4, 2), (2, 2), 1).all()
    shares = cluster(x.flatten(2).mT, (7, 5), (3, 4), 2, 1.0, 1)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 35))


def test_a_cluster_that_no_token_joins_is_the_mean_of_its_part() -> None:
    x = torch.tensor([-10.0, 20.0, -10.0, -10.0, 20.0, 20.0])[None, :, None]
    shares = cluster(x, (1, 6), (1, 3), iterations=2, temperature=1e-3, reach=2)
    centroids, sizes = merge(x, Reduction(range(6), shares))
    assert sizes[0].tolist() == pytest.approx([0, 3, 3])
    assert centroids[0, :, 0].tolist() == pytest.approx([5, -10, 20])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": 16}, r"clusters is 16; it can be a grid, down and across \(clusters: \[16, 16\]\)"),
        ({"clusters": [4, 0]}, r"clusters is \[4, 0\]; it can be a grid"),
        ({"alpha": -1}, "alpha is -1; it can be the number of blocks"),
        ({"iterations": 0}, "iterations is 0; it can be 1 or more"),
        ({"temperature": 0.0}, "temperature is 0.0; it can be a positive number"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Expedit(**settings)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"clusters is \[6, 2\] at blocks\.2, where the patches of vit stand 5 by 3"):
        logits_with(vit(), Expedit(clusters=[6, 2]))
    with pytest.raises(RecipeError, match="alpha is 5; vit has 5 blocks, of which one must be left"):
        logits_with(vit(), Expedit(alpha=5))
    with pytest.raises(RecipeError, match="vit gets 15 patches, which aren't the grid that it was made for"):
        logits_with(vit(img_size=(48, 24), dynamic_img_size=True), Expedit())


@pytest.mark.slow
def test_at_384_pixels_it_costs_less_by_what_the_paper_needs_for_its_speed() -> None:
    model = load_model("timm:deit_tiny_patch16_224", model_kwargs={"img_size": 384})
    whole = macs(model)
    Expedit().apply_(model, None)  # type: ignore[arg-type]
    assert whole > 1.4 * macs(model)
