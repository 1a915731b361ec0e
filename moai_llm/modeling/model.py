"""The whole model as transformers knows it: MoaiModel (hidden states), MoaiForCausalLM (loss or logits),
registered with the Auto classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from moai_llm.config import MoaiConfig
from moai_llm.losses import Loss, shift_labels
from moai_llm.modeling.decoder import DecoderLayer
from moai_llm.modeling.linear import Linear
from moai_llm.modeling.mamba import Mamba
from moai_llm.modeling.moe import MoE, RouterSums
from moai_llm.modeling.normalization import make_norm
from moai_llm.modeling.rope import BY_LENGTH, RotaryEmbedding
from moai_llm.modeling.slots import SlotCache
from moai_llm.ops.moe import switch_loss

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


@dataclass
class MoaiModelOutput(ModelOutput):
    """`router` holds one `RouterSums` per sparse layer."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    router: tuple[RouterSums, ...] | None = None


@dataclass
class MoaiCausalLMOutput(CausalLMOutputWithPast):
    """`loss` is what is trained on. `cross_entropy` is its next-token part alone and `aux_loss` its router part, both
    detached and normalised like the loss."""

    cross_entropy: Tensor | None = None
    aux_loss: Tensor | None = None
    router: tuple[RouterSums, ...] | None = None


class MoaiPreTrainedModel(PreTrainedModel):
    config: MoaiConfig
    config_class = MoaiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = True
    _keep_in_fp32_modules_strict = list(Mamba.KEEP_FP32)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mamba):
            module.init_weights()
        elif isinstance(module, MoE):
            module.init_weights(self.config.initializer_range)


class MoaiModel(MoaiPreTrainedModel):
    """Token ids to hidden states.

    Beyond transformers' usual arguments `forward` takes:
        seq_idx: (B, L) document number of each position of packed rows. No layer looks across a border. Derived from
            `position_ids` where those restart and it is not given.
        token_mask: (B, L) which tokens the router's sums count; all but padding when None.
        noise_key: () or, one for each row, (B,) int64 tensor that the router's noise is a function of; a counter of
            forward calls when None.
        rope_length: how long the sequences will become, for RoPE rules that depend on it; this forward's own end when
            None.
    """

    expert_counts: Tensor
    noise_step: Tensor

    def __init__(self, config: MoaiConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        assert config.layer_types is not None and config.mlp_layer_types is not None
        self.rotary = RotaryEmbedding(config) if config.rotates else None
        sparse = config.mlp_layer_types.count("sparse")
        # selections of each expert since the last `take_expert_counts`, added once per forward while training
        self.register_buffer("expert_counts", torch.zeros(sparse, config.num_experts), persistent=False)
        self.register_buffer("noise_step", torch.zeros((), dtype=torch.int64), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self.expert_counts.zero_()
            self.noise_step.zero_()

    def take_expert_counts(self) -> Tensor:
        """(sparse layers, E) selections per expert since the last call, and start again from zero."""
        counts = self.expert_counts.clone()
        self.expert_counts.zero_()
        return counts

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        token_mask: Tensor | None = None,
        noise_key: Tensor | None = None,
        rope_length: int | None = None,
        **_: Any,
    ) -> MoaiModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = _past_length(past_key_values)
        slots = past_key_values if isinstance(past_key_values, SlotCache) else None
        if slots is not None:
            position_ids, rope_length = slots.positions(x.shape[1], x.device), None
        given: dict[str, Any] = {}
        if isinstance(attention_mask, dict):  # made by generate() for a static cache
            given, attention_mask = attention_mask, attention_mask.get("linear_attention")
        padded = _without_full_mask(attention_mask)
        if seq_idx is None and past == 0 and position_ids is not None and padded is None and slots is None:
            seq_idx = _documents(position_ids)
        if seq_idx is not None and past_key_values is not None:
            raise ValueError("packed rows (seq_idx) cannot be cached: run one document a row")
        if use_cache and past_key_values is None and seq_idx is None:
            past_key_values = new_cache(self.config)
        if position_ids is None:
            position_ids = _positions(x, past, padded)
        if self.embed_positions is not None:
            known = self.config.max_position_embeddings
            length = past + x.shape[1] if slots is None else max(slots.after(x.shape[1]))
            if length > known:
                raise ValueError(f"this model has {known} learned positions, {length} do not fit")
            x = x + self.embed_positions(position_ids)
        ends = max(past + x.shape[1], rope_length or 0) if slots is None else slots.ends(x.shape[1])
        pieces = None if slots is None else slots.pieces
        rope = None if self.rotary is None else self.rotary(position_ids, ends, pieces)
        if noise_key is None and self.training and self.config.router_noise:
            noise_key = self.noise_step.clone()
            self.noise_step += 1
        mask_for = given
        if not given and slots is None:  # rows of slots know their own lengths
            mask_for = self._masks(x, padded, past_key_values, position_ids, seq_idx)
        if padded is not None and padded.dim() == 2:
            last = padded[:, -x.shape[1] :]
            token_mask = last if token_mask is None else token_mask
            if seq_idx is None:
                seq_idx = last.to(torch.int32)  # padding is another document: no state flows out of it
        every, router = [], []
        for layer, kind in zip(self.layers, self.config.layer_types or ()):
            every.append(x)
            x, sums = layer(
                x,
                rope=rope,
                mask=mask_for.get(kind) if kind in MASKS else None,
                seq_idx=seq_idx if kind not in MASKS or mask_for.get(kind) is None else None,
                past_key_values=past_key_values,
                token_mask=token_mask,
                noise_key=noise_key,
            )
            if sums is not None:
                router.append(sums)
        x = self.norm(x)
        if isinstance(past_key_values, StateCache):
            past_key_values.seen += x.shape[1]
        elif slots is not None:
            slots.advance(x.shape[1])
        if self.training and router:
            self.expert_counts += torch.stack([sums.selected for sums in router]).detach().to(self.expert_counts.dtype)
        return MoaiModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*every, x) if output_hidden_states else None,
            router=tuple(router) or None,
        )

    def _masks(
        self, x: Tensor, padded: Tensor | None, cache: Any, position_ids: Tensor, seq_idx: Tensor | None
    ) -> dict[str, Any]:
        """Per attention type the mask transformers would build, where our op cannot do without one; {} where it can."""
        if padded is not None and padded.dim() == 4:
            return dict.fromkeys(MASKS, padded)
        static = cache is not None and getattr(cache, "is_compileable", False)
        ours = self.config._attn_implementation in (None, "sdpa", "eager")
        if ours and padded is None and not static:
            return {}
        if not ours and seq_idx is not None and x.shape[0] > 1:
            raise ValueError(
                f"packed rows with attn_implementation={self.config._attn_implementation!r} need one row a batch; "
                "use attn_implementation='sdpa'"
            )
        arguments = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": padded,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        kinds = [kind for kind in MASKS if kind in (self.config.layer_types or ())]
        return {kind: MASKS[kind](**arguments) for kind in kinds}


