"""soup: the mean of several fine-tunes' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.merging.technique import Finetune, Merging, State, averaged


@dataclass(frozen=True, kw_only=True)
class Soup(Merging):
    """Average the weights of several fine-tunes of one model, which often is better than any of them.

    The right choice for fine-tunes on the same task with other settings or seeds. Models of different tasks lose much
    of what they learned by it; `ties`, `opcm` and `fisher` lose less. Models that weren't tuned from the same one give
    nothing of use.

    Shape: none changes.
    Needs: the fine-tunes (`martlet merge`); no images.
    Cost: reading them, one at a time; nothing at run time.
    Paper: Wortsman et al., Model soups, 2022, arXiv 2203.05482, uniform soup.
    Differs: the greedy soup, which tries each on images that are held back, isn't there.
    Raises: RecipeError without fine-tunes.
    """

    name: ClassVar[str] = "soup"
    summary: ClassVar[str] = "the mean of several fine-tunes' weights"
    paper: ClassVar[str] = "Wortsman et al., Model soups, 2022, arXiv 2203.05482"

    def merge(self, base: State, finetunes: Sequence[Finetune], model: Model, context: Context) -> State:
        return averaged(base, finetunes)
