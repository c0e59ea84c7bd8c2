"""Features by the names of layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distill_optim.distill import features


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 2))


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_it_takes_what_the_layers_give_with_their_graphs() -> None:
    net, x = model(), torch.randn(5, 4)
    with features(net, ["0", "2.1"]) as seen:
        net(x)
    assert torch.equal(seen["0"], net[0](x))
    assert torch.equal(seen["2.1"], net[:3](x))
    assert list(seen) == ["0", "2.1"]
    seen["2.1"].sum().backward()
    assert net[0].weight.grad is not None


def test_every_pass_takes_anew() -> None:
    net = model()
    seen = features(net, ["0"])
    for rows in (5, 2):
        net(torch.randn(rows, 4))
        assert len(seen["0"]) == rows
    seen.remove()
    net(torch.randn(7, 4))
    assert len(seen["0"]) == 2


@pytest.mark.parametrize("error", [False, True])
def test_the_hooks_come_off(error: bool) -> None:
    net = model()
    try:
        with features(net, ["0", "2.1"]):
            assert hooks(net) == 2
            if error:
                raise RuntimeError
    except RuntimeError:
        pass
    assert hooks(net) == 0
    seen = features(net, ["0"])
    seen.remove()
    seen.remove()
    assert hooks(net) == 0


def test_a_name_that_is_not_there_is_refused_with_those_that_are_near() -> None:
    net = nn.ModuleDict({"encoder": model(), "head": nn.Linear(2, 2)})
    for name, near in (("encodr", "'encoder'"), ("2.1", "'encoder.2.1'"), ("haed", "'head'"), ("x", "list them with")):
        with pytest.raises(ValueError, match=f"names: the model has no layer '{name}'; .*{near}"):
            features(net, ["head", name])
    assert hooks(net) == 0


def test_one_string_is_refused() -> None:
    with pytest.raises(TypeError, match=r"names='0': expected several names; for one layer give \['0'\]"):
        features(model(), "0")


def test_a_layer_that_has_not_run_is_missing() -> None:
    seen = features(model(), ["0"])
    assert "0" not in seen
    with pytest.raises(KeyError, match="'0': no features; it has not run, or was not among the names"):
        seen["0"]


class Block(nn.Module):
    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output


def test_of_a_tuple_the_first_is_taken() -> None:
    block = nn.Sequential(Block((torch.ones(2), None)))
    with features(block, ["0"]) as seen:
        block(torch.ones(1))
    assert torch.equal(seen["0"], torch.ones(2))


@pytest.mark.parametrize(("output", "kind"), [({"x": 1}, "dict"), ((), "tuple"), ((None, 1), "NoneType")])
def test_what_is_no_tensor_is_refused(output: object, kind: str) -> None:
    block = nn.Sequential(Block(output))
    with features(block, ["0"]), pytest.raises(TypeError, match=f"layer '0' returns a {kind}, expected a tensor or"):
        block(torch.ones(1))


def test_a_layer_under_two_names_is_found_under_both() -> None:
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    with features(net, ["0", "2"]) as seen:
        out = net(torch.randn(3, 4))
    assert torch.equal(seen["0"], out)  # the last time that it ran
    assert torch.equal(seen["2"], out)


def test_a_copy_of_the_model_is_not_listened_to() -> None:
    net, x = model(), torch.randn(5, 4)
    with features(net, ["0"]) as seen:
        net(x)
        average = torch.optim.swa_utils.AveragedModel(net)
        average(torch.randn(2, 4))
        copy.deepcopy(net)(torch.randn(2, 4))
    assert torch.equal(seen["0"], net[0](x))
