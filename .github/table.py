"""The README's 2-D tables: python .github/table.py FOLDER... reads each metrics.json of train_2d.py below them. One system: a line for each
number of steps, mean (range) over seeds; several: a line for each system, means at 8 / 4 / 2 / 1 steps and the ranges at one step."""
import json
import sys
from pathlib import Path

COLUMNS = {"nll": "NLL", "mae_oracle": "error against the oracle", "mae_truth": "error against the truth", "mass": "mass",
           "sample_kl": "sample KL", "euler_nll": "Euler NLL"}
text = lambda v: f"{v:.3f}" if abs(v) < 100 else f"{v:.0e}"
mean = lambda values: "" if None in values else text(sum(values) / len(values))
spread = lambda values: "" if None in values else f"{text(min(values))} to {text(max(values))}"


def read(paths):
    return [json.loads(path.read_text()) for path in sorted(paths)]


def one_system(runs):
    print("| steps | " + " | ".join(COLUMNS.values()) + " |\n" + "| --- " * (1 + len(COLUMNS)) + "|")
    for k in ["oracle", *runs[0]["steps"]]:
        rows = [run["oracle"] if k == "oracle" else run["steps"][k] for run in runs]
        columns = [[row.get(c) for row in rows] for c in COLUMNS]
        print(f"| {k} | " + " | ".join("" if None in v else f"{mean(v)} ({spread(v)})" for v in columns) + " |")


def several_systems(systems):
    """systems: {name: [metrics of each seed]}."""
    names = ["NLL", "error against the oracle", "at 1 step", "error against the truth", "mass", "sample KL", "at 1 step", "Euler NLL",
             "oracle: NLL, KL"]
    print("| (seeds) | " + " | ".join(names) + " |\n" + "| --- " * (1 + len(names)) + "|")
    for name, runs in systems.items():
        values = lambda key, k: [run["steps"][k][key] for run in runs]
        cell = lambda key: " / ".join(filter(None, (mean(values(key, k)) for k in runs[0]["steps"])))
        cells = [cell("nll"), cell("mae_oracle"), spread(values("mae_oracle", "1")), cell("mae_truth"), cell("mass"), cell("sample_kl"),
                 spread(values("sample_kl", "1")), cell("euler_nll"), ", ".join(mean([run["oracle"][key] for run in runs]) for key in ("nll", "sample_kl"))]
        print(f"| {name} ({len(runs)}) | {' | '.join(cells)} |")


def main(folders):
    systems = {}
    for run in read(path for folder in folders for path in Path(folder).rglob("metrics.json")):
        name = f"{run['target']}, {run['method']}{'' if run['divergence_head'] or run['method'] == 'flow' else ', no head'}"
        systems.setdefault(name, []).append(run)
    one_system(*systems.values()) if len(systems) == 1 else several_systems(systems)


if __name__ == "__main__":
    main(sys.argv[1:])
