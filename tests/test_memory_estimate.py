"""What is counted on tensors without content is what real ones take."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32
from conftest import write_flan_t5
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM

from utils.config import TrainingConfig
from utils.execution.fused import fuse
from utils.modeling.loading import load_model
from utils.training.resources import assumed_gpu
from utils.training.resources.assumed_gpu import cuda_kernels
from utils.training.resources.memory_estimate import (
    LiveBytes,
    MicroBatch,
    count_bytes,
    estimate_memory,
    fake_model,
    measure_micro_batch,
)

MICRO_BATCHES = (MicroBatch(3, 40, 9, 110, 25), MicroBatch(1, 1, 1, 0, 0))


def test_live_bytes():
    weight = torch.ones(10, 20)
    with LiveBytes([weight], num_logits=600) as live:
        view = weight.t()
        assert live.now == 0, "a view takes nothing"
        first = view * 2
        assert (live.now, live.peak) == (800, 800)
        logits = torch.cat([first, first, first])
        assert (live.now, live.peak, live.logits_at_peak) == (3200, 3200, 2400)
        del first
        assert (live.now, live.peak) == (2400, 3200)
        del logits
        assert (live.now, live.logits_now) == (0, 0)
        view.add_(1)
    assert (live.peak, live.logits_at_peak) == (3200, 2400)


def test_cuda_kernels():
    def empty(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16))

    def count_live(name: str, *given: torch.Tensor, **settings) -> int:
        """Bytes that live on for the backward pass, with the result."""
        with cuda_kernels(), LiveBytes([t for t in given if isinstance(t, torch.Tensor)], num_logits=0) as live:
            result = getattr(functional, name)(*given, **settings)
            assert result.shape == given[0].shape
            num_bytes = live.now
            result.sum().backward()
        assert all(tensor.grad is not None for tensor in given if isinstance(tensor, torch.Tensor))
        return num_bytes

    with FakeTensorMode():
        values, weight = empty(6, 64), empty(64)
        assert count_live("dropout", values, p=0.5) == 6 * 64 * (2 + 1), "the result and a byte an element"
        assert count_live("dropout", values, p=0.5, training=False) == 0
        assert count_live("rms_norm", values, (64,), weight) == 6 * 64 * 2 + 6 * 4, "and a number a row"
        query, result, row_sums = empty(2, 3, 10, 16), 2 * 3 * 10 * 16 * 2, 2 * 3 * 32 * 4  # of rows, in 32s
        for num_keys, copy_of_mask in ((16, 0), (12, 2 * 3 * 10 * 16 * 2)):  # whose rows are in 8s
            key, mask = empty(2, 3, num_keys, 16), empty(2, 3, 10, num_keys)
            live = count_live("scaled_dot_product_attention", query, key, key, mask)
            assert live == result + row_sums + copy_of_mask + 16, "the last is a random state; no queries times keys"
    assert functional.dropout is not assumed_gpu.drop, "put back"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_assumed_gpu_gets_its_kernels(tmp_path, precision):
    """0.58 and 0.38 of what the CPU's keep was counted; kernels of the CPU alone would be 1."""
    AcceleratorState._reset_state(True)
    accelerator, folder = Accelerator(cpu=True), write_flan_t5(tmp_path, d_model=128, d_kv=32, d_ff=256)
    model = load_model(str(folder), "sdpa", torch.float32, without_weights=True)
    fuse(model)
    activations = []
    for memory in ("8GB", None):
        config = TrainingConfig(mixed_precision=precision, preflight=True, assume_memory=memory)
        parts, _ = estimate_memory(
            accelerator, model, config, MicroBatch(4, 253, 16, 1012, 64), None, accumulating=True
        )
        activations.append(parts["activations"])
    assert activations[0] < 0.75 * activations[1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_on_fake_tensors_is_one_on_real_ones(flan_t5, precision):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    settings = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    real = AutoModelForSeq2SeqLM.from_pretrained(flan_t5, **settings).train()
    shapes = AutoModelForSeq2SeqLM.from_pretrained(flan_t5, device_map="meta", **settings)
    assert count_bytes(shapes) == count_bytes(real)
    if precision == "bf16":
        real.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(real.forward))
    before, config = copy.deepcopy(real.state_dict()), TrainingConfig()
    cases = [(micro_batch, keep) for micro_batch in MICRO_BATCHES for keep in (True, False, None)]
    expected = [measure_micro_batch(accelerator, real, config, *case) for case in cases]
    for num_cases in (len(cases), 1):  # and the first once more
        with fake_model(shapes, accelerator.device, precision) as fake:
            found = [measure_micro_batch(accelerator, fake, config, *case) for case in cases[:num_cases]]
            assert found == expected[:num_cases]
    assert all(peak > 0 for peak, _ in expected)
    gradients = [
        measure_micro_batch(accelerator, real, config, MicroBatch(1, 2, 2, 2, 2), keep)[0] for keep in (True, False)
    ]
    assert gradients[0] - gradients[1] > 0.5 * count_bytes(real)[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in real.state_dict().items())
