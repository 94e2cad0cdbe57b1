"""ia_red2: before groups of blocks, a learned policy drops the patches that tell least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.tokens import Reduction, rejoin, skip
from martlet.nn.interpreter import Interpreter
from martlet.vit.tokens import Decision, Patches, Reading, Taken, TokenReduction, TokenRun, in_stages, patches_of
from martlet.vit.view import VitView, view

BATCH = 8
RATE = 1e-4
"""Of Adam, on the policies' weights."""
EVERY = 10
"""Steps between judging what was learned."""
GONE = 1e-6
"""What a dropped patch still counts while policies learn, so that a gradient reaches it."""


@dataclass(frozen=True, kw_only=True)
class IARED2(TokenReduction):
    """Drop, before some blocks, the patches that a small policy learned to do without.

    Before each block of the schedule, a policy scores the patches that are left by a query of the class token and keys
    of its own; those of the highest scores stay and the others are dropped for good. Policies learn from images without
    labels: what is dropped must change the logits of the untouched model as little as possible. The model's own weights
    stay as they are. From some dozen images little can be learned that holds for others: give some hundreds. On a model
    that isn't trained along, dropping loses more than merging (`tome`, `tps`).

    Args:
        r: patches to drop before every block (`r: 8`) or before some (`r: {3: 58, 6: 41}`, blocks counted from 0).
            Without it, three tenths of those that are left, at one, two and three quarters of the blocks.
        steps: of Adam, on 8 images each, for all policies at once. 0 leaves them as they begin, which is the attention
            of their blocks. What does best on a quarter of the images, which isn't learned from, is kept, be it that;
            the record says how much better (`kl_mean`, in nats).

    Shape: (B, N, C) to (B, N - r, C) before a block. Where only the class token is read, the last block computes only
        it, and where all are, a dropped patch keeps what it was when it was dropped.
    Needs: global attention, a class token, and calibration images.
    Cost: some minutes of learning on a CPU; at run time, two Linears and a selection before each block that reduces.
    Paper: Pan et al., IA-RED²: Interpretability-Aware Redundancy Reduction for Vision Transformers, 2021, arXiv
        2106.12620, sections 3.2 and 3.3.
    Differs: shapes are static: as many patches stay in each image, where the paper keeps those that score more than a
        half. Policies learn together from the divergence of the logits, by a straight-through gradient, where the paper
        rewards each, one after the other, for right answers and few patches (REINFORCE), and trains the model too. A
        policy begins as its block's attention and not at random.
    Raises: RecipeError for a schedule that doesn't fit the model, a model without class token, no images, or a number
        of steps below 0; SourceError for a model that isn't a plain ViT.
    """

    name: ClassVar[str] = "ia_red2"
    summary: ClassVar[str] = "drop the patches that a learned policy can do without"
    paper: ClassVar[str] = "Pan et al., IA-RED²: Interpretability-Aware Redundancy Reduction, 2021, arXiv 2106.12620"
    needs_images: ClassVar[bool] = True
    proportional: ClassVar[bool] = False

    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise RecipeError(f"ia_red2: steps is {self.steps}; it can be 0 or more")

    def space(self) -> None:
        """Nothing: without training, others lose several times less."""

    def asks_class_token(self) -> bool:
        return True

    def default(self, patches: Patches, depth: int) -> dict[int, int]:
        return in_stages(patches, depth)

    def most(self, patches: Patches) -> int:
        return max(patches.number - 1, 0)

    def run(self, vit: VitView, found: Reading, schedule: Mapping[int, int]) -> TokenRun:
        """Adds a policy to each block of the schedule, as `policy`."""
        first, patches = min(schedule), patches_of(vit, found.num_tokens)
        pool, left = {}, patches.number
        for i, r in sorted(schedule.items()):
            left -= r
            policy = Interpreter(vit.blocks[i])
            vit.blocks[i].module.add_module("policy", policy)
            pool[i - first] = partial(drop, policy=policy, keep=left)
        return TokenRun(vit.blocks[first:], patches, {}, self.proportional, found.num_read, pool=pool)

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images = [batch.clone() for batch in context.calibration(self)]
        if sum(map(len, images)) < 2:
            raise RecipeError("ia_red2 learns from some images and judges by others; give at least 2 with --num-calib")
        taken = Taken(model)
        record = super().apply_(model, context)
        if record["removed"] and self.steps:
            blocks = view(model.module).blocks
            policies = {i: Interpreter(taken.vit.blocks[i]) for i, _ in record["removed"]}
            record["kl_mean"] = self._learn(taken, policies, dict(record["removed"]), torch.cat(images), context)
            for i, policy in policies.items():
                blocks[i].module.policy.load_state_dict(policy.state_dict())  # type: ignore[union-attr]
        return record

    def _learn(
        self,
        taken: Taken,
        policies: Mapping[int, Interpreter],
        schedule: Mapping[int, int],
        images: Tensor,
        context: Context,
    ) -> dict[str, float]:
        """Trains the policies in place. Returns the mean divergence of the logits, in nats, before and after.

        Patches that are dropped stay and count for nothing, so that a gradient tells what they would have changed. A
        quarter of the images isn't learned from: by those the best of what policies were after every few steps is kept.
        """
        taken.module.requires_grad_(False)
        first, left, pool = min(schedule), taken.patches.number, {}
        for i, r in sorted(schedule.items()):
            left -= r
            pool[i - first] = partial(relax, policy=policies[i], keep=left)
        run = TokenRun(taken.vit.blocks[first:], taken.patches, {}, True, taken.found.num_read, pool=pool)
        parts: list[tuple[Tensor, Tensor]] = []  # tokens that the first policy gets, and logits
        with torch.no_grad():
            for part in images.split(BATCH):
                before = taken.before(part)
                parts.append((before[first], taken.logits(part, before[-1])))
        tokens, logits = (torch.cat(each) for each in zip(*parts, strict=True))

        def divergence(chosen: Tensor) -> Tensor:
            found = taken.logits(images[chosen], run(tokens[chosen]))
            return functional.kl_div(
                found.log_softmax(-1), logits[chosen].log_softmax(-1), reduction="batchmean", log_target=True
            )

        learned_from = len(images) - max(len(images) // 4, 1)
        judges = torch.arange(learned_from, len(images))
        weights = torch.nn.ModuleList(policies.values())

        def judged() -> tuple[float, dict[str, Tensor]]:
            with torch.no_grad():
                total = sum(float(divergence(part)) * len(part) for part in judges.split(BATCH))
            return total / len(judges), {name: w.clone() for name, w in weights.state_dict().items()}

        best = begins = judged()
        generator = torch.Generator().manual_seed(context.seed)
        optimizer = torch.optim.Adam(weights.parameters(), RATE)
        order = torch.empty(0, dtype=torch.long)
        with torch.enable_grad():
            for step in range(self.steps):
                context.progress("learn what can be dropped", step, self.steps)
                if len(order) < min(BATCH, learned_from):
                    order = torch.randperm(learned_from, generator=generator)
                chosen, order = order[:BATCH], order[BATCH:]
                optimizer.zero_grad()
                divergence(chosen).backward()
                optimizer.step()
                if step % EVERY == EVERY - 1 or step == self.steps - 1:
                    best = min(best, judged(), key=lambda each: each[0])
        weights.load_state_dict(best[1])
        return {"before": begins[0], "after": best[0]}


def drop(x: Tensor, size: Tensor | None, patches: Patches, *, policy: Interpreter, keep: int) -> Decision:
    """The patches that the policy scores highest stay."""
    reduction = skip(policy(x, patches.first), keep, patches.first)
    return Decision(reduction, restore=partial(rejoin, x=x, reduction=reduction))


def relax(x: Tensor, size: Tensor | None, patches: Patches, *, policy: Interpreter, keep: int) -> Decision:
    """All stay; those that would be dropped count for nothing, with the gradient of their score.

    size: (B, N), in which a patch that was dropped before is next to 0.
    """
    scores = policy(x, patches.first)  # (B, P)
    there = torch.ones_like(scores) if size is None else (size[:, patches.first :] > 0.5).to(scores.dtype)
    chosen = (scores + there).topk(keep).indices  # as many, even where scores are equal
    stays = torch.zeros_like(scores).scatter(1, chosen, 1.0)
    counts = stays + there * (scores - scores.detach()) + GONE
    count = x.shape[1]
    shares = torch.eye(count, dtype=x.dtype).expand(x.shape[0], -1, -1)
    return Decision(Reduction(range(count), shares), torch.cat([x.new_ones(len(x), patches.first), counts], 1))
