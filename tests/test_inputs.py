"""The doors of f2d2.py: bad input gets one sentence, a ValueError, or the right value."""

from math import inf, nan

import numpy as np
import pytest
import torch
from exact import TinyBackbone, times
from torch import nn

import f2d2
from f2d2 import JointFlowMap, divergence, f2d2_loss, log_likelihood, sample, self_guidance

CONDITIONS = [None, "semigroup", "eulerian", "lagrangian"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_flow(head=True):
    return JointFlowMap(TinyBackbone(2, 8), 8, head)


FLOW = make_flow()
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
T = times(4, dtype=torch.float32)[0]


def refused(match, function, *arguments, **options):
    """The call raises ValueError with one sentence that a user can act on."""
    with pytest.raises(ValueError, match=match) as caught:
        function(*arguments, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and 15 < len(sentence) < 160, sentence


def with_value(a, value):
    a = a.clone()
    a[-1] = value
    return a


def loss(x, condition="semigroup", teacher=None, flow=FLOW, **options):
    return f2d2_loss(flow, x, condition, teacher, **options)


def ode_sample(x, steps=2, **options):
    return f2d2.ode_sample(FLOW.velocity, x, steps, **options)


def ode_log_likelihood(x, steps=2, **options):
    return f2d2.ode_log_likelihood(FLOW.velocity, x, steps, **options)


# ------------------------------------------------------------------------------- x
WHOLE = {  # doors that take the data as they are
    "loss": loss,
    "sample": lambda x: sample(FLOW, x, 2),
    "log_likelihood": lambda x: log_likelihood(FLOW, x, 2),
    "self_guidance": lambda x: self_guidance(FLOW, x),
    "ode_sample": ode_sample,
    "ode_log_likelihood": ode_log_likelihood,
}
DOORS = WHOLE | {
    "flow": lambda x: FLOW(x, T, T),
    "velocity": lambda x: FLOW.velocity(x, T),
    "divergence": lambda x: divergence(FLOW.velocity, x, T),
}
BAD_X = [  # x, a word of the sentence
    (np.zeros((4, 2), dtype=np.float32), "float"),
    ([[0.0, 1.0]] * 4, "float"),
    (None, "float"),
    (torch.zeros(4, 2, dtype=torch.long), "float"),
    (torch.zeros(4, 2, dtype=torch.uint8), "float"),
    (torch.zeros(0, 2), "at least one example"),
    (torch.tensor(1.0), "at least one example"),
]


@pytest.mark.parametrize("door", DOORS)
def test_x_is_a_floating_point_tensor_with_an_example(door):
    for x, word in BAD_X:
        refused(word, DOORS[door], x)


@pytest.mark.parametrize("door", WHOLE)
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_data_with_nan_or_infinity_are_refused_whole(door, value):
    refused("NaN or infinity", WHOLE[door], with_value(X, value))


def test_images_of_other_than_bytes_are_not_dequantized():
    for images in (X, torch.zeros(4, dtype=torch.int16), np.zeros((2, 3)), [0, 255]):
        refused("uint8", f2d2.dequantize, images)


def test_data_without_dimensions_have_the_likelihood_of_a_column():
    """x [B] is right as it is: the same numbers as [B, 1]."""
    x = X[:, 0]

    def velocity(x, t):
        return x.sin() * t.reshape(-1, *[1] * (x.dim() - 1))

    for probe in ("exact", "rademacher", "dct"):
        row, column = [divergence(velocity, a, T, probe)[1] for a in (x, x[:, None])]
        torch.testing.assert_close(row, column)
    row, column = [f2d2.ode_log_likelihood(velocity, a, 4) for a in (x, x[:, None])]
    torch.testing.assert_close(row, column)
    torch.testing.assert_close(f2d2.normal_log_density(x), f2d2.normal_log_density(x[:, None]))


# ------------------------------------------------------------------------------- times
TIMED = {  # doors that take a time
    "flow, t": lambda t: FLOW(X, t, T),
    "flow, s": lambda s: FLOW(X, T, s),
    "velocity": lambda t: FLOW.velocity(X, t),
    "divergence": lambda t: divergence(FLOW.velocity, X, t),
    "loss, t": lambda t: loss(X, t=t, s=T),
    "loss, s": lambda s: loss(X, t=T, s=s),
}
BAD_TIMES = [
    (0.5, "time"),
    ([0.1, 0.2, 0.3, 0.4], "time"),
    (np.zeros(4), "time"),
    (None, "time"),
    (torch.zeros(1), "time"),
    (torch.zeros(4, 1), "time"),
    (torch.zeros(3), "time"),
    (T.double(), "dtype and device"),
    (T.half(), "dtype and device"),
    (T.to("meta"), "dtype and device"),
]


@pytest.mark.parametrize("door", TIMED)
def test_times_are_tensors_like_x_one_per_example(door):
    for t, word in BAD_TIMES:
        refused(word, TIMED[door], t)
    if door != "velocity":
        refused("time", TIMED[door], torch.tensor(0.5))


@pytest.mark.parametrize("door", TIMED)
@pytest.mark.parametrize("value", [-0.01, 1.01, nan, inf])
def test_times_lie_between_0_and_1(door, value):
    t = with_value(T, value)
    if door == "velocity" and abs(value) < 2:  # an ODE solver may overshoot
        assert FLOW.velocity(X, t).isfinite().all()
    elif door == "flow, s" and value == 1.01:  # the mirrored likelihood asks for that
        assert FLOW(X, T, t)[1].isfinite().all()
        refused("must lie in", FLOW, X, T, 2 * t)
    else:
        refused("must lie in|NaN or infinity", TIMED[door], t)


def test_the_velocity_takes_one_time_for_all_as_solvers_give_it():
    one = torch.tensor(0.3)
    torch.testing.assert_close(FLOW.velocity(X, one), FLOW.velocity(X, one.expand(4)))


BAD_STEPS = [
    *[(steps, "whole number") for steps in (0, -1, 2.5, True, None, [0.0, 1.0], "4", nan)],
    (torch.tensor(4), "whole number"),
    *[(torch.tensor(grid), "from 0 to 1") for grid in ([0, 0.5], [0.5, 1], [0, 0.5, 0.5, 1])],
    *[(torch.tensor(grid), "from 0 to 1") for grid in ([1, 0.5], [0, nan, 1], [0.0], [])],
]


def test_steps_are_a_whole_number_or_a_tensor_of_times():
    for steps, word in BAD_STEPS:
        refused(word, sample, FLOW, X, steps)
        refused(word, log_likelihood, FLOW, X, steps)
        refused(word, ode_sample, X, steps)
        refused(word, ode_log_likelihood, X, steps)


def test_whole_grids_are_taken_in_either_order_and_as_integers():
    one = log_likelihood(FLOW, X, 1)
    for steps in (torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), np.int64(1)):
        assert torch.equal(log_likelihood(FLOW, X, steps), one)
    assert len(f2d2.time_grid(np.uint8(255), X)) == 256


# ------------------------------------------------------------------------------- the loss
BAD_OPTIONS = [  # an option of f2d2_loss, a value, a word of the sentence
    *[("condition", name, "condition") for name in ("euler", "", 1, f2d2_loss)],
    *[("diagonal", share, "share") for share in (-0.1, 1.5, nan)],
    *[("x0", torch.zeros(shape), "x0") for shape in ((4, 1), (3, 2), (2,), (4, 2, 1))],
    ("x0", [[0.0, 1.0]] * 4, "x0"),
    ("x0", np.zeros((4, 2)), "x0"),
    ("x0", torch.zeros(4, 2).long(), "x0"),
    ("x0", X.double(), "dtype and device"),
    ("x0", with_value(X, nan), "NaN or infinity"),
    *[("context", torch.zeros(length), "context") for length in (3, 5, 0)],
    *[("context", many, "one tensor") for many in ([T, T], (T,), {"label": T}, [0, 1, 2, 3])],
    *[("probe", name, "unknown probe") for name in ("gauss", "Exact", "", None, 3)],
    *[("probe", torch.ones(shape), "probe has shape") for shape in ((1, 2), (4, 1), (2,))],
    ("probe", X.double(), "dtype and device"),
    ("teacher", make_flow(), "velocity"),
    ("t", T, "time"),  # without s
    ("s", T, "time"),
]


@pytest.mark.parametrize("name, value, word", BAD_OPTIONS, ids=str)
def test_options_of_the_loss(name, value, word):
    for head in (True, False):
        refused(word, loss, X, flow=make_flow(head), **{name: value})
    if name == "context":
        for door in (sample, log_likelihood):
            refused(word, door, FLOW, X, 2, context=value)
        refused(word, self_guidance, FLOW, X, context=value)
        refused(word, ode_sample, X, context=value)
        refused(word, ode_log_likelihood, X, context=value)
    if name == "probe":
        refused(word, divergence, FLOW.velocity, X, T, value)
        refused(word, ode_log_likelihood, X, probe=value)


def test_a_probe_is_drawn_by_its_name():
    for name in ("gauss", "exact", None):
        refused("unknown probe", f2d2.hutchinson_probe, X, name)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_derivatives_are_not_taken_in_bfloat16(condition):
    with torch.autocast("cpu", torch.bfloat16):
        for head in (True, False):
            refused("autocast", loss, X, condition, flow=make_flow(head))
        if condition == "eulerian":  # its d/dt is a derivative whatever the probe
            refused("autocast", loss, X, condition, probe="residual")
        refused("autocast", divergence, FLOW.velocity, X, T)
        refused("autocast", ode_log_likelihood, X)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert loss(X, condition)["vm"].isfinite()


def test_the_lagrangian_has_no_residual_at_x_s():
    refused("LSD", loss, X, "lagrangian", probe="residual")


# ------------------------------------------------------------------------------- what networks give
class Returns(nn.Module):
    """A backbone that returns what it is given."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x, t, s):
        return self.outputs if len(self.outputs) == 2 else self.outputs[0]


def zeros(*shape):
    return torch.zeros(shape)


BAD_OUTPUTS = [
    ((zeros(4, 1), zeros(4, 8)), "backbone's u has shape"),
    ((zeros(4), zeros(4, 8)), "backbone's u has shape"),
    ((zeros(1, 2), zeros(4, 8)), "backbone's u has shape"),
    ((zeros(4, 2), zeros(4, 9)), "features"),
    ((zeros(4, 2), zeros(1, 8)), "features"),
    ((zeros(4, 2), zeros(8)), "features"),
    ((zeros(4, 2),), r"must return \(u, features\)"),
    ((zeros(2, 2),), r"must return \(u, features\)"),
]


@pytest.mark.parametrize("outputs, word", BAD_OUTPUTS, ids=str)
@pytest.mark.parametrize("head", [True, False])
def test_a_backbone_returns_u_like_x_and_a_row_of_features(outputs, word, head):
    flow = JointFlowMap(Returns(*outputs), 8, head)
    refused(word, flow, X, T, T)
    refused(word, flow.velocity, X, T)
    refused(word, log_likelihood, flow, X, 2)


def column_D(x, t, s):
    return x, t[:, None]


def mean_D(x, t, s):
    return x, t.mean()


def row_u(x, t, s):
    return x[:1], t


def column_u(x, t, s):
    return x[:, :1], t


BAD_FLOWS = [(column_D, "D has shape"), (mean_D, "D has shape"), (row_u, "u has shape")]
BAD_FLOWS.append((column_u, "u has shape"))


@pytest.mark.parametrize("flow, word", BAD_FLOWS)
@pytest.mark.parametrize("size", [4, 3])
def test_rates_of_other_shapes_are_refused_not_broadcast(flow, word, size):
    """The slip of the published semigroup divergence loss: [B] against [B, 1]."""
    x = X[:size]
    for condition in CONDITIONS:
        refused("shape", f2d2_loss, flow, x, condition)
    refused(word, sample, flow, x, 2)
    refused(word, log_likelihood, flow, x, 2)
    refused(word, self_guidance, flow, x)


@pytest.mark.parametrize("rates, word", BAD_FLOWS)
def test_conditions_called_directly_do_not_broadcast_what_g_returns(rates, word):
    def g(x, t):
        return rates(x, t, t)

    if word[0] == "D":  # PyTorch's jvp refuses such a u itself
        refused(word, f2d2.eulerian, FLOW, g, X, T, T.flip(0))
    refused(word, f2d2.lagrangian, FLOW, g, X, T, T.flip(0))


def column_velocity(x, t):
    return x[:, :1]


def row_velocity(x, t):
    return x[:1]


def double_velocity(x, t):
    return x.double()


def nan_velocity(x, t):
    return x * nan


BAD_TEACHERS = [(column_velocity, "shape"), (row_velocity, "shape")]
BAD_TEACHERS += [(double_velocity, "dtype"), (nan_velocity, "NaN or infinity")]


@pytest.mark.parametrize("velocity, word", BAD_TEACHERS)
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_a_teacher_s_velocity_is_like_x(velocity, word, head):
    for condition in CONDITIONS:
        refused(word, loss, X, condition, velocity, flow=make_flow(head))
    if velocity is not nan_velocity:
        refused(word, divergence, velocity, X, T)
        for euler in (True, False):
            refused(word, f2d2.ode_sample, velocity, X, 2, euler)
            refused(word, f2d2.ode_log_likelihood, velocity, X, 2, euler=euler)


def test_a_flow_map_is_no_velocity_but_has_one():
    refused("velocity", divergence, FLOW, X, T)
    refused("velocity", f2d2.ode_sample, FLOW, X, 2)
    refused("velocity", f2d2.ode_log_likelihood, FLOW, X, 2, euler=True)


# ------------------------------------------------------------------------------- no head, no graph
def test_a_map_without_a_head_has_no_likelihood():
    flow = make_flow(head=False)
    refused("no divergence head", log_likelihood, flow, X, 2)
    refused("no divergence head", self_guidance, flow, X)
    assert sample(flow, X, 2)[1] is None


def test_the_oracle_carries_no_half_of_a_gradient():
    """The field is taken without a graph; a gradient of the rest alone would be a wrong one."""
    x = X.clone().requires_grad_()
    assert not ode_sample(x).requires_grad
    assert not ode_log_likelihood(x).requires_grad
    for door in (ode_sample, ode_log_likelihood):
        refused("no gradient", torch.func.grad(lambda x, door=door: door(x).sum()), X)
