"""readout: the last block computes only the tokens that the head reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique
from martlet.vit.tokens import TokenRun, check_global, install_, patches_of, reading, run_from_parts_
from martlet.vit.view import view


@dataclass(frozen=True, kw_only=True)
class Readout(Technique):
    """Leave out what the last block computes for tokens that nobody reads. Exact.

    Where the head reads the class token alone, the last block needs the keys and values of all tokens, but attention,
    projection and MLP of that one only: of twelve blocks, most of one is saved. A head that averages the patches reads
    all of them, and nothing changes. Techniques that reduce tokens do it too.

    Shape: the last block's output is (B, num_read, C) in place of (B, N, C).
    Needs: global attention.
    Cost: a few forward passes of one image of noise; nothing at run time.
    Paper: none; Touvron et al., Going Deeper with Image Transformers, 2021, arXiv 2103.17239, section 3, train blocks
        that update the class token alone.
    Differs: nothing is trained; the logits stay the same but for rounding.
    Raises: SourceError for a model that isn't a plain ViT.
    """

    name: ClassVar[str] = "readout"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "the last block computes only the tokens that the head reads"
    paper: ClassVar[str] = "Touvron et al., Going Deeper with Image Transformers, 2021, arXiv 2103.17239"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS})

    def space(self) -> Choices:
        return Choices()

    def check(self, model: Model) -> None:
        check_global(view(model.module), self.name)

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        vit = view(model.module)
        found = reading(model, vit)
        record = found._asdict()
        if found.num_read is not None:
            run_from_parts_(model, vit, len(vit.blocks) - 1, self.name)
            self.restore_(model, record)
        return record

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        if record["num_read"] is not None:
            vit = view(model.module)
            install_(TokenRun(vit.blocks[-1:], patches_of(vit, record["num_tokens"]), num_read=record["num_read"]))
