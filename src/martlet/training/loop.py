"""The loop: one for every technique that trains, on `accelerate`: a CPU, a GPU, or what its launcher starts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from martlet.core.errors import DataError, MartletError, NumericsError, RecipeError
from martlet.core.kept import Kept, digest
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.data.examples import Examples
from martlet.training import checkpoint
from martlet.training.history import History
from martlet.training.objective import RATE, Batch, Objective
from martlet.training.order import Order, own_randomness, processes, seed_
from martlet.training.technique import Leading, Training
from martlet.training.zeros import hold_zeros_, leaves_zeros

SAVE_SECONDS = 60.0
"""Between two checkpoints."""
TIMED = slice(2, 10)
"""Steps that tell how long one takes, where there is a limit in minutes."""
SPARE = 0.95
"""Of the time, what the schedule is made for."""
HELD_BACK, MOST_HELD_BACK, LEAST = 0.02, 1000, 500
"""The share of the images that aren't learned from but judged by, how many at most, and of how many there are at least.
"""


def train_(
    model: Model, objective: Objective, examples: Examples, settings: Training, context: Context
) -> dict[str, Any]:
    """Trains in place. Returns what there is to tell: steps, images, and curves of the loss.

    With `context.kept`, what was done is kept there every minute, and the same call goes on from it, to the same
    weights bit for bit.

    Raises:
        NumericsError: the loss is NaN or infinite; the batch is saved.
        RecipeError: a batch that processes can't share, or patience without images to judge by.
        DataError: too few images, or a batch that doesn't fit into memory; says which does.
        MartletError: another process died.
    """
    from accelerate import Accelerator

    for step in model.steps[-1:]:
        if isinstance(step.technique, Leading):
            objective = step.technique.around(objective, step.record, model, settings, context)
    processes()
    accelerator = Accelerator()
    teacher = None if context.teacher is None else context.teacher.module
    flags = {parameter: parameter.requires_grad for parameter in model.module.parameters()}
    with own_randomness():
        try:
            for module in filter(None, (model.module, teacher)):
                module.to(accelerator.device)
            return _Run(model, objective, examples, settings, context, accelerator).run_()
        except RuntimeError as error:
            if accelerator.num_processes > 1 and "onnection" in str(error):
                raise MartletError(
                    "another process of the training died; the same command goes on from the last checkpoint"
                ) from error
            raise
        finally:
            for module in filter(None, (model.module, teacher)):
                module.to("cpu")
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = None
            mode_(model, training=False)


def parts(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Images that are judged by, none of few, and those that are learned from."""
    count = min(int(HELD_BACK * len(examples)), MOST_HELD_BACK) if len(examples) >= LEAST else 0
    return examples.split(count, seed)


class _Pair(nn.Module):
    """Student and objective as one, so that both are wrapped, and their gradients shared, at once."""

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective.loss(self.student, batch)


