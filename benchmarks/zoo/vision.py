"""Small models of packages for images, sound and graphs, with random weights."""

# The packages need not be installed.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Case, entry


def images(model: nn.Module, size: int = 32) -> Case:
    """A classifier of three kinds of images."""
    return Case(model, lambda: (torch.randn(2, 3, size, size).double(), torch.randint(3, (2,))), F.cross_entropy)


def timm_model(name: str, size: int = 32, **options: Any) -> Case:
    import timm

    return images(timm.create_model(name, pretrained=False, num_classes=3, **options), size)


@entry("timm", "ViT")
def vit() -> Case:
    return timm_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2)


@entry("timm", "ConvNeXt")
def convnext() -> Case:
    return timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))


@entry("timm", "EfficientNet-B0")
def efficientnet() -> Case:
    return timm_model("efficientnet_b0", channel_multiplier=0.25, depth_multiplier=0.1)


@entry("timm", "Swin")
def swin() -> Case:
    return timm_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2), drop_path_rate=0.0
    )


@entry("timm", "MLP-Mixer")
def mixer() -> Case:
    return timm_model("mixer_s32_224", img_size=32, embed_dim=16, num_blocks=2)


@entry("timm", "ResNet-26")
def timm_resnet() -> Case:
    return timm_model("resnet26")


@entry("torchvision", "ResNet-18")
def resnet18() -> Case:
    import torchvision

    return images(torchvision.models.resnet18(num_classes=3))


@entry("torchvision", "MobileNetV3 small", expected="plain PyTorch fails")
def mobilenet() -> Case:
    import torchvision

    return images(torchvision.models.mobilenet_v3_small(num_classes=3, dropout=0.0))


@entry("torchvision", "DenseNet")
def densenet() -> Case:
    import torchvision

    return images(torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3))


@entry("torchvision", "DenseNet, memory_efficient=True")
def densenet_checkpointing() -> Case:
    import torchvision

    options = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "num_classes": 3}
    return images(torchvision.models.DenseNet(**options, memory_efficient=True))


@entry("torchvision", "Swin")
def torchvision_swin() -> Case:
    from torchvision.models.swin_transformer import SwinTransformer

    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": [4, 4], "num_classes": 3}
    return images(SwinTransformer(**sizes, stochastic_depth_prob=0.0))


@entry("torchvision", "ViT")
def torchvision_vit() -> Case:
    from torchvision.models import VisionTransformer

    return images(VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3))


@entry("torchvision", "DeformConv2d", expected="plain PyTorch fails")
def deform() -> Case:
    from torchvision.ops import DeformConv2d

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset, self.conv = nn.Conv2d(3, 18, 3, padding=1), DeformConv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x, self.offset(x)).mean((2, 3))

    return images(Model(), 8)


def waveform(model: nn.Module, size: int, outputs: int) -> Case:
    return Case(model, lambda: (torch.randn(2, 1, size).double(), torch.randn(2, outputs).double()), F.mse_loss)


@entry("torchaudio", "MelSpectrogram and a linear layer")
def mel() -> Case:
    import torchaudio

    front = torchaudio.transforms.MelSpectrogram(n_fft=64, n_mels=8)
    return waveform(nn.Sequential(front, nn.Flatten(), nn.Linear(8 * 13, 3)), 400, 3)


@entry("torchaudio", "Conformer", expected="refused")
def conformer() -> Case:
    from torchaudio.models import Conformer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Conformer(8, num_heads=2, ffn_dim=16, num_layers=1, depthwise_conv_kernel_size=3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.body(x, lengths)[0].mean(1)

    data = lambda: ((torch.randn(2, 6, 8).double(), torch.tensor([6, 6])), torch.randn(2, 8).double())  # noqa: E731
    return Case(Model(), data, F.mse_loss)


def nodes(model: nn.Module) -> Case:
    """A ring of six nodes."""
    edges = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6])
    return Case(
        model, lambda: ((torch.randn(6, 4).double(), torch.cat([edges, edges.flip(0)], 1)), torch.randint(3, (6,))), F.cross_entropy
    )


