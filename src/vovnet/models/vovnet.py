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

from vovnet.errors import ConfigError
from vovnet.models.layers import (
    AtrousMaxPool,
    Attention,
    ClassifierHead,
    ConvKind,
    ConvNormAct,
    FeatureInfo,
    NormKind,
    init_weights,
    make_attention,
    make_conv3x3,
    resolve_indices,
)
from vovnet.models.settings import check_groups, check_settings

AttentionPlace = Literal["last_block", "every_block"]
Stem = Literal["code", "paper", "small"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VoVNetConfig:
    """The shape of one VoVNet; channels in order of depth, stages 2 to 5 of the papers.

    Raises ConfigError on a setting of another type or range, and on a choice that there is not.
    """

    stem_channels: tuple[int, int, int] = (64, 64, 128)
    stage_conv_channels: tuple[int, int, int, int] = (128, 160, 192, 224)
    stage_out_channels: tuple[int, int, int, int] = (256, 512, 768, 1024)
    layers_per_block: int
    blocks_per_stage: tuple[int, int, int, int]
    depthwise: bool = False
    attention: Attention = "none"
    attention_in: AttentionPlace = "last_block"
    identity: bool = True  # from the second block of a stage on
    stem: Stem = "code"  # strides 2, 1, 2; paper: 2, 1, 1 and a pool; small pictures: 1, 1, 2
    norm: NormKind = "bn"
    deformable_stages: tuple[int, ...] = ()  # of 2 to 5: all 3x3 convolutions of their blocks

    def __post_init__(self) -> None:
        check_settings(self)
        if self.norm in ("gn", "evonorm_s0"):
            channels = (*self.stem_channels, *self.stage_conv_channels, *self.stage_out_channels)
            check_groups("channels", channels, groups=16)
        if not set(self.deformable_stages) <= set(range(2, 6)):
            raise ConfigError(
                f"deformable_stages: expected some of 2..5, got {self.deformable_stages}"
            )
        if self.depthwise and self.deformable_stages:
            raise ConfigError("deformable_stages: expected none in a depthwise network")

    @property
    def last_fine_stem_layer(self) -> int:
        """The stem's last layer at its highest resolution, which is the first feature map."""
        return 2 if self.stem == "paper" else 1

    def conv_of(self, stage: int) -> ConvKind:
        """What the 3x3 convolutions of a stage are, counted from 0."""
        if stage + 2 in self.deformable_stages:
            return "deformable"
        return "depthwise" if self.depthwise else "plain"


class OsaBlock(nn.Module):
    """One-shot aggregation: a chain of 3x3 convolutions whose outputs are concatenated once."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        layers: int,
        conv: ConvKind,
        dilation: int,
        attention: Attention,
        identity: bool,
        norm: NormKind,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.identity = identity
        reduce = conv == "depthwise" and in_channels != mid_channels
        self.conv_reduction = (
            ConvNormAct(in_channels, mid_channels, kernel=1, stride=1, norm=norm)
            if reduce
            else nn.Identity()
        )
        first_channels = mid_channels if reduce else in_channels
        self.conv_mid = nn.ModuleList(
            make_conv3x3(
                conv,
                mid_channels if index else first_channels,
                mid_channels,
                stride=1,
                dilation=dilation,
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
        y = self.drop_path(self.attn(self.aggregate(outputs)))
        return y + x if self.identity else y

    def aggregate(self, outputs: list[Tensor]) -> Tensor:
        """Maps (B, C_i, H, W) to the 1x1 convolution of their concat (B, C, H, W)."""
        return self.conv_concat(torch.cat(outputs, dim=1))  # type: ignore[no-any-return]


def make_pool(dilation: int) -> nn.Module:
    """The max-pool in front of a stage with this dilation."""
    if dilation == 1:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)
    return AtrousMaxPool(dilation // 2)


class OsaStage(nn.Module):
    """OSA blocks of one resolution, after a max-pool where the stage halves it.

    Beyond output_stride nothing is halved: the pool takes its window at every pixel, and the taps
    of all later 3x3 convolutions and pools move apart by as much. The same weights then give the
    strided network's values at every second (fourth) pixel, up to attention and the lower and
    right rim of maps of odd size. No published VoVNet is dilated; this arrangement is ours.
    """

    def __init__(
        self,
        config: VoVNetConfig,
        stage: int,
        in_channels: int,
        drop_paths: Sequence[float],
        output_stride: int,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        dilation = max(4 * 2**stage // output_stride, 1)
        downsample = stage > 0 or config.stem == "paper"
        self.pool = make_pool(dilation) if downsample else nn.Identity()
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
                    conv=config.conv_of(stage),
                    dilation=dilation,
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


class VoVNet(nn.Module):
    """The network of VoVNetConfig: stem, four OSA stages, classifier. Input (B, in_chans, H, W)
    float, H and W at least 32.

    An output_stride of 8 or 16 instead of 32 keeps the later stages at that resolution. Raises
    ConfigError on any other.
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
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        if type(output_stride) is not int or output_stride not in (8, 16, 32):
            raise ConfigError(f"output_stride: expected 8, 16 or 32, got {output_stride!r}")
        self.config = config
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.pretrained_cfg: dict[str, Any] = {}
        self.num_features = self.head_hidden_size = config.stage_out_channels[-1]
        self.stem = self._make_stem(config, in_chans)
        self.stages = self._make_stages(config, drop_path_rate, output_stride)
        self.head = ClassifierHead(
            self.num_features, num_classes, drop_rate=drop_rate, pool=global_pool
        )
        self.feature_info = self._describe_features(config, output_stride)
        self.apply(init_weights)

    @staticmethod
    def _make_stem(config: VoVNetConfig, in_chans: int) -> nn.Sequential:
        first, second, third = config.stem_channels
        conv: ConvKind = "depthwise" if config.depthwise else "plain"
        norm = config.norm
        first_stride = 1 if config.stem == "small" else 2
        last_stride = 1 if config.stem == "paper" else 2
        return nn.Sequential(
            ConvNormAct(in_chans, first, kernel=3, stride=first_stride, norm=norm),
            make_conv3x3(conv, first, second, stride=1, norm=norm),
            make_conv3x3(conv, second, third, stride=last_stride, norm=norm),
        )

    @staticmethod
    def _make_stages(
        config: VoVNetConfig, drop_path_rate: float, output_stride: int
    ) -> nn.Sequential:
        total = sum(config.blocks_per_stage)
        rates = [drop_path_rate * block / max(total - 1, 1) for block in range(total)]
        in_channels = (config.stem_channels[-1], *config.stage_out_channels[:-1])
        stages, start = [], 0
        for stage, count in enumerate(config.blocks_per_stage):
            drop_paths = rates[start : start + count]
            stages.append(OsaStage(config, stage, in_channels[stage], drop_paths, output_stride))
            start += count
        return nn.Sequential(*stages)

    @staticmethod
    def _describe_features(config: VoVNetConfig, output_stride: int) -> FeatureInfo:
        stem_layer = config.last_fine_stem_layer
        shrink = 2 if config.stem == "small" else 1
        stem = {
            "num_chs": config.stem_channels[stem_layer],
            "reduction": 2 // shrink,
            "module": f"stem.{stem_layer}",
        }
        stages = (
            {
                "num_chs": channels,
                "reduction": min(4 * 2**stage, output_stride) // shrink,
                "module": f"stages.{stage}",
            }
            for stage, channels in enumerate(config.stage_out_channels)
        )
        return FeatureInfo([stem, *stages])

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
        stem_layer = self.config.last_fine_stem_layer
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
        """(B, in_chans, H, W) to the last map (B, C, about H / 32, about W / 32)."""
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
        self.head.apply(init_weights)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that sort parameter names into layers, for learning rates that decay with
        depth.
        """
        stage = r"^stages\.(\d+)"
        return {"stem": r"^stem", "blocks": stage if coarse else rf"{stage}\.blocks\.(\d+)"}

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
        out_indices: int | Sequence[int] | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        output_stride: int = 32,
    ) -> None:
        super().__init__(
            config,
            num_classes=0,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            output_stride=output_stride,
        )
        self.out_indices = resolve_indices(out_indices, 1 + len(self.stages))
        self.feature_info = FeatureInfo(self.feature_info[index] for index in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return self.forward_intermediates(  # type: ignore[no-any-return]
            x, self.out_indices, stop_early=True, intermediates_only=True
        )


_SLIM = (64, 80, 96, 112)
_SLIM_OUT = (112, 256, 384, 512)
_V19 = VoVNetConfig(layers_per_block=3, blocks_per_stage=(1, 1, 1, 1), attention="ese")
_V19_DW = replace(_V19, stem_channels=(64, 64, 64), depthwise=True)
_V19_SLIM = replace(_V19, stage_conv_channels=_SLIM, stage_out_channels=_SLIM_OUT)
_V19_SLIM_DW = replace(_V19_SLIM, stem_channels=(64, 64, 64), depthwise=True)
_V19_THIN_DW = replace(  # our own, of the smallest VovDet
    _V19_DW,
    stem_channels=(32, 32, 48),
    stage_conv_channels=(48, 80, 96, 112),
    stage_out_channels=(80, 192, 384, 512),
    attention="none",
)
_V39 = VoVNetConfig(layers_per_block=5, blocks_per_stage=(1, 1, 2, 2), attention="ese")
_V57 = VoVNetConfig(layers_per_block=5, blocks_per_stage=(1, 1, 4, 3), attention="ese")
_V99 = VoVNetConfig(layers_per_block=5, blocks_per_stage=(1, 3, 9, 3), attention="ese")
_V39_D2 = replace(_V39, attention_in="every_block")
_V57_D2 = replace(_V57, attention_in="every_block")
_V99_D2 = replace(_V99, attention_in="every_block")
_V27_SLIM_V1 = VoVNetConfig(
    stage_conv_channels=_SLIM,
    stage_out_channels=(128, 256, 384, 512),
    layers_per_block=5,
    blocks_per_stage=(1, 1, 1, 1),
)

# Naming: `b` and `a` as in timm (eSE in the last block of a stage; V1 without identity), `_d2` =
# eSE in every block, `_dcn` = deformable as in CenterMask2, plain `vovnetN` = the released V1 code
# with identity, `_paper` = the V1 paper; `vovnet19_thin_dw` and `vovnet19_slim` = ours, of VovDet.
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
    "vovnet19_thin_dw": _V19_THIN_DW,
    "vovnet19_slim": replace(_V19_SLIM, attention="none"),
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
    "ese_vovnet39_d2": _V39_D2,
    "ese_vovnet57_d2": _V57_D2,
    "ese_vovnet99_d2": _V99_D2,
    "ese_vovnet39_dcn_d2": replace(_V39_D2, deformable_stages=(3, 4, 5)),
    "ese_vovnet57_dcn_d2": replace(_V57_D2, deformable_stages=(3, 4, 5)),
    "ese_vovnet99_dcn_d2": replace(_V99_D2, deformable_stages=(3, 4, 5)),
}
