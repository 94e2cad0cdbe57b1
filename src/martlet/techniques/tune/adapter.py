"""adapter: a small bottleneck behind each MLP is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from martlet.core.errors import RecipeError
from martlet.nn.side import Bottleneck
from martlet.training.inserted import Inserted
from martlet.vit.view import VitView


@dataclass(frozen=True, kw_only=True)
class Adapter(Inserted):
    """Learn a task by a bottleneck behind each MLP, and the classifier; the bottlenecks stay.

    What tasks share stays the same bit for bit, and each has a small file of its own. `lora` is as good, and costs
    nothing at run time.

    Args:
        width: features inside a bottleneck.

    Shape: none changes.
    Needs: images with labels (`--train`); a plain vision transformer.
    Cost: a step is a little cheaper than of `finetune`; at run time two thin Linears more in each block.
    Paper: Houlsby et al., Parameter-Efficient Transfer Learning, 2019, arXiv 1902.00751; Pfeiffer et al., 2021, arXiv
        2005.00247, for one bottleneck a block.
    Differs: norms aren't learned. The texts weren't read again.
    Raises: RecipeError for a setting out of range, images without labels, or a model that has bottlenecks or is no
        plain ViT; SourceError for one that isn't a transformer; and as the loop does.
    """

    name: ClassVar[str] = "adapter"
    summary: ClassVar[str] = "learn a task by a bottleneck behind each MLP"
    paper: ClassVar[str] = "Houlsby et al., Parameter-Efficient Transfer Learning, 2019, arXiv 1902.00751"
    layer: ClassVar[type[nn.Module]] = Bottleneck
    learned: ClassVar[tuple[str, ...]] = ("down", "up")

    width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise RecipeError(f"adapter: width is {self.width}; it has to be more than 0")

    def layers(self, vit: VitView) -> Mapping[str, nn.Module]:
        return {
            block.mlp.name: Bottleneck(block.mlp.module, block.mlp.fc2.weight.shape[0], self.width)
            for block in vit.blocks
        }
