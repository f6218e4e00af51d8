"""What is replaced is the same function as in stock transformers, in outputs and gradients: to rounding in fp32, and
no further from fp32 than stock is in bf16."""

import copy

import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import relative_difference
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from utils.config import TrainingConfig
from utils.data.batching import collate
from utils.data.prefetch import move_batch
from utils.execution import fused
from utils.execution.fused import FUSED, FusedDropout, attend_on_cpu, fuse
from utils.training.step import compute_gradient

SHAPE = {"vocab_size": 100, "d_model": 48, "d_kv": 16, "num_heads": 3, "d_ff": 96, "num_layers": 3}


def build_t5(activation: str, **more: object) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    settings = SHAPE | {"feed_forward_proj": activation, "decoder_start_token_id": 0, "dropout_rate": 0.0} | more
    model = T5ForConditionalGeneration(T5Config(**settings))
    for parameter in model.parameters():  # norms of 1 and biases of one size would hide what they are multiplied with
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def run(model: torch.nn.Module, padded: bool, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of real targets, and the gradients of their sum weighted at random."""
    generator = torch.Generator().manual_seed(1)
    source_lengths = [30, 21, 1] if padded else [30, 30, 30]
    ids, targets = (torch.randint(3, 100, size, generator=generator) for size in ((3, 30), (3, 12)))
    mask = torch.arange(30) < torch.tensor(source_lengths)[:, None]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, attention_mask=mask[:, None, None], decoder_input_ids=targets, use_cache=False)
    logits = logits.logits.float()
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in trained.items()}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("activation", ["gated-gelu", "relu"])
def test_it_is_the_same_function(activation, padded):
    stock = build_t5(activation)
    fused = copy.deepcopy(stock)
    fuse(fused)
    assert stock.state_dict().keys() == fused.state_dict().keys()
    (expected, gradients), (logits, fused_gradients) = run(stock, padded), run(fused, padded)
    # Rounding: 1e-7 to 1e-6 was measured; leaving out the mask or the positions gives more than 0.01.
    assert relative_difference({"": logits}, {"": expected}) < 1e-5
    assert relative_difference(fused_gradients, gradients) < 1e-5
    # Stock wholly in bf16, as T5 was trained, has the same precision between the layers, and less in the weights.
    in_bf16, fused_in_bf16 = run(copy.deepcopy(stock).bfloat16(), padded), run(fused, padded, autocast=True)
    for rounded, fused_rounded, exact in (
        ({"": in_bf16[0]}, {"": fused_in_bf16[0]}, {"": expected}),
        ({name: g.float() for name, g in in_bf16[1].items()}, fused_in_bf16[1], gradients),
    ):
        rounding = relative_difference(rounded, exact)
        # 0.6 to 1.06 of it was measured.
        assert 1e-3 < rounding and relative_difference(fused_rounded, exact) < 1.25 * rounding


def test_gpu_kernels_take_positions_and_mask_as_they_lie(monkeypatch):
    """Else each layer would copy them: 4 GB more for 16 examples of 1,001 tokens at flan-t5-base's shape."""
    model, strides, attend = build_t5("gated-gelu"), [], functional.scaled_dot_product_attention
    fuse(model)

    def attend_and_look(*arguments, attn_mask: torch.Tensor, **settings) -> torch.Tensor:
        if attn_mask.dtype != torch.bool:
            strides.append(attn_mask.stride())
        return attend(*arguments, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend_and_look)
    run(model, padded=True)
    assert len(strides) == 6, "self-attention of 3 layers in each stack"
    assert all(stride[-1] == 1 and not any(step % 8 for step in stride[:-1]) for stride in strides)


def test_what_passes_between_layers_is_bf16_under_autocast_alone():
    model, seen = build_t5("gated-gelu"), []
    fuse(model)
    for stack in (model.encoder, model.decoder):
        for part in (*stack.block, stack.final_layer_norm):
            part.register_forward_pre_hook(lambda part, arguments: seen.append(arguments[0].dtype))
    for autocast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        run(model, padded=True, autocast=autocast)
        assert seen == [dtype] * 8, "3 layers and a norm of each stack"
        seen.clear()


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_computes_in_bf16_under_autocast(use_dora):
    """PEFT would cast its input to fp32, as it does elsewhere; for DoRA, which takes norms in that precision."""
    lora = LoraConfig(target_modules=["q", "v"], lora_dropout=0.1, use_dora=use_dora)
    model = get_peft_model(build_t5("gated-gelu").bfloat16(), lora)
    fuse(model)
    adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
    seen = []
    for adapter in adapters:
        adapter.lora_dropout["default"].register_forward_pre_hook(lambda part, given: seen.append(given[0].dtype))
        assert adapter.lora_A["default"].weight.dtype == torch.float32, "which small updates need"
    run(model, padded=True, autocast=True)
    assert seen == [torch.float32 if use_dora else torch.bfloat16] * len(adapters) and adapters
    seen.clear()
    model.eval()(input_ids=torch.ones(1, 2, dtype=torch.long), decoder_input_ids=torch.ones(1, 2, dtype=torch.long))
    assert use_dora or seen == [torch.float32] * len(adapters), "outside autocast its own weights are fp32"


def test_weights_are_cast_once_an_update():
    """And not in each micro-batch; the gradient is the same, bit for bit."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, generator = build_t5("gated-gelu"), torch.Generator().manual_seed(3)
    model.config.pad_token_id = 0
    fuse(model)
    model, config, batches = accelerator.prepare(model), TrainingConfig(), []
    for _ in range(3):
        ids, labels = (torch.randint(3, 100, (2, size), generator=generator).tolist() for size in (9, 5))
        batch = collate(pa.table({"input_ids": ids, "labels": labels}), 0)
        batches.append(move_batch(batch, model, accelerator.device))

    class CountCasts(TorchDispatchMode):
        num_casts = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            shape = model.encoder.block[0].layer[1].DenseReluDense.wi_0.weight.shape
            self.num_casts += function is torch.ops.aten._to_copy.default and (
                args[0].shape == shape and kwargs.get("dtype") == torch.bfloat16
            )
            return function(*args, **(kwargs or {}))

    def compute(apart: bool) -> tuple[int, dict[str, torch.Tensor]]:
        model.zero_grad()
        with CountCasts() as counted:
            for share in [[batch] for batch in batches] if apart else [batches]:
                compute_gradient(accelerator, model, share, 30, config)
        return counted.num_casts, {name: p.grad.clone() for name, p in model.named_parameters()}

    (num_casts, gradients), (num_apart, expected) = compute(apart=False), compute(apart=True)
    assert num_apart == 3 * num_casts > 0
    assert all(gradients[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("p", [0.1, 0.25])
def test_dropout_on_a_cpu(p):
    """Bounds are five standard deviations, of the share and of the correlation of neighbours."""
    dropout, states = FusedDropout(p), torch.full((100, 10_001), 2.0, requires_grad=True)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(dropout(states))
    kept = draws[0].detach() != 0
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(1 - p - kept.float().mean().item()) < 5 * deviation
    assert draws[0].detach()[kept].unique().tolist() == pytest.approx([2 / (1 - p)], rel=2e-5)
    centred = kept.flatten().float() - (1 - p)
    for distance in (1, 2, 3, 4, 8):  # four are of one number
        correlation = (centred[:-distance] * centred[distance:]).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / kept.numel() ** 0.5
    (gradient,) = torch.autograd.grad(draws[0].sum(), states)
    assert gradient.equal(kept * (2**16 / (2**16 - round(p * 2**16))))
    assert dropout.eval()(states) is states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["no mask", "booleans", "numbers"])
def test_attention_on_a_cpu_is_pytorchs_but_for_the_numbers_drawn(monkeypatch, dtype, kind):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, 7, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    mask = None
    if kind == "booleans":
        mask = torch.arange(7).expand(3, 1, 1, 7) < torch.tensor([7, 4, 1])[:, None, None, None]
    elif kind == "numbers":
        mask = torch.randn(3, 2, 7, 7, generator=generator).to(dtype)
    upstream = torch.randn(3, 2, 7, 8, generator=generator).to(dtype)
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(fused.DropOnCpu, "apply", lambda weights, p: weights)
        found.append(attend_on_cpu(query, key, value, mask, 0.1, 0.5))
    found.append(functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5))
    gradients = [torch.autograd.grad(output, (query, key, value), upstream) for output in found]
    rounding = 1e-6 if dtype == torch.float32 else 2**-6  # of a bf16 number 2^-9, in a few steps
    for ours, expected in zip((found[0], *gradients[0]), (found[1], *gradients[1]), strict=True):
        assert ours.dtype == dtype
        assert (ours - expected).norm() < rounding * expected.norm()
    torch.manual_seed(0)
    mean = sum(attend_on_cpu(query, key, value, mask, 0.1, 0.5).detach().float() for _ in range(2000)) / 2000
    assert (mean - found[0].float()).norm() < 0.05 * found[0].float().norm()


def test_everything_that_is_named_is_replaced():
    model = build_t5("gated-gelu")
    fuse(model)
    left = {type(module).__name__ for module in model.modules()} & {"NewGELUActivation", *(t.__name__ for t in FUSED)}
    assert left == set()


def test_generated_texts_are_those_of_stock():
    stock = build_t5("gated-gelu")
    fused = copy.deepcopy(stock)
    fuse(fused)
    ids = torch.randint(3, 100, (4, 20), generator=torch.Generator().manual_seed(2))
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        texts = [model.eval().generate(ids, max_new_tokens=12, **settings) for model in (stock, fused)]
        assert texts[0].equal(texts[1])


def test_other_families_and_kinds_of_attention_run_as_they_are():
    for model in (build_t5("relu", attn_implementation="eager"), BartForConditionalGeneration(BartConfig(
        vocab_size=100, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2,
    ))):  # fmt: skip
        before = [type(module) for module in model.modules() if "Attention" in type(module).__name__]
        fuse(model)
        assert [type(module) for module in model.modules() if "Attention" in type(module).__name__] == before
