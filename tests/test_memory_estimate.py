"""What is counted on tensors without content is what real ones take."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32
from transformers import AutoModelForSeq2SeqLM

from utils.config import TrainingConfig
from utils.training.memory_estimate import LiveBytes, MicroBatch, count_bytes, fake_model, measure_micro_batch

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
    for _ in range(2):
        with fake_model(shapes, accelerator.device, precision) as fake:
            assert [measure_micro_batch(accelerator, fake, config, *case) for case in cases] == expected
    assert all(peak > 0 for peak, _ in expected)
    gradients = [
        measure_micro_batch(accelerator, real, config, MicroBatch(1, 2, 2, 2, 2), keep)[0] for keep in (True, False)
    ]
    assert gradients[0] - gradients[1] > 0.5 * count_bytes(real)[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in real.state_dict().items())
