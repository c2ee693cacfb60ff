"""train_2d.py: its parts against formulas, every method end to end, its files, what it refuses."""

import json
import math
import subprocess
import sys
import time
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
PUBLISHED = {name: getattr(train_2d, name) for name in SMALL}
STEPS = 9  # the teacher takes a third of them
RECIPES = {  # condition, a teacher, weight decay
    "flow": (None, False, 0.0),
    "shortcut": ("semigroup", False, 0.1),
    "shortcut-distill": ("semigroup", True, 0.1),
    "meanflow": ("eulerian", True, 0.0),
    "lsd": ("lagrangian", True, 0.0),
}
KEYS = {"nll", "mae_oracle", "mae_truth", "mass", "sample_kl", "euler_nll", "mae_sample", "seconds"}
ALWAYS = {"sample_kl", "euler_nll"}  # what a network without a likelihood has too
FILES = ["checkpoint.pt", "figure.png", "metrics.json"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(train_2d, name, value)


def run(out, *options):
    main([*map(str, options), "--steps", str(STEPS), "--out", str(out)])
    return json.loads((out / "metrics.json").read_text())


def stopped(capsys, code, *options):
    """What is printed when the program ends with this exit code."""
    capsys.readouterr()
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        main(["--steps", str(STEPS), *map(str, options)])
    assert stop.value.code == code
    return capsys.readouterr().err


def load(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_seconds(metrics):
    return [dict(row, seconds=0) for row in (metrics["oracle"], *metrics["steps"].values())]


def test_two_steps_of_muon_by_hand():
    """On diagonals, of 3 x 2 matrices, every singular value is a number of its own."""

    def matrix(diagonal):
        return torch.eye(3, 2).double() * torch.tensor(diagonal)

    weight = np.array([2.0, -1.0])
    momentum = np.zeros(2)
    p = matrix(weight)
    momenta = [matrix(momentum)]
    for g in (np.array([3.0, 0.5]), np.array([-1.0, 4.0])):
        p.grad = matrix(g)
        train_2d.muon_step([p], momenta, 0.1, 0.2)

        momentum = 0.95 * momentum + 0.05 * g
        x = 0.05 * g + 0.95 * momentum
        x = x / np.sqrt((x**2).sum())
        for _ in range(5):
            x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5
        weight = (1 - 0.1 * 0.2) * weight - 0.1 * x
    torch.testing.assert_close(p, matrix(weight))


# --------------------------------------------------------------------------- targets
@pytest.mark.parametrize("target", [Checkerboard(), Gaussians()])
def test_targets_integrate_to_one_and_samples_have_no_divergence(target):
    points = train_2d.grid(500, 5)
    assert target.log_prob(points).exp().sum().item() * 0.02**2 == pytest.approx(1, abs=1e-3)
    torch.manual_seed(0)
    x = target.sample(200_000)
    assert target.log_prob(x).isfinite().all()
    assert 0 < train_2d.sample_kl(target, x) < 0.01
    half_missing = torch.cat([x, x + 100])
    assert train_2d.sample_kl(target, half_missing) == pytest.approx(math.log(2), abs=0.02)


def test_the_sample_kl_of_no_sample_in_reach_is_that_of_equal_shares():
    """Half a count in each of 1,600 cells: sum of p ln(p / q), q = 0.5 / (n + 800), p = 1 / 800."""
    far = torch.full((1000, 2), 50.0)
    expected = math.log((1 / 800) / (0.5 / 1800))
    assert train_2d.sample_kl(Checkerboard(), far) == pytest.approx(expected, abs=1e-6)


def test_the_checkerboard_has_eight_squares():
    """The lower left one is black."""
    p = Checkerboard().log_prob(train_2d.grid(4, 4)).exp().reshape(4, 4)
    black = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]] * 2)
    torch.testing.assert_close(p, black / 32)


