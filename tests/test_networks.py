"""Networks that people have: a stand-in of each kind, trained and read as README says."""

import copy

import pytest
import torch
import torch.distributed as dist
from exact import ConditionalGaussian, EightGaussians, wide
from measure.costs import Flops
from measure.networks import readme_classes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import f2d2
from f2d2 import (
    JointFlowMap,
    f2d2_loss,
    log_likelihood,
    ode_log_likelihood,
    ode_sample,
    sample,
    self_guidance,
)

CONDITIONS = ["semigroup", "eulerian", "lagrangian"]


# ------------------------------------------------------------------------------- the stand-ins
class Attention(nn.Linear):
    """Four tokens of four numbers attend to each other."""

    def __init__(self):
        super().__init__(4, 12)

    def forward(self, h):
        q, k, v = super().forward(h.reshape(-1, 1, 4, 4)).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)


class Layer(nn.Linear):
    def __init__(self):
        super().__init__(16, 16)


class Checkpointed(Layer):
    """Runs again in the backward pass instead of keeping what it needs there."""

    use_reentrant = False

    def forward(self, h):
        return checkpoint(super().forward, h, use_reentrant=self.use_reentrant)


class Reentrant(Checkpointed):
    use_reentrant = True


class InBfloat16(Layer):
    def forward(self, h):
        with torch.autocast("cpu"):
            return super().forward(h)


class Backbone(nn.Module):
    """x [B, 2] -> u, features [B, 16], with one of the stand-ins in the middle."""

    def __init__(self, middle):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.middle = middle
        self.out = nn.Linear(16, 2)

    def forward(self, x, t, s):
        h = self.first(torch.cat([x, f2d2.time_features(t, s)], 1)).tanh()
        features = h + self.middle(h).tanh()
        return self.out(features), features


def make_flow(middle):
    """The same weights for the same shapes, the head's last layer included."""
    flow = JointFlowMap(Backbone(middle), 16)
    torch.manual_seed(1)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    return flow


def step(flow, condition, autocast=False, **options):
    """A loss of fixed draws, and its gradient for every parameter."""
    torch.manual_seed(2)
    with torch.autocast("cpu", enabled=autocast):
        losses = f2d2_loss(flow, torch.randn(12, 2), condition, **options)
    flow.zero_grad()
    sum(losses.values()).backward()
    gradients = [p.grad.clone() for p in flow.parameters()]
    assert all(g.norm() > 0 for g in gradients)
    return [torch.stack(list(losses.values())), *gradients]


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------- as they are
@pytest.mark.parametrize("condition", CONDITIONS)
def test_fused_attention_needs_the_math_kernel_but_for_semigroup(condition):
    flow = make_flow(Attention())
    with sdpa_kernel(SDPBackend.MATH):
        expected = step(flow, condition)
    if condition == "semigroup":
        close(step(flow, condition), expected)
    else:
        with pytest.raises((NotImplementedError, RuntimeError)):
            step(flow, condition)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_checkpoints_and_running_statistics_are_refused_by_torch_func(condition):
    for middle in (Checkpointed(), Reentrant(), nn.BatchNorm1d(16)):
        with pytest.raises(RuntimeError):
            step(make_flow(middle), condition)
    step(make_flow(nn.BatchNorm1d(16)).eval(), condition)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_autocast_inside_the_backbone_costs_a_few_digits(condition):
    half = make_flow(InBfloat16())
    whole = make_flow(Layer())
    close(step(half, condition)[:1], step(whole, condition)[:1], 0.01)
    x = torch.randn(12, 2)
    difference = log_likelihood(half, x, 2) - log_likelihood(whole, x, 2)
    assert 0 < difference.abs().max() < 0.02


# ------------------------------------------------------------------------------- DDP
@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def doubled(state, bucket):
    """In place of the mean over processes: shows that a gradient went through DDP, and once."""
    future = torch.futures.Future()
    future.set_result(2 * bucket.buffer())
    return future


