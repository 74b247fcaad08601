"""VoVNet (Lee et al. 2019) and VoVNetV2 (Lee & Park 2020): one-shot aggregation backbones and
classifiers.

Order of reading: the OSA block, the network, the table of published variants.
State-dict keys of timm's variants are timm's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from vovnet.models.layers import (
    ConvNormAct,
    EffectiveSqueezeExcite,
    EfficientChannelAttention,
    NormKind,
    SeparableConvNormAct,
)

Attention = Literal["none", "ese", "eca"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VoVNetConfig:
    """The shape of one VoVNet; channels in order of depth, stages 2 to 5 of the papers."""

    stem_channels: tuple[int, int, int] = (64, 64, 128)
    stage_conv_channels: tuple[int, int, int, int] = (128, 160, 192, 224)
    stage_out_channels: tuple[int, int, int, int] = (256, 512, 768, 1024)
    layers_per_block: int
    blocks_per_stage: tuple[int, int, int, int]
    depthwise: bool = False
    attention: Attention = "none"
    attention_in: Literal["last_block", "every_block"] = "last_block"
    identity: bool = True  # from the second block of a stage on
    stem: Literal["code", "paper"] = "code"  # code: strides 2, 1, 2; paper: 2, 1, 1 and a pool
    norm: NormKind = "bn"


def make_attention(kind: Attention, channels: int) -> nn.Module:
    """The channel attention after the aggregation; raises ValueError on an unknown kind."""
    if kind == "none":
        return nn.Identity()
    if kind == "ese":
        return EffectiveSqueezeExcite(channels)
    if kind == "eca":
        return EfficientChannelAttention(channels)
    raise ValueError(f"attention: expected none, ese or eca, got {kind!r}")


def make_conv3x3(
    in_channels: int, out_channels: int, *, stride: int, depthwise: bool, norm: NormKind
) -> nn.Module:
    """A plain or a depthwise separable 3x3 with norm and ReLU."""
    if depthwise:
        return SeparableConvNormAct(in_channels, out_channels, stride=stride, norm=norm)
    return ConvNormAct(in_channels, out_channels, kernel=3, stride=stride, norm=norm)


class OsaBlock(nn.Module):
    """One-shot aggregation: a chain of 3x3 convolutions whose outputs are concatenated once."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        layers: int,
        depthwise: bool,
        attention: Attention,
        identity: bool,
        norm: NormKind,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.identity = identity
        reduce = depthwise and in_channels != mid_channels
        self.conv_reduction = (
            ConvNormAct(in_channels, mid_channels, kernel=1, stride=1, norm=norm)
            if reduce
            else nn.Identity()
        )
        first_channels = mid_channels if reduce else in_channels
        self.conv_mid = nn.ModuleList(
            make_conv3x3(
                mid_channels if index else first_channels,
                mid_channels,
                stride=1,
                depthwise=depthwise,
                norm=norm,
            )
            for index in range(layers)
        )
        self.conv_concat = ConvNormAct(
            in_channels + layers * mid_channels, out_channels, kernel=1, stride=1, norm=norm
        )
        self.attn = make_attention(attention, out_channels)
        self.drop_path = StochasticDepth(drop_path, "row") if identity else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]  # the block's input as it came, not the reduced one
        y: Tensor = self.conv_reduction(x)
        for conv in self.conv_mid:
            y = conv(y)
            outputs.append(y)
        y = self.drop_path(self.attn(self.conv_concat(torch.cat(outputs, dim=1))))
        return y + x if self.identity else y


