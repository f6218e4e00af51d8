"""How much memory a run will take, by part, without taking any: one step of a model on FakeTensors, which have shapes
and devices and no content, is watched tensor by tensor. What a strategy shards or copies is added in whole numbers.
"""

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from utils.config import TrainingConfig
from utils.execution.strategies import is_deepspeed, is_sharded, name_strategy
from utils.modeling.shapes import count_saved_by_4bit
from utils.training.resources.assumed_gpu import cuda_kernels, estimated_device
from utils.training.step import compute_target_logits, compute_training_losses

# What is held between two updates; of other strategies all but the gradients.
AT_REST = {
    "DEEPSPEED_ZERO1": ("parameters", "optimizer"),
    "DEEPSPEED_ZERO2": ("parameters", "optimizer"),
    "DEEPSPEED_ZERO3": ("parameters", "optimizer", "gradients", "copies"),
}


@dataclass(frozen=True)
class MicroBatch:
    num_examples: int
    source_length: int  # of each, with padding
    target_length: int
    num_source_tokens: int  # of all, without padding
    num_target_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_source_tokens + self.num_target_tokens

    @property
    def num_computed_tokens(self) -> int:
        return self.num_examples * (self.source_length + self.target_length)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that still live: now, at most, and at that moment in tensors
    of `num_logits` elements. Those of `given` tensors, of which views are made, do not count."""

    def __init__(self, given: Iterable[torch.Tensor], num_logits: int):
        super().__init__()
        self.num_logits = num_logits
        self.seen = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in given})
        self.now = self.peak = self.logits_now = self.logits_at_peak = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        made = operator(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage] = True
                self.count(storage.nbytes(), tensor.numel() == self.num_logits)
                weakref.finalize(storage, self.count, -storage.nbytes(), tensor.numel() == self.num_logits)
        return made

    def count(self, num_bytes: int, are_logits: bool):
        self.now += num_bytes
        self.logits_now += num_bytes * are_logits
        if self.now > self.peak:
            self.peak, self.logits_at_peak = self.now, self.logits_now


@contextlib.contextmanager
def fake_model(
    model: torch.nn.Module, device: torch.device, mixed_precision: str, assume_gpu: bool = False
) -> Iterator[torch.nn.Module]:
    """Of a model on the meta device one of FakeTensors on `device`, in training and under autocast as Accelerate
    prepares it; on a CPU it can call the kernels of a GPU."""
    model, made = copy.deepcopy(model), {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:  # a tensor that two modules share stays one
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        if isinstance(tensor, torch.nn.Parameter):
                            fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        made[id(tensor)] = fake, tensor
                    tensors[name] = made[id(tensor)][0]
        if mixed_precision == "bf16":
            model.forward = convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16)(model.forward))
        model.train()
        with cuda_kernels() if assume_gpu and device.type == "cpu" else contextlib.nullcontext():
            yield model


def measure_micro_batch(
    accelerator: Accelerator,
    model: torch.nn.Module,
    config: TrainingConfig,
    micro_batch: MicroBatch,
    keep_gradients: bool | None,
) -> tuple[int, int]:
    """Most bytes that a fake model's forward and backward pass hold beside its parameters, and how many of them are
    logits. Gradients go, one by one, into what is there or is sharded, unless they are kept; with None there is no
    backward pass."""
    num_examples, num_targets = micro_batch.num_examples, micro_batch.num_target_tokens
    sizes = {name: (num_examples, micro_batch.source_length) for name in ("input_ids", "attention_mask")}
    sizes |= {name: (num_targets,) for name in ("target_positions", "targets")}
    sizes["decoder_input_ids"] = (num_examples, micro_batch.target_length)
    batch = {name: torch.ones(size, dtype=torch.long, device=accelerator.device) for name, size in sizes.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = []
    if not keep_gradients:
        hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
    num_logits = num_targets * model.get_output_embeddings().weight.shape[0]
    with LiveBytes(model.parameters(), num_logits) as live, torch.set_grad_enabled(keep_gradients is not None):
        loss = compute_training_losses(compute_target_logits(accelerator, model, batch), batch["targets"], config)[0]
        if keep_gradients is not None:
            loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return live.peak, live.logits_at_peak


def count_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Of (all, trained) parameters, a shared one counted once. A gradient and a moment are as large as the latter."""
    parameters = list(model.parameters())
    return sum(p.nbytes for p in parameters), sum(p.nbytes for p in parameters if p.requires_grad)


