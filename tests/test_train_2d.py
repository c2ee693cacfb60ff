"""train_2d.py end to end: every method for a few steps, resuming, the files it writes, what it refuses."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_2d
from f2d2 import ode_log_likelihood
from train_2d import Checkerboard, Gaussians, main

GITHUB = Path(train_2d.__file__).parent / ".github"
STEPS = train_2d.JOINT_STEPS // 1000  # so that the teacher and the warm start take a few steps too


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in dict(
        WIDTH=32, DEPTH=2, BATCH=64, N_TEST=64, N_SAMPLES=500, N_GRID=10, ORACLE_STEPS=4
    ).items():
        monkeypatch.setattr(train_2d, name, value)


def run(out, *options):
    main([*map(str, options), "--steps", str(STEPS), "--out", str(out)])
    return json.loads((out / "metrics.json").read_text())


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
    assert metrics["divergence_head"] == head and metrics["seed"] == 3 and metrics["seconds"] > 0
    assert set(metrics["oracle"]) == {"nll", "mae_truth", "sample_kl"} and list(
        metrics["steps"]
    ) == ["8", "4", "2", "1"]
    for row in metrics["steps"].values():
        assert set(row) == {"nll", "mae_oracle", "mae_truth", "mass", "sample_kl", "euler_nll"}
        assert math.isfinite(row["sample_kl"]) and math.isfinite(row["euler_nll"])
        assert all((row[k] is not None) == head for k in ("nll", "mae_oracle", "mae_truth", "mass"))
    assert Image.open(tmp_path / "figure.png").width > 1000
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["config"]["method"] == options[options.index("--method") + 1]
    out = capsys.readouterr().out
    assert "parameters" in out and "grad" in out and "s left" in out and "sample KL" in out


def test_the_paper_s_recipe_draws_uniform_times_in_every_stage():
    for method in train_2d.CONDITION:
        _, args, _ = train_2d.parse(["--method", method, "--paper"])
        for *_, options in train_2d.stages(args):
            assert options["log_time"] == 0.0


def test_huber_which_noise_would_bias_weighs_u_only_where_a_teacher_gives_the_targets():
    for options, ours in {
        "shortcut": "none",
        "shortcut-distill": "huber",
        "meanflow": "huber",
        "lsd": "none",
        "meanflow --no-teacher": "adaptive",
        "lsd --no-teacher": "none",
    }.items():
        for _, _, condition, kw in train_2d.stages(
            train_2d.parse(["--method", *options.split()])[1]
        ):
            assert condition is None or kw["velocity_weight"] == ours
    for method in train_2d.CONDITION:
        for _, _, condition, kw in train_2d.stages(
            train_2d.parse(["--method", method, "--paper"])[1]
        ):
            assert condition is None or kw["velocity_weight"] == (
                "adaptive" if method == "meanflow" else "none"
            )
            assert condition is None or not (kw["own_tangent"] or kw["through_dD"])


def test_meanflow_whose_time_derivative_log_times_blow_up_has_none(tmp_path):
    for method, inputs in (("meanflow", 18), ("lsd", 20)):
        run(tmp_path / method, "--method", method)
        flow = torch.load(tmp_path / method / "checkpoint.pt", weights_only=True)["flow"]
        assert flow["backbone.body.0.weight"].shape[1] == inputs


def test_a_student_that_is_its_own_target_has_weight_decay(tmp_path, monkeypatch):
    decay, muon = [], train_2d.Muon
    monkeypatch.setattr(
        train_2d,
        "Muon",
        lambda matrices, options: (decay.append(options["weight_decay"]), muon(matrices, options))[
            1
        ],
    )
    run(tmp_path / "shortcut-distill", "--method", "shortcut-distill")
    run(tmp_path / "lsd", "--method", "lsd")
    assert decay == [0, 0.1, 0.1, 0, 0, 0]  # teacher, warm start, joint


def test_muon_is_torch_s_but_for_the_rounding():
    """Three steps, with weight decay; the second matrix has no gradient at first, as the head's in the warm start."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((12, 16), (12, 12), (12, 12))]
    torch_s = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = train_2d.Muon(ours, {"weight_decay": 0.1}), torch.optim.Muon(torch_s, weight_decay=0.1)
    for step in range(3):
        for p, q in zip(ours, torch_s):
            p.grad = (
                None if p is ours[1] and step == 0 else torch.randn(p.shape) * (p is not ours[2])
            )
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
    for p, q in zip(ours, torch_s):
        torch.testing.assert_close(
            p, q, atol=5e-3, rtol=0
        )  # singular values move by 0.07 to 0.12 a step
        assert p.isfinite().all()


