"""The doors of f2d2.py: bad input gets one sentence, a ValueError, or the right value."""

import numpy as np
import pytest
import torch
from exact import TinyBackbone, times
from torch import nn

from f2d2 import (
    JointFlowMap,
    dequantize,
    divergence,
    f2d2_loss,
    log_likelihood,
    ode_log_likelihood,
    ode_sample,
    sample,
    self_guidance,
    time_grid,
)

CONDITIONS = ["semigroup", "eulerian", "lagrangian"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_flow(head=True):
    return JointFlowMap(TinyBackbone(2, 8), 8, head)


def data(n=4):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1))


def start(n=4):
    return times(n, dtype=torch.float32)[0]


def refused(call, match):
    """call() raises ValueError with one sentence that a user can act on."""
    with pytest.raises(ValueError, match=match) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and 15 < len(sentence) < 160, sentence


DOORS = {
    "flow": lambda flow, x: flow(x, start(), start()),
    "jump": lambda flow, x: flow.jump(x, start(), start(), start()),
    "velocity": lambda flow, x: flow.velocity(x, start()),
    "divergence": lambda flow, x: divergence(flow.velocity, x, start()),
    "loss": lambda flow, x: f2d2_loss(flow, x, "semigroup"),
    "sample": lambda flow, x: sample(flow, x, 2),
    "log_likelihood": lambda flow, x: log_likelihood(flow, x, 2),
    "self_guidance": lambda flow, x: self_guidance(flow, x),
    "ode_sample": lambda flow, x: ode_sample(flow.velocity, x, 2),
    "ode_log_likelihood": lambda flow, x: ode_log_likelihood(flow.velocity, x, 2),
}
WHOLE = [name for name in DOORS if name not in ("flow", "jump", "velocity", "divergence")]


# ------------------------------------------------------------------------------- x
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((4, 2), dtype=np.float32),
        [[0.0, 1.0]] * 4,
        None,
        torch.zeros(4, 2, dtype=torch.long),
        torch.zeros(4, 2, dtype=torch.uint8),
    ],
    ids=["numpy", "list", "None", "long", "uint8"],
)
def test_x_is_a_floating_point_tensor(door, x):
    refused(lambda: DOORS[door](make_flow(), x), "float")


@pytest.mark.parametrize("door", DOORS)
def test_a_batch_has_at_least_one_example(door):
    refused(lambda: DOORS[door](make_flow(), torch.zeros(0, 2)), "at least one example")
    refused(lambda: DOORS[door](make_flow(), torch.tensor(1.0)), "at least one example")


@pytest.mark.parametrize("door", WHOLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_data_with_nan_or_infinity_is_refused_whole(door, value):
    x = data()
    x[2, 1] = value
    refused(lambda: DOORS[door](make_flow(), x), "NaN or infinity")


def test_images_of_other_than_bytes_are_not_dequantized():
    for images in (data(), torch.zeros(4, dtype=torch.int16), np.zeros((2, 3)), [0, 255]):
        refused(lambda images=images: dequantize(images), "uint8")
    assert dequantize(torch.tensor([0, 255], dtype=torch.uint8)).dtype == torch.float32


# ------------------------------------------------------------------------------- times
@pytest.mark.parametrize("t", [0.5, [0.1, 0.2, 0.3, 0.4], np.zeros(4), None, 1], ids=str)
def test_times_are_tensors(t):
    flow = make_flow()
    x = data()
    good = start()
    refused(lambda: flow(x, t, good), "time")
    refused(lambda: flow(x, good, t), "time")
    refused(lambda: flow.velocity(x, t), "time")
    refused(lambda: flow.jump(x, good, good, t), "time")
    refused(lambda: divergence(flow.velocity, x, t), "time")
    refused(lambda: f2d2_loss(flow, x, "semigroup", t=t, s=good), "time|come together")
    refused(lambda: f2d2_loss(flow, x, "semigroup", t=good, s=t), "time|come together")


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (3,)])
def test_times_are_one_per_example(shape):
    flow = make_flow()
    x = data()
    bad = torch.zeros(shape)
    refused(lambda: flow(x, bad, start()), "time")
    refused(lambda: flow(x, start(), bad), "time")
    refused(lambda: flow.velocity(x, bad), "time")
    refused(lambda: f2d2_loss(flow, x, "eulerian", t=bad, s=start()), "time")
    refused(lambda: f2d2_loss(flow, x, "eulerian", t=start(), s=bad), "time")


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_times_lie_between_0_and_1(value):
    flow = make_flow()
    x = data()
    bad = start()
    bad[1] = value
    refused(lambda: flow(x, bad, start()), "must lie in")
    refused(lambda: flow.velocity(x, bad), "must lie in")
    refused(lambda: flow.jump(x, start(), start(), bad), "must lie in")
    refused(lambda: divergence(flow.velocity, x, bad), "must lie in")
    refused(lambda: f2d2_loss(flow, x, "lagrangian", t=bad, s=start()), "must lie in")
    refused(lambda: f2d2_loss(flow, x, "lagrangian", t=start(), s=bad), "must lie in")
    if value == 1.01:  # a target time beyond 1 is asked for by the mirrored likelihood alone
        assert flow(x, start(), bad)[1].isfinite().all()
        refused(lambda: flow(x, start(), 2 * bad), "must lie in")
    else:
        refused(lambda: flow(x, start(), bad), "must lie in")


