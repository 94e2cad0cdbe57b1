"""cascade: cheaper models before this one; an image goes on while they are unsure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model, Step
from martlet.core.technique import Context, Stage, Technique
from martlet.data.preprocess import Preprocess
from martlet.graph.join import Member, join
from martlet.nn.exits import has_exits


@dataclass(frozen=True, kw_only=True)
class Cascade(Technique):
    """Ask cheaper models first; only images of which they are unsure come to this one.

    Needs no training, and takes models of any kind, rounded ones too. Together they can be better than the best of
    them, because what two models agree on is right more often. No image stays with the first before thresholds
    (`deer`) or windows (`window`) are set.

    Args:
        first: the models that come before this one, the cheapest first: what `--teacher` takes, MODEL[=FILE], or the
            folder of an artifact.
        average: images leave with the mean of the probabilities of all models that they came through, as an ensemble;
            else with the last model's logits alone.

    Shape: none changes. With `average`, logits are logarithms of probabilities.
    Needs: models of the same classes and image size. They get the images that the last one wants, but for mean and
        standard deviation, which each gets as its own.
    Cost: nothing at compress time; at run time, each model that an image comes to.
    Paper: Xia and Bouganis, Window-Based Early-Exit Cascades for Uncertainty Estimation, 2023, arXiv 2303.08010, whose
        code averages probabilities, and asks the first model's largest; Wang et al., Wisdom of Committees, 2022,
        arXiv 2012.01988, section 4, for classification.
    Differs: windows are a technique of their own. How sure a later model of three is follows from the average so far.
    Raises: RecipeError without models, or with models that have exits, or other classes or image sizes; SourceError as
        `load_model`.
    """

    name: ClassVar[str] = "cascade"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "cheaper models first, and this one for what they are unsure of"
    paper: ClassVar[str] = (
        "Xia and Bouganis, Window-Based Early-Exit Cascades for Uncertainty Estimation, 2023, arXiv 2303.08010"
    )
    breaks: ClassVar[frozenset[Fact]] = frozenset(
        {Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS, Fact.UNFUSED, Fact.ONE_EXIT}
    )

    first: tuple[str, ...] = ()
    average: bool = True

    def __post_init__(self) -> None:
        listed = isinstance(self.first, list | tuple) and all(isinstance(each, str) for each in self.first)
        if not listed:
            raise RecipeError(f"cascade: first is {self.first!r}; it can be a list of models, as in [runs/small]")
        object.__setattr__(self, "first", tuple(self.first))

    def check(self, model: Model) -> None:
        if not self.first:
            raise RecipeError("cascade: first names no model to ask before this one; `martlet cascade A B` names them")
        if has_exits(model.module):
            raise RecipeError(f"cascade: {model.name} has exits already; build the cascade first, or leave them out")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        from martlet.core import pipeline
        from martlet.source import load_other

        members = []
        for spec in self.first:
            member = load_other(spec, model)
            if has_exits(member.module):
                raise RecipeError(f"cascade: {member.name} has exits already; give models without")
            if member.num_classes != model.num_classes or member.preprocess.size != model.preprocess.size:
                raise RecipeError(f"cascade: {_kind(member)} and {_kind(model)} don't go together; they need the same")
            members.append(member)
        self._join_(model, [pipeline.traced(member) for member in members])
        return {
            "members": [
                {
                    "name": each.name,
                    "origin": each.origin,
                    "preprocess": each.preprocess.to_json(),
                    "steps": [step.to_json() for step in each.steps],
                }
                for each in members
            ]
        }

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        from martlet import source
        from martlet.core import pipeline

        members = []
        for each in record["members"]:
            member = Model(
                name=each["name"],
                module=source.rebuild(each["origin"]),
                preprocess=Preprocess.from_json(each["preprocess"]),
                num_classes=model.num_classes,
                origin=each["origin"],
            )
            pipeline.restore_(member, [Step.from_json(step) for step in each["steps"]])
            members.append(pipeline.traced(member))
        self._join_(model, members)

    def _join_(self, model: Model, members: list[Model]) -> None:
        joined = []
        for member in (*members, model):
            assert isinstance(member.module, GraphModule)
            joined.append(Member(member.module, *model.preprocess.renormalized(member.preprocess)))
        model.module = join(joined, self.average)


def _kind(model: Model) -> str:
    down, across = model.preprocess.size
    return f"{model.name} ({model.num_classes} classes, {down} × {across} px)"