def test_every_ablation_edits_the_source_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(GITHUB))
    ablate = importlib.import_module("ablate")
    sources = lambda: [(tmp_path / file).read_text() for file in ("f2d2.py", "train_2d.py")]
    ablate.prepare("the default", tmp_path)
    default = sources()
    for name in ablate.ABLATIONS:
        ablate.prepare(name, tmp_path)
        assert (sources() != default) == bool(ablate.ABLATIONS[name][1])
        (
            compile((tmp_path / "f2d2.py").read_text(), "f2d2.py", "exec"),
            compile((tmp_path / "train_2d.py").read_text(), "train_2d.py", "exec"),
        )
        train_2d.parse(ablate.ABLATIONS[name][0].split())


@pytest.mark.parametrize(
    "options, blurred",
    [([], True), (["--paper"], False), (["--method", "lsd", "--no-teacher"], False)],
    ids=str,
)
def test_a_student_of_a_teacher_also_trains_off_the_data(tmp_path, monkeypatch, options, blurred):
    noise, loss = {True: [], False: []}, train_2d.f2d2_loss
    monkeypatch.setattr(
        Checkerboard, "sample", lambda self, n, generator, device: torch.zeros(n, 2, device=device)
    )
    monkeypatch.setattr(
        train_2d,
        "f2d2_loss",
        lambda net, x1, condition, *a, **kw: (
            noise[condition is None].append(x1.clone()),
            loss(net, x1, condition, *a, **kw),
        )[1],
    )
    run(tmp_path, *options)
    assert not any(x1.any() for x1 in noise[True])  # the teacher sees the data as they are
    x1 = torch.cat(noise[False])
    if not blurred:
        assert not x1.any()
    else:  # std log-uniform between 0.05 and 0.4: E std^2 and P(|x| > 0.2)
        assert x1.square().mean().item() == pytest.approx(
            (0.4**2 - 0.05**2) / (2 * math.log(8)), rel=0.3
        )
        std = 0.05 * 8 ** torch.linspace(0, 1, 1001)
        assert (x1.norm(dim=1) > 0.2).float().mean().item() == pytest.approx(
            torch.exp(-0.5 * (0.2 / std) ** 2).mean().item(), rel=0.3
        )


def test_the_table_of_systems_is_read_from_the_runs(tmp_path):
    table = lambda: subprocess.run(
        [sys.executable, GITHUB / "table.py", tmp_path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    mass = [run(tmp_path / seed, "--seed", seed)["steps"]["8"]["mass"] for seed in "01"]
    assert len(table()) == 2 + 5  # the oracle, 8, 4, 2, 1 steps
    assert f"| {sum(mass) / 2:.3f} ({min(mass):.3f} to {max(mass):.3f}) |" in table()[3]
    run(tmp_path / "baseline", "--no-divergence"), run(tmp_path / "flow", "--method", "flow")
    flow, lsd, baseline = sorted(table()[2:])
    assert flow.startswith("| checkerboard, flow (1) |") and lsd.startswith(
        "| checkerboard, lsd (2) |"
    )
    assert (
        baseline.startswith("| checkerboard, lsd, no head (1) |")
        and lsd.split("|")[6].startswith(f" {sum(mass) / 2:.3f} / ")
        and flow.split("|")[6].strip() == ""
    )


def test_self_guidance_is_measured_on_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(GITHUB))
    guidance = importlib.import_module("guidance")
    monkeypatch.setattr(guidance, "N", 500), monkeypatch.setattr(guidance, "N_ORACLE", 50)
    monkeypatch.setattr(guidance, "SETTINGS", [(0, 0.0), (8, 1.0)])
    run(tmp_path), capsys.readouterr()
    guidance.main([tmp_path])
    plain, guided = capsys.readouterr().out.splitlines()[2:]
    assert plain.startswith("| checkerboard | 0 | 0.0 |") and guided.startswith(
        "| checkerboard | 8 | 1.0 |"
    )
    log_p = [float(row.split("|")[4].split("/")[0]) for row in (plain, guided)]
    assert log_p[1] > log_p[0] + 0.1  # eight steps of length one towards the likelier start


def test_grids_of_few_steps_are_measured_on_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(GITHUB))
    grids = importlib.import_module("grids")
    monkeypatch.setattr(grids, "N_TEST", 50), monkeypatch.setattr(grids, "N_SAMPLES", 500)
    run(tmp_path), capsys.readouterr()
    grids.main([tmp_path])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[2:4] for row in rows] == [
        [f" {k} ", f" {name} "] for k in (8, 4, 2) for name in ("uniform", "finer near the data")
    ]
    assert all(a.split("|")[4:] != b.split("|")[4:] for a, b in zip(rows[::2], rows[1::2]))


def test_a_finished_run_prints_its_table_again_and_trains_nothing(tmp_path, monkeypatch, capsys):
    first = run(tmp_path)
    monkeypatch.setattr(train_2d, "f2d2_loss", None)
    assert run(tmp_path) == first
    assert "sample KL" in capsys.readouterr().out


