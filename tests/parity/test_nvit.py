"""nvit ranks by squares of sums of weight times gradient, less latency, as loops over single weights do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from martlet.core import pipeline, report
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.source import load_model
from martlet.techniques.prune.nvit import NViT
from martlet.vit import view
from martlet.vit.latency_law import fit_law
from martlet.vit.structure import BlockShape, shape_of

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
UNITS, DIM = 24, 4


class Noise:
    num_images = 6

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(3, 3, 16, 16, generator=generator)


def model() -> Model:
    torch.manual_seed(0)
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, seed=3)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.normal_(0, 0.5)
    return found


def saliency(block: int, squared_sum: bool = True) -> list[float]:
    """Of each hidden unit, the sum over batches of (sum of g w)²; as a fault, of the sum of (g w)²."""
    module, totals = model().module.double(), [0.0] * UNITS
    for images in Noise():
        module.zero_grad()
        logits = module(images.double())
        loss: Any = -sum(logits[i].log_softmax(0)[int(logits[i].argmax())] for i in range(len(logits))) / len(logits)
        loss.backward()
        mlp = module.blocks[block].mlp  # type: ignore[index, union-attr]
        with torch.no_grad():
            for unit in range(UNITS):
                products = [float(mlp.fc1.bias[unit] * mlp.fc1.bias.grad[unit])]
                for feature in range(12):
                    products.append(float(mlp.fc1.weight[unit, feature] * mlp.fc1.weight.grad[unit, feature]))
                    products.append(float(mlp.fc2.weight[feature, unit] * mlp.fc2.weight.grad[feature, unit]))
                totals[unit] += sum(products) ** 2 if squared_sum else sum(p**2 for p in products)
    return totals


def pruned(**settings: object) -> Model:
    technique = NViT(multiple=2, repair=False, **settings)  # type: ignore[arg-type]
    return pipeline.run(model(), Recipe((technique,)), Context(images=Noise(), engine="openvino"))


@pytest.mark.parametrize("squared_sum", [True, pytest.param(False, id="a fault in the oracle")])
def test_units_of_all_blocks_are_ranked_together(squared_sum: bool) -> None:
    """Always those two units of one block go whose saliency is least, wherever they are."""
    found = pruned(prune_ratio=0.1, groups=("hidden",), latency_regularization=0.0).module
    left = [found.blocks[i].mlp.fc1.out_features for i in range(2)]  # type: ignore[index, union-attr]
    order = [sorted(range(UNITS), key=saliency(i, squared_sum).__getitem__) for i in range(2)]
    values = [saliency(i, squared_sum) for i in range(2)]
    gone = [0, 0]
    while sum(gone) < 2 * UNITS - sum(left):
        cost = [sum(values[i][u] for u in order[i][gone[i] : gone[i] + 2]) for i in range(2)]
        gone[0 if cost[0] < cost[1] else 1] += 2
    kept = [sorted(order[i][gone[i] :]) for i in range(2)]
    whole = model().module
    same = [UNITS - n for n in gone] == left and all(
        torch.equal(found.blocks[i].mlp.fc2.weight, whole.blocks[i].mlp.fc2.weight[:, kept[i]])  # type: ignore[index, union-attr]
        for i in range(2)
    )
    assert same == squared_sum


def rows(hidden_ms: float, qk_ms: float) -> list[dict[str, float]]:
    """Blocks that take 1 ms, and something for each unit and each dimension of q and k."""
    return [
        {"num_heads": h, "qk_dim": d, "v_dim": e, "hidden": u, "latency_ms": 1 + u * hidden_ms + h * d * qk_ms}
        for h in (1, 2, 3)
        for d in (2, 4)
        for e in (2, 4)
        for u in (8, 24)
    ]


def table(path: Path, **changes: object) -> str:
    cpu = report.environment()["cpu"]
    path.write_text(json.dumps({"engine": "openvino", "cpu": cpu, "blocks": rows(0.01, 1e-6)} | changes))
    return str(path)


def test_the_law_is_the_one_that_blocks_were_made_by() -> None:
    law = fit_law(rows(0.01, 0.02))
    assert law(BlockShape(2, 3, 4, 16)) == pytest.approx(1 + 0.16 + 0.12)
    noisy = rows(0.01, 0.02)
    noisy[3]["latency_ms"] *= 1.5
    with pytest.raises(RecipeError, match="doesn't hold together"):
        fit_law(noisy)
    with pytest.raises(RecipeError, match="needs blocks that differ in every size; this one has 2 rows"):
        fit_law(rows(0.01, 0.02)[:2])


def test_what_saves_latency_goes_first(tmp_path: Path) -> None:
    """Where hidden units take all of it, more of them go than by MACs."""
    settings = {"prune_ratio": 0.15, "groups": ("qk", "hidden"), "latency_regularization": 1e3}
    by_table = pruned(latency_table=table(tmp_path / "table.json"), **settings)
    other = table(tmp_path / "other.json", blocks=rows(1e-6, 0.05))
    against = pruned(latency_table=other, **settings)
    shapes = [[shape_of(block) for block in view(each.module).blocks] for each in (by_table, against)]
    assert [shape.qk_dim for shape in shapes[0]] == [4, 4]
    assert [shape.qk_dim for shape in shapes[1]] == [2, 2]
    assert sum(shape.hidden for shape in shapes[0]) < sum(shape.hidden for shape in shapes[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "onnxruntime"}, "measured on another engine: onnxruntime, and this is openvino"),
        ({"cpu": "Z80"}, "measured on another machine: Z80, and this is"),
        ({"blocks": []}, "needs blocks that differ"),
    ],
)
def test_tables_of_other_engines_and_machines_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    technique = NViT(latency_table=table(tmp_path / "table.json", **changes))
    with pytest.raises(RecipeError, match=message):
        technique.check_engine(Context(engine="openvino"))


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    for name in ("missing.json", "list.json"):
        with pytest.raises(RecipeError, match=f"{name} is no latency table .*parts table makes one"):
            NViT(latency_table=str(tmp_path / name)).check_engine(Context(engine="openvino"))
    with pytest.raises(RecipeError, match="latency_regularization is at least 0"):
        NViT(latency_regularization=-1.0)