class MoaiForCausalLM(MoaiPreTrainedModel, GenerationMixin):
    """The language model. With `labels` it returns the loss from hidden states, and while training no logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoaiConfig) -> None:
        super().__init__(config)
        self.model = MoaiModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.objective = Loss()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        router_load: Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoaiCausalLMOutput:
        """
        Args:
            labels: (B, L) aligned with the inputs and shifted here; -100 has no target.
            num_items_in_batch: targets of the whole batch, over all its micro-batches and ranks: the loss is the sum
                divided by it, so that accumulated micro-batches add up to the big batch. The targets of this call
                when None.
            router_load: (sparse layers, E) share of all selections per expert, that the balance loss multiplies with;
                this call's own when None. With several micro-batches it must be the same for all of them.
            return_logits: also compute logits beside a loss; by default only when not training.

        Raises:
            ValueError: labels without a single target.
        """
        targets = None if labels is None else shift_labels(labels)
        if targets is not None:
            kwargs.setdefault("token_mask", targets != -100)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=self.config.use_cache and labels is None and not self.training
            if use_cache is None
            else use_cache,
            **kwargs,
        )
        hidden = output.last_hidden_state
        loss = cross_entropy = aux = logits = None
        if targets is not None:
            count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
            sums = self.objective.sums(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())
            loss, cross_entropy = sums.objective / count, sums.cross_entropy / count
            if output.router is not None:
                aux = router_loss(self.config, output.router, count, router_load)
                loss = loss + aux
                aux = aux.detach()
        if targets is None or (return_logits if return_logits is not None else not self.training):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep] if logits_to_keep is not None else hidden)
        return MoaiCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            cross_entropy=cross_entropy,
            aux_loss=aux,
            router=output.router,
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """States alone need a cache of ours; RoPE rules that depend on the final length must know it before the first
        token.
        """
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            cache = new_cache(self.config)
            if isinstance(cache, StateCache):
                model_kwargs["past_key_values"] = cache
                return None
        rope = self.config.rope_parameters
        if rope is not None and rope["rope_type"] in BY_LENGTH:
            model_kwargs.setdefault("rope_length", generation_config.max_length)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]


def router_loss(
    config: MoaiConfig, router: tuple[RouterSums, ...], count: Tensor | int, load: Tensor | None = None
) -> Tensor:
    """Sum over the sparse layers of coefficient x Switch loss and coefficient x z-loss, both per counted token.

    Args:
        count: counted tokens of the whole window; `router` may hold only a part of them.
        load: (layers, E) share of all K selections that fell on each expert; of `router` itself when None.
    """
    total = router[0].z.new_zeros(())
    for i, sums in enumerate(router):
        share = sums.selected / sums.selected.sum().clamp_min(1) if load is None else load[i]
        total = total + config.router_aux_loss_coef * switch_loss(share.detach(), sums.probability / count)
        total = total + config.router_z_loss_coef * sums.z / count
    return total


class StateCache(DynamicCache):
    """The cache of a model without attention: its layers hold states and no tokens, so it counts them itself."""

    def __init__(self, config: MoaiConfig) -> None:
        super().__init__(config=config)
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen


def new_cache(config: MoaiConfig) -> DynamicCache:
    """An empty cache for a model of this config."""
    return DynamicCache(config=config) if set(config.layer_types or ()) & set(MASKS) else StateCache(config)


def _past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _without_full_mask(attention_mask: Tensor | None) -> Tensor | None:
    """A 2-D mask without any padding says nothing, and attention without a mask is faster."""
    if attention_mask is None or attention_mask.dim() != 2 or torch.compiler.is_compiling():
        return attention_mask
    return None if bool(attention_mask.all()) else attention_mask


def _positions(x: Tensor, past: int, padded: Tensor | None) -> Tensor:
    if padded is not None and padded.dim() == 2:
        return (padded.long().cumsum(-1) - 1).clamp_min(0)[:, -x.shape[1] :]
    return torch.arange(past, past + x.shape[1], device=x.device)[None]


def _documents(position_ids: Tensor) -> Tensor | None:
    """Document numbers from positions that restart; None where each row is one document."""
    if torch.compiler.is_compiling():
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return None
    return torch.nn.functional.pad(starts.to(torch.int32).cumsum(-1, dtype=torch.int32), (1, 0))


AutoModel.register(MoaiConfig, MoaiModel)
AutoModelForCausalLM.register(MoaiConfig, MoaiForCausalLM)