class _Run:
    def __init__(
        self,
        model: Model,
        objective: Objective,
        examples: Examples,
        settings: Training,
        context: Context,
        accelerator: Any,
    ) -> None:
        self.model, self.objective, self.settings, self.context = model, objective, settings, context
        self.accelerator, self.device = accelerator, accelerator.device
        self.main: bool = accelerator.is_main_process
        self.kept = context.kept
        self.key = "train-" + self._digest(examples) if self.kept is not None else ""
        self.judged, learned = parts(examples, context.seed)
        self.examples = objective.learned_from(learned)
        if settings.patience and not len(self.judged):
            raise RecipeError(
                f"{settings.name}: patience needs images to judge by, which are held back of {LEAST} or more; "
                f"{examples.source} has {len(examples)}"
            )
        world = accelerator.num_processes
        batch = min(settings.batch, len(self.examples)) // world * world
        if batch != min(settings.batch, len(self.examples)) or not batch:
            raise RecipeError(f"{settings.name}: {world} processes can't share a batch of {settings.batch} evenly")
        if (settings.mixup or settings.cutmix) and batch // world % 2:
            raise DataError(f"{batch // world} images of a step can't be mixed in pairs; give an even number")
        self.order = Order(
            n=len(self.examples), batch=batch, seed=context.seed, rank=accelerator.process_index, world=world
        )
        self.most = self.steps = max(1, round(settings.epochs * self.order.per_epoch))
        self.undecided = settings.minutes > 0
        self.history = History(self.order.per_epoch)
        self.autocast = settings.precision == "bf16" or (settings.precision == "auto" and self.device.type != "cpu")
        self.mix = self._mixer()

    def run_(self) -> dict[str, Any]:
        student, objective = self.model.module, self.objective
        seed_(self.context.seed)  # of what an objective draws
        objective.prepare_(student)
        objective.to(self.device)
        student.to(self.device)  # with what was put into it
        try:
            self._learn_(student, objective)
        finally:
            objective.finish_(student)
        return {
            "steps": self.steps,
            "images": self.order.n,
            "batch": self.order.batch,
            "processes": self.order.world,
            **self.history.record(),
        }

    def _learn_(self, student: nn.Module, objective: Objective) -> None:
        from timm.utils.model_ema import ModelEmaV3

        settings = self.settings
        groups = objective.groups(student, settings.weight_decay)
        student.requires_grad_(False)
        for group in groups:
            group["lr"] = settings.rate * group.pop(RATE, 1.0)
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        learned = [parameter for group in groups for parameter in group["params"]]
        if not learned:
            raise RecipeError(f"{settings.name} finds no parameter of {self.model.name} to train")
        if leaves_zeros(self.model):
            hold_zeros_(learned)
        optimizer = settings.optimizer(groups)
        ema = ModelEmaV3(student, decay=settings.ema, use_warmup=True) if settings.ema else None
        pair = self.accelerator.prepare(_Pair(student, objective))
        state = checkpoint.State(student, objective, optimizer, ema, self.history)
        start = self._resume(state)
        scheduler = self._scheduler(optimizer)
        mode_(self.model, training=True)
        clock = saved = time.monotonic()
        began = 0.0
        step = start
        for batch in self._batches(start):
            if self.undecided and step - start == TIMED.start:
                began = time.monotonic()
            scheduler.step_update(step + 1)
            loss = self._step(pair, batch, optimizer, learned, first=step == start)
            if ema is not None:
                ema.update(student, step)
            step += 1
            self.history.add(step, loss, optimizer.param_groups[0]["lr"], self.context.scalars)
            if self.undecided and step - start >= TIMED.stop:
                self._decide(step, clock, (time.monotonic() - began) / (TIMED.stop - TIMED.start))
                scheduler = self._scheduler(optimizer)
            if step % self.order.per_epoch == 0 or step == self.steps:
                self._judge(step, student if ema is None else ema.module)
                if settings.patience and not self.history.goes_on(
                    settings.patience, student if ema is None else ema.module
                ):
                    self.steps = step
            self.context.progress(f"train, loss {loss:.3f}", step, self.steps)
            if self.kept is not None and self.main and time.monotonic() - saved >= SAVE_SECONDS:
                self._save(state, step)
                saved = time.monotonic()
        if self.kept is not None and self.main:
            self._save(state, step)
        if settings.patience:
            student.load_state_dict(self.history.best)
        elif ema is not None:
            student.load_state_dict(ema.module.state_dict())
        mode_(self.model, training=False)

    def _batches(self, start: int) -> Iterator[Batch]:
        settings = self.settings
        for step, (indices, seeds) in enumerate(self.order.steps(start), start):
            if step >= self.steps:
                return
            self.objective.begin_step_(self.model.module, step)
            policy = settings.policy(step, self.steps)
            images = self.examples.batch(indices, seeds, policy, settings.erase).to(self.device)
            images = self.examples.normalize(images)
            labels = None if self.examples.labels is None else self.examples.labels[torch.from_numpy(indices)]
            labels = None if labels is None else labels.to(self.device)
            seed_(self.context.seed, step, self.order.rank)
            unmixed = None
            if self.mix is not None:
                unmixed = images.clone(), labels
                images, mixed = self.mix(
                    images, images.new_zeros(len(images), dtype=torch.long) if labels is None else labels
                )
                labels = None if labels is None else mixed
            yield Batch(
                images=images,
                labels=labels,
                indices=indices,
                seeds=seeds,
                step=step,
                steps=self.steps,
                unmixed=unmixed,
            )

    def _step(
        self, pair: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, learned: list[Tensor], first: bool
    ) -> float:
        value = None
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = pair(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                self._stop(batch, value)
            loss.backward()
            if self.objective.climb_(learned):
                optimizer.zero_grad()
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    pair(batch).backward()
                self.objective.descend_(learned)
        except RuntimeError as error:
            if not (first and _is_memory(error)):
                raise
            value = None
        if value is None:  # out here, where the error no longer holds on to what the step had computed
            self._shrink(pair, batch)
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(learned, self.settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        return value

    @torch.no_grad()
    def _judge(self, step: int, student: nn.Module) -> None:
        """The loss on images that were held back, and how often the student is right, where labels tell."""
        if not len(self.judged):
            return
        import numpy as np

        mode_(self.model, training=False)
        losses, right, labels = 0.0, 0, self.judged.labels
        for indices in np.array_split(np.arange(len(self.judged)), -(-len(self.judged) // self.order.batch)):
            images = self.judged.normalize(self.judged.batch(indices, indices).to(self.device))
            truth = None if labels is None else labels[torch.from_numpy(indices)].to(self.device)
            batch = Batch(images=images, labels=truth, indices=indices, seeds=indices, step=step, steps=self.steps)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                logits = student(images)
            losses += float(self.objective.judge(logits.float(), batch)) * len(indices)
            right += 0 if truth is None else int((logits.argmax(1) == truth).sum())
        top1_pct = None if labels is None else 100 * right / len(self.judged)
        self.history.judged(step, losses / len(self.judged), top1_pct, self.context.scalars)
        mode_(self.model, training=True)

    def _decide(self, step: int, clock: float, seconds: float) -> None:
        """Cuts the schedule to what fits into the minutes that are left."""
        from accelerate.utils import broadcast_object_list

        left = SPARE * (60 * self.settings.minutes - (time.monotonic() - clock))
        decided = [min(self.most, step + max(1, int(left / max(seconds, 1e-9))))]
        self.steps = broadcast_object_list(decided)[0]
        self.undecided = False

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        from timm.scheduler import CosineLRScheduler

        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        warmup = min(round(self.settings.warmup * self.steps), self.steps - 1)
        return CosineLRScheduler(
            optimizer, t_initial=self.steps - warmup + 1, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
        )

    def _mixer(self) -> Any:
        from timm.data import Mixup

        settings = self.settings
        if not settings.mixup and not settings.cutmix:
            return None
        classes = self.model.num_classes
        return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)

    def _digest(self, examples: Examples) -> str:
        """Of all that the weights follow from."""
        teacher = self.context.teacher
        tensors = [*self.model.module.state_dict().values()]
        if teacher is not None:
            tensors += teacher.module.state_dict().values()
        techniques = [repr(self.settings), *(repr(step.technique) for step in self.model.steps[-1:])]
        settings = [*techniques, str(self.context.seed), str(self.accelerator.num_processes)]
        return digest([examples.digest, *settings, *(tensor.detach().cpu() for tensor in tensors)])

    def _resume(self, state: checkpoint.State) -> int:
        """Takes up what was kept. Returns the step to go on with."""
        found = None if self.kept is None else self.kept.load(self.key)
        if found is None:
            return 0
        data = state.load_(*found)
        self.steps, self.undecided = data["steps"], data["undecided"]
        return data["step"]

    def _save(self, state: checkpoint.State, step: int) -> None:
        assert self.kept is not None
        more = {"step": step, "steps": self.steps, "undecided": self.undecided}
        self.kept.save(self.key, *state.saved(more))

    def _stop(self, batch: Batch, value: float) -> NoReturn:
        """Saves the batch that gave no number as its loss."""
        where = ""
        if self.kept is not None:
            tensors = {"images": batch.images} | ({} if batch.labels is None else {"labels": batch.labels})
            tensors["indices"] = torch.from_numpy(batch.indices)
            name = f"batch-{batch.step}"
            Kept(self.kept.folder).save(name, tensors, {"step": batch.step})
            where = f"; its batch is in {self.kept.folder / name}.safetensors"
        raise NumericsError(
            f"{self.settings.name}: the loss of step {batch.step} is {value}{where}; "
            f"a rate lower than {self.settings.rate:g} may help"
        )

    def _shrink(self, pair: nn.Module, batch: Batch) -> NoReturn:
        """Finds the batch that fits, and says so."""
        size = len(batch.indices) // 2
        while size:
            part = batch.first(size)
            try:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    pair(part).backward()
            except RuntimeError as error:
                if not _is_memory(error):
                    raise
                size //= 2
                continue
            break
        fits = (
            f"one of {size * self.order.world} does; set batch: {size * self.order.world}" if size else "no batch does"
        )
        raise DataError(f"{self.settings.name}: a batch of {self.order.batch} doesn't fit into memory; {fits}")


def mode_(model: Model, training: bool) -> None:
    """Dropout and batch norms as in training, or as in inference; a graph was traced for inference and stays so."""
    if model.stage is Stage.MODULE:
        model.module.train(training)


def _is_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
