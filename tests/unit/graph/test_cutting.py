"""Cutting a graph at its exits."""

import torch
from torch import nn

from martlet.graph.stages import cumulative_macs, leaves, run, stages, unstaged, window
from martlet.graph.trace import trace
from martlet.nn.exits import Exit, has_exits, leave, top_probability

SIZE = (4, 4)


class Skips(nn.Module):
    """Two exits; what the first stage computes is needed by the second and, once more, by the third."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second, self.third = nn.Linear(48, 8), nn.Linear(8, 8), nn.Linear(16, 5)
        self.exits = nn.ModuleList([Exit(nn.Linear(8, 5)), Exit(nn.Linear(8, 5))])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.stem(images.reshape(images.shape[0], -1))
        second = self.second(first.relu())
        later = self.third(torch.cat([first, second], 1))
        for exit_, x in ((self.exits[1], second), (self.exits[0], first)):
            logits = exit_(x)
            later = leave(logits, top_probability(logits), later, exit_.window)
        return later


def traced():
    return trace(Skips().eval(), SIZE)


def test_a_stage_has_what_its_exit_needs_and_no_earlier_one_has_computed():
    graph = traced()
    parts = stages(graph)
    assert [part.inputs[:1] for part in parts[:1]] == [("images",)]
    assert [len(part.inputs) for part in parts] == [1, 1, 2]
    assert [len(part.outputs) for part in parts] == [3, 3, 1]  # logits, confidence, what is needed later
    assert set(parts[1].inputs) == {parts[0].outputs[2]}
    assert set(parts[2].inputs) == {parts[0].outputs[2], parts[1].outputs[2]}
    names = [{name.partition(".")[0] for name, _ in part.module.named_parameters()} for part in parts]
    assert names == [{"stem", "exits"}, {"second", "exits"}, {"third"}]


def test_one_graph_gives_what_all_stages_give():
    graph = traced()
    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    whole = unstaged(graph)
    assert whole.inputs == ("images",)
    with torch.no_grad():
        found = dict(zip(whole.outputs, whole.module(images), strict=True))
        wanted = [dict(list(given.items())[:2]) for given in run(stages(graph), images)]
    assert [*found] == [name for given in wanted for name in given]
    assert all(torch.equal(found[name], value) for given in wanted for name, value in given.items())


class Splits(Skips):
    """What crosses the cuts is a part of a list that the first stage computes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first, second, third = (
            self.stem(images.reshape(images.shape[0], -1)).unflatten(1, (1, 8)).repeat(1, 3, 1).unbind(1)
        )
        later, sure = self.third(torch.cat([third, third], 1)), first[:, :2].unbind(1)
        for k, x in ((1, self.second(second)), (0, first)):
            later = leave(self.exits[k](x), sure[k], later, self.exits[k].window)
        return later


def test_tensors_are_cut_and_not_lists_of_them():
    graph, images = trace(Splits().eval(), SIZE), torch.randn(3, 3, *SIZE)
    parts = stages(graph)
    with torch.no_grad():
        found = run(parts, images)
    assert all(isinstance(value, torch.Tensor) for given in found for value in given.values())
    assert [len(part.inputs) for part in parts] == [1, 2, 1]  # the second exit's confidence is known to the first stage
    for part in parts:
        assert len(part.inputs) == len(part.module.graph.find_nodes(op="placeholder"))
    assert torch.equal(graph(images), next(iter(found[-1].values())))


def test_stages_share_the_memory_of_the_model():
    graph = traced()
    ours = {p.data_ptr() for p in graph.parameters()}
    assert all(p.data_ptr() in ours for part in stages(graph) for p in part.module.parameters())


def test_stages_one_after_the_other_give_what_the_graph_gives():
    graph, images = traced(), torch.randn(3, 3, *SIZE)
    found = run(stages(graph), images)
    last = next(iter(found[-1].values()))
    assert torch.equal(graph(images), last)  # no image leaves yet
    for k, exit_ in enumerate(leaves(graph)):
        window(graph, exit_).copy_(torch.tensor([torch.inf, torch.inf]))  # all leave here
        assert torch.equal(graph(images), next(iter(found[k].values())))
        window(graph, exit_).copy_(torch.tensor([-torch.inf, torch.inf]))


def test_macs_up_to_each_exit():
    assert cumulative_macs(stages(traced()), SIZE) == [
        48 * 8 + 8 * 5,
        48 * 8 + 40 + 64 + 40,
        48 * 8 + 40 + 64 + 40 + 80,
    ]


def test_a_model_without_exits_is_one_stage():
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval(), SIZE)
    assert leaves(graph) == []
    assert not has_exits(graph)
    [part] = stages(graph)
    images = torch.randn(2, 3, *SIZE)
    assert torch.equal(part.module(images)[0], graph(images))


def test_both_sides_of_an_exit_learn():
    logits, later = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    leave(logits, torch.tensor([0.9, 0.1]), later, torch.tensor([0.0, 0.5])).sum().backward()
    assert torch.equal(logits.grad, torch.ones(2, 3))
    assert torch.equal(later.grad, torch.ones(2, 3))
