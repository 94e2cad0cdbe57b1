"""resolution: smaller images, and so fewer tokens from the first block on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique
from martlet.vit.image_size import set_image_size_

MULTIPLE = 32
"""Of pixels that a side is, where `ratio` says how many: what patches of 16 and four halvings divide."""


@dataclass(frozen=True, kw_only=True)
class Resolution(Technique):
    """Run the model on smaller images.

    The work falls with the square of the side, in convolutions too, and with more than that in attention. Position
    embeddings are resampled; everything else stays. Without training, accuracy falls fast for a model that was trained
    at one size: of the same work, merging tokens usually loses less. It is the one way to fewer tokens that also takes
    hybrids and windows.

    Args:
        size: pixels of a side. Without it, `ratio` says it.
        ratio: share of each side to remove; what is left is rounded to a multiple of 32. 0 changes nothing.

    Shape: images (B, 3, H, W) get smaller, and so does everything inside; logits stay (B, K).
    Needs: nothing.
    Cost: a forward pass of one image; at run time, less than before.
    Paper: Touvron et al., Fixing the train-test resolution discrepancy, 2019, arXiv 1906.06423; positions: Dosovitskiy
        et al., An Image is Worth 16x16 Words, 2021, arXiv 2010.11929, section 3.2.
    Differs: nothing is fine-tuned at the new size; positions are resampled as timm does, by bicubic interpolation with
        antialiasing.
    Raises: RecipeError for a size that isn't smaller; SourceError for a model that can't take it.
    """

    name: ClassVar[str] = "resolution"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "run on smaller images"
    paper: ClassVar[str] = "Touvron et al., Fixing the train-test resolution discrepancy, 2019, arXiv 1906.06423"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.ALL_TOKENS, Fact.ONE_EXIT})

    size: int = 0
    ratio: float = 0.14

    def __post_init__(self) -> None:
        if self.size < 0:
            raise RecipeError(f"resolution: size is pixels of a side, not {self.size}")
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"resolution: ratio is the share to remove, from 0 to less than 1, not {self.ratio}")

    def space(self) -> Choices:
        return Choices(settings={"ratio": (0.14, 0.28)})

    def check(self, model: Model) -> None:
        self._size(model)

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        size = self._size(model)
        if size != model.preprocess.size:
            set_image_size_(model, size)
        return {"size": list(size)}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        h, w = record["size"]
        set_image_size_(model, (h, w))

    def _size(self, model: Model) -> tuple[int, int]:
        """(H, W) that the images get.

        Raises:
            RecipeError: not smaller than they are.
        """
        h, w = model.preprocess.size
        if not self.size:
            if self.ratio == 0:
                return h, w
            h, w = (max(1, round(side * (1 - self.ratio) / MULTIPLE)) * MULTIPLE for side in (h, w))
        else:
            h, w = round(self.size * h / min(h, w)), round(self.size * w / min(h, w))
        if max(h, w) > max(model.preprocess.size):
            now = " × ".join(map(str, model.preprocess.size))
            raise RecipeError(
                f"resolution: {model.name} takes images of {now} pixels, and {h} × {w} isn't less; give a smaller size"
            )
        return h, w