def test_the_gaussians_have_the_closed_form_s_density():
    x = 3 * torch.randn(100, 2, dtype=torch.float64)
    torch.testing.assert_close(
        Gaussians().log_prob(x), EightGaussians().log_prob(x), atol=1e-5, rtol=1e-5
    )


# --------------------------------------------------------------------------- the table
class Normal(ExactGaussian):
    """Data N(mean, std^2 I) in two dimensions, with its flow map, velocity and log p."""

    def sample(self, n):
        return self.mean + self.std * torch.randn(n, 2)


TRUTH = Normal(0.2, 0.8)
STUDENT = Normal(0.3, 0.7)
TEACHER = Normal(-0.1, 0.9)
OFF = 0.3  # the student's log p is too large by this: its mass is exp(OFF)


def student(x, t, s):
    u, D = STUDENT(x, t, s)
    return u, D + OFF


def evaluate(flow, velocity=TEACHER.velocity, target=TRUTH, mirror=False):
    return train_2d.evaluate(target, flow, STUDENT.velocity, velocity, mirror, "cpu")


@pytest.fixture
def draws(monkeypatch):
    """The draws that evaluate makes, in its order; larger sizes than the other tests'."""
    for name, value in dict(N_TEST=200, N_SAMPLES=1500, N_GRID=30, ORACLE_STEPS=60).items():
        monkeypatch.setattr(train_2d, name, value)
    torch.manual_seed(12345)
    return TRUTH.sample(200), torch.randn(1500, 2)


def mean_error(a, b):
    return (a - b).abs().mean().item()


def test_the_table_of_three_gaussians_is_what_their_densities_say(draws):
    """The target, the flow map and the oracle have different densities, so that no two mix."""
    x, x0 = draws
    x1 = STUDENT.mean + STUDENT.std * x0
    slow_x1 = TEACHER.mean + TEACHER.std * x0
    drawn = x1[:1000]
    log_p = STUDENT.log_prob(x) + OFF
    slow = TEACHER.log_prob(x)
    metrics, pictures = evaluate(student)
    expected = dict(
        nll=-log_p.mean().item(),
        mae_oracle=mean_error(log_p, slow),
        mae_truth=mean_error(log_p, TRUTH.log_prob(x)),
        mass=math.exp(OFF),
        sample_kl=train_2d.sample_kl(TRUTH, x1),
        mae_sample=mean_error(STUDENT.log_prob(drawn) + OFF, TEACHER.log_prob(drawn)),
    )
    for row in metrics["steps"].values():
        assert {key: row[key] for key in expected} == pytest.approx(expected, abs=2e-3)
    expected = dict(
        nll=-slow.mean().item(),
        mae_truth=mean_error(slow, TRUTH.log_prob(x)),
        mass=1,
        sample_kl=train_2d.sample_kl(TRUTH, slow_x1),
    )
    metrics["oracle"].pop("seconds")
    assert metrics["oracle"] == pytest.approx(expected, abs=2e-3)

    points = train_2d.grid(30, 5)
    for title, samples, density in (
        ("data", pictures["data"][0], TRUTH.log_prob(points)),
        ("ODE, 60-120 NFE", slow_x1, TEACHER.log_prob(points)),
        ("8 NFE", x1, STUDENT.log_prob(points) + OFF),
    ):
        torch.testing.assert_close(pictures[title], (samples, density), atol=0.05, rtol=1e-3)


def test_the_number_in_a_title_is_that_of_the_network_s_evaluations(draws):
    calls = []

    def counted_flow(x, t, s):
        calls.append("flow")
        return student(x, t, s)

    def counted_oracle(x, t):
        calls.append("oracle")
        return TEACHER.velocity(x, t)

    _, pictures = evaluate(counted_flow, counted_oracle)
    titles = ["data", "ODE, 60-120 NFE", "8 NFE", "4 NFE", "2 NFE", "1 NFE"]
    assert list(pictures) == titles
    # log p of x, log p on the grid, the samples, the first thousand with their log p
    assert calls.count("flow") == 4 * (8 + 4 + 2 + 1)
    # samples; log p of x, on the grid, and of four times a thousand samples
    assert calls.count("oracle") == 60 + (2 + 4) * 120


