"""The README's code runs as printed, and what it names is there."""

import re
from pathlib import Path

import torch
from torch import nn

import f2d2
from train_2d import MLP

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_five_lines_of_the_first_screen():
    names = vars(f2d2) | {"backbone": MLP(3, 16, 2), "feature_dim": 16}
    names |= {"x0": torch.randn(8, 3), "x1": torch.randn(8, 3)}
    exec(CODE[0], names)
    assert names["loss"].isfinite() and names["log_p"].shape == (8,)


class Labelled(MLP):
    def forward(self, x, t, s, labels):
        return super().forward(x + labels[:, None], t, s)


def test_paste_into_your_repository():
    names = {"backbone": Labelled(3, 16, 2), "feature_dim": 16}
    names["data"] = [(torch.randn(8, 3), torch.arange(8)) for _ in range(3)]
    before = [p.clone() for p in names["backbone"].parameters()]
    exec(CODE[1], names)
    assert names["x1"].shape == (8, 3) and names["log_p"].shape == (8,)
    assert not names["log_p"].requires_grad
    after = names["backbone"].parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after))


class StraightLines(nn.Module):
    """In MeanFlow's time, exact if all of the data are one point: z moves along a line."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def forward(self, z, times, aug_cond):
        return (z - self.data) / times[0][:, None]


class Features(nn.Module):
    def forward(self, x, t, s):
        return torch.ones(len(x), 1)


def test_a_network_in_meanflows_time_is_wrapped():
    """x = (1-t) x_0 + t x_1 is z at MeanFlow's time 1 - t, and dx/dt = -dz/d(1-t)."""
    names = {"torch": torch}
    exec(next(code for code in CODE if "class FromMeanFlow" in code), names)
    data = torch.randn(5, 2)
    noise = torch.randn(5, 2)
    backbone = names["FromMeanFlow"](StraightLines(data), Features())
    t = torch.full((5,), 0.25)
    s = torch.full((5,), 0.75)
    x_t = 0.75 * noise + 0.25 * data
    u, features = backbone(x_t, t, s)
    torch.testing.assert_close(x_t + 0.5 * u, 0.25 * noise + 0.75 * data)
    assert features.shape == (5, 1)


def test_commands_are_one_line_each_and_name_files_that_exist():
    commands = re.findall(r"```\n(pip install.*?)\n```", README)
    assert commands == [
        "pip install -r requirements.txt && python train_2d.py",
        "pip install -r requirements.txt && python -m pytest",
    ]
    for name in re.findall(r"\]\(([^)h#][^)#]*)", README):
        assert (ROOT / name).exists(), name


def test_what_is_ours_is_marked_where_the_readme_says():
    lines = (ROOT / "f2d2.py").read_text().split("\n")
    numbers = [int(n) for n in re.findall(r"\(f2d2\.py#L(\d+)\)", README)]
    assert len(numbers) > 5
    for number in numbers:
        assert "[ours]" in lines[number - 1], lines[number - 1]