class OsaStage(nn.Module):
    """OSA blocks of one resolution, after a max-pool where the stage halves it."""

    def __init__(
        self, config: VoVNetConfig, stage: int, in_channels: int, drop_paths: Sequence[float]
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        downsample = stage > 0 or config.stem == "paper"
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True) if downsample else nn.Identity()
        count = config.blocks_per_stage[stage]
        out_channels = config.stage_out_channels[stage]
        attended = range(count) if config.attention_in == "every_block" else (count - 1,)
        self.blocks = nn.Sequential(
            *(
                OsaBlock(
                    out_channels if index else in_channels,
                    config.stage_conv_channels[stage],
                    out_channels,
                    layers=config.layers_per_block,
                    depthwise=config.depthwise,
                    attention=config.attention if index in attended else "none",
                    identity=config.identity and index > 0,
                    norm=config.norm,
                    drop_path=drop_paths[index],
                )
                for index in range(count)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class ClassifierHead(nn.Module):
    """Global average pool, dropout, one linear layer (none for num_classes 0)."""

    def __init__(
        self, in_channels: int, num_classes: int, *, drop_rate: float, pool: Literal["avg", ""]
    ) -> None:
        super().__init__()
        self.pool = pool
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(in_channels, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) to logits (B, num_classes), or to the pooled embedding (B, C)."""
        if self.pool:
            x = x.mean((2, 3))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class FeatureInfo(list[dict[str, Any]]):
    """Channels, stride and module of each feature map, finest first."""

    def channels(self, indices: Sequence[int] | None = None) -> list[int]:
        """Channel counts of the maps at indices (all when None)."""
        return [self[index]["num_chs"] for index in self._pick(indices)]

    def reduction(self, indices: Sequence[int] | None = None) -> list[int]:
        """Strides in input pixels of the maps at indices (all when None)."""
        return [self[index]["reduction"] for index in self._pick(indices)]

    def _pick(self, indices: Sequence[int] | None) -> Sequence[int]:
        return range(len(self)) if indices is None else indices


class VoVNet(nn.Module):
    """The network of VoVNetConfig: stem, four OSA stages, classifier. Input (B, in_chans, H, W)
    float.
    """

    def __init__(
        self,
        config: VoVNetConfig,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: Literal["avg", ""] = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.pretrained_cfg: dict[str, Any] = {}
        self.num_features = self.head_hidden_size = config.stage_out_channels[-1]
        self.stem = self._make_stem(config, in_chans)
        self.stages = self._make_stages(config, drop_path_rate)
        self.head = ClassifierHead(
            self.num_features, num_classes, drop_rate=drop_rate, pool=global_pool
        )
        self.feature_info = self._describe_features(config)
        self.apply(_init_weights)

    @staticmethod
    def _make_stem(config: VoVNetConfig, in_chans: int) -> nn.Sequential:
        first, second, third = config.stem_channels
        depthwise, norm = config.depthwise, config.norm
        last_stride = 2 if config.stem == "code" else 1
        return nn.Sequential(
            ConvNormAct(in_chans, first, kernel=3, stride=2, norm=norm),
            make_conv3x3(first, second, stride=1, depthwise=depthwise, norm=norm),
            make_conv3x3(second, third, stride=last_stride, depthwise=depthwise, norm=norm),
        )

    @staticmethod
    def _make_stages(config: VoVNetConfig, drop_path_rate: float) -> nn.Sequential:
        total = sum(config.blocks_per_stage)
        rates = [drop_path_rate * block / max(total - 1, 1) for block in range(total)]
        in_channels = (config.stem_channels[-1], *config.stage_out_channels[:-1])
        stages, start = [], 0
        for stage, count in enumerate(config.blocks_per_stage):
            stages.append(OsaStage(config, stage, in_channels[stage], rates[start : start + count]))
            start += count
        return nn.Sequential(*stages)

    @staticmethod
    def _describe_features(config: VoVNetConfig) -> FeatureInfo:
        stem_layer = 1 if config.stem == "code" else 2  # the last layer of stride 2
        info = FeatureInfo()
        info.append(
            {
                "num_chs": config.stem_channels[stem_layer],
                "reduction": 2,
                "module": f"stem.{stem_layer}",
            }
        )
        info.extend(
            {"num_chs": channels, "reduction": 4 * 2**stage, "module": f"stages.{stage}"}
            for stage, channels in enumerate(config.stage_out_channels)
        )
        return info

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps at indices (negative from the end, an int takes the last n, None all five).

        Returns the list of maps, or (last map, list) unless intermediates_only. `norm` is accepted
        for timm's callers: every map is already normalised. Raises ValueError for other formats
        than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected NCHW, got {output_fmt!r}")
        wanted = resolve_indices(indices, 1 + len(self.stages))
        maps = {}
        stem_layer = 1 if self.config.stem == "code" else 2
        for index, layer in enumerate(self.stem):
            x = layer(x)
            if index == stem_layer:
                maps[0] = x
        for index, stage in enumerate(self.stages, start=1):
            if stop_early and index > max(wanted):
                break
            x = maps[index] = stage(x)
        intermediates = [maps[index] for index in wanted]
        return intermediates if intermediates_only else (x, intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last map (B, C, ceil(H / 32), ceil(W / 32))."""
        return self.stages(self.stem(x))  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits, or to the pooled embedding."""
        return self.head(x, pre_logits=pre_logits)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(
        self, num_classes: int, global_pool: Literal["avg", ""] | None = None
    ) -> None:
        """Replaces the classifier by a new one for num_classes (0: none)."""
        pool = self.head.pool if global_pool is None else global_pool
        reference = next(self.parameters())
        self.num_classes = num_classes
        self.head = ClassifierHead(
            self.num_features, num_classes, drop_rate=self.drop_rate, pool=pool
        ).to(reference)
        self.head.apply(_init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory in training: blocks are computed again in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]


class VoVNetFeatures(VoVNet):
    """A VoVNet without classifier whose forward returns the list of feature maps at out_indices."""

    def __init__(
        self,
        config: VoVNetConfig,
        *,
        out_indices: Sequence[int] | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(config, num_classes=0, in_chans=in_chans, drop_path_rate=drop_path_rate)
        self.out_indices = resolve_indices(out_indices, 1 + len(self.stages))
        self.feature_info = FeatureInfo(self.feature_info[index] for index in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return self.forward_intermediates(  # type: ignore[no-any-return]
            x, self.out_indices, stop_early=True, intermediates_only=True
        )


def resolve_indices(indices: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Feature indices from timm's three ways of saying them; raises ValueError when out of
    range.
    """
    if indices is None:
        return tuple(range(count))
    if isinstance(indices, int):
        indices = range(count - indices, count)
    resolved = tuple(index + count if index < 0 else index for index in indices)
    if not resolved or not all(0 <= index < count for index in resolved):
        raise ValueError(f"feature indices: expected some of 0..{count - 1}, got {tuple(indices)}")
    return resolved


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


_SLIM = (64, 80, 96, 112)
_SLIM_OUT = (112, 256, 384, 512)
_V19_SLIM_DW = VoVNetConfig(
    stem_channels=(64, 64, 64),
    stage_conv_channels=_SLIM,
    stage_out_channels=_SLIM_OUT,
    layers_per_block=3,
    blocks_per_stage=(1, 1, 1, 1),
    depthwise=True,
    attention="ese",
)
_V19_DW = VoVNetConfig(
    stem_channels=(64, 64, 64),
    layers_per_block=3,
    blocks_per_stage=(1, 1, 1, 1),
    depthwise=True,
    attention="ese",
)
_V19_SLIM = VoVNetConfig(
    stage_conv_channels=_SLIM,
    stage_out_channels=_SLIM_OUT,
    layers_per_block=3,
    blocks_per_stage=(1, 1, 1, 1),
    attention="ese",
)
_V19 = VoVNetConfig(layers_per_block=3, blocks_per_stage=(1, 1, 1, 1), attention="ese")
_V39 = VoVNetConfig(layers_per_block=5, blocks_per_stage=(1, 1, 2, 2), attention="ese")
_V57 = VoVNetConfig(layers_per_block=5, blocks_per_stage=(1, 1, 4, 3), attention="ese")
_V99 = VoVNetConfig(layers_per_block=5, blocks_per_stage=(1, 3, 9, 3), attention="ese")
_V27_SLIM_V1 = VoVNetConfig(
    stage_conv_channels=_SLIM,
    stage_out_channels=(128, 256, 384, 512),
    layers_per_block=5,
    blocks_per_stage=(1, 1, 1, 1),
)

# Naming: `b` and `a` as in timm (eSE in the last block of a stage; V1 without identity), `_d2` =
# eSE in every block, plain `vovnetN` = the released V1 code with identity, `_paper` = the V1 paper.
VARIANTS: dict[str, VoVNetConfig] = {
    "vovnet39a": replace(_V39, attention="none", identity=False),
    "vovnet57a": replace(_V57, attention="none", identity=False),
    "ese_vovnet19b_slim_dw": _V19_SLIM_DW,
    "ese_vovnet19b_dw": _V19_DW,
    "ese_vovnet19b_slim": _V19_SLIM,
    "ese_vovnet19b": _V19,
    "ese_vovnet39b": _V39,
    "ese_vovnet57b": _V57,
    "ese_vovnet99b": _V99,
    "eca_vovnet39b": replace(_V39, attention="eca"),
    "ese_vovnet39b_evos": replace(_V39, norm="evonorm_s0"),
    "vovnet27_slim": _V27_SLIM_V1,
    "vovnet39": replace(_V39, attention="none"),
    "vovnet57": replace(_V57, attention="none"),
    "vovnet27_slim_paper": replace(_V27_SLIM_V1, identity=False, stem="paper"),
    "vovnet39_paper": replace(_V39, attention="none", identity=False, stem="paper"),
    "vovnet57_paper": replace(_V57, attention="none", identity=False, stem="paper"),
    "ese_vovnet19_slim_dw_d2": replace(_V19_SLIM_DW, attention_in="every_block"),
    "ese_vovnet19_dw_d2": replace(_V19_DW, attention_in="every_block"),
    "ese_vovnet19_slim_d2": replace(_V19_SLIM, attention_in="every_block"),
    "ese_vovnet19_d2": replace(_V19, attention_in="every_block"),
    "ese_vovnet39_d2": replace(_V39, attention_in="every_block"),
    "ese_vovnet57_d2": replace(_V57, attention_in="every_block"),
    "ese_vovnet99_d2": replace(_V99, attention_in="every_block"),
}