def test_seconds_are_for_ten_thousand_log_p(monkeypatch):
    """A clock that says one second for each measurement, of 64 of them."""
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    metrics, _ = evaluate(student)
    for row in (metrics["oracle"], *metrics["steps"].values()):
        assert row["seconds"] == 10_000 / 64


def test_the_paper_s_mirror(draws):
    for mirror in (False, True):
        metrics, _ = evaluate(student, mirror=mirror)
        log_p = f2d2.log_likelihood(student, draws[0], 2, mirror)
        assert metrics["steps"]["2"]["nll"] == pytest.approx(-log_p.mean().item(), abs=1e-5)


def test_a_map_without_a_head_has_samples_and_euler_s_log_p():
    metrics, pictures = evaluate(lambda x, t, s: STUDENT(x, t, s)[:1])
    for row in metrics["steps"].values():
        assert set(row) == ALWAYS
    own = f2d2.ode_log_likelihood(STUDENT.velocity, train_2d.grid(10, 5), 8, euler=True)
    torch.testing.assert_close(pictures["8 NFE"][1], own)


def test_the_figure_has_titles_y_upwards_samples_above_and_densities_below(monkeypatch):
    """Samples near (4, -4) only, density near (-4, 4) only, half of it in the second column. Red
    of 1.3 times the data's largest density: 252, of half of that: 187, of none: 13."""
    monkeypatch.setattr(train_2d, "N_GRID", 100)
    near = torch.tensor([3.95, 4.05, 4.15])
    samples = torch.cartesian_prod(near, -near)
    log_p = torch.full((100, 100), -math.inf)
    log_p[8:11, 79:82] = math.log(100 / 9)
    pictures = {"data": (samples, log_p), "1 NFE": (samples, log_p - math.log(2))}
    figure = train_2d.draw_figure(pictures).resize((200, 200), Image.Resampling.BOX)
    red = np.array(figure)[:, :, 0].astype(int)
    for row, column, value in ((90, 90, 222), (90, 190, 222), (119, 9, 222), (119, 109, 147)):
        assert red[row, column] == pytest.approx(value, abs=12)
        red[row - 3 : row + 4, column - 3 : column + 4] = 0
    letters = (red > 100).reshape(2, 100, 2, 100)
    assert letters[:, :12].any((1, 3)).all()
    assert not letters[:, 12:].any()


# --------------------------------------------------------------------------- recipes, training
def test_the_readme_s_run_has_these_sizes():
    assert PUBLISHED == dict(
        WIDTH=192,
        DEPTH=4,
        BATCH=768,
        N_TEST=10_000,
        N_SAMPLES=200_000,
        N_GRID=100,
        ORACLE_STEPS=64,
    )
    assert vars(train_2d.PARSER.parse_args([])) == dict(
        method="lsd",
        target="checkerboard",
        no_divergence=False,
        no_teacher=False,
        paper=False,
        seed=0,
        steps=9000,
        out=None,
        device="cpu",
    )


def train(method, teacher=None, steps=6, paper=False):
    flow = f2d2.JointFlowMap(MLP(2, 32, 2), 32, method != "flow")
    args = SimpleNamespace(steps=steps, paper=paper, device="cpu")
    train_2d.train(method, flow, args, Checkerboard(), teacher)
    return flow


