"""Self-guidance, measured: python .github/guidance.py RUN... prints the README's table from folders of train_2d.py (lsd or shortcut-distill).
Per target, iterations and lr, at 1 / 2 steps, means over the runs: log p of the samples and of their least likely hundredth by the
oracle, the share off the support (less likely under the truth than all but 1 in 1,000 of its own samples), and the sample KL."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from f2d2 import MLP, JointFlowMap, ode_log_likelihood, sample, self_guidance
import train_2d

SETTINGS = [(0, 0.0)] + [(iterations, lr) for lr in (0.003, 0.005, 0.01, 0.03, 0.1, 0.3) for iterations in (1, 2, 4, 8)]
N, N_ORACLE = 100_000, 5_000


def load(folder):
    """The name of the target, the target, the flow map and its teacher, of a finished run."""
    state = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    flow, teacher = (JointFlowMap(MLP(2, train_2d.WIDTH, train_2d.DEPTH), train_2d.WIDTH, head) for head in (True, False))
    flow.load_state_dict(state["flow"]), teacher.load_state_dict(state["teacher"])
    return state["config"]["target"], train_2d.TARGETS[state["config"]["target"]](), flow, teacher


def main(folders):
    table = {}
    for folder in folders:
        name, target, flow, teacher = load(folder)
        generator = torch.Generator().manual_seed(7)
        x0 = torch.randn(N, 2, generator=generator)
        floor = target.log_prob(target.sample(N, generator, "cpu")).quantile(0.001)
        for iterations, lr in SETTINGS:
            start = torch.cat([self_guidance(flow, part, lr, iterations) for part in x0.split(20_000)])
            for steps in (1, 2):
                with torch.no_grad():
                    x = torch.cat([sample(flow, part, steps)[0] for part in start.split(20_000)])
                    log_p = ode_log_likelihood(teacher.velocity, x[:N_ORACLE], train_2d.ORACLE_STEPS // 2)
                row = log_p.mean(), log_p.quantile(0.01), 100 * (target.log_prob(x) < floor).float().mean(), train_2d.sample_kl(target, x)
                table.setdefault((name, iterations, lr), {}).setdefault(steps, []).append([float(v) for v in row])

    print("| target | iterations | lr | log p | its lowest 1 % | off the support, % | sample KL | range of KL at 1 step |\n" + "| --- " * 8 + "|")
    for (name, iterations, lr), rows in table.items():
        mean = [[sum(column) / len(column) for column in zip(*rows[steps])] for steps in (1, 2)]
        kl = [row[3] for row in rows[1]]
        cells = [f"{a:.2f} / {b:.2f}" for a, b in list(zip(*mean))[:3]] + [f"{mean[0][3]:.3f} / {mean[1][3]:.3f}", f"{min(kl):.3f}-{max(kl):.3f}"]
        print(f"| {name} | {iterations} | {lr} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
