"""Self-guidance, measured: python .github/guidance.py RUN... reads runs of train_2d.py with a divergence head and prints the README's table."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from f2d2 import MLP, JointFlowMap, ode_log_likelihood, sample, self_guidance
from train_2d import DEPTH, ORACLE_STEPS, TARGETS, WIDTH, sample_kl

print("| target | iterations | lr | steps | log p of the samples (oracle) | worst 1 % | off the support (%) | sample KL |\n" + "| --- " * 8 + "|")
results = {}
for run in sys.argv[1:]:
    state = torch.load(Path(run) / "checkpoint.pt", weights_only=True)
    target = TARGETS[state["config"]["target"]]()
    flow, teacher = JointFlowMap(MLP(2, WIDTH, DEPTH), WIDTH), JointFlowMap(MLP(2, WIDTH, DEPTH), WIDTH, False)
    flow.load_state_dict(state["flow"]), teacher.load_state_dict(state["teacher"])
    x0 = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(7))
    # off the support: less likely under the truth than all but one in a thousand of its own samples
    truth = target.log_prob(target.sample(100_000, torch.Generator().manual_seed(8), "cpu"))
    floor = truth.sort().values[100]
    for iterations, lr in [(0, 0.0), (1, 0.01), (1, 0.03), (1, 0.1), (1, 0.3), (2, 0.1), (4, 0.1), (8, 0.1), (8, 0.03)]:
        start = torch.cat([self_guidance(flow, part, lr, iterations) for part in x0.split(20_000)])
        for steps in (1, 2):
            with torch.no_grad():
                x = sample(flow, start, steps)[0]
                log_p = ode_log_likelihood(teacher.velocity, x[:5000], ORACLE_STEPS // 2)
            row = [log_p.mean().item(), log_p.quantile(0.01).item(), 100 * (target.log_prob(x) < floor).float().mean().item(), sample_kl(target, x)]
            results.setdefault((state["config"]["target"], iterations, lr, steps), []).append(row)
for key, rows in results.items():
    means = [f"{sum(column) / len(rows):.3f} ({min(column):.3f} to {max(column):.3f})" for column in zip(*rows)]
    print(f"| {' | '.join(map(str, key))} | {' | '.join(means)} |")