def spy(monkeypatch):
    """The arguments of every call of the loss, the weight decay and rate of every Muon step."""
    losses = []
    steps = []
    loss = f2d2.f2d2_loss
    muon_step = train_2d.muon_step

    def noted_loss(net, x1, condition, teacher, **options):
        losses.append(dict(options, x1=x1, condition=condition, teacher=teacher))
        return loss(net, x1, condition, teacher, **options)

    def noted_step(matrices, momenta, rate, weight_decay):
        steps.append((matrices, rate, weight_decay))
        muon_step(matrices, momenta, rate, weight_decay)

    monkeypatch.setattr(f2d2, "f2d2_loss", noted_loss)
    monkeypatch.setattr(train_2d, "muon_step", noted_step)
    return losses, steps


@pytest.mark.parametrize("paper", [False, True], ids=["ours", "paper"])
@pytest.mark.parametrize("method", RECIPES)
def test_the_recipe_reaches_the_loss_and_the_optimizer(monkeypatch, method, paper):
    losses, steps = spy(monkeypatch)
    condition, teacher, decay = RECIPES[method]
    velocity = TEACHER.velocity if teacher else None
    train(method, velocity, paper=paper)
    assert len(losses) == (2 if method == "flow" else 6)
    assert all(weight_decay == decay for _, _, weight_decay in steps)
    objective = dict(diagonal=0.25, probe="exact", robust=True)
    if paper:
        objective = dict(diagonal=0.5, probe="rademacher", paper=True)
    for options in losses:
        options.pop("x1")
        own_times = options.pop("t", None) is not None and options.pop("s") is not None
        assert own_times == (method == "meanflow" and not paper)
        assert options == dict(objective, condition=condition, teacher=velocity)


def test_meanflow_s_own_times_are_uniform_in_both_directions(monkeypatch):
    losses, _ = spy(monkeypatch)
    monkeypatch.setattr(train_2d, "BATCH", 4000)
    train("meanflow", steps=1)
    times = torch.stack([losses[0]["t"], losses[0]["s"]], 1)
    cells = torch.histogramdd(times, [2, 2], range=[0.0, 1.0] * 2).hist
    torch.testing.assert_close(cells, torch.full((2, 2), 1e3), rtol=0.1, atol=0)


def test_rates_matrices_and_the_seconds_left(monkeypatch, capsys):
    """Up for 100 steps, half a cosine down to zero. Muon has each matrix of full width, Adam the
    rest. On this clock a second passes between two lines."""
    _, steps = spy(monkeypatch)
    adams = []
    adam_step = torch.optim.Adam.step

    def noted(self):
        adams.append((self.param_groups[0]["params"], self.param_groups[0]["lr"]))
        adam_step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    monkeypatch.setattr(train_2d, "BATCH", 4)
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    flow = train("shortcut", steps=200)

    assert len(steps) == len(adams) == 200
    for i in (1, 50, 100, 150, 200):
        rate = min(i / 100, 1) * 0.5 * (1 + math.cos(math.pi * i / 200))
        assert steps[i - 1][1] == pytest.approx(0.02 * rate, abs=1e-12)
        assert adams[i - 1][1] == pytest.approx(0.003 * rate, abs=1e-12)
    matrices = {flow.backbone.body[2].weight, flow.head[0].weight}
    assert set(steps[0][0]) == matrices
    assert set(adams[0][0]) == set(flow.parameters()) - matrices

    lines = capsys.readouterr().out.splitlines()
    for line, step, left in zip(lines, (100, 200), (1, 0)):
        assert line.startswith(f"shortcut {step}/200: vm ")
        assert line.endswith(f", {left} s left for shortcut")


@pytest.mark.parametrize("options", ["", "--paper", "--no-teacher"])
def test_a_student_of_a_teacher_also_trains_off_the_data(tmp_path, monkeypatch, options):
    """Std log-uniform between 0.05 and 0.4; the teacher sees the data as they are."""
    losses, _ = spy(monkeypatch)
    monkeypatch.setattr(Checkerboard, "sample", lambda self, n: torch.zeros(n, 2))
    run(tmp_path, *options.split())
    blurs = {None: 0, "lagrangian": 0}
    if not options:
        blurs["lagrangian"] = (0.4**2 - 0.05**2) / (2 * math.log(8))
    for condition, expected in blurs.items():
        noise = [o["x1"].square().mean().item() for o in losses if o["condition"] == condition]
        assert sum(noise) == pytest.approx(len(noise) * expected, rel=0.3)


