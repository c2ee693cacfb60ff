"""Networks that others wrote, wrapped in README's lines, in everything that f2d2.py does:

python tests/measure/networks.py

Installs nothing: uses what is there of torchcfm, diffusers, timm and torchvision. The networks are
small and untrained. A cell says "yes" or what was raised; "NotImplementedError; yes": as it is, and
with what README says that helps.
"""

import copy
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[2]))
import f2d2

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "torchcfm", "diffusers", "timm", "torchvision")
SIZE = 8
COLOURS = 3
PIXELS = COLOURS * SIZE**2
FEATURES = 16


def readme_classes():
    """{name: class} of what README's "Paste it" wraps networks in."""
    names = {"torch": torch}
    for code in re.findall(r"```python\n(class .*?)```", (ROOT / "README.md").read_text(), re.S):
        exec(code, names)
    return names


# ------------------------------------------------------------------------------- adapters
class Adapter(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


class Torchcfm(Adapter):
    def forward(self, x, t, *context):
        return self.net(t, x, *context)


class Diffusers(Adapter):
    def forward(self, x, t, *context):
        return self.net(x, 1000 * t, *context).sample


class InBfloat16(Adapter):
    def forward(self, *inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(*inputs)


class PlaneOfS(Adapter):
    """s as one more input plane of a network whose output stays."""

    def forward(self, x, t, s, *context):
        plane = s.reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        return self.net(torch.cat([x, plane], 1), t, *context)


def with_times(x, t, s):
    """x [B, C, ...] with both times as planes: [B, C + 2, ...]."""
    times = torch.stack([t, s], 1).reshape(len(x), 2, *[1] * (x.dim() - 2))
    return torch.cat([x, times.expand(-1, -1, *x.shape[2:])], 1)


class Classifier(Adapter):
    """A network without any time: its "classes" are u and the features."""

    def forward(self, x, t, s):
        out = self.net(with_times(x, t, s))
        size = x[0].numel()
        return out[:, :size].reshape(x.shape), out[:, size:]


class Tokens(nn.Module):
    """Pixels as tokens of nn.TransformerEncoder."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(FEATURES, 2, 32, dropout=0.0, batch_first=True)
        self.first = nn.Linear(COLOURS + 2, FEATURES)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.last = nn.Linear(FEATURES, COLOURS)

    def forward(self, x, t, s):
        tokens = with_times(x, t, s).flatten(2).mT  # [B, H W, C + 2]
        h = self.encoder(self.first(tokens))
        return self.last(h).mT.reshape(x.shape), h.mean(1)


# ------------------------------------------------------------------------------- networks
# Each is imported where it is made, so that those that are not there can be left out.
def torchcfm_mlp():
    from torchcfm.models.models import MLP

    return Classifier(MLP(2 + 1, 2 + FEATURES, time_varying=True))


def torchcfm_unet(**options):
    from torchcfm.models.unet.unet import UNetModel

    planes = COLOURS + 1, 32, COLOURS + FEATURES  # in, inside, out
    return Torchcfm(UNetModel(SIZE, *planes, 1, (1, 2), channel_mult=(1, 2), **options))


def diffusers_unet(checkpointing=False):
    from diffusers import UNet2DModel

    net = UNet2DModel(
        SIZE,
        COLOURS + 1,
        COLOURS + FEATURES,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(FEATURES, FEATURES),
        norm_num_groups=8,
        num_class_embeds=10,
    )
    if checkpointing:
        net.enable_gradient_checkpointing()
    return Diffusers(net)


def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    options = dict(num_layers=2, sample_size=SIZE, num_embeds_ada_norm=10)
    net = DiTTransformer2DModel(2, 16, COLOURS + 1, COLOURS + FEATURES, **options)
    return Diffusers(net).eval()  # in train() it drops labels at random


def timm_vit(checkpointing=False):
    from timm.models.vision_transformer import VisionTransformer

    options = dict(embed_dim=32, depth=2, num_heads=2)
    net = VisionTransformer(SIZE, 2, COLOURS + 2, PIXELS + FEATURES, **options)
    net.set_grad_checkpointing(checkpointing)
    return Classifier(net)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    net = VisionTransformer(SIZE, 2, 2, 2, 32, 64, num_classes=PIXELS + FEATURES)
    net.conv_proj = nn.Conv2d(COLOURS + 2, 32, 2, stride=2)
    return Classifier(net)


def torchvision_resnet():
    from torchvision.models import resnet18

    net = resnet18(num_classes=PIXELS + FEATURES)
    net.conv1 = nn.Conv2d(COLOURS + 2, 64, 3, padding=1)
    return Classifier(net)


def networks():
    """{name: function that makes a backbone}."""
    classes = readme_classes()
    two_times = classes["TwoTimes"]

    def with_features():
        adapted = diffusers_unet()
        last = nn.Conv2d(FEATURES, COLOURS, 3, padding=1)
        adapted.net.conv_out = last
        return classes["WithFeatures"](PlaneOfS(adapted), last)

    return {
        "torchcfm MLP": torchcfm_mlp,
        "torchcfm UNetModel": lambda: two_times(torchcfm_unet()),
        "the same, labels": lambda: two_times(torchcfm_unet(num_classes=10)),
        "the same, use_checkpoint": lambda: two_times(torchcfm_unet(use_checkpoint=True)),
        "the same, bf16 inside": lambda: two_times(InBfloat16(torchcfm_unet())),
        "diffusers UNet2DModel, labels": lambda: two_times(diffusers_unet()),
        "the same, labels, WithFeatures": with_features,
        "the same, labels, checkpointing": lambda: two_times(diffusers_unet(checkpointing=True)),
        "diffusers DiT, labels": lambda: two_times(diffusers_dit()),
        "timm ViT": timm_vit,
        "timm ViT, checkpointing": lambda: timm_vit(checkpointing=True),
        "torchvision ViT": torchvision_vit,
        "torchvision ResNet-18, BatchNorm in train()": torchvision_resnet,
        "nn.TransformerEncoder": Tokens,
        "nn.TransformerEncoder in eval()": lambda: Tokens().eval(),
    }


# ------------------------------------------------------------------------------- the table
class Trial:
    """What is tried with one network, each time with a new one of the same weights."""

    def __init__(self, name, make):
        self.make = make
        torch.manual_seed(0)
        self.x = torch.randn(4, 2) if "MLP" in name else torch.randn(4, COLOURS, SIZE, SIZE)
        self.context = torch.randint(10, (4,)) if "labels" in name else None

    def flow(self):
        torch.manual_seed(1)
        flow = f2d2.JointFlowMap(self.make(), FEATURES)
        for p in flow.parameters():  # many networks begin with layers of zeros
            p.data += 0.02 * torch.randn_like(p)
        return flow

    def train(self, condition, probe="rademacher", flow=None):
        """A step of fixed draws -> its loss."""
        flow = flow or self.flow()
        torch.manual_seed(2)
        losses = f2d2.f2d2_loss(flow, self.x, condition, context=self.context, probe=probe)
        sum(losses.values()).backward()
        gradients = [p.grad for p in flow.backbone.parameters() if p.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients)
        return sum(losses.values()).item()

    def train_helped(self, condition):
        """As README says: attention's plain kernel, no fast path, eval()."""
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return self.train(condition, flow=self.flow().eval())
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    @torch.no_grad()
    def log_p(self, flow=None):
        """Of samples and of data, in two steps."""
        flow = (flow or self.flow()).eval()
        _, log_p_of_samples = f2d2.sample(flow, self.x, 2, self.context)
        log_p = f2d2.log_likelihood(flow, self.x, 2, context=self.context)
        both = torch.cat([log_p_of_samples, log_p])
        assert both.isfinite().all()
        return both

    def oracle(self):
        velocity = self.flow().eval().velocity
        f2d2.ode_log_likelihood(velocity, self.x, 2, "rademacher", context=self.context)

    def copy(self):
        """After a step, so that what the step left behind is copied too."""
        flow = self.flow()
        self.train("semigroup", "residual", flow)
        twin = copy.deepcopy(flow)
        assert torch.equal(self.log_p(twin), self.log_p(flow))


def attempt(function, *arguments):
    """ "yes" and what it returns, or the name of what it raised and None."""
    try:
        return "yes", function(*arguments)
    except Exception as error:
        return type(error).__name__, None


def row(trial):
    cells = []
    for condition in ("semigroup", "eulerian", "lagrangian"):
        cell, loss = attempt(trial.train, condition)
        cell_helped, loss_helped = attempt(trial.train_helped, condition)
        if loss and loss_helped and abs(loss / loss_helped - 1) > 1e-3:
            cell_helped = "another loss"
        cells.append(cell if cell == cell_helped else f"{cell}; {cell_helped}")
    cells.append(attempt(trial.train, "semigroup", "residual")[0])
    for function in (trial.log_p, trial.oracle, trial.copy):
        cells.append(attempt(function)[0])
    return cells


def main():
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            print(package, version(package))
    print("\n| network | semigroup | eulerian | lagrangian | semigroup, residual ", end="")
    print("| sample, log_likelihood | oracle | deepcopy |")
    print("| --- " * 8 + "|")
    for name, make in networks().items():
        try:
            make()
        except ImportError as error:
            print(f"| {name} | not run: {error} |")
            continue
        print(f"| {name} | {' | '.join(row(Trial(name, make)))} |", flush=True)


if __name__ == "__main__":
    main()
