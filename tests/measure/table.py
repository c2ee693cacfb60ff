"""The README's tables, from the runs of train_2d.py or of train_image.py:

python tests/measure/table.py FOLDER...    every metrics.json in and below these folders

Runs of one system in 2-D: a line for each number of steps, mean (range) over seeds. Of several
systems: a line for each, means at 8 / 4 / 2 / 1 steps and the ranges at one step. Images: a line
for each system, means at 8 / 4 / 2 / 1 steps (range over steps and seeds).
"""

import json
import sys
from pathlib import Path

COLUMNS = {
    "nll": "NLL",
    "mae_oracle": "error against the oracle",
    "mae_truth": "error against the truth",
    "mass": "mass",
    "mae_sample": "error of the samples' log p",
    "sample_kl": "sample KL",
    "euler_nll": "Euler NLL",
    "seconds": "seconds for 10,000 log p",
}
ORACLE_COLUMNS = {"bpd": "oracle", "energy": "energy"}  # of train_image.py
IMAGE_COLUMNS = {
    "bpd": "bits/dim",
    "bpd_oracle": "bits/dim of the oracle's images",
    "gap": "gap to the oracle",
    "mae_oracle": "error per image",
    "corr": "correlation",
}
RANGES = ("mae_oracle", "sample_kl")  # of several systems, at one step
ORACLE = ("nll", "sample_kl", "seconds")


def number(value):
    if abs(value) >= 100:
        return f"{value:.0e}"
    return f"{value:.3f}"


def mean(values):
    """Of the seeds, or nothing where a system has no such number."""
    if None in values:
        return ""
    return number(sum(values) / len(values))


def spread(values):
    if None in values:
        return ""
    return f"{number(min(values))} to {number(max(values))}"


def print_row(cells):
    print("| " + " | ".join(cells) + " |")


def print_header(titles):
    print_row(titles)
    print("| --- " * len(titles) + "|")


def name_of(run):
    if "config" in run:  # of train_image.py
        taught = "teacher" in run["oracle"]["of"]
        return f"{run['config']['method']}, {'teacher' if taught else 'from data'}"
    name = f"{run['target']}, {run['method']}"
    if run.get("no_teacher") and run["method"] in ("meanflow", "lsd"):
        name += " from data"
    if not run["divergence_head"] and run["method"] != "flow":
        name += ", no head"
    if run.get("paper"):
        name += ", paper"
    return name


def one_system(runs):
    print_header(["steps", *COLUMNS.values()])
    for k in ["oracle", *runs[0]["steps"]]:
        rows = [run["oracle"] if k == "oracle" else run["steps"][k] for run in runs]
        cells = [k]
        for key in COLUMNS:
            values = [row.get(key) for row in rows]
            cells.append("" if None in values else f"{mean(values)} ({spread(values)})")
        print_row(cells)


def several_systems(systems):
    """systems: {name: metrics of each seed}."""
    titles = ["(seeds)"]
    for key, title in COLUMNS.items():
        titles.append(title)
        if key in RANGES:
            titles.append("at 1 step")
    print_header([*titles, "oracle: NLL, KL, seconds"])

    for name, runs in systems.items():
        cells = [f"{name} ({len(runs)})"]
        for key in COLUMNS:
            columns = {k: [run["steps"][k].get(key) for run in runs] for k in runs[0]["steps"]}
            means = [mean(values) for values in columns.values()]
            cells.append(" / ".join(text for text in means if text))
            if key in RANGES:
                cells.append(spread(columns["1"]))
        oracle = [mean([run["oracle"].get(key) for run in runs]) for key in ORACLE]
        print_row([*cells, ", ".join(oracle)])


def image_systems(systems):
    print_header(["(seeds)", *ORACLE_COLUMNS.values(), *IMAGE_COLUMNS.values()])
    for name, runs in systems.items():
        cells = [f"{name} ({len(runs)})"]
        for key in ORACLE_COLUMNS:
            cells.append(mean([run["oracle"][key] for run in runs]))
        for key in IMAGE_COLUMNS:
            columns = [[run["steps"][k].get(key) for run in runs] for k in runs[0]["steps"]]
            means = [mean(values) for values in columns]
            cells.append("" if "" in means else f"{' / '.join(means)} ({spread(sum(columns, []))})")
        print_row(cells)


def main(folders):
    paths = {path for folder in folders for path in Path(folder).rglob("metrics.json")}
    runs = [json.loads(path.read_text()) for path in sorted(paths)]
    systems = {}
    for run in runs:
        systems.setdefault(name_of(run), []).append(run)
    if not runs:
        sys.exit("no metrics.json there: name the folders of finished runs.")
    elif "config" in runs[0]:
        image_systems(systems)
    elif len(systems) == 1:
        one_system(*systems.values())
    else:
        several_systems(systems)


if __name__ == "__main__":
    main(sys.argv[1:])