def test_a_student_starts_from_its_teacher(tmp_path, monkeypatch):
    train = train_2d.train
    monkeypatch.setattr(train_2d, "train", lambda name, *rest: name == "lsd" or train(name, *rest))
    run(tmp_path)
    state = load(tmp_path)
    for key, value in state["teacher"].items():
        assert torch.equal(value, state["flow"][key])


# --------------------------------------------------------------------------- end to end
@pytest.mark.parametrize(
    "options",
    [
        "--method flow",
        "--method shortcut",
        "--method shortcut-distill",
        "--method meanflow",
        "--method lsd",
        "--method meanflow --no-teacher",
        "--method lsd --no-teacher --target gaussians",
        "--method shortcut-distill --no-divergence",
        "--method lsd --no-divergence",
        "--method shortcut --paper",
        "--method meanflow --paper",
        "--method lsd --paper --no-divergence",
    ],
)
def test_every_method(tmp_path, monkeypatch, options):
    monkeypatch.setattr(time, "time", None)  # a clock that may be set back is not asked
    metrics = run(tmp_path, *options.split(), "--seed", "3")
    method = options.split()[1]
    head = "--no-divergence" not in options and method != "flow"
    known = {key: metrics[key] for key in ("method", "seed", "divergence_head")}
    assert known == dict(method=method, seed=3, divergence_head=head)
    assert set(metrics["oracle"]) == {"nll", "mae_truth", "mass", "sample_kl", "seconds"}
    assert list(metrics["steps"]) == ["8", "4", "2", "1"]
    for row in metrics["steps"].values():
        assert set(row) == (KEYS if head else ALWAYS)
        assert all(math.isfinite(value) for value in row.values())

    assert Image.open(tmp_path / "figure.png").size == (6 * 20, 2 * 20)
    weights = load(tmp_path)["flow"]
    plain = "--paper" in options or method == "meanflow"
    assert weights["backbone.body.0.weight"].shape[1] == (18 if plain else 20)
    assert any(key.startswith("head.") for key in weights) == head
    assert sorted(contents(tmp_path)) == FILES


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("method", RECIPES)
def test_mirror_euler_steps_and_the_oracle_s_velocity(tmp_path, monkeypatch, method, paper):
    """What evaluate is called with: the paper mirrors, flow matching steps by Euler's rule."""
    x = torch.randn(4, 2)
    t = torch.rand(4)

    def checked(target, flow, own, velocity, mirror, device):
        v = own(x, t)
        assert mirror == (paper and method != "lsd")
        assert torch.equal(v, flow(x, t, t)[0])
        assert torch.equal(v, flow(x, t, t / 2)[0]) == (method == "flow")
        assert torch.equal(v, velocity(x, t)) == (method in ("flow", "shortcut"))
        return {"oracle": {}, "steps": {}}, {"data": (x, torch.zeros(100))}

    monkeypatch.setattr(train_2d, "evaluate", checked)
    run(tmp_path, "--method", method, *["--paper"] * paper)


def test_the_seed_decides_what_a_run_draws(tmp_path, monkeypatch):
    losses, _ = spy(monkeypatch)
    for seed in (5, 2**64 - 1):
        losses.clear()
        run(tmp_path / str(seed), "--method", "shortcut", "--seed", seed)
        torch.manual_seed(seed)
        assert torch.equal(losses[0]["x1"], Checkerboard().sample(64))