def test_times_have_the_dtype_and_the_device_of_x():
    flow = make_flow()
    x = data()
    for bad in (start().double(), start().half(), start().to("meta")):
        refused(lambda bad=bad: flow(x, bad, start()), "dtype and device")
        refused(lambda bad=bad: flow(x, start(), bad), "dtype and device")
        refused(lambda bad=bad: f2d2_loss(flow, x, None, t=bad, s=bad), "dtype and device")
        refused(lambda bad=bad: divergence(flow.velocity, x, bad), "dtype and device")


@pytest.mark.parametrize(
    "steps", [0, -1, 2.5, 2.0, True, None, [0.0, 1.0], "4", float("nan"), torch.tensor(4)], ids=str
)
def test_steps_are_a_whole_number_or_a_tensor_of_times(steps):
    flow = make_flow()
    x = data()
    refused(lambda: sample(flow, x, steps), "whole number")
    refused(lambda: log_likelihood(flow, x, steps), "whole number")
    refused(lambda: ode_sample(flow.velocity, x, steps), "whole number")
    refused(lambda: ode_log_likelihood(flow.velocity, x, steps), "whole number")
    refused(lambda: time_grid(steps, x), "whole number")


@pytest.mark.parametrize(
    "grid", [[0.0, 0.5], [0.5, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0, float("nan"), 1.0], [0.0], []]
)
def test_a_tensor_of_times_goes_from_0_to_1(grid):
    flow = make_flow()
    for steps in (torch.tensor(grid), torch.tensor(grid).flip(0)):
        refused(lambda steps=steps: sample(flow, data(), steps), "from 0 to 1")
        refused(lambda steps=steps: log_likelihood(flow, data(), steps), "from 0 to 1")


def test_whole_grids_are_taken_in_either_order_and_as_integers():
    flow = make_flow()
    x = data()
    one = log_likelihood(flow, x, 1)
    assert torch.equal(log_likelihood(flow, x, torch.tensor([0, 1])), one)
    assert torch.equal(log_likelihood(flow, x, np.int64(1)), one)
    assert len(time_grid(np.uint8(255), x)) == 256
    assert torch.equal(log_likelihood(flow, x, torch.tensor([1.0, 0.0])), one)


# ------------------------------------------------------------------------------- the loss
def test_conditions_have_names():
    flow = make_flow()
    for name in ("euler", "Semigroup", "", 1, f2d2_loss):
        refused(lambda name=name: f2d2_loss(flow, data(), name), "condition")


def test_t_and_s_come_together():
    flow = make_flow()
    refused(lambda: f2d2_loss(flow, data(), "semigroup", t=start()), "time|together")
    refused(lambda: f2d2_loss(flow, data(), "semigroup", s=start()), "time|together")
    assert f2d2_loss(flow, data(), "semigroup", t=start(), s=start())["u"].isfinite()


@pytest.mark.parametrize("diagonal", [-0.1, 1.5, float("nan")])
def test_diagonal_is_a_share(diagonal):
    refused(lambda: f2d2_loss(make_flow(), data(), "semigroup", diagonal=diagonal), "share")


@pytest.mark.parametrize(
    "x0",
    [torch.zeros(4, 1), torch.zeros(3, 2), torch.zeros(2), torch.zeros(4, 2, 1), [[0.0, 1.0]] * 4],
    ids=["column", "short", "row", "wide", "list"],
)
def test_noise_has_the_shape_of_the_data(x0):
    refused(lambda: f2d2_loss(make_flow(), data(), "semigroup", x0=x0), "x0|float")


@pytest.mark.parametrize("x0", [np.zeros((4, 2)), torch.zeros(4, 2).long()], ids=["numpy", "long"])
def test_noise_is_a_floating_point_tensor(x0):
    refused(lambda: f2d2_loss(make_flow(), data(), "semigroup", x0=x0), "x0|float")


@pytest.mark.parametrize("length", [3, 5, 0])
def test_context_has_one_row_per_example(length):
    refused(
        lambda: f2d2_loss(make_flow(), data(), "semigroup", context=torch.zeros(length)), "context"
    )


@pytest.mark.parametrize("probe", ["gauss", "Exact", "", None, 3])
def test_probes_have_names(probe):
    flow = make_flow()
    x = data()
    refused(lambda: divergence(flow.velocity, x, start(), probe), "unknown probe")
    refused(lambda: ode_log_likelihood(flow.velocity, x, 2, probe), "unknown probe")
    for condition in (None, *CONDITIONS):
        refused(
            lambda condition=condition: f2d2_loss(flow, x, condition, probe=probe), "unknown probe"
        )
    refused(lambda: f2d2_loss(make_flow(False), x, None, probe=probe), "unknown probe")


