"""The README's code runs as printed, and what it names is there."""

import re
from pathlib import Path

import torch

from train_2d import MLP

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_paste_into_your_repository():
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    names = {
        "backbone": MLP(3, 16, 2),
        "feature_dim": 16,
        "data": [torch.randn(8, 3) for _ in range(3)],
    }
    before = [p.clone() for p in names["backbone"].parameters()]
    exec(code, names)
    assert names["x1"].shape == (8, 3)
    assert names["log_p"].shape == (8,)
    after = names["backbone"].parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after))


def test_a_network_in_meanflows_time_is_wrapped():
    """x = (1-t) x_0 + t x_1 is z at MeanFlow's time 1 - t, and dx/dt = -dz/d(1-t)."""
    names = {"torch": torch}
    exec(re.findall(r"```python\n(.*?)```", README, re.S)[1], names)
    data = torch.randn(5, 2)

    def net(z, r, t):  # exact if all of the data are one point: z moves along a straight line
        return (z - data) / t[:, None]

    backbone = names["FromMeanFlow"](net, lambda x, t, s: torch.ones(len(x), 1))
    noise = torch.randn(5, 2)
    t, s = torch.full((2, 5), 0.25)
    s = s + 0.5
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
