"""Configuration of OpenVLA, with the field names of the published checkpoints."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING


class VisionTower(NamedTuple):
    """Sizes of one ViT, and how its pixels are normalised.

    Attributes:
        width (`int`), depth (`int`), heads (`int`), mlp_width (`int`): of the blocks. patch_size (`int`): pixels.
        layer_scale (`bool`): learnt scale after attention and MLP. class_token (`bool`), register_tokens (`int`): tokens before the patches.
        attention_pool (`bool`): whether the checkpoint carries a pooling head (never run here).
        mean (`list[float]`), std (`list[float]`): per RGB channel, of pixels in [0, 1].
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_size: int = 14
    layer_scale: bool = False
    class_token: bool = False
    register_tokens: int = 0
    attention_pool: bool = False
    mean: list[float] = [0.5, 0.5, 0.5]
    std: list[float] = [0.5, 0.5, 0.5]


VISION_TOWERS = {
    # mean and std as the published `preprocessor_config.json` has them: ImageNet's, rounded to bfloat16
    "vit_large_patch14_reg4_dinov2.lvd142m": VisionTower(
        width=1024,
        depth=24,
        heads=16,
        mlp_width=4096,
        layer_scale=True,
        class_token=True,
        register_tokens=4,
        mean=[0.484375, 0.455078125, 0.40625],
        std=[0.228515625, 0.2236328125, 0.224609375],
    ),
    "vit_so400m_patch14_siglip_224": VisionTower(width=1152, depth=27, heads=16, mlp_width=4304, attention_pool=True),
}
"""The ViTs of published OpenVLA checkpoints by timm name; sizes from timm's `vision_transformer.py`."""


class OFTSettings(NamedTuple):
    """What makes an OpenVLA decide on a whole chunk in one forward pass (OpenVLA-OFT, arXiv 2502.19645), with the discrete head.

    None of it is written in a published checkpoint; it has to be what the checkpoint was trained with. Source of the sizes:
    openvla-oft `prismatic/vla/constants.py`.

    Attributes:
        chunk_size (`int`): `C`, 8 for LIBERO, 5 for Bridge, 25 for ALOHA.
        bidirectional (`bool`): every token sees every other one, as in openvla-oft with its fork of transformers; with the stock one
            the same code is causal.
        stop_token (`bool`): `</s>` behind the action's tokens, as in openvla-oft; RLinf leaves it out. It only matters where
            `bidirectional`.
        num_images (`int`): cameras, the patches of one behind those of the other.
        state_size (`int`): `P`, values of proprioception that become one token behind the patches; 0 for none.
    """

    chunk_size: int = 8
    bidirectional: bool = True
    stop_token: bool = True
    num_images: int = 1
    state_size: int = 0


