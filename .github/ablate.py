"""One thing changed in the 2-D run, trained and measured: python .github/ablate.py "no baseline" --seed 0 --steps 1000
Without a name: the README's table, from the runs in runs/ablation. Every row is options of train_2d.py and edits of the source; the
teacher keeps its full number of steps, whatever --steps says, because a dull teacher is easy for any student."""
import subprocess
import sys
from pathlib import Path

from table import read, several_systems

ROOT, RUNS = Path(__file__).parent.parent, Path("runs/ablation")
HUBER = 'velocity_weight=weight if args.no_teacher or lsd else "huber"'
WHOLE_TEACHER = ("round(n * args.steps / JOINT_STEPS)", 'n if name == "teacher" else round(n * args.steps / JOINT_STEPS)')
SCRATCH = ('elif name == "warm start" and velocity:', "elif False:")
FORWARD = [('kw = dict(probe="exact"', 'kw = dict(direction="forward", probe="exact"'), ('args.paper and args.method != "lsd"', "True")]
TWO = """class Two(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.u, self.D = MLP(2, width, DEPTH), MLP(2, width, DEPTH)

    def forward(self, x, t, s):
        return self.u(x, t, s)[0], self.D(x, t, s)[1]


TARGETS = """
ABLATIONS = {  # name: (options, [(old, new)]); each old occurs once in f2d2.py and train_2d.py together
    "the default": ("", []),
    "--paper": ("--paper", []),
    "shortcut-distill": ("--method shortcut-distill", []),
    "shortcut-distill, forward only, mirrored": ("--method shortcut-distill", FORWARD),
    "shortcut-distill, L_u unweighted": ("--method shortcut-distill", [(HUBER, "velocity_weight=weight")]),
    "no log time": ("", [('"meanflow" else 0.5,', '"meanflow" else 0.0,'), ('logs = ours and args.method != "meanflow"', "logs = False")]),
    "no baseline": ("", [("WIDTH, head, ours, logs", "WIDTH, head, False, logs")]),
    "huber on L_u": ("", [(HUBER, 'velocity_weight="huber"')]),
    "L_D unweighted": ("", [('divergence_weight="huber"', 'divergence_weight="none"')]),
    "natural weight on L_D": ("", [('divergence_weight="huber"', 'divergence_weight="natural"')]),
    "Rademacher probe": ("", [('probe="exact", diagonal', 'probe="rademacher", diagonal')]),
    "Gaussian probe": ("", [('probe="exact", diagonal', 'probe="rademacher", diagonal'),
                            ("torch.randint(0, 2, x.shape, device=x.device, generator=generator).to(x.dtype) * 2 - 1",
                             "torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)")]),
    "no noise on the data": ("", [("blur = 0.05 if", "blur = 0.0 if")]),
    "no warm start": ("", [("JOINT_STEPS = 3000, 500,", "JOINT_STEPS = 3000, 0,")]),
    "no Fourier features": ("", [("[y, y.sin(), y.cos(), (2 * y).sin(), (2 * y).cos(), ", "[y, "), ("sizes = [5 * data_dim", "sizes = [data_dim")]),
    "not from the teacher's weights": ("", [SCRATCH]),
    "not from the teacher's weights, u and D in two networks": ("", [SCRATCH, ("TARGETS = ", TWO), (">= WIDTH)", ">= 136)"),
        ("JointFlowMap(MLP(2, WIDTH, DEPTH, logs), WIDTH, head", "JointFlowMap(Two(136) if head else MLP(2, WIDTH, DEPTH), 136 if head else WIDTH, head")]),
    "Adam alone": ("", [('Muon(matrices, {"weight_decay": 0.1 * (condition == "semigroup")})', "torch.optim.Adam(matrices)"), ("(0.02, 3e-3)", "(3e-3, 3e-3)")]),
    "no gradient through ∂u/∂s": ("", [("(v - _wide(s - t, x) * du,", "(v - _wide(s - t, x) * du.detach(),")]),
    "no gradient through ∂D/∂s": ("", [('kw = dict(probe="exact"', 'kw = dict(through_dD=False, probe="exact"')]),
    "meanflow": ("--method meanflow", []),
    "meanflow, adaptive weight on L_u": ("--method meanflow", [(HUBER, "velocity_weight=weight")]),
    "meanflow, log time": ("--method meanflow", [('log_time=0.0 if args.method == "meanflow" else 0.5', "log_time=0.5"), ('logs = ours and args.method != "meanflow"', "logs = ours")]),
    "meanflow --no-teacher": ("--method meanflow --no-teacher", []),
    "meanflow --no-teacher, tangent x_1 - x_0": ("--method meanflow --no-teacher", [('kw = dict(probe="exact"', 'kw = dict(own_tangent=False, probe="exact"')]),
}


def prepare(name, folder):
    """Writes the edited f2d2.py and train_2d.py into folder; raises ValueError for an edit that does not fit the source."""
    sources = {file: (ROOT / file).read_text() for file in ("f2d2.py", "train_2d.py")}
    for old, new in [WHOLE_TEACHER, *ABLATIONS[name][1]]:
        if (count := sum(text.count(old) for text in sources.values())) != 1:
            raise ValueError(f'"{name}" edits "{old}", which occurs {count} times.')
        sources = {file: text.replace(old, new) for file, text in sources.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in sources.items():
        (folder / file).write_text(text)


def slug(name):
    return "".join(c if c.isalnum() else "_" for c in name)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        runs = {name: read(RUNS.glob(f"{slug(name)}-*/metrics.json")) for name in ABLATIONS}
        several_systems({name: seeds for name, seeds in runs.items() if seeds})
    elif sys.argv[1] not in ABLATIONS:
        sys.exit(f'no ablation is called "{sys.argv[1]}"; there are: {"; ".join(ABLATIONS)}.')
    else:
        name, options = sys.argv[1], sys.argv[2:]
        seed = options[options.index("--seed") + 1] if "--seed" in options else "0"
        folder = RUNS / f"{slug(name)}-{seed}"
        prepare(name, folder)
        command = [sys.executable, folder / "train_2d.py", *ABLATIONS[name][0].split(), "--out", folder, *options]
        sys.exit(subprocess.run(command).returncode)
