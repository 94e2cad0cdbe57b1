"""What all techniques share that put two thin Linears in the place of one: which, of what rank, and the record."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError, nearest
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Batches, Context, Progress, Stage, Technique
from martlet.functional.allocation import Choice
from martlet.functional.structure.low_rank import Factors
from martlet.functional.structure.rank_allocation import breakeven, least_loss, levels, same_share
from martlet.nn.low_rank import empty_like, thin_linear

ALLOCATIONS = ("milp", "same")
COUNTS = ("macs", "params")
NUM_IMAGES = 32
"""On which a layer's part in the error of the logits is measured."""


@dataclass(frozen=True, eq=False)
class Site:
    """A Linear that can be replaced. rows: vectors that go through it for one image."""

    name: str
    linear: nn.Linear
    rows: int

    @property
    def weights(self) -> int:
        return self.linear.weight.numel()


@dataclass(frozen=True, kw_only=True)
class Factorization(Technique):
    """What all techniques share that put two thin Linears in the place of one.

    Args:
        ratio: share to remove of what the model's Linears have together; 0 replaces none.
        count: of what; `macs`, or `params`.
        allocation: `milp` gives each Linear the rank that loses least for what it costs; `same`, all the same share.
        multiple: ranks are multiples of it; kernels work on so many at once. At 8 inputs and 10 outputs OpenVINO's int8
            kernel for AMX gives garbage; 16 stays away from that.
    """

    stage: ClassVar[Stage] = Stage.MODULE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS, Fact.WHOLE_LINEARS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.WHOLE_LINEARS})

    ratio: float = 0.3
    count: str = "macs"
    allocation: str = "milp"
    multiple: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"{self.name}: ratio is the share to remove, from 0 to less than 1, not {self.ratio}")
        if self.multiple < 1:
            raise RecipeError(f"{self.name}: multiple is 1 or more, not {self.multiple}")
        for key, known in (("count", COUNTS), ("allocation", ALLOCATIONS)):
            if (value := getattr(self, key)) not in known:
                raise RecipeError(
                    f"{self.name}: {key} is one of {', '.join(known)}, not {value!r}{nearest(str(value), known)}"
                )

    @abstractmethod
    def factors(self, model: Model, found: list[Site], context: Context) -> dict[str, Factors]:
        """Of each Linear, by name; one that is missing stays whole."""

    def loss_of(
        self, model: Model, found: list[Site], factors: Mapping[str, Factors], context: Context
    ) -> Mapping[str, float]:
        """By what a Linear's share of lost squares is multiplied, to be compared with another's."""
        return dict.fromkeys(factors, 1.0)

    def check(self, model: Model) -> None:
        if self.ratio and not any(self._ranks(site) for site in sites(model)):
            raise RecipeError(
                f"{self.name}: no Linear of {model.name} is large enough for two thinner ones whose rank is a multiple "
                f"of {self.multiple}"
            )

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        found = [site for site in sites(model) if self._ranks(site)] if self.ratio else []
        factors = self.factors(model, found, context) if found else {}
        found = [site for site in found if site.name in factors]
        ranks = self.ranks(model, found, factors, context)
        for site in found:
            if (rank := ranks.get(site.name)) is not None:
                _put_(model.module, site.name, thin_linear(site.linear, factors[site.name].at(rank)))
        biases = [name for name in ranks if model.module.get_submodule(name).up.bias is not None]  # type: ignore[union-attr]
        whole = [name for name, module in model.module.named_modules() if _is_linear(module)]
        factored = tuple(f"{name}." for name in ranks)
        return {
            "ranks": ranks,
            "biases": biases,
            "left_whole": [name for name in whole if not name.startswith(factored)] if ranks else whole,
        }

    def ranks(
        self, model: Model, found: list[Site], factors: Mapping[str, Factors], context: Context
    ) -> dict[str, int]:
        """By name; what is missing stays whole.

        Raises:
            RecipeError: so much can't be removed.
        """
        if not found:
            return {}
        scale = self.loss_of(model, found, factors, context)
        products = {}
        for site in found:
            name, full = site.name, min(site.linear.weight.shape)
            thin = sum(site.linear.weight.shape)
            unit = site.rows if self.count == "macs" else 1
            loss = {rank: scale[name] * factors[name].lost(rank) for rank in self._ranks(site)}
            products[name] = {rank: Choice(cost, (unit * thin * rank,)) for rank, cost in loss.items()}
            products[name][full] = Choice(0.0, (unit * site.weights,))
        total = sum(choices[max(choices)].uses[0] for choices in products.values())
        rest = sum((s.rows if self.count == "macs" else 1) * s.weights for s in sites(model)) - total
        budget = (1 - self.ratio) * (total + rest) - rest
        allocate = least_loss if self.allocation == "milp" else same_share
        try:
            picked = allocate(products, budget)
        except ValueError:
            least = sum(min(choice.uses[0] for choice in choices.values()) for choices in products.values())
            raise RecipeError(
                f"{self.name}: ratio {self.ratio:g} can't be reached in {model.name}; with ranks that are multiples of "
                f"{self.multiple}, at most {(total - least) / (total + rest):.2f} of the Linears' {self.count} can go"
            ) from None
        return {site.name: picked[site.name] for site in found if picked[site.name] in self._ranks(site)}

    def _ranks(self, site: Site) -> list[int]:
        """Of which two factors cost less than the one Linear."""
        return levels(breakeven(*site.linear.weight.shape), self.multiple)

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        for name, rank in record["ranks"].items():
            linear = cast(nn.Linear, model.module.get_submodule(name))
            _put_(model.module, name, empty_like(linear, rank, name in record["biases"]))