class OpenVLAConfig(PreTrainedConfig):
    """Configuration of [`OpenVLAForActionPrediction`]; the defaults are openvla-7b's.

    Args:
        vision_backbone_id, llm_backbone_id, arch_specifier, hf_llm_id, timm_override_act_layers, output_projector_states: kept for
            the published code, which builds the model from them.
        timm_model_ids (`list[str]`): one name per vision tower. image_sizes (`list[int]`): pixels, one per tower.
        use_fused_vision_backbone (`bool`): two towers whose features are concatenated.
        image_resize_strategy (`str`): see [`OpenVLAImageProcessor`].
        vision_towers (`dict[str, dict]`, *optional*): fields of [`VisionTower`] by name, for towers that are not in `VISION_TOWERS`.
        text_config (`dict` or `PreTrainedConfig`): the decoder; Llama unless `model_type` says otherwise.
        pad_to_multiple_of (`int`): rows that were appended to the decoder's vocabulary; no token uses them.
        n_action_bins (`int`): bins per action value; they are the last tokens before the appended rows, lowest value last.
        norm_stats (`dict`): statistics by `unnorm_key`, see [`~trl_stare.policies.normalization.ActionStatistics`].
        image_token_id (`int`, *optional*): placeholder of an image patch in `input_ids`; the last appended row by default.
        action_convention (`str`): how actions become robot units, see [`~trl_stare.policies.conventions.get_convention`].
        action_statistics (`str`, *optional*): which of the checkpoint's statistics scale actions and proprioception, `"quantiles"` (the
            default where there are several), `"bounds"` (OFT's ALOHA checkpoints) or `"normal"`.
        oft (`dict`, *optional*): fields of [`OFTSettings`]; `None` for a model that writes one token after the other.

    Raises:
        ValueError: a vision tower whose sizes are unknown, or `oft` settings that make no sense.
    """

    model_type = "openvla"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        vision_backbone_id: str = "dinosiglip-vit-so-224px",
        llm_backbone_id: str = "llama2-7b-pure",
        arch_specifier: str = "no-align+fused-gelu-mlp",
        hf_llm_id: str = "meta-llama/Llama-2-7b-hf",
        timm_model_ids: list[str] | None = None,
        timm_override_act_layers: list[str | None] | None = None,
        use_fused_vision_backbone: bool = True,
        image_resize_strategy: str = "resize-naive",
        image_sizes: list[int] | None = None,
        vision_towers: dict[str, dict[str, Any]] | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        llm_max_length: int = 2048,
        pad_token_id: int = 32000,
        pad_to_multiple_of: int = 64,
        output_projector_states: bool = False,
        n_action_bins: int = 256,
        norm_stats: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        action_convention: str = "identity",
        action_statistics: str | None = None,
        oft: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vision_backbone_id, self.llm_backbone_id, self.arch_specifier = (
            vision_backbone_id,
            llm_backbone_id,
            arch_specifier,
        )
        self.hf_llm_id, self.llm_max_length, self.output_projector_states = (
            hf_llm_id,
            llm_max_length,
            output_projector_states,
        )
        self.timm_model_ids = timm_model_ids or list(VISION_TOWERS)
        self.timm_override_act_layers = timm_override_act_layers or [None] * len(self.timm_model_ids)
        self.use_fused_vision_backbone, self.image_resize_strategy = use_fused_vision_backbone, image_resize_strategy
        self.image_sizes, self.vision_towers = image_sizes or [224] * len(self.timm_model_ids), vision_towers or {}
        if not isinstance(text_config, PreTrainedConfig):
            # openvla-7b stores no sizes: Llama's own defaults are Llama-2-7b's
            text_config = {"vocab_size": 32064, "pad_token_id": pad_token_id} | (text_config or {})
            text_config = CONFIG_MAPPING[text_config.pop("model_type", "llama")](**text_config)
        self.text_config, self.pad_to_multiple_of = text_config, pad_to_multiple_of
        self.n_action_bins, self.norm_stats, self.action_convention = (
            n_action_bins,
            norm_stats or {},
            action_convention,
        )
        self.action_statistics, self.oft = action_statistics, oft
        self.image_token_id = text_config.vocab_size - 1 if image_token_id is None else image_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(pad_token_id=pad_token_id, **kwargs)

    @property
    def oft_settings(self) -> OFTSettings | None:
        """`oft`, checked."""
        if self.oft is None:
            return None
        if unknown := set(self.oft) - set(OFTSettings._fields):
            raise ValueError(f"`oft` must hold some of {OFTSettings._fields}, got {sorted(unknown)}.")
        settings = OFTSettings(**self.oft)
        if settings.chunk_size < 1 or settings.num_images < 1 or settings.state_size < 0:
            raise ValueError(
                f"`oft` must have a `chunk_size` and `num_images` of at least 1 and no negative `state_size`, got {settings}."
            )
        return settings

    @property
    def policy_type(self) -> str:
        """Which policy a checkpoint becomes; `model_type` is the same for both, since the published code knows no other."""
        return "openvla" if self.oft is None else "openvla_oft"

    @property
    def image_size(self) -> int:
        """Pixels of the (square) picture that the towers see."""
        return self.image_sizes[0]

    @property
    def num_image_tokens(self) -> int:
        """Placeholders before the prompt: the patches of all images, and one for proprioception where the model reads it."""
        patches = (self.image_size // self.towers()[0].patch_size) ** 2
        oft = self.oft_settings or OFTSettings()
        return oft.num_images * patches + (oft.state_size > 0)

    @property
    def action_slot_id(self) -> int:
        """Placeholder of an action token that OFT is to predict: the appended row before that of the image. Its embedding is zero."""
        return self.image_token_id - 1

    @property
    def action_token_ids(self) -> list[int]:
        """Vocabulary id of each bin, lowest action value first. For openvla-7b 31999, 31998, ..., 31744.

        Source: `prismatic/vla/action_tokenizer.py`, `vocab_size - digitize(action, linspace(-1, 1, 256))`.
        """
        last = self.text_config.vocab_size - self.pad_to_multiple_of - 1
        return list(range(last, last - self.n_action_bins, -1))

    def towers(self) -> list[VisionTower]:
        """The vision towers in the order of `timm_model_ids`."""
        if len(self.timm_model_ids) != (2 if self.use_fused_vision_backbone else 1):
            raise ValueError(
                "`timm_model_ids` must name two towers where `use_fused_vision_backbone`, else one, got "
                f"{self.timm_model_ids}."
            )
        known = VISION_TOWERS | {name: VisionTower(**sizes) for name, sizes in self.vision_towers.items()}
        if unknown := [name for name in self.timm_model_ids if name not in known]:
            raise ValueError(
                f"`timm_model_ids` must be among {sorted(known)}, got {unknown}. Give the sizes in `vision_towers`."
            )
        return [known[name] for name in self.timm_model_ids]