def test_a_stopped_run_resumes_bit_identically(tmp_path, monkeypatch):
    loss, calls = train_2d.f2d2_loss, []

    def stop_at(n):
        def counted(*args, **kw):
            calls.append(1)
            if len(calls) == n:
                raise KeyboardInterrupt
            return loss(*args, **kw)

        return counted

    whole = run(tmp_path / "whole", "--method", "meanflow", "--no-teacher")
    for n in (3, 6):  # in the first stage and in the last
        calls.clear()
        monkeypatch.setattr(train_2d, "f2d2_loss", stop_at(n))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", "--method", "meanflow", "--no-teacher")
    monkeypatch.setattr(train_2d, "f2d2_loss", loss)
    parts = run(tmp_path / "parts", "--method", "meanflow", "--no-teacher")
    assert parts["steps"] == whole["steps"] and parts["oracle"] == whole["oracle"]
    a, b = (
        torch.load(tmp_path / p / "checkpoint.pt", weights_only=True)["flow"]
        for p in ("whole", "parts")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def refused(capsys, *options):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, options)))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_refused_and_nothing_on_disk_is_touched(tmp_path, capsys, monkeypatch):
    assert "checkerboard" in refused(capsys, "--target", "moons")
    assert "shortcut" in refused(capsys, "--method", "diffusion")
    assert "at least 1" in refused(capsys, "--steps", "0", "--out", tmp_path / "new")
    assert "drop --no-teacher" in refused(
        capsys, "--method", "shortcut-distill", "--no-teacher", "--out", tmp_path / "new"
    )
    assert "'cpu', 'cuda'" in refused(capsys, "--device", "abacus", "--out", tmp_path / "new")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "use --device cpu" in refused(capsys, "--device", "cuda", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()

    run(tmp_path / "lsd", "--method", "lsd")
    before = {p.name: p.read_bytes() for p in (tmp_path / "lsd").iterdir()}
    err = refused(capsys, "--method", "meanflow", "--steps", STEPS, "--out", tmp_path / "lsd")
    assert "'method': 'lsd'" in err and "'method': 'meanflow'" in err
    with (
        monkeypatch.context() as patch
    ):  # another version of this script, whose network or batch differs
        patch.setattr(train_2d, "WIDTH", 48), patch.setattr(train_2d, "BATCH", 32)
        assert "another experiment" in refused(
            capsys, "--method", "lsd", "--steps", STEPS, "--out", tmp_path / "lsd"
        )
    assert {p.name: p.read_bytes() for p in (tmp_path / "lsd").iterdir()} == before

    for name, content in (("corrupt", b"not a checkpoint"), ("foreign", None), ("results", None)):
        folder = tmp_path / name
        folder.mkdir()
        if content:
            (folder / "checkpoint.pt").write_bytes(content)
        elif name == "foreign":
            torch.save({"weights": torch.zeros(2)}, folder / "checkpoint.pt")
        else:
            (folder / "metrics.json").write_text("{}")
        assert "choose another --out" in refused(capsys, "--steps", STEPS, "--out", folder)
        assert [p.name for p in folder.iterdir()] == [
            "metrics.json" if name == "results" else "checkpoint.pt"
        ]


def test_a_checkpoint_cannot_execute_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"config": Evil()}, tmp_path / "checkpoint.pt")
    assert "choose another --out" in refused(capsys, "--out", tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("target", [Checkerboard(), Gaussians()])
def test_targets_integrate_to_one_and_samples_have_no_divergence(target):
    points = train_2d.grid(500, 5, "cpu")
    assert target.log_prob(points).exp().sum().item() * 0.02**2 == pytest.approx(1, abs=1e-3)
    x = target.sample(200_000, torch.Generator().manual_seed(0), "cpu")
    assert 0 < train_2d.sample_kl(target, x) < 0.01
    assert train_2d.sample_kl(target, x * 0.9) > 0.1
    assert train_2d.sample_kl(target, torch.cat([x, x + 100])) == pytest.approx(
        math.log(2), abs=0.02
    )  # half are missing


def test_the_mixture_s_velocity_transports_it():
    """The continuity equation along a path: d/dt log p_t(x_t) = -div v, by central differences."""
    target, e = Gaussians(), 1e-5
    x, t = 2 * torch.randn(50, 2, dtype=torch.float64), torch.full((50,), 0.6, dtype=torch.float64)
    v = target.velocity(x, t)
    change = (target.log_prob(x + e * v, 0.6 + e) - target.log_prob(x - e * v, 0.6 - e)) / (2 * e)
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda y: target.velocity(y, t[:1]), x[i : i + 1])[
                0, :, 0
            ]
            for i in range(50)
        ]
    )
    torch.testing.assert_close(
        change, -jacobian.diagonal(dim1=1, dim2=2).sum(1), atol=1e-6, rtol=1e-5
    )