@torch.no_grad()
def sites(model: Model) -> list[Site]:
    """The Linears that run as layers: found by running an image of noise, because some libraries read only weights.

    Those are left out whose weight is shared with another module's.
    """
    rows: dict[str, int] = {}
    handles = []
    named = {n: cast(nn.Linear, module) for n, module in model.module.named_modules() if _is_linear(module)}
    owners: dict[int, int] = {}
    for module in model.module.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in named.items():
        handles.append(module.register_forward_hook(_counts(rows, name)))
    try:
        model.module(torch.zeros(1, 3, *model.preprocess.size))
    finally:
        for handle in handles:
            handle.remove()
    return [
        Site(name, cast(nn.Linear, named[name]), n) for name, n in rows.items() if owners[id(named[name].weight)] == 1
    ]


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear  # a subclass may be read or run in ways of its own


def _counts(rows: dict[str, int], name: str):
    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        rows[name] = rows.get(name, 0) + output[..., 0].numel()

    return hook


@torch.no_grad()
def logit_errors(
    module: nn.Module, trials: Mapping[str, nn.Module], images: Batches, progress: Progress
) -> dict[str, float]:
    """Mean squared change of the logits, relative to their variance, if one module alone is replaced; by its name."""
    few, count = [], 0
    for batch in images:
        few.append(batch[: NUM_IMAGES - count])
        count += len(few[-1])
        if count >= NUM_IMAGES:
            break
    expected = torch.cat([module(batch) for batch in few])
    spread = (expected - expected.mean(1, keepdim=True)).square().mean().clamp(min=torch.finfo().tiny)
    found = {}
    for i, (name, trial) in enumerate(trials.items()):
        progress("measuring layers", i, len(trials))
        with _replaced(module, name, trial):
            found[name] = float((torch.cat([module(batch) for batch in few]) - expected).square().mean() / spread)
    return found


@contextmanager
def _replaced(module: nn.Module, name: str, trial: nn.Module) -> Iterator[None]:
    own = module.get_submodule(name)
    _put_(module, name, trial)
    try:
        yield
    finally:
        _put_(module, name, own)


def _put_(module: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, new)
