"""The README's code runs as printed."""

import re
from pathlib import Path

import torch

from f2d2 import MLP

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_paste_into_your_repository():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {
        "backbone": MLP(3, 16, 2),
        "feature_dim": 16,
        "data": [torch.randn(8, 3) for _ in range(3)],
    }
    before = [p.clone() for p in names["backbone"].parameters()]
    exec(code, names)
    assert names["x1"].shape == (8, 3) and names["log_p"].shape == (8,)
    assert all(not torch.equal(a, b) for a, b in zip(before, names["backbone"].parameters()))


def test_commands_are_one_line_each_and_name_files_that_exist():
    commands = re.findall(r"```\n(pip install.*?)\n```", README)
    assert commands == [
        "pip install -r requirements.txt && python train_2d.py",
        "pip install -r requirements.txt && python -m pytest",
    ]
    for name in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (Path(__file__).parent.parent / name).exists(), name