@pytest.mark.parametrize("shape", [(1, 2), (4, 1), (2,), (4, 2, 1)])
def test_a_given_probe_has_the_shape_of_the_data(shape):
    flow = make_flow()
    x = data()
    probe = torch.ones(shape)
    refused(lambda: divergence(flow.velocity, x, start(), probe), "probe has shape")
    refused(lambda: ode_log_likelihood(flow.velocity, x, 2, probe), "probe has shape")
    refused(lambda: f2d2_loss(flow, x, "semigroup", probe=probe), "probe has shape")


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_derivatives_are_not_taken_in_bfloat16(condition):
    flow = make_flow()
    x = data()
    with torch.autocast("cpu", torch.bfloat16):
        refused(lambda: f2d2_loss(flow, x, condition), "autocast")
        refused(lambda: f2d2_loss(make_flow(False), x, condition), "autocast")
        refused(lambda: divergence(flow.velocity, x, start()), "autocast")
        refused(lambda: ode_log_likelihood(flow.velocity, x, 2), "autocast")
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert f2d2_loss(flow, x, condition)["vm"].isfinite()


# ------------------------------------------------------------------------------- other shapes
class Shaped(nn.Module):
    """A backbone whose outputs have given shapes."""

    def __init__(self, u, features):
        super().__init__()
        self.shapes = u, features

    def forward(self, x, t, s):
        u, features = (torch.zeros(shape) for shape in self.shapes)
        return u, features


@pytest.mark.parametrize(
    "u, features, match",
    [
        ((4, 1), (4, 8), "backbone's u has shape"),
        ((4,), (4, 8), "backbone's u has shape"),
        ((1, 2), (4, 8), "backbone's u has shape"),
        ((4, 2), (4, 9), "features"),
        ((4, 2), (1, 8), "features"),
        ((4, 2), (8,), "features"),
    ],
)
def test_a_backbone_returns_u_like_x_and_a_row_of_features(u, features, match):
    for head in (True, False):
        flow = JointFlowMap(Shaped(u, features), 8, head)
        refused(lambda flow=flow: flow(data(), start(), start()), match)
        refused(lambda flow=flow: log_likelihood(flow, data(), 2), match)


def column_D(x, t, s):
    return x, t[:, None]


def mean_D(x, t, s):
    return x, t.mean()


@pytest.mark.parametrize("flow", [column_D, mean_D])
@pytest.mark.parametrize("condition", [None, *CONDITIONS])
@pytest.mark.parametrize("size", [4, 1])
def test_a_column_or_a_mean_of_D_is_refused_not_broadcast(flow, condition, size):
    """The slip of the published semigroup divergence loss: [B] against [B, 1]."""
    x = data(size)
    refused(lambda: f2d2_loss(flow, x, condition), "shape")
    refused(lambda: sample(flow, x, 2), "D has shape")
    refused(lambda: log_likelihood(flow, x, 2), "D has shape")
    refused(lambda: self_guidance(flow, x), "D has shape")


@pytest.mark.parametrize("part", [(slice(1),), (slice(None), slice(1))], ids=["row", "column"])
def test_a_flow_s_u_is_shaped_like_x(part):
    def flow(x, t, s):
        return x[part], t

    for condition in (None, *CONDITIONS):
        refused(lambda condition=condition: f2d2_loss(flow, data(), condition), "shape")
    refused(lambda: sample(flow, data(), 2), "u has shape")
    refused(lambda: log_likelihood(flow, data(), 2), "u has shape")
    refused(lambda: self_guidance(flow, data()), "u has shape")


def column_velocity(x, t):
    return x[:, :1]


def row_velocity(x, t):
    return x[:1]


@pytest.mark.parametrize("velocity", [column_velocity, row_velocity])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_a_teacher_s_velocity_is_shaped_like_x(velocity, head):
    flow = make_flow(head)
    for condition in (None, *CONDITIONS):
        refused(lambda condition=condition: f2d2_loss(flow, data(), condition, velocity), "shape")
    refused(lambda: divergence(velocity, data(), start()), "velocity has shape")
    for euler in (True, False):
        refused(lambda euler=euler: ode_sample(velocity, data(), 2, euler), "shape")
        refused(lambda euler=euler: ode_log_likelihood(velocity, data(), 2, euler=euler), "shape")


# ------------------------------------------------------------------------------- no head, no graph
def test_a_map_without_a_head_has_no_likelihood():
    flow = make_flow(head=False)
    refused(lambda: log_likelihood(flow, data(), 2), "no divergence head")
    refused(lambda: self_guidance(flow, data()), "no divergence head")
    assert sample(flow, data(), 2)[1] is None


def test_the_oracle_carries_no_half_of_a_gradient():
    """The field is taken without a graph; a gradient of the rest alone would be a wrong one."""
    flow = make_flow()
    x = data().requires_grad_()
    assert not ode_sample(flow.velocity, x, 2).requires_grad
    assert not ode_log_likelihood(flow.velocity, x, 2).requires_grad
