"""Where the model that generates lies: whole on each process's device, or spread over what one process has."""

import warnings
from pathlib import Path

from accelerate import Accelerator, dispatch_model, infer_auto_device_map
from accelerate.utils import get_max_memory
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel

from utils.config import EvaluationConfig, UserError

WEIGHTS_SHARE = 0.8  # of a GPU's free memory; the rest is for activations and the cache of keys and values


def check_device_map(accelerator: Accelerator, config: EvaluationConfig):
    if config.device_map and accelerator.num_processes > 1:
        raise UserError(
            f"--device_map {config.device_map} gives one process all GPUs, and {accelerator.num_processes} were "
            "started: take --num_processes 1"
        )


def place_model(
    model: PreTrainedModel,
    accelerator: Accelerator,
    config: EvaluationConfig,
    max_memory: dict[int | str, int] | None = None,
    offload_dir: Path | None = None,
) -> PreTrainedModel:
    """The model, to be called with inputs on its first parameter's device.

    Args:
        max_memory: bytes for weights on each GPU, by its number, and on "cpu"; by default what is free there.
        offload_dir: a folder for weights that fit nowhere else.
    """
    if not config.device_map:
        return model.to(accelerator.device)
    clear_device_cache(garbage_collection=True)  # the hooks of a model that was spread before hold each other
    if max_memory is None:
        free = get_max_memory()
        max_memory = {device: size if device == "cpu" else int(size * WEIGHTS_SHARE) for device, size in free.items()}
    with warnings.catch_warnings(action="ignore"):  # that T5's embedding has several names
        device_map = infer_auto_device_map(model, max_memory, model._no_split_modules)
        if "disk" in device_map.values() and offload_dir is None:
            raise UserError(f"--device_map {config.device_map}: the model fits neither the GPUs nor the host's memory")
        return dispatch_model(model, device_map, offload_dir=offload_dir, skip_keys=model._skip_keys_device_placement)
