"""The Inception network of the FID once more, in PyTorch, as its blocks are described; and weights for it."""

import numpy as np
import torch
import torch.nn.functional as F

from flax_diffusion.models.inception import inception_shapes


def random_weights(seed=0):
    """Tensors by pytorch-fid's names, such that activations stay of order one."""
    rng, made = np.random.default_rng(seed), {}
    for path, shape in inception_shapes().items():
        name = ".".join((*path[:-1], "weight" if path[-1] == "kernel" else path[-1]))
        values = rng.standard_normal(shape, dtype=np.float32)
        if name == "fc.weight":
            values = values.T / 45
        elif name.endswith("conv.weight"):
            values = values.transpose(3, 2, 0, 1) * np.sqrt(2 / np.prod(shape[:3]), dtype=np.float32)
        elif name.endswith(("bn.weight", "running_var")):
            values = 0.5 + np.abs(values) / 2
        else:
            values = values / 10
        made[name] = torch.from_numpy(np.array(values, order="C"))
    return made


class Reference:
    """Computes features and logits of pictures (B, 3, H, W) in 0..1 with weights by pytorch-fid's names."""

    def __init__(self, weights):
        self.weights = weights

    def conv(self, x, name, stride=1, pad=None):
        kernel = self.weights[f"{name}.conv.weight"]
        pad = [side // 2 for side in kernel.shape[2:]] if pad is None else pad
        x = F.conv2d(x, kernel, stride=stride, padding=pad)
        norm = (self.weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *norm, training=False, eps=1e-3))

    def chain(self, x, block, *names):
        for name in names:
            x = self.conv(x, f"{block}.{name}")
        return x

    def block_a(self, x, block):
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([
            self.chain(x, block, "branch1x1"),
            self.chain(x, block, "branch5x5_1", "branch5x5_2"),
            self.chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            self.chain(pooled, block, "branch_pool"),
        ], 1)  # fmt: skip

    def block_b(self, x, block):
        double = self.chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        return torch.cat([
            self.conv(x, f"{block}.branch3x3", 2, 0),
            self.conv(double, f"{block}.branch3x3dbl_3", 2, 0),
            F.max_pool2d(x, 3, 2),
        ], 1)  # fmt: skip

    def block_c(self, x, block):
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([
            self.chain(x, block, "branch1x1"),
            self.chain(x, block, *(f"branch7x7_{i}" for i in (1, 2, 3))),
            self.chain(x, block, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
            self.chain(pooled, block, "branch_pool"),
        ], 1)  # fmt: skip

    def block_d(self, x, block):
        seven = self.chain(x, block, "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
        return torch.cat([
            self.conv(self.chain(x, block, "branch3x3_1"), f"{block}.branch3x3_2", 2, 0),
            self.conv(seven, f"{block}.branch7x7x3_4", 2, 0),
            F.max_pool2d(x, 3, 2),
        ], 1)  # fmt: skip

    def block_e(self, x, block, pooled):
        three = self.chain(x, block, "branch3x3_1")
        double = self.chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        return torch.cat([
            self.chain(x, block, "branch1x1"),
            self.chain(three, block, "branch3x3_2a"),
            self.chain(three, block, "branch3x3_2b"),
            self.chain(double, block, "branch3x3dbl_3a"),
            self.chain(double, block, "branch3x3dbl_3b"),
            self.chain(pooled, block, "branch_pool"),
        ], 1)  # fmt: skip

    def __call__(self, pictures):
        x = F.interpolate(pictures, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
        x = self.conv(x, "Conv2d_1a_3x3", 2, 0)
        x = self.conv(x, "Conv2d_2a_3x3", 1, 0)
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3"), 3, 2)
        x = self.conv(x, "Conv2d_3b_1x1")
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3", 1, 0), 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block_a(x, name)
        x = self.block_b(x, "Mixed_6a")
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.block_c(x, name)
        x = self.block_d(x, "Mixed_7a")
        x = self.block_e(x, "Mixed_7b", F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        x = self.block_e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1))
        features = x.mean((2, 3))
        return features, F.linear(features, self.weights["fc.weight"], self.weights["fc.bias"])
