"""What tests/speed.py times, in PyTorch: its peer, run by it in a process of its own.

`torch.compile` (PyTorch 2.14) crashes a process that has TensorFlow 2.21 in it. Prints
its version, the number of weights and the names of the cases; then runs each case that
is named on its input once, and prints the milliseconds.
"""

import json
import sys
import time

import torch
from torch import nn

THREADS = 2
BATCH = 16
# Of AlexNets of half the width: (C, H, W) as in tests/speed.py.
SITES = [(48, 27, 27), (128, 13, 13), (128, 6, 6), (2048,), (2048,)]


class Unit(nn.Module):
    """One unit per channel of T tasks."""

    def __init__(self, tasks, shape):
        super().__init__()
        alpha = torch.full((tasks, tasks), 0.1 / (tasks - 1)).fill_diagonal_(0.9)
        self.alpha = nn.Parameter(alpha[..., None].repeat(1, 1, shape[0]))
        self.trailing = (1,) * (len(shape) - 1)

    def forward(self, *maps):
        alpha = self.alpha.to(maps[0].dtype)
        alpha = alpha.reshape(*alpha.shape, *self.trailing)
        return [mix(row, maps) for row in alpha]


def mix(row, maps):
    mixed = row[0] * maps[0]
    for weight, x in zip(row[1:], maps[1:], strict=True):
        mixed = torch.addcmul(mixed, weight, x)
    return mixed


def tower():
    """`alexnet(20, width=0.5)`, cut at the taps."""

    def convolution(channels, filters, kernel, stride=1):
        # The first is not padded.
        padding = kernel // 2 if stride == 1 else 0
        return [
            nn.Conv2d(channels, filters, kernel, stride, padding),
            nn.ReLU(inplace=True),
        ]

    def dense(inputs, outputs):
        return [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]

    stages = [
        [*convolution(3, 48, 11, 4), nn.MaxPool2d(3, 2)],
        [nn.BatchNorm2d(48), *convolution(48, 128, 5), nn.MaxPool2d(3, 2)],
        [
            *[nn.BatchNorm2d(128), *convolution(128, 192, 3)],
            *[nn.BatchNorm2d(192), *convolution(192, 192, 3)],
            *[nn.BatchNorm2d(192), *convolution(192, 128, 3), nn.MaxPool2d(3, 2)],
        ],
        [nn.BatchNorm2d(128), nn.Flatten(), *dense(128 * 6 * 6, 2048)],
        [nn.BatchNorm1d(2048), nn.Dropout(), *dense(2048, 2048)],
        [nn.BatchNorm1d(2048), nn.Dropout(), nn.Linear(2048, 20)],
    ]
    return nn.ModuleList(nn.Sequential(*stage) for stage in stages)


class Network(nn.Module):
    """Two AlexNets, stitched."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([tower(), tower()])
        self.units = nn.ModuleList(Unit(2, site) for site in SITES)

    def forward(self, image):
        x = image / 127.5 - 1
        maps = [tower[0](x) for tower in self.towers]
        for k, unit in enumerate(self.units, start=1):
            maps = unit(*maps)
            maps = [tower[k](x) for tower, x in zip(self.towers, maps, strict=True)]
        return [logits.float() for logits in maps]


def networks(dtype, channels_last, compiled):
    """{case: function} of a training step and of inference."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    network = Network().to(dtype=weights, memory_format=memory)
    optimizer = torch.optim.SGD(network.parameters(), 0.001, momentum=0.9, fused=True)
    image = 255 * torch.rand(BATCH, 3, 227, 227)
    image = image.to(dtype=weights, memory_format=memory)
    labels = torch.randint(20, (BATCH,))
    run = torch.compile(network) if compiled else network
    autocast = dtype == "mixed_bfloat16"

    def step():
        network.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = sum(nn.functional.cross_entropy(y, labels) for y in run(image))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    @torch.inference_mode()
    def inference():
        network.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run(image)

    layout = "channels last, " * channels_last
    mode = "compiled" if compiled else "eager"
    name = f"two AlexNets, {dtype}, PyTorch, {layout}{mode}"
    cases = {f"{name}, inference": inference}
    # As in tests/speed.py, weights that are in bfloat16 are not trained.
    return cases if dtype == "bfloat16" else {**cases, f"{name}, step": step}


def units(tasks, compiled):
    """{case: function} of the units at all sites, forward and with gradients."""
    x = [
        [torch.randn(BATCH, *site).requires_grad_() for _ in range(tasks)]
        for site in SITES
    ]
    layers = nn.ModuleList(Unit(tasks, site) for site in SITES)
    leaves = [*layers.parameters(), *(a for site in x for a in site)]

    def all_units(x):
        return [a for layer, site in zip(layers, x, strict=True) for a in layer(*site)]

    run = torch.compile(all_units) if compiled else all_units

    @torch.no_grad()
    def forward():
        return run(x)

    def both():
        upstream = [a.detach() for site in x for a in site]
        return torch.autograd.grad(run(x), leaves, upstream)

    name = f"unit, T={tasks}, PyTorch, {'compiled' if compiled else 'eager'}"
    return {f"{name}, forward": forward, f"{name}, forward and backward": both}


def all_cases():
    cases = {}
    for compiled in (False, True):
        for tasks in (2, 4):
            cases |= units(tasks, compiled)
        for dtype in ("float32", "mixed_bfloat16", "bfloat16"):
            for channels_last in (False, True):
                cases |= networks(dtype, channels_last, compiled)
    return cases


def main():
    torch.set_num_threads(THREADS)
    # All networks share one forward pass, which is compiled for each of them.
    torch._dynamo.config.recompile_limit = 64
    cases = all_cases()
    weights = sum(p.numel() for p in Network().parameters())
    print(json.dumps([torch.__version__, weights, list(cases)]), flush=True)
    for name in sys.stdin:
        run = cases[name.strip()]
        start = time.perf_counter()
        run()
        print(1000 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
