"""Run a training script with each gradient multiplied by 3 and divided by 3: how far rounding alone moves its result.

    python tests/rounded_gradient.py train_lora.py ...

So do three processes: the loss is multiplied by their number, and the sum of their gradients divided by it.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.execution import passes
from utils.training import step

backward, clip_gradient = step.backward, passes.clip_gradient


def clip_third(accelerator, model, max_grad_norm):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(3)
    return clip_gradient(accelerator, model, max_grad_norm)


if __name__ == "__main__":
    step.backward = lambda accelerator, model, loss_sum: backward(accelerator, model, 3 * loss_sum)
    passes.clip_gradient = clip_third
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