def distributed(flow):
    wrapped = DistributedDataParallel(flow, broadcast_buffers=False)
    wrapped.register_comm_hook(None, doubled)
    return wrapped


@pytest.mark.parametrize("condition", CONDITIONS)
def test_ddp_around_the_map_averages_every_gradient_once(condition, one_process):
    flow = make_flow(Layer())
    losses, *gradients = step(flow, condition)
    close(step(distributed(flow), condition), [losses, *[2 * g for g in gradients]])


# ------------------------------------------------------------------------------- no derivative
@pytest.mark.parametrize("time", [0.0, 0.3, 0.7, 0.95])
def test_the_residual_is_minus_the_divergence_on_average(time):
    """Eight Gaussians, in each of which x_1 - x_0 given x_t is N(mean, std^2 I). The point mean +
    std has the average square of the residual too, because the means average to v."""
    data = EightGaussians()
    x = 2 * torch.randn(5, 2, dtype=torch.float64)
    t = torch.full((5,), time, dtype=torch.float64)
    offset, log_density, var = data._components(x, t)
    x1 = data.centres + time * data.std**2 / var[..., None] * offset
    mean = (x1 - x[:, None]) / (1 - time)
    std = data.std / var.sqrt()

    v, div = f2d2.divergence(data.velocity, x, t, "exact")
    average = 0
    for component, p in enumerate(log_density.softmax(1).T):
        average += p * f2d2.residual_divergence(v, mean[:, component] + std, t)
    torch.testing.assert_close(average, -div)


@pytest.mark.parametrize("around", ["plain", "autocast", "ddp"])
def test_nothing_stands_in_the_way_of_the_residual(around, one_process):
    """Gradients are those of a plain network of the same weights."""
    autocast = around == "autocast"
    for middle, plain in (
        (Attention(), Attention()),
        (Checkpointed(), Layer()),
        (Reentrant(), Layer()),
        (nn.BatchNorm1d(16), nn.BatchNorm1d(16, track_running_stats=False)),
    ):
        flow = make_flow(middle)
        with sdpa_kernel(SDPBackend.MATH):
            losses, *gradients = step(make_flow(plain), "semigroup", probe="residual")
        if around == "ddp":
            if isinstance(middle, Reentrant):
                continue  # PyTorch refuses: each pass of the layer marks its variables
            flow = distributed(flow)
            gradients = [2 * g for g in gradients]
        found = step(flow, "semigroup", autocast, probe="residual")
        close(found, [losses, *gradients], 0.1 if autocast else 1e-4)


def flops(condition, **options):
    """Of a step on "meta", with the head but for flow matching."""
    layers = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(30)]).to("meta")

    def backbone(x, t, s):
        u = layers(x)
        return u, u.mean((2, 3))

    flow = JointFlowMap(backbone, 8, condition is not None).to("meta")
    with Flops() as counter:
        losses = f2d2_loss(flow, torch.empty(8, 8, 8, 8, device="meta"), condition, **options)
        sum(losses.values()).backward()
    return counter.total


def test_what_the_residual_saves():
    """Thirds of a step of flow matching, whose backward pass is two: four instead of five with
    semigroup, which is asked for half of the batch; six instead of seven and a quarter."""
    flow = flops(None)
    for probe, expected in (("residual", (4 / 3, 2)), ("rademacher", (5 / 3, 7.25 / 3))):
        semigroup = flops("semigroup", probe=probe)
        eulerian = flops("eulerian", probe=probe, diagonal=0.25)
        assert (semigroup / flow, eulerian / flow) == pytest.approx(expected, abs=0.02)


