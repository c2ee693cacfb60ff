"""train_2d.py: its parts against formulas, every method end to end, its files, what it refuses."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import EightGaussians, ExactGaussian
from PIL import Image

import f2d2
import train_2d
from train_2d import MLP, Checkerboard, Gaussians, main

TABLE = Path(__file__).parent / "measure" / "table.py"
SMALL = dict(WIDTH=32, DEPTH=2, BATCH=64, N_TEST=64, N_SAMPLES=500, N_GRID=10, ORACLE_STEPS=4)
STEPS = 9  # the teacher takes a third of them
KEYS = {"nll", "mae_oracle", "mae_truth", "mass", "sample_kl", "euler_nll", "mae_sample", "seconds"}
ALWAYS = {"sample_kl", "euler_nll"}  # what a network without a likelihood has too


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(train_2d, name, value)


def run(out, *options):
    main([*map(str, options), "--steps", str(STEPS), "--out", str(out)])
    return json.loads((out / "metrics.json").read_text())


def load(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(capsys, *options):
    """What is printed when the program ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, options)))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# --------------------------------------------------------------------------- network, optimizer
@pytest.mark.parametrize("paper", [False, True])
def test_the_mlp_sees_x_its_waves_and_the_times(paper):
    net = MLP(3, 16, 2, paper).double()
    seen = []
    net.body[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    x = torch.randn(5, 3, dtype=torch.float64)
    t, s = torch.rand(2, 5, dtype=torch.float64)
    u, features = net(x, t, s)
    assert u.shape == (5, 3)
    assert features.shape == (5, net.feature_dim) == (5, 16)
    y = x.numpy()
    waves = np.concatenate([y, np.sin(y), np.cos(y), np.sin(2 * y), np.cos(2 * y)], 1)
    expected = torch.cat([torch.tensor(waves), f2d2.time_features(t, s, paper)], 1)
    torch.testing.assert_close(seen[0], expected)
    assert len([layer for layer in net.body if isinstance(layer, torch.nn.Linear)]) == 2
    torch.testing.assert_close(u, net.out(features))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_torch_s_but_for_the_rounding():
    """Three steps, with weight decay; the second matrix has no gradient at first."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((12, 16), (12, 12), (12, 12))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        train_2d.Muon(ours, {"lr": 0.1, "weight_decay": 0.1}),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1),
    ]
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            if i == 1 and step == 0:
                continue
            p.grad = torch.randn(p.shape) * (i != 2)  # the third has a gradient of zero
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        # its products are in bfloat16, and singular values move by 0.07 to 0.12 a step
        torch.testing.assert_close(p, q, atol=5e-3, rtol=0)
        assert p.isfinite().all()


def test_two_steps_of_muon_on_a_diagonal_by_hand():
    """There every singular value is a number of its own."""
    weight = np.array([2.0, -1.0])
    gradients = [np.array([3.0, 0.5]), np.array([-1.0, 4.0])]
    p = torch.nn.Parameter(torch.diag(torch.tensor(weight)))
    muon = train_2d.Muon([p], {"lr": 0.1, "weight_decay": 0.2})
    momentum = np.zeros(2)
    for g in gradients:
        p.grad = torch.diag(torch.tensor(g))
        muon.step()

        momentum = 0.95 * momentum + 0.05 * g
        x = 0.05 * g + 0.95 * momentum
        x = x / np.sqrt((x**2).sum())
        for _ in range(5):
            x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5
        weight = (1 - 0.1 * 0.2) * weight - 0.1 * x
    np.testing.assert_allclose(p.detach().diag().numpy(), weight, rtol=1e-9)


# --------------------------------------------------------------------------- targets
@pytest.mark.parametrize("target", [Checkerboard(), Gaussians()])
def test_targets_integrate_to_one_and_samples_have_no_divergence(target):
    points = train_2d.grid(500, 5)
    assert target.log_prob(points).exp().sum().item() * 0.02**2 == pytest.approx(1, abs=1e-3)
    x = target.sample(200_000, torch.Generator().manual_seed(0), "cpu")
    assert target.log_prob(x).isfinite().all()
    assert 0 < train_2d.sample_kl(target, x) < 0.01
    assert train_2d.sample_kl(target, x * 0.9) > 0.1
    half_missing = torch.cat([x, x + 100])
    assert train_2d.sample_kl(target, half_missing) == pytest.approx(math.log(2), abs=0.02)


def test_the_sample_kl_of_no_sample_in_reach_is_that_of_equal_shares():
    """Half a count in each of 1,600 cells: sum of p ln(p / q), q = 0.5 / (n + 800), p = 1 / 800."""
    far = torch.full((1000, 2), 50.0)
    expected = math.log((1 / 800) / (0.5 / 1800))
    assert train_2d.sample_kl(Checkerboard(), far) == pytest.approx(expected, abs=1e-6)


def test_the_checkerboard_has_eight_squares():
    centres = train_2d.grid(4, 4)
    log_p = Checkerboard().log_prob(centres)
    assert log_p.isfinite().sum() == 8
    assert log_p[0].item() == pytest.approx(-math.log(32))  # the lower left one is black
    colour = log_p.isfinite().reshape(4, 4)
    assert (colour[1:] != colour[:-1]).all()
    assert (colour[:, 1:] != colour[:, :-1]).all()
    outside = Checkerboard().log_prob(torch.tensor([[5.0, 5.0]]))
    assert outside.isinf().all()


def test_the_gaussians_have_the_closed_form_s_density():
    x = 3 * torch.randn(100, 2, dtype=torch.float64)
    torch.testing.assert_close(
        Gaussians().log_prob(x), EightGaussians().log_prob(x), atol=1e-5, rtol=1e-5
    )


# --------------------------------------------------------------------------- the table
class Normal:
    """N(mean, std^2 I) in two dimensions, in numpy: what the table's numbers are computed from."""

    def __init__(self, mean, std):
        self.mean = mean
        self.std = std

    def sample(self, n, generator, device):
        return self.mean + self.std * torch.randn(n, 2, generator=generator, device=device)

    def log_prob(self, x):
        square = ((np.asarray(x, dtype=np.float64) - self.mean) ** 2).sum(1) / self.std**2
        return torch.tensor(-0.5 * square - math.log(2 * math.pi * self.std**2))


TRUTH = Normal(0.2, 0.8)
STUDENT = Normal(0.3, 0.7)
TEACHER = Normal(-0.1, 0.9)
OFF = 0.3  # the student's log p is too large by this: its mass is exp(OFF)


def student(x, t, s):
    u, D = ExactGaussian(STUDENT.mean, STUDENT.std)(x, t, s)
    return u, D + OFF


@pytest.fixture
def draws(monkeypatch):
    """The draws that evaluate makes, in its order; larger sizes than the other tests'."""
    sizes = dict(N_TEST=200, N_SAMPLES=1500, N_GRID=30, ORACLE_STEPS=60)
    for name, value in sizes.items():
        monkeypatch.setattr(train_2d, name, value)
    generator = torch.Generator().manual_seed(12345)
    x = TRUTH.sample(200, generator, "cpu")
    x0 = torch.randn(1500, 2, generator=generator)
    return x, x0


def oracle(x, t):
    return ExactGaussian(TEACHER.mean, TEACHER.std).velocity(x, t)


def mean_error(a, b):
    return (a - b).abs().mean().item()


def test_the_table_of_three_gaussians_is_what_their_densities_say(draws):
    """The target, the flow map and the oracle have different densities, so that no two mix."""
    x, x0 = draws
    metrics, pictures = train_2d.evaluate(TRUTH, student, oracle)
    log_p = STUDENT.log_prob(x) + OFF
    slow = TEACHER.log_prob(x)

    def close(value):
        return pytest.approx(value, abs=2e-3)

    row = metrics["oracle"]
    assert row["nll"] == close(-slow.mean().item())
    assert row["mae_truth"] == close(mean_error(slow, TRUTH.log_prob(x)))
    assert row["sample_kl"] == close(train_2d.sample_kl(TRUTH, TEACHER.mean + TEACHER.std * x0))
    x1 = STUDENT.mean + STUDENT.std * x0
    assert list(metrics["steps"]) == ["8", "4", "2", "1"]
    for row in metrics["steps"].values():
        assert set(row) == KEYS
        assert row["nll"] == close(-log_p.mean().item())
        assert row["mae_oracle"] == close(mean_error(log_p, slow))
        assert row["mae_truth"] == close(mean_error(log_p, TRUTH.log_prob(x)))
        assert row["mass"] == close(math.exp(OFF))
        assert row["sample_kl"] == close(train_2d.sample_kl(TRUTH, x1))
        drawn = x1[:1000]
        expected = mean_error(STUDENT.log_prob(drawn) + OFF, TEACHER.log_prob(drawn))
        assert row["mae_sample"] == close(expected)

    assert list(pictures) == ["truth", "oracle", "8", "4", "2", "1"]
    points = train_2d.grid(30, 5)
    for name, density in {"truth": TRUTH, "oracle": TEACHER, "2": STUDENT}.items():
        expected = density.log_prob(points) + OFF * (name == "2")
        torch.testing.assert_close(pictures[name][1].double(), expected, atol=0.05, rtol=1e-3)
    torch.testing.assert_close(pictures["1"][0], x1, atol=1e-4, rtol=1e-4)
    x1 = TEACHER.mean + TEACHER.std * x0
    torch.testing.assert_close(pictures["oracle"][0], x1, atol=1e-3, rtol=0)


def test_the_euler_column_is_euler_s_rule_with_the_network_s_own_velocity(draws, monkeypatch):
    """v(x,t) = m + a (x - t m), div v = 2 a, with a = sigma'/sigma: from t = 1 down."""
    x, _ = draws
    monkeypatch.setattr(train_2d, "ORACLE_STEPS", 2)
    metrics, _ = train_2d.evaluate(TRUTH, student, oracle)
    for k in (8, 4, 2, 1):
        y = np.asarray(x, dtype=np.float64)
        integral = 0.0
        for step in range(k):
            t = 1 - step / k
            a = (STUDENT.std**2 * t - (1 - t)) / ((1 - t) ** 2 + STUDENT.std**2 * t**2)
            y = y - (STUDENT.mean + a * (y - t * STUDENT.mean)) / k
            integral += 2 * a / k
        log_p = Normal(0.0, 1.0).log_prob(y).numpy() - integral
        assert metrics["steps"][str(k)]["euler_nll"] == pytest.approx(-log_p.mean(), abs=1e-4)


def test_seconds_are_for_ten_thousand_log_p(monkeypatch):
    """A clock that says one second for each measurement, of 64 of them."""
    clock = iter(range(1000))
    monkeypatch.setattr(train_2d.time, "perf_counter", lambda: next(clock))
    metrics, _ = train_2d.evaluate(TRUTH, student, oracle)
    for row in (metrics["oracle"], *metrics["steps"].values()):
        assert row["seconds"] == 10_000 / 64


def test_mirror_is_the_paper_s_approximation():
    """Data N(0, 0.5^2 I) at x = (0.3, 0.3): twice the values known for one dimension."""
    flow = ExactGaussian(0.0, 0.5)
    target = SimpleNamespace(
        sample=lambda n, generator, device: torch.full((n, 2), 0.3),
        log_prob=Normal(0.0, 0.5).log_prob,
    )
    metrics, _ = train_2d.evaluate(target, flow, flow.velocity, mirror=True)
    found = [metrics["steps"][k]["nll"] for k in "1248"]
    assert found == pytest.approx([2 * 1.990, 2 * 1.399, 2 * 0.832, 2 * 0.582], abs=2e-3)
    metrics, _ = train_2d.evaluate(target, flow, flow.velocity)
    assert metrics["steps"]["1"]["nll"] == pytest.approx(2 * 0.4058, abs=2e-3)


def test_a_map_without_a_head_has_samples_alone():
    exact = ExactGaussian(STUDENT.mean, STUDENT.std)
    metrics, pictures = train_2d.evaluate(TRUTH, lambda x, t, s: exact(x, t, s)[:1], oracle)
    for row in metrics["steps"].values():
        assert {key for key, value in row.items() if value is not None} == ALWAYS
    assert metrics["oracle"]["seconds"] > 0
    assert pictures["1"][1].shape == (100,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_none(bad):
    exact = ExactGaussian(STUDENT.mean, STUDENT.std)

    def broken(x, t, s):
        u, D = exact(x, t, s)
        return u, D + bad

    metrics, _ = train_2d.evaluate(TRUTH, broken, oracle)
    json.dumps(metrics, allow_nan=False)
    assert all(row["nll"] is None for row in metrics["steps"].values())
    assert all(row["euler_nll"] is not None for row in metrics["steps"].values())
    train_2d.print_table({**metrics, "target": "", "method": "", "seed": 0, "seconds": 0})


def test_the_figure_has_y_upwards_samples_above_and_densities_below():
    """All samples near (4, -4), all of the density near (-4, 4)."""
    samples = torch.tensor([[4.25, -4.25]]).repeat(100, 1)
    log_p = torch.full((10, 10), -math.inf)
    log_p[0, 9] = 0.0
    file = io.BytesIO()
    train_2d.draw_figure({"truth": (samples, log_p.flatten()), "1": (samples, log_p - 9)}, file)
    image = np.asarray(Image.open(file).convert("L"), dtype=float)
    assert image.shape == (40, 40)
    cells = image.reshape(20, 2, 20, 2).mean((1, 3))  # two panels of 10 x 10 cells beside, below
    bright = cells > cells.min() + 20
    expected = np.zeros((20, 20), dtype=bool)
    expected[9, [9, 19]] = True  # right, bottom of the upper panels
    expected[10, 0] = True  # left, top of the lower panel; the second density is e^-9 of it
    np.testing.assert_array_equal(bright, expected)


# --------------------------------------------------------------------------- recipes, training
METHODS = ["flow", "shortcut", "shortcut-distill", "meanflow", "lsd"]


def spy(monkeypatch):
    """The arguments of every call of the loss, and the weight decay of every Muon."""
    losses = []
    decays = []
    loss = f2d2.f2d2_loss

    def noted_loss(net, x1, condition, teacher, **options):
        losses.append(dict(options, x1=x1, condition=condition, teacher=teacher))
        return loss(net, x1, condition, teacher, **options)

    class NotedMuon(train_2d.Muon):
        def __init__(self, matrices, options):
            decays.append(options["weight_decay"])
            super().__init__(matrices, options)

    monkeypatch.setattr(f2d2, "f2d2_loss", noted_loss)
    monkeypatch.setattr(train_2d, "Muon", NotedMuon)
    return losses, decays


EXPECTED = {  # condition, a teacher, weight decay, times left to the loss
    "flow": (None, False, 0.0, True),
    "shortcut": ("semigroup", False, 0.1, True),
    "shortcut-distill": ("semigroup", True, 0.1, True),
    "meanflow": ("eulerian", True, 0.0, False),
    "lsd": ("lagrangian", True, 0.0, True),
}


@pytest.mark.parametrize("paper", [False, True], ids=["ours", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_reaches_the_loss_and_the_optimizer(monkeypatch, method, paper):
    losses, decays = spy(monkeypatch)
    condition, teacher, decay, log_times = EXPECTED[method]
    flow = f2d2.JointFlowMap(MLP(2, 32, 2), 32, method != "flow")
    args = SimpleNamespace(steps=3, paper=paper, device="cpu")
    generator = torch.Generator().manual_seed(0)
    velocity = Gaussian_velocity if teacher else None
    train_2d.train(method, flow, args, Checkerboard(), generator, velocity)

    assert decays == [decay]
    assert len(losses) == (1 if method == "flow" else 3)
    for options in losses:
        assert options["condition"] == condition
        assert options["teacher"] is velocity
        assert options["generator"] is generator
        assert options["diagonal"] == (0.5 if paper else 0.25)
        assert options["probe"] == ("rademacher" if paper else "exact")
        assert options.get("robust", False) == (not paper)
        assert options.get("paper", False) == paper
        assert ("t" not in options) == (paper or log_times)
        if "t" in options:
            assert options["t"].shape == options["s"].shape == (64,)
            assert options["t"].dtype == torch.float32


def Gaussian_velocity(x, t):
    return ExactGaussian(0.0, 2.0).velocity(x, t)


def test_meanflow_s_own_times_are_uniform_in_both_directions(monkeypatch):
    losses, _ = spy(monkeypatch)
    monkeypatch.setattr(train_2d, "BATCH", 4000)
    flow = f2d2.JointFlowMap(MLP(2, 32, 2), 32, True)
    args = SimpleNamespace(steps=1, paper=False, device="cpu")
    train_2d.train("meanflow", flow, args, Checkerboard(), torch.Generator().manual_seed(0))
    t, s = losses[0]["t"], losses[0]["s"]
    assert (t < s).float().mean().item() == pytest.approx(0.5, abs=0.03)
    for times in (t, s):
        deciles = torch.histc(times, 10, 0, 1) / len(times)
        torch.testing.assert_close(deciles, torch.full((10,), 0.1), atol=0.02, rtol=0)


def test_every_matrix_of_full_width_is_muon_s_and_the_rest_is_adam_s(monkeypatch):
    moved = {}
    for kind, name in ((train_2d.Muon, "muon"), (torch.optim.Adam, "adam")):
        make = kind.__init__

        def noted(self, parameters, *options, make=make, name=name, **more):
            parameters = list(parameters)
            moved[name] = parameters
            make(self, parameters, *options, **more)

        monkeypatch.setattr(kind, "__init__", noted)
    flow = f2d2.JointFlowMap(MLP(2, 32, 2), 32, True)
    args = SimpleNamespace(steps=1, paper=False, device="cpu")
    train_2d.train("lsd", flow, args, Checkerboard(), torch.Generator().manual_seed(0))
    name_of = {p: name for name, p in flow.named_parameters()}
    muon = {name_of[p] for p in moved["muon"]}
    in_head = {name for name in muon if name.startswith("head.")}
    assert muon - in_head == {"backbone.body.2.weight"}
    assert len(in_head) == 1
    assert {name_of[p] for p in moved["adam"]} == set(name_of.values()) - muon


def test_the_learning_rate_rises_for_100_steps_and_ends_at_zero(monkeypatch):
    rates = []
    step = train_2d.Muon.step

    def noted(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(train_2d.Muon, "step", noted)
    monkeypatch.setattr(train_2d, "BATCH", 2)
    flow = f2d2.JointFlowMap(MLP(2, 32, 2), 32, False)
    args = SimpleNamespace(steps=600, paper=False, device="cpu")
    train_2d.train("flow", flow, args, Checkerboard(), torch.Generator().manual_seed(0))
    assert len(rates) == 200
    for i in (1, 50, 100, 150, 200):
        half_cosine = 0.5 * (1 + math.cos(math.pi * i / 200))
        assert rates[i - 1] == pytest.approx(0.02 * min(i / 100, 1) * half_cosine, abs=1e-12)


@pytest.mark.parametrize(
    "options, blurred",
    [([], True), (["--paper"], False), (["--method", "lsd", "--no-teacher"], False)],
    ids=["teacher", "paper", "no teacher"],
)
def test_a_student_of_a_teacher_also_trains_off_the_data(tmp_path, monkeypatch, options, blurred):
    losses, _ = spy(monkeypatch)
    monkeypatch.setattr(
        Checkerboard, "sample", lambda self, n, generator, device: torch.zeros(n, 2, device=device)
    )
    run(tmp_path, *options)
    for options in losses:
        if options["condition"] is None:
            assert not options["x1"].any()  # the teacher sees the data as they are
    x1 = torch.cat([options["x1"] for options in losses if options["condition"]])
    if not blurred:
        assert not x1.any()
        return
    # std log-uniform between 0.05 and 0.4: E std^2 and P(|x| > 0.2)
    expected = (0.4**2 - 0.05**2) / (2 * math.log(8))
    assert x1.square().mean().item() == pytest.approx(expected, rel=0.3)
    std = 0.05 * 8 ** torch.linspace(0, 1, 1001)
    expected = torch.exp(-0.5 * (0.2 / std) ** 2).mean().item()
    assert (x1.norm(dim=1) > 0.2).float().mean().item() == pytest.approx(expected, rel=0.3)


def test_a_student_starts_from_its_teacher(tmp_path, monkeypatch):
    starts = []
    train = train_2d.train

    def noted(name, net, args, target, generator, teacher=None):
        starts.append({key: value.clone() for key, value in net.backbone.state_dict().items()})
        train(name, net, args, target, generator, teacher)

    monkeypatch.setattr(train_2d, "train", noted)
    run(tmp_path)
    trained = load(tmp_path)["teacher"]
    assert len(starts) == 2
    for key, value in starts[1].items():
        assert torch.equal(value, trained[f"backbone.{key}"])
        assert not torch.equal(value, starts[0][key])


# --------------------------------------------------------------------------- end to end
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "flow"],
        ["--method", "shortcut"],
        ["--method", "shortcut-distill"],
        ["--method", "meanflow"],
        ["--method", "lsd"],
        ["--method", "meanflow", "--no-teacher"],
        ["--method", "lsd", "--no-teacher", "--target", "gaussians"],
        ["--method", "shortcut-distill", "--no-divergence"],
        ["--method", "lsd", "--no-divergence"],
        ["--method", "shortcut", "--paper"],
        ["--method", "meanflow", "--paper"],
        ["--method", "lsd", "--paper", "--no-divergence"],
    ],
    ids=" ".join,
)
def test_every_method(tmp_path, options, capsys):
    metrics = run(tmp_path, *options, "--seed", "3")
    head = "--no-divergence" not in options and "flow" not in options
    assert metrics["divergence_head"] == head
    assert metrics["seed"] == 3
    assert metrics["seconds"] > 0
    assert metrics["method"] == options[1]
    assert {"nll", "mae_truth", "sample_kl", "seconds"} <= set(metrics["oracle"])
    assert list(metrics["steps"]) == ["8", "4", "2", "1"]
    for row in metrics["steps"].values():
        assert set(row) == KEYS
        for key, value in row.items():
            assert (value is not None) == (head or key in ALWAYS), key
            assert value is None or math.isfinite(value)

    assert Image.open(tmp_path / "figure.png").size == (6 * 20, 2 * 20)
    state = load(tmp_path)
    assert set(state) == {"config", "seconds", "flow", "teacher"}
    assert state["config"]["method"] == options[1]
    plain = "--paper" in options or "meanflow" in options
    assert state["flow"]["backbone.body.0.weight"].shape[1] == (18 if plain else 20)
    assert any(key.startswith("head.") for key in state["flow"]) == head
    assert names(tmp_path) == ["checkpoint.pt", "figure.png", "metrics.json"]
    printed = capsys.readouterr().out
    assert f"{options[1]} {3 if 'flow' in options else STEPS}/" in printed
    assert "mae_sample" in printed


@pytest.mark.parametrize("options, mirrored", [([], False), (["--paper"], True)], ids=str)
def test_mirror_euler_steps_and_the_oracle_s_velocity(tmp_path, monkeypatch, options, mirrored):
    """What evaluate is called with: the paper mirrors, flow matching steps by Euler's rule."""
    called = []

    def noted(target, flow, velocity, mirror, device):
        x = torch.randn(4, 2)
        t = torch.rand(4)
        called.append((mirror, flow(x, t, t / 2)[0], velocity(x, t), flow(x, t, t)[0]))
        return {"oracle": {}, "steps": {}}, {"truth": (x, torch.zeros(100))}

    monkeypatch.setattr(train_2d, "evaluate", noted)
    for method in METHODS:
        main(["--method", method, *options, "--steps", "3", "--out", str(tmp_path / method)])
    for method, (mirror, u, v, own) in zip(METHODS, called):
        assert mirror == (mirrored and method != "lsd")
        assert torch.equal(u, own) == (method == "flow")
        assert torch.equal(v, own) == (method in ("flow", "shortcut"))


def test_seeds_of_64_bits(tmp_path):
    metrics = run(tmp_path / "large", "--method", "shortcut", "--seed", 2**64 - 1)
    assert metrics["seed"] == 2**64 - 1
    other = run(tmp_path / "other", "--method", "shortcut", "--seed", 2**64 - 2)
    assert other["steps"] != metrics["steps"]
    again = run(tmp_path / "again", "--method", "shortcut", "--seed", 2**64 - 1)
    for k, row in metrics["steps"].items():
        assert dict(row, seconds=0) == dict(again["steps"][k], seconds=0)


def test_the_readme_s_tables_are_read_from_the_runs(tmp_path):
    def table():
        command = [sys.executable, TABLE, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    def cells(line):
        return [cell.strip() for cell in line.split("|")[1:-1]]

    runs = [run(tmp_path / seed, "--seed", seed) for seed in "01"]
    lines = table()
    assert len(lines) == 2 + 5  # the oracle, 8, 4, 2, 1 steps
    titles = cells(lines[0])
    assert len(titles) == 1 + len(KEYS)
    for title, key in {
        "mass": "mass",
        "NLL": "nll",
        "error against the oracle": "mae_oracle",
        "error against the truth": "mae_truth",
        "error of the samples' log p": "mae_sample",
        "sample KL": "sample_kl",
        "Euler NLL": "euler_nll",
        "seconds for 10,000 log p": "seconds",
    }.items():
        low, high = sorted(metrics["steps"]["4"][key] for metrics in runs)
        expected = f"{(low + high) / 2:.3f} ({low:.3f} to {high:.3f})"
        assert dict(zip(titles, cells(lines[4])))[title] == expected

    run(tmp_path / "baseline", "--no-divergence")
    run(tmp_path / "flow", "--method", "flow")
    lines = table()
    titles = cells(lines[0])
    flow, lsd, baseline = (dict(zip(titles, cells(line))) for line in sorted(lines[2:]))
    assert flow["(seeds)"] == "checkerboard, flow (1)"
    assert lsd["(seeds)"] == "checkerboard, lsd (2)"
    assert baseline["(seeds)"] == "checkerboard, lsd, no head (1)"
    assert flow["mass"] == ""
    for key, title in (("mass", "mass"), ("mae_sample", "error of the samples' log p")):
        values = [metrics["steps"]["8"][key] for metrics in runs]
        assert lsd[title].startswith(f"{sum(values) / 2:.3f} / ")
        assert len(lsd[title].split(" / ")) == 4


# --------------------------------------------------------------------------- files
def test_a_finished_run_prints_its_table_again_and_trains_nothing(tmp_path, monkeypatch, capsys):
    first = run(tmp_path)
    before = contents(tmp_path)
    table = capsys.readouterr().out.splitlines()[-7:]
    monkeypatch.setattr(f2d2, "f2d2_loss", None)
    assert run(tmp_path) == first
    assert capsys.readouterr().out.splitlines() == table
    assert contents(tmp_path) == before


@pytest.mark.parametrize("left", [None, "", '{"oracle": {"nll": 3', "{}", "[]", "null"])
def test_a_table_that_is_missing_or_half_written_is_measured_again(tmp_path, monkeypatch, left):
    first = run(tmp_path, "--method", "shortcut")
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    if left is None:
        (tmp_path / "metrics.json").unlink()
    else:
        (tmp_path / "metrics.json").write_text(left)
    monkeypatch.setattr(f2d2, "f2d2_loss", None)
    again = run(tmp_path, "--method", "shortcut")
    for k, row in first["steps"].items():
        assert dict(row, seconds=0) == dict(again["steps"][k], seconds=0)
    assert again["seconds"] > load(tmp_path)["seconds"] > 0  # training and measuring
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint


def test_bad_options_are_refused_and_make_no_folder(tmp_path, capsys):
    new = tmp_path / "new"
    for options, sentence in {
        ("--target", "moons"): "checkerboard",
        ("--method", "diffusion"): "shortcut",
        ("--steps", 0): "--steps from 1",
        ("--steps", "many"): "--steps",
        ("--steps", 1.5): "--steps",
        ("--seed", -1): "--seed goes from 0 to 2^64 - 1",
        ("--seed", 2**64): "--seed goes from 0 to 2^64 - 1",
        ("--seed", "1e3"): "--seed",
        ("--method", "shortcut-distill", "--no-teacher"): "drop --no-teacher",
        ("--device", "abacus"): "cpu",
        ("--what",): "--what",
    }.items():
        assert sentence in refused(capsys, *options, "--out", new)
    assert not new.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    assert "cuda" in refused(capsys, "--device", "cuda", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_help_names_every_option_and_what_differs_from_the_published_runs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = "method target no-divergence no-teacher paper seed steps out device".split()
    assert all(f"--{option}" in text for option in options)
    assert "python train_2d.py --method meanflow --no-teacher" in text
    for difference in ("uniform", "forward", "Rademacher", "mirrored", "Muon", "EMA", "50 times"):
        assert difference in text


def test_an_unusable_out_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f2d2, "f2d2_loss", None)  # found out before any work
    file = tmp_path / "file"
    file.write_text("kept")
    assert "File exists" in refused(capsys, "--out", file)
    assert "Not a directory" in refused(capsys, "--out", file / "below")
    assert file.read_text() == "kept"

    def denied(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", denied)
    assert "Permission denied" in refused(capsys, "--out", tmp_path / "locked")
    assert not contents(tmp_path / "locked")


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("name", ["trial", "checkpoint.pt", "figure.png", "metrics.json"])
def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path, capsys, name):
    (tmp_path / f"{name}.tmp").symlink_to(FULL)
    options = ("--method", "shortcut", "--steps", STEPS, "--out", tmp_path)
    message = refused(capsys, *options)
    assert "No space left on device" in message
    assert name in message
    done = ["trial", "checkpoint.pt", "figure.png", "metrics.json"]
    assert names(tmp_path) == done[1 : done.index(name)]
    main(list(map(str, options)))  # and there is room again
    assert names(tmp_path) == done[1:]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_2d.save_whole(path, fail)
    assert not contents(tmp_path)
    train_2d.save_whole(path, lambda file: file.write(b"old"))
    with pytest.raises(KeyboardInterrupt):
        train_2d.save_whole(path, fail)
    assert contents(tmp_path) == {"file": b"old"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The bytes of a finished run."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(train_2d, name, value)
        run(out)
    return contents(out)


def test_another_experiment_is_refused(tmp_path, capsys, finished, monkeypatch):
    for name, content in finished.items():
        (tmp_path / name).write_bytes(content)
    here = ("--steps", STEPS, "--out", tmp_path)
    message = refused(capsys, "--method", "meanflow", *here)
    assert "'method': 'lsd'" in message and "'method': 'meanflow'" in message
    for options in (["--seed", 1], ["--paper"], ["--target", "gaussians"], ["--no-divergence"]):
        assert "you asked for" in refused(capsys, *options, *here)
    assert "you asked for" in refused(capsys, "--steps", STEPS + 1, "--out", tmp_path)
    # another version of this script, whose network or batch differs
    for name, value in (("WIDTH", 48), ("DEPTH", 3), ("BATCH", 32)):
        with monkeypatch.context() as patch:
            patch.setattr(train_2d, name, value)
            assert "you asked for" in refused(capsys, *here)
    assert contents(tmp_path) == finished


WEIGHT = "backbone.body.0.weight"
CUT_SHORT = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"not a checkpoint",
}
SPOILT = {
    "no teacher": lambda state: state.pop("teacher"),
    "no seconds": lambda state: state.pop("seconds"),
    "no config": lambda state: state.pop("config"),
    "another kind": lambda state: state.clear(),
    "weights are no table": lambda state: state.update(flow=torch.zeros(2)),
    "seconds are no number": lambda state: state.update(seconds="long"),
    "missing weight": lambda state: state["flow"].pop(WEIGHT),
    "one weight too many": lambda state: state["flow"].update(other=torch.zeros(2)),
    "wrong shape": lambda state: state["flow"].update({WEIGHT: torch.zeros(3, 3)}),
    "NaN": lambda state: state["teacher"][WEIGHT][0].fill_(math.nan),
    "infinite": lambda state: state["flow"][WEIGHT][0].fill_(math.inf),
    "half precision": lambda state: state.update(flow=halved(state["flow"])),
    "one in double precision": lambda state: state["flow"].update(
        {WEIGHT: state["flow"][WEIGHT].double()}
    ),
}


def halved(weights):
    return {key: value.half() for key, value in weights.items()}


@pytest.mark.parametrize("kind", [*CUT_SHORT, *SPOILT])
def test_a_bad_checkpoint_is_refused_and_left_alone(tmp_path, capsys, finished, kind):
    content = finished["checkpoint.pt"]
    if kind in CUT_SHORT:
        (tmp_path / "checkpoint.pt").write_bytes(CUT_SHORT[kind](content))
    else:
        state = torch.load(io.BytesIO(content), weights_only=True)
        SPOILT[kind](state)
        torch.save(state, tmp_path / "checkpoint.pt")
    before = contents(tmp_path)
    message = refused(capsys, "--steps", STEPS, "--out", tmp_path)
    assert "is no run of this script" in message
    assert len(message.splitlines()) < 8  # the usage and one sentence
    assert contents(tmp_path) == before


def test_a_table_without_its_checkpoint_is_left_alone(tmp_path, capsys, finished):
    (tmp_path / "metrics.json").write_bytes(finished["metrics.json"])
    assert "choose another --out" in refused(capsys, "--steps", STEPS, "--out", tmp_path)
    assert contents(tmp_path) == {"metrics.json": finished["metrics.json"]}


def test_a_checkpoint_cannot_execute_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"config": Evil()}, tmp_path / "checkpoint.pt")
    assert "choose another --out" in refused(capsys, "--out", tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("method, bad", [("lsd", math.nan), ("shortcut", math.inf)])
def test_a_loss_that_is_not_finite_ends_the_run_and_writes_nothing(
    tmp_path, capsys, monkeypatch, method, bad
):
    loss = f2d2.f2d2_loss

    def diverging(net, x1, condition, teacher, **options):
        losses = loss(net, x1, condition, teacher, **options)
        return losses if condition is None else dict(losses, u=losses["u"] * bad)

    monkeypatch.setattr(f2d2, "f2d2_loss", diverging)
    message = refused(capsys, "--method", method, "--steps", STEPS, "--out", tmp_path)
    assert f"{method} diverged at step 1" in message
    assert not contents(tmp_path)


def test_weights_that_are_not_finite_end_the_run_at_the_last_step_too(
    tmp_path, capsys, monkeypatch
):
    step = train_2d.Muon.step

    def spoilt(self):
        step(self)
        self.param_groups[0]["params"][0].data[0, 0] = math.nan

    monkeypatch.setattr(train_2d.Muon, "step", spoilt)
    options = ("--method", "shortcut", "--steps", 1, "--out", tmp_path)
    assert "shortcut diverged at step 1" in refused(capsys, *options)
    assert not contents(tmp_path)