def test_the_readme_s_tables_are_read_from_the_runs(tmp_path):
    def table():
        command = [sys.executable, TABLE, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()]
        titles, _, *rows = [[cell.strip() for cell in row] for row in rows]
        return [dict(zip(titles, row)) for row in rows]

    runs = [run(tmp_path / seed, "--seed", seed) for seed in "01"]
    rows = table()
    assert rows[2]["steps"] == "4"
    for title, key in {
        "mass": "mass",
        "NLL": "nll",
        "error against the oracle": "mae_oracle",
        "error against the truth": "mae_truth",
        "error of the samples' log p": "mae_sample",
        "sample KL": "sample_kl",
    }.items():
        low, high = sorted(metrics["steps"]["4"][key] for metrics in runs)
        assert rows[2][title] == f"{(low + high) / 2:.3f} ({low:.3f} to {high:.3f})"

    run(tmp_path / "baseline", "--no-divergence")
    run(tmp_path / "flow", "--method", "flow")
    mean = sum(metrics["steps"]["8"]["mass"] for metrics in runs) / 2
    found = {row["(seeds)"]: row["mass"].split(" / ")[0] for row in table()}
    assert found == {
        "checkerboard, flow (1)": "",
        "checkerboard, lsd (2)": f"{mean:.3f}",
        "checkerboard, lsd, no head (1)": "",
    }


# --------------------------------------------------------------------------- files
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of a finished run."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(train_2d, name, value)
        run(out)
    return contents(out)


@pytest.fixture
def done(tmp_path, finished):
    for name, content in finished.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_finished_run_prints_its_table_again(done, finished, monkeypatch, capsys):
    monkeypatch.setattr(train_2d, "evaluate", None)
    rows = run(done)["steps"]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[1] == ["steps", *train_2d.COLUMNS]
    for line in printed[3:]:
        assert line[1:] == [f"{rows[line[0]][key]:.4g}" for key in train_2d.COLUMNS]
    assert contents(done) == finished


@pytest.mark.parametrize("left", ["half a table", "another's table", "no figure"])
def test_what_is_missing_is_measured_again(done, finished, monkeypatch, left):
    first = json.loads(finished["metrics.json"])
    results = done / "metrics.json"
    if left == "half a table":
        results.write_bytes(finished["metrics.json"][:300])
    if left == "another's table":
        run(done / "other", "--seed", 1)
        (done / "other" / "metrics.json").replace(results)
    if left == "no figure":
        (done / "figure.png").unlink()
    monkeypatch.setattr(f2d2, "f2d2_loss", None)
    again = run(done)
    assert without_seconds(again) == without_seconds(first)
    assert again["seconds"] == load(done)["seconds"] > 0
    for name in FILES[:2]:
        assert (done / name).read_bytes() == finished[name]


def test_bad_options_are_refused_and_make_no_folder(tmp_path, capsys):
    new = tmp_path / "new"
    refusals = {
        ("--target", "moons"): "checkerboard",
        ("--method", "diffusion"): "shortcut",
        ("--steps", 0): "--steps from 1",
        ("--seed", -1): "--seed goes from 0 to 2^64 - 1",
        ("--seed", 2**64): "--seed goes from 0 to 2^64 - 1",
        ("--method", "shortcut-distill", "--no-teacher"): "drop --no-teacher",
        ("--device", "abacus"): "cpu",
    }
    for options, sentence in refusals.items():
        assert sentence in stopped(capsys, 2, *options, "--out", new)
    assert not new.exists()