# ------------------------------------------------------------------------------- labels
def test_labels_go_through_every_door():
    """The right ones give the exact answers, those of the neighbour none."""
    flow = ConditionalGaussian()
    label = torch.arange(4)
    x0 = torch.randn(4, 3, dtype=torch.float64)
    x1 = sample(flow, x0, 1, label)[0]
    normal = torch.distributions.Normal(flow.means[label], flow.stds[label])
    truth = normal.log_prob(x1.T).sum(0)

    def errors(label):
        log_p = [
            sample(flow, x0, 2, label)[1],
            log_likelihood(flow, x1, 2, context=label),
            ode_log_likelihood(flow.velocity, x1, 64, context=label),
        ]
        end = ode_sample(flow.velocity, x0, 64, context=label)
        return torch.cat([torch.stack(log_p) - truth, (end - x1).T]).abs()  # a row for each

    assert (errors(label) < 0.01).all()
    assert (errors(label.roll(1)).amax(1) > 0.1).all()


def test_self_guidance_sees_the_label():
    """D grows along its label."""
    label = torch.tensor([-1.0, 1.0])

    def flow(x, t, s, label):
        return x, label * x.sum(1)

    x0 = self_guidance(flow, torch.zeros(2, 3), lr=1.0, context=label)
    torch.testing.assert_close(x0, label[:, None].expand(2, 3))


class Policy(Backbone):
    """Actions x [B, 1] for observations o [B, 1]."""

    def forward(self, x, t, s, o):
        u, features = super().forward(torch.cat([x, o], 1), t, s)
        return u[:, :1], features


def test_the_likelihood_of_a_policy_s_actions():
    """a given o is N(o, (0.6 + 0.3 o)^2)."""

    def draw(n):
        o = 2 * torch.rand(n, 1) - 1
        policy = torch.distributions.Normal(o, 0.6 + 0.3 * o)
        a = policy.sample()
        return o, a, policy.log_prob(a)[:, 0]

    torch.manual_seed(0)
    flow = JointFlowMap(Policy(Layer()), 16)
    optimizer = torch.optim.Adam(flow.parameters())
    for i in range(400):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - i / 400)
        o, a, _ = draw(256)
        losses = f2d2_loss(flow, a, "semigroup", context=o, probe="exact", robust=True)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    o, a, truth = draw(1000)
    error = log_likelihood(flow, a, 2, context=o) - truth
    shuffled = log_likelihood(flow, a, 2, context=o.roll(1, 0)) - truth
    assert error.abs().mean() < 0.25
    assert shuffled.abs().mean() > 0.7


# ------------------------------------------------------------------------------- README's lines
class Images(nn.Module):
    """A network of one or two times."""

    def __init__(self, planes_in=3, planes_out=3):
        super().__init__()
        self.first = nn.Conv2d(planes_in, 8, 3, padding=1)
        self.last = nn.Conv2d(8, planes_out, 3, padding=1)

    def forward(self, x, *times):
        return self.last((self.first(x) + wide(sum(times), x)).tanh())


class OfMeanFlow(Images):
    """As py-meanflow calls its own."""

    def forward(self, z, times, aug_cond):
        return super().forward(z, *times)


class Features(nn.Linear):
    def forward(self, x, t, s):
        return super().forward(x.flatten(1))


@pytest.mark.parametrize("name", ["TwoTimes", "WithFeatures", "FromMeanFlow"])
def test_a_network_in_readme_s_lines(name):
    """Trains, all but a trained MeanFlow's own weights, and is copied with what a step left."""
    net = Images()
    modules = {
        "TwoTimes": [Images(3 + 1, 3 + 8)],
        "WithFeatures": [net, net.last],
        "FromMeanFlow": [OfMeanFlow(), Features(48, 8)],
    }
    flow = JointFlowMap(readme_classes()[name](*modules[name]), 8)
    x = torch.randn(4, 3, 4, 4)
    for condition in CONDITIONS:
        sum(f2d2_loss(flow, x, condition).values()).backward()
    for p in flow.parameters():
        assert (p.grad is not None) == p.requires_grad
    assert next(flow.backbone.net.parameters()).requires_grad == (name != "FromMeanFlow")
    twin = copy.deepcopy(flow)
    assert torch.equal(log_likelihood(twin, x, 2), log_likelihood(flow, x, 2))
