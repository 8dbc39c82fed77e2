"""Any causal vision-language model of transformers as a VLA: an explicit map from bins to tokens, a prompt, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_stare.interfaces import Observation
from trl_stare.policies.autoregressive import AutoregressivePolicy
from trl_stare.policies.conventions import get_convention
from trl_stare.policies.normalization import ActionStatistics, BinnedActions, select_statistics

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Inputs that say of every token what it is; 0 is text, but in PaliGemma the bidirectional prefix, and 1 the causal suffix."""
_PACKED_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Models whose processors write the patches of all images of a batch below each other."""


class HFVLMPolicy(AutoregressivePolicy, model_type="hf_vlm"):
    """An [`AutoregressivePolicy`] over `AutoModelForImageTextToText` models: LLaVA, SmolVLM, PaliGemma, Qwen2.5-VL and their like.

    What makes a VLA of the model is in `model.config.vla`, which [`create`] writes, so that it travels with the checkpoint and
    `TokenPolicy.from_pretrained` finds it.

    Args:
        model (`PreTrainedModel`): with `config.vla`.
        processor (`ProcessorMixin`): called with `images` and `text`; writes the image placeholders.
        unnorm_key (`str`, *optional*): which statistics to use; may be left out where the checkpoint has only one.

    Raises:
        ValueError: `config.vla` is missing, or its token ids or statistics make no sense.
    """

    def __init__(self, model: Any, processor: Any, unnorm_key: str | None = None):
        vla = getattr(model.config, "vla", None)
        if not vla:
            raise ValueError(
                f"`model.config.vla` must be set, got none in this {model.config.model_type!r}. Use `HFVLMPolicy.create`."
            )
        unnorm_key = select_statistics(vla["norm_stats"], unnorm_key)
        statistics = ActionStatistics.of_checkpoint(vla["norm_stats"], unnorm_key)
        self.convention = get_convention(vla["action_convention"])
        super().__init__(
            model,
            processor,
            BinnedActions(statistics, len(vla["action_token_ids"])),
            chunk_size=vla["chunk_size"],
            action_dim=statistics.action_dim,
            unnorm_key=unnorm_key,
            action_token_ids=vla["action_token_ids"],
        )
        self.prompt = vla["prompt"]
        config = model.config
        self.image_token_id = getattr(config, "image_token_id", None) or config.image_token_index

    @classmethod
    def create(
        cls,
        model: Any,
        processor: Any,
        *,
        norm_stats: dict[str, Any],
        prompt: str,
        action_token_ids: Sequence[int] | None = None,
        num_bins: int = 256,
        chunk_size: int = 1,
        action_convention: str = "identity",
    ) -> HFVLMPolicy:
        """Make a VLA of a vision-language model.

        Args:
            model (`PreTrainedModel`), processor (`ProcessorMixin`): the pre-trained parts; both are changed where tokens are appended.
            norm_stats (`dict`): see [`ActionStatistics`].
            prompt (`str`): with `{instruction}`, and with the image's placeholder as the processor wants it.
            action_token_ids (`Sequence[int]`, *optional*): rows of the vocabulary to reuse, lowest bin first. By default `num_bins` tokens
                `<action_0>`, ... are appended to the tokenizer and to the embeddings, whose new rows are drawn with the spread of the old.
            num_bins (`int`): of appended tokens. chunk_size (`int`): `C`, environment steps per decision.
            action_convention (`str`): see [`~trl_stare.policies.conventions.get_convention`].
        """
        if "{instruction}" not in prompt:
            raise ValueError(f"`prompt` must hold `{{instruction}}`, got {prompt!r}.")
        if action_token_ids is None:
            names = [f"<action_{i}>" for i in range(num_bins)]
            _append_tokens(model, processor.tokenizer, names)
            action_token_ids = processor.tokenizer.convert_tokens_to_ids(names)
        model.config.vla = {
            "action_token_ids": list(action_token_ids),
            "norm_stats": norm_stats,
            "prompt": prompt,
            "chunk_size": chunk_size,
            "action_convention": action_convention,
        }
        return cls(model, processor)

    def prepare(self, obs: Observation) -> dict[str, Tensor]:
        """What the processor makes of images and prompts, one row per observation; its images are floats already.

        Raises:
            ValueError: a prompt that leaves no room for the action, or image placeholders that were lost.
        """
        n, text = len(obs.instructions), [self.prompt.format(instruction=i) for i in obs.instructions]
        encoded = self.processor(
            images=[[image] for image in obs.images.numpy()],
            text=text,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        # PaliGemma's processor makes labels of the prompt, on which the model would compute a loss of its own
        inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor) and name != "labels"}
        longest = self.model.config.get_text_config().max_position_embeddings - self.num_tokens
        if inputs["input_ids"].shape[1] > longest:
            raise ValueError(
                f"`instruction` must leave a prompt of at most {longest} tokens, got {inputs['input_ids'].shape[1]}. Shorten it."
            )
        images = (inputs["input_ids"] == self.image_token_id).sum(1)
        if images.min() == 0 or images.min() != images.max():
            raise ValueError(
                f"`input_ids` must hold equally many image placeholders in every row, got {images.tolist()}. Never truncate a prompt."
            )
        if self._packed:
            inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (n, -1))
        return inputs

    def forward(self, inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Any, Tensor]:
        """As above; patches that belong to one batch are put below each other again."""
        if self._packed:
            inputs = inputs | {"pixel_values": inputs["pixel_values"].flatten(0, 1)}
        return super().forward(inputs, **kwargs)

    def extend(self, inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """As above; inputs that say what kind of token stands where grow too."""
        kind = int(self.model.config.model_type == "paligemma")
        kinds = {
            name: F.pad(inputs[name], (0, tokens.shape[1]), value=kind) for name in _TOKEN_TYPES if name in inputs
        }
        return super().extend(inputs, tokens) | kinds

    def next_inputs(self, tokens: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """As above; Qwen-VL's positions count an image as one side of it, and only `generate` would work them out."""
        inputs = super().next_inputs(tokens, attention_mask)
        if not self._packed:
            return inputs
        deltas = next(m.rope_deltas for m in self.model.modules() if getattr(m, "rope_deltas", None) is not None)
        positions = attention_mask.cumsum(-1)[:, -1:] - 1 + deltas
        return inputs | {"position_ids": positions.expand(3, -1, -1)}

    def encode(self, actions: Tensor) -> Tensor:
        """`[N, C, A]` robot units -> `[N, C * A]` bins."""
        return super().encode(actions if self.convention is None else self.convention.from_robot(actions))

    def decode(self, trace: Tensor) -> Tensor:
        """`[N, C * A]` bins -> `[N, C, A]` float32 robot units."""
        actions = super().decode(trace)
        return actions if self.convention is None else self.convention.to_robot(actions)

    @property
    def _packed(self) -> bool:
        return self.model.config.model_type in _PACKED_TYPES


@torch.no_grad()
def _append_tokens(model: Any, tokenizer: Any, names: Sequence[str]) -> None:
    """Teach both the tokens called `names`; rows of what neither knew are drawn around the mean of the others, with their spread.

    transformers would put all new rows at the mean, with noise of 3e-5: as good as the same, in bfloat16 the same. A LoRA changes no
    row, and could tell no bin from another.
    """
    known, rows = tokenizer.get_vocab(), model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens(list(names), special_tokens=True)
    total = max(len(tokenizer), rows)
    model.resize_token_embeddings(total, mean_resizing=False)
    # a vocabulary may have rows to spare, which no token has trained
    unknown = tokenizer.convert_tokens_to_ids([name for name in names if name not in known])
    old = torch.tensor([row for row in known.values() if row < rows])
    new = torch.tensor(sorted({*unknown, *range(rows, total)}), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    for weight in {id(module.weight): module.weight for module in modules}.values():  # they may be tied
        trained = weight[old.to(weight.device)].float()
        noise = torch.randn(len(new), weight.shape[1], generator=generator).to(weight.device)
        weight[new.to(weight.device)] = (trained.mean(0) + trained.std(0) * noise).to(weight.dtype)