def share_out(accelerator: Accelerator, model: torch.nn.Module, config: TrainingConfig) -> dict[str, int]:
    """Bytes of each part on one process while it computes a gradient; `copies` are those of its strategy."""
    strategy, n = name_strategy(accelerator), accelerator.num_processes
    weights, trained = count_bytes(model)
    if getattr(config, "load_in_4bit", False):
        weights -= count_saved_by_4bit(model)
    on_gpu = estimated_device(accelerator, config).type == "cuda"
    parts = {"parameters": weights, "gradients": trained, "optimizer": 2 * trained, "copies": 0}
    if strategy.startswith("MULTI_"):
        parts["copies"] = trained  # buckets, which DDP does not share with the gradients
    elif strategy == "FSDP":
        parts = {name: size // n for name, size in parts.items()}
        parts["copies"] = count_gathered_bytes(model)
    elif is_deepspeed(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        bucket = 4 * number_in(settings, "reduce_bucket_size", 5e8)
        # A GPU holds all of a bucket, a CPU what of it is written to.
        parts["copies"] = bucket if on_gpu else min(bucket, trained)
        parts["optimizer"] = 3 * trained // n  # and the weights again, in flat partitions
        if strategy != "DEEPSPEED_ZERO1":
            parts["gradients"] = trained // n
        if strategy == "DEEPSPEED_ZERO3":
            parts["parameters"] = weights // n
            # Gathered weights stay, until there are so many, and are copied from a buffer of those gathered together.
            for name, default in (("stage3_max_live_parameters", 1e9), ("stage3_prefetch_bucket_size", 5e7)):
                parts["copies"] += min(weights, 4 * number_in(settings, name, default))
            if on_gpu:
                parts |= dict.fromkeys(find_offloaded(settings), 0)  # they are in the host's memory
    return parts


def find_offloaded(settings: dict) -> list[str]:
    parts = {"offload_param": ("parameters",), "offload_optimizer": ("gradients", "optimizer")}
    return [part for name in parts if (settings.get(name) or {}).get("device") == "cpu" for part in parts[name]]


def number_in(settings: dict, name: str, default: float) -> int:
    value = settings.get(name)
    return int(value if isinstance(value, int | float) else default)  # it may be "auto"


def count_gathered_bytes(model: torch.nn.Module) -> int:
    """What FSDP2 holds whole at a time: weights and gradients of all that is in no block, and of two blocks."""
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    sizes = [sum(count_bytes(block)) for block in blocks]
    outside = [p for p in model.parameters() if id(p) not in in_blocks]
    return sum(p.nbytes * (1 + p.requires_grad) for p in outside) + 2 * max(sizes, default=0)


def estimate_memory(
    accelerator: Accelerator,
    model: torch.nn.Module,
    config: TrainingConfig,
    training: MicroBatch,
    validation: MicroBatch | None,
    accumulating: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on the main process, which holds most, of a model on the meta device: by part while it computes a
    gradient, and at other moments in all. On a CPU a checkpoint's copy and the export count too."""
    _, trained = count_bytes(model)
    parts = share_out(accelerator, model, config)
    keep_gradients = not accumulating and not is_sharded(accelerator)
    device = estimated_device(accelerator, config)
    with fake_model(model, accelerator.device, config.mixed_precision, device.type == "cuda") as fake:
        peak, logits = measure_micro_batch(accelerator, fake, config, training, keep_gradients)
        no_gradients = measure_micro_batch(accelerator, fake, config, validation, None)[0] if validation else 0
    parts |= {"activations": max(0, peak - logits - trained * keep_gradients), "logits": logits}
    at_rest = AT_REST.get(name_strategy(accelerator), ("parameters", "optimizer", "copies"))
    resting = sum(parts[name] for name in at_rest)
    on_cpu = device.type == "cpu"
    moments = {"validation, a checkpoint being written": resting + 3 * trained * on_cpu + no_gradients}
    if on_cpu:
        # Sharded weights are gathered for it; what is read back to be compared stays mapped.
        is_gathered = name_strategy(accelerator) in ("DEEPSPEED_ZERO3", "FSDP")
        moments["the export"] = resting + trained * is_gathered
        if getattr(config, "merge_into", None):  # what was trained has gone by then
            moments["the merge"] = 4 * sum(parameter.numel() for parameter in model.parameters())
    return parts, moments