@entry("torch_geometric", "GCN", expected="refused")
def gcn() -> Case:
    from torch_geometric.nn import GCN

    return nodes(GCN(4, 8, 2, 3))


@entry("torch_geometric", "GAT", expected="refused")
def gat() -> Case:
    from torch_geometric.nn import GAT

    return nodes(GAT(4, 8, 2, 3))


@entry("torch_geometric", "GraphSAGE")
def sage() -> Case:
    from torch_geometric.nn import GraphSAGE

    return nodes(GraphSAGE(4, 8, 2, 3))


@entry("torch_geometric", "GIN")
def gin() -> Case:
    from torch_geometric.nn import GIN

    return nodes(GIN(4, 8, 2, 3))


@entry("torch_geometric", "GCN, add_self_loops=False")
def gcn_without_loops() -> Case:
    from torch_geometric.nn import GCN

    return nodes(GCN(4, 8, 2, 3, add_self_loops=False))


@entry("torch_geometric", "GAT, add_self_loops=False")
def gat_without_loops() -> Case:
    from torch_geometric.nn import GAT

    return nodes(GAT(4, 8, 2, 3, add_self_loops=False))


@entry("torch_geometric", "GCNConv, cached=True, add_self_loops=False", expected="refused")
def gcn_cached() -> Case:
    from torch_geometric.nn import GCNConv

    return nodes(GCNConv(4, 3, cached=True, add_self_loops=False))


@entry("monai", "UNet")
def unet() -> Case:
    from monai.networks.nets import UNet

    model = UNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(4, 8), strides=(2,), num_res_units=1)
    return Case(model, lambda: (torch.randn(2, 1, 8, 8).double(), torch.randn(2, 1, 8, 8).double()), F.mse_loss)


@entry("monai", "UNet with DiceLoss")
def unet_dice() -> Case:
    from monai.losses import DiceLoss

    case = unet()
    return Case(case.model, lambda: (torch.randn(2, 1, 8, 8).double(), torch.randint(2, (2, 1, 8, 8)).double()), DiceLoss(sigmoid=True))


@entry("diffusers", "UNet2DModel")
def diffusion() -> Case:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    model = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **blocks, **sizes)
    data = lambda: ((torch.randn(2, 1, 8, 8).double(), torch.tensor([3, 7])), torch.randn(2, 1, 8, 8).double())  # noqa: E731
    return Case(model, data, lambda output, target: F.mse_loss(output.sample, target))


@entry("kornia", "Sobel and a convolution")
def kornia_filters() -> Case:
    import kornia

    return images(nn.Sequential(nn.Conv2d(3, 3, 3), kornia.filters.Sobel(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 8)


@entry("kornia", "HardNet, eval mode")
def hardnet() -> Case:
    import kornia

    return Case(
        kornia.feature.HardNet(pretrained=False).eval(),
        lambda: (torch.randn(2, 1, 32, 32).double(), torch.randn(2, 128).double()),
        F.mse_loss,
    )


@entry("snntorch", "Leaky neurons, init_hidden=True", expected="plain PyTorch fails")
def spiking() -> Case:
    import snntorch

    neurons = {"beta": 0.9, "init_hidden": True}
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), snntorch.Leaky(**neurons), nn.Linear(8, 3))
    return images(model, 4)


@entry("snntorch", "Leaky neurons, the state passed on", expected="plain PyTorch fails")
def spiking_loop() -> Case:
    import snntorch

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.neurons, self.last = nn.Linear(48, 8), snntorch.Leaky(beta=0.9), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            memory, outputs = torch.zeros(len(x), 8, dtype=x.dtype), []
            for _ in range(3):
                spikes, memory = self.neurons(self.first(x.flatten(1)), memory)
                outputs.append(self.last(spikes) + memory[:, :3])
            return torch.stack(outputs).sum(0)

    return images(Model(), 4)


@entry("einops", "Rearrange between layers")
def einops_layers() -> Case:
    from einops.layers.torch import Rearrange, Reduce

    return images(nn.Sequential(Rearrange("b c h w -> b (h w) c"), nn.Linear(3, 3), nn.Tanh(), Reduce("b n c -> b c", "mean")), 4)
