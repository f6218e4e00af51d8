"""Fine-tune all weights of Flan-T5 to summarise dialogues.

accelerate launch train_full.py                                   # google/flan-t5-base on knkarthick/dialogsum
accelerate launch train_full.py --demo                            # no network, minutes on two CPU cores
accelerate launch --multi_gpu --num_processes 8 train_full.py     # the same training, eight times the GPUs
accelerate launch train_full.py --train_file my.csv --validation_file dev.csv --output_dir out
python train_full.py --help                                       # every setting
"""

from utils.config import TrainingConfig
from utils.launch.command_line import show_help_if_asked

if __name__ == "__main__":
    show_help_if_asked(TrainingConfig, "train_full.yaml", __doc__)  # before the imports, which take seconds

import torch

from utils.data.rows import load_rows
from utils.data.tokens import tokenize_rows
from utils.execution.compiled import compile_blocks
from utils.execution.fused import fuse
from utils.execution.passes import allow_unused_weights
from utils.execution.strategies import start_accelerator
from utils.launch.output_dir import check_output_dir
from utils.launch.script import run_script
from utils.modeling.export import export_model
from utils.modeling.families import check_trainable
from utils.modeling.generation_config import set_generation_config
from utils.modeling.loading import check_sizes, load_model, load_tokenizer
from utils.training.checkpointing import Checkpointer
from utils.training.loop import train
from utils.training.optimization import build_lr_scheduler, build_optimizer
from utils.training.resources.batch_size import choose_batch_size
from utils.training.resources.preflight import report_preflight
from utils.training.tracking import describe_run, finish_run, start_run


def main(config: TrainingConfig):
    check_output_dir(config)
    train_rows = load_rows(config, "train", config.max_train_samples)
    validation_rows = load_rows(config, "validation", config.max_eval_samples, not config.needs_validation)
    accelerator = start_accelerator(config)

    tokenizer = load_tokenizer(config.model_name_or_path)
    # fp32 weights under bf16 autocast: AdamW's small updates would be lost in bf16 weights.
    model = load_model(
        config.model_name_or_path, config.attn_implementation, torch.float32, without_weights=config.preflight
    )
    check_sizes(model, tokenizer, config)
    check_trainable(model, f"--model_name_or_path {config.model_name_or_path}")
    fuse(model)
    compile_blocks(accelerator, model, config)
    set_generation_config(model, config)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()

    train_data = tokenize_rows(accelerator, train_rows, tokenizer, config, "train")
    validation_data = tokenize_rows(accelerator, validation_rows, tokenizer, config, "validation")
    run = describe_run(config, model, train_rows, validation_rows)
    if config.preflight:
        return report_preflight(accelerator, config, model, train_data, validation_data, run)
    checkpointer = Checkpointer(accelerator, config, model, run)
    optimizer = build_optimizer(model, config)
    lr_scheduler = build_lr_scheduler(optimizer, config, run["num_train_steps"])
    allow_unused_weights(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)

    config = choose_batch_size(accelerator, model, train_data, config, checkpointer.batch_size)
    start_run(accelerator, config, checkpointer.folder, run)
    train(accelerator, model, tokenizer, optimizer, lr_scheduler, train_data, validation_data, config, checkpointer)
    export_model(accelerator, model, tokenizer, config.output_dir)
    finish_run(accelerator, config, checkpointer.run)


if __name__ == "__main__":
    run_script(main, TrainingConfig, "train_full.yaml")