def test_an_unusable_out_is_one_sentence_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f2d2, "f2d2_loss", None)
    file = tmp_path / "file"
    file.write_text("kept")
    assert "File exists" in stopped(capsys, 2, "--out", file)

    def denied(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(train_2d.tempfile, "TemporaryFile", denied)
    assert "Permission denied" in stopped(capsys, 2, "--out", tmp_path / "locked")


@pytest.mark.parametrize("room", [0, 300])  # bytes: nothing fits, or a part does
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_one_sentence_and_the_state_before_it_stays(
    done, capsys, monkeypatch, name, room
):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = train_2d.save

    def full(path, content):
        if path.name == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            save(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    out = done
    if name == "checkpoint.pt":
        out = done / "new"
        out.mkdir()
    else:
        (out / "metrics.json").write_text("to be measured again")
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(train_2d, "save", full)
        message = stopped(capsys, 2, "--out", out)
    assert f"cannot write to {out}" in message and "too large" in message
    assert contents(out) == before
    run(out)  # and there is room again


def test_no_file_or_link_of_the_user_s_is_touched(tmp_path):
    """And the files' rights are those of any file that open() makes."""
    mine = tmp_path / "mine"
    mine.write_text("kept")
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / f"{name}.tmp").symlink_to(mine)
    before = contents(out)
    run(out, "--method", "shortcut")
    after = contents(out)
    for name in FILES:
        assert (out / name).stat().st_mode == mine.stat().st_mode
        after.pop(name)
    assert after == before


@pytest.mark.parametrize("name", FILES[1:])
def test_a_user_s_own_file_is_not_replaced(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert "choose another --out" in stopped(capsys, 2, "--out", tmp_path).lower()
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("when", ["teacher", "student", "table"])
def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(
    tmp_path, capsys, monkeypatch, finished, when
):
    name = "train" if when != "table" else "evaluate"
    function = getattr(train_2d, name)

    def interrupted(*arguments):
        if when != "student" or arguments[0] == "lsd":
            raise KeyboardInterrupt
        function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_2d, name, interrupted)
        message = stopped(capsys, 130, "--out", tmp_path)
    assert len(message.splitlines()) == 1
    if when == "table":
        assert "networks are kept, the same command goes on" in message
        assert list(contents(tmp_path)) == ["checkpoint.pt"]
        monkeypatch.setattr(train_2d, "train", None)
    else:
        assert "nothing is kept, the same command starts again" in message
        assert not contents(tmp_path)
    again = run(tmp_path)
    assert without_seconds(again) == without_seconds(json.loads(finished["metrics.json"]))


def test_another_experiment_is_refused(done, capsys, finished, monkeypatch):
    for options, word in {
        "--method meanflow": "'method': 'meanflow'",
        "--target gaussians": "'target': 'gaussians'",
        "--no-divergence": "'no_divergence': True",
        "--no-teacher": "'no_teacher': True",
        "--paper": "'paper': True",
        "--seed 1": "'seed': 1",
        "--steps 10": "'steps': 10",
    }.items():
        message = stopped(capsys, 2, *options.split(), "--out", done)
        assert "'method': 'lsd'" in message and word in message.split("you asked for")[1]
    monkeypatch.setattr(train_2d, "BATCH", 32)  # by an edit of the script
    assert "'batch': 32" in stopped(capsys, 2, "--out", done)
    assert contents(done) == finished


@pytest.mark.parametrize("kind", ["empty", "cut short", "text", "another kind", "code"])
def test_a_bad_checkpoint_is_refused_and_left_alone(done, capsys, kind):
    class Code:
        def __reduce__(self):
            return (open, (str(done / "executed"), "w"))

    path = done / "checkpoint.pt"
    content = path.read_bytes()
    if kind in ("another kind", "code"):
        torch.save({"config": Code() if kind == "code" else None}, path)
    else:
        path.write_bytes({"empty": b"", "cut short": content[:-99], "text": b"text"}[kind])
    before = contents(done)
    assert str(path) in stopped(capsys, 2, "--out", done)
    assert contents(done) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys, monkeypatch, bad):
    loss = {"u": torch.tensor(bad)}
    monkeypatch.setattr(f2d2, "f2d2_loss", lambda *arguments, **options: loss)
    assert "flow diverged at step 1" in stopped(capsys, 2, "--out", tmp_path)
    assert not contents(tmp_path)
