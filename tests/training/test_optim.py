import pytest
import torch
from torch import nn

from vovnet.training.optim import Ema, build_optimizer, learning_rate_factor, set_learning_rate


def make_module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed(name):
    module = make_module()
    module[2].weight.requires_grad_(False)
    optimizer = build_optimizer(module, name, learning_rate=0.1, momentum=0.8, weight_decay=0.05)
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay == {
        id(module[0].weight): 0.05,
        id(module[0].bias): 0.0,
        id(module[1].weight): 0.0,
        id(module[1].bias): 0.0,
    }


def test_set_learning_rate_reaches_every_group():
    optimizer = build_optimizer(
        make_module(), "sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.1
    )
    set_learning_rate(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]


@pytest.mark.parametrize(
    ("progress", "step", "fraction", "steps", "expected"),
    [
        (0.0, 0, 0.1, None, 0.001),
        (0.0, 0, 0.0, None, 1.0),
        (0.0, 0, None, 0, 1.0),
        (0.0, 4, None, 10, 0.5005),
        (0.5, 50, 0.1, None, 0.505),
        (1.0, 100, 0.1, None, 0.01),
        (1.5, 100, None, 10, 0.01),
    ],
)
def test_learning_rate_rises_then_falls(progress, step, fraction, steps, expected):
    factor = learning_rate_factor(progress, step, warmup_fraction=fraction, warmup_steps=steps)
    assert factor == pytest.approx(expected)


def test_ema_averages_floats_and_copies_the_rest():
    module = make_module()
    ema = Ema(module, decay=0.9)
    before = {name: value.clone() for name, value in ema.module.state_dict().items()}
    with torch.no_grad():
        module[0].weight += 1.0
        module[1].running_mean += 2.0
        module[1].num_batches_tracked += 7
    ema.update(module)
    decay = 1 / 11
    after = ema.module.state_dict()
    expected = before["0.weight"] + (1 - decay)
    torch.testing.assert_close(after["0.weight"], expected)
    torch.testing.assert_close(after["1.running_mean"], before["1.running_mean"] + 2 * (1 - decay))
    assert int(after["1.num_batches_tracked"]) == 7


def test_ema_decay_warms_up_to_its_value():
    module = nn.Linear(1, 1, bias=False)
    ema = Ema(module, decay=0.5)
    ema.updates = 1000
    nn.init.constant_(ema.module.weight, 1.0)
    nn.init.constant_(module.weight, 0.0)
    ema.update(module)
    assert float(ema.module.weight) == 0.5


def test_ema_leaves_the_module_alone_and_continues_from_its_state():
    module = make_module()
    ema = Ema(module, decay=0.9)
    assert module.training
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    ema.update(module)
    other = Ema(make_module(), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    for name, value in ema.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name])
