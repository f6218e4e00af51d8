"""The functions of stock transformers made faster, most by fewer and larger kernels, for training. `fuse` puts them
into a loaded model, whose weights, their names and what is saved stay as they are. A family that is not named here
runs as it is.

    NewGELUActivation       torch's GELU with approximate="tanh": one kernel for eight, which keeps its input alone
    T5Stack                 under autocast, what passes from layer to layer is bf16, as when T5 itself was trained
    T5LayerNorm             torch's RMSNorm: as there, the mean of the squares is taken in fp32
    T5DenseGatedActDense    under autocast, activations stay bf16 on their way to `wo`, which would be given them in
                            fp32 and cast them back
    T5Attention             positions and mask are merged once for all layers of a stack and not in each of them;
                            cross-attention, which has no positions, takes the mask as it is
    LoraLayer               its input is not cast to fp32, which autocast would undo
    Dropout                 on a CPU, from 16 random bits an element. PyTorch draws a number of 53 for each, one after
                            the other, which took a quarter of the time in full and two fifths with LoRA
"""

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense, T5LayerNorm, T5Stack

ALIGNMENT = 8  # elements


def fuse(model: PreTrainedModel):
    for module in model.modules():
        if type(module) in FUSED and not (
            type(module) is T5Attention and module.config._attn_implementation != "sdpa"
        ):
            module.__class__ = FUSED[type(module)]
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, GELUTanh())
        if isinstance(module, LoraLayer) and not module.lora_variant:  # DoRA takes norms in the input's dtype
            module._cast_input_dtype = cast_unless_autocast


class DropOnCpu(torch.autograd.Function):
    """Dropout with a probability that is a multiple of 2^-16."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, p: float) -> torch.Tensor:
        threshold = round(p * 2**16)
        numbers = torch.empty(-(-states.numel() // 4), dtype=torch.int64, device=states.device)
        bits = numbers.random_(-(2**63), None).view(torch.int16)[: states.numel()]
        kept = (bits >= threshold - 2**15).view(states.shape)
        ctx.save_for_backward(kept)
        ctx.scale = 2**16 / (2**16 - threshold)
        return states * kept.to(states.dtype).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return gradient * kept.to(gradient.dtype).mul_(ctx.scale), None


def draws_slowly(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.compiler.is_compiling()


class FusedDropout(torch.nn.Dropout):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if 0 < self.p < 1 and self.training and not self.inplace and draws_slowly(states.device):
            return DropOnCpu.apply(states, self.p)
        return super().forward(states)


def attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    scale: float,
) -> torch.Tensor:
    """scaled_dot_product_attention as a CPU computes it where there is dropout, in fp32, but for its dropout."""
    with torch.autocast("cpu", enabled=False):
        query, key, values = query.float() * scale, key.float(), value.float()
        scores = query @ key.transpose(-1, -2)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
        if mask is not None:
            scores = scores + mask
        return (DropOnCpu.apply(scores.softmax(dim=-1), dropout_p) @ values).to(value.dtype)


def cast_unless_autocast(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return states if torch.is_autocast_enabled(states.device.type) else states.to(dtype)


class FusedT5Stack(T5Stack):
    def forward(self, input_ids: torch.Tensor | None = None, **kwargs) -> object:
        device = self.embed_tokens.weight.device.type
        if input_ids is not None and torch.is_autocast_enabled(device):
            kwargs["inputs_embeds"] = self.embed_tokens(input_ids).to(torch.get_autocast_dtype(device))
            input_ids = None
        return super().forward(input_ids, **kwargs)


class FusedT5LayerNorm(T5LayerNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden_states.dtype)
        # CUDA's autocast would cast the input to fp32, and keep it for the backward pass.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return functional.rms_norm(hidden_states, hidden_states.shape[-1:], weight, self.variance_epsilon)


class FusedT5DenseGatedActDense(T5DenseGatedActDense):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(hidden_states.device.type):
            return super().forward(hidden_states)
        return self.wo(self.dropout(self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)))


class FusedT5Attention(T5Attention):
    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: object = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """The attention, and what the next layer of the stack gets as position_bias: positions and mask in one.

        Args:
            hidden_states: (examples, queries, d_model). key_value_states: (examples, keys, d_model).
            mask: broadcast to (examples, heads, queries, keys), False where a key is not to be seen.
            position_bias: (examples, heads, queries, keys), from the layer before.
        """
        if past_key_values is not None:  # in decoding
            return super().forward(
                hidden_states, mask, key_value_states, position_bias, past_key_values=past_key_values, **kwargs
            )
        is_self_attention = key_value_states is None
        attended = hidden_states if is_self_attention else key_value_states
        query, key, value = (
            projection(states).unflatten(-1, (self.n_heads, self.key_value_proj_dim)).transpose(1, 2)
            for projection, states in ((self.q, hidden_states), (self.k, attended), (self.v, attended))
        )
        if is_self_attention and position_bias is None:
            position_bias = self.merge_bias(hidden_states, mask)
        dropout_p, bias = self.dropout if self.training else 0.0, position_bias if is_self_attention else mask
        if 0 < dropout_p < 1 and draws_slowly(query.device):
            attention = attend_on_cpu(query, key, value, bias, dropout_p, self.scaling)
        else:
            attention = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=self.scaling
            )
        return self.o(attention.transpose(1, 2).flatten(-2)), position_bias, None

    def merge_bias(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(1 or examples, heads, tokens, tokens): the positions' bias, or the lowest number where nothing is seen."""
        num_tokens, device = hidden_states.shape[1], hidden_states.device
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if mask is None and self.is_causal:
            mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
        bias = self.compute_bias(num_tokens, num_tokens, device).to(dtype)
        if mask is not None:
            bias = bias.where(mask, torch.finfo(dtype).min)
        # Its rows lie a multiple of ALIGNMENT apart: attention on a GPU would copy it in each layer otherwise.
        return functional.pad(bias.contiguous(), (0, -num_tokens % ALIGNMENT))[..., :num_tokens]


FUSED = {
    torch.nn.Dropout: FusedDropout,
    T5Stack: FusedT5Stack,
    T5LayerNorm: FusedT5LayerNorm,
    T5DenseGatedActDense: FusedT5DenseGatedActDense,
    T5Attention: FusedT5Attention,
}
