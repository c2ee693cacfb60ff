"""The README's 2-D table, mean (range) over seeds: python .github/table.py FOLDER reads each metrics.json of train_2d.py below it."""
import json
import sys
from pathlib import Path

COLUMNS = {"nll": "NLL", "mae_oracle": "error against the oracle", "mae_truth": "error against the truth", "mass": "mass",
           "sample_kl": "sample KL", "euler_nll": "Euler NLL"}
runs = {}
for path in sorted(Path(sys.argv[1]).rglob("metrics.json")):
    m = json.loads(path.read_text())
    name = f"{m['target']}, {m['method']}{'' if m['divergence_head'] or m['method'] == 'flow' else ', no head'}"
    runs.setdefault(name, []).append(m)


def cell(values):
    values = [v for v in values if v is not None]
    text = lambda v: f"{v:.3f}" if abs(v) < 100 else f"{v:.0e}"
    spread = f" ({text(min(values))} to {text(max(values))})" if len(values) > 1 else ""
    return text(sum(values) / len(values)) + spread if values else ""


print("| | steps | " + " | ".join(COLUMNS.values()) + " |\n" + "| --- " * (2 + len(COLUMNS)) + "|")
for name, ms in runs.items():
    for k in ["oracle", *ms[0]["steps"]]:
        rows = [m["oracle"] if k == "oracle" else m["steps"][k] for m in ms]
        print(f"| {name}, {len(ms)} seed{'s' * (len(ms) > 1)} | {k} | " + " | ".join(cell([row.get(c) for row in rows]) for c in COLUMNS) + " |")
