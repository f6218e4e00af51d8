"""Fine-tune all weights of Flan-T5 to summarise dialogues.

accelerate launch train_full.py                                   # google/flan-t5-base on knkarthick/dialogsum
accelerate launch train_full.py --demo                            # no network, minutes on two CPU cores
accelerate launch --multi_gpu --num_processes 8 train_full.py     # the same training, eight times the GPUs
accelerate launch train_full.py --train_file my.csv --validation_file dev.csv --output_dir out
python train_full.py --help                                       # every setting
"""

import torch

from utils.config import TrainingConfig
from utils.data.rows import load_rows
from utils.data.tokens import tokenize_rows
from utils.files import hash_value
from utils.launch.output_dir import check_output_dir
from utils.launch.script import run_script
from utils.modeling.export import export_model
from utils.modeling.loading import check_sizes, count_parameters, load_model, load_tokenizer
from utils.modeling.strategies import start_accelerator
from utils.prompting import build_prompt
from utils.scoring.report import plot_loss_curve
from utils.training.checkpoint_files import describe_run
from utils.training.checkpointing import Checkpointer
from utils.training.loop import train
from utils.training.optimization import build_lr_scheduler, build_optimizer, num_train_steps
from utils.training.preflight import report_preflight
from utils.training.tracking import start_run


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
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()

    train_data = tokenize_rows(accelerator, train_rows, tokenizer, config, "train")
    validation_data = (
        tokenize_rows(accelerator, validation_rows, tokenizer, config, "validation") if validation_rows else None
    )
    num_steps = num_train_steps(config, len(train_data))
    num_parameters, num_trainable_parameters = count_parameters(model)
    run = {
        "num_parameters": num_parameters,
        "num_trainable_parameters": num_trainable_parameters,
        "num_train_examples": len(train_data),
        "num_train_steps": num_steps,
        "data_fingerprint": hash_value([train_rows, validation_rows]),
        "prompt": build_prompt("{dialogue}"),
    }
    if config.preflight:
        return report_preflight(accelerator, config, model, train_data, validation_data, run)
    checkpointer = Checkpointer(accelerator, config, describe_run(config, model) | run)
    optimizer = build_optimizer(model, config)
    lr_scheduler = build_lr_scheduler(optimizer, config, num_steps)
    model, optimizer = accelerator.prepare(model, optimizer)

    start_run(accelerator, config, checkpointer.folder, run)
    train(accelerator, model, tokenizer, optimizer, lr_scheduler, train_data, validation_data, config, checkpointer)
    export_model(accelerator, model, tokenizer, config.output_dir)
    if accelerator.is_main_process:
        plot_loss_curve(config.output_dir)
    accelerator.wait_for_everyone()  # the launcher ends all when one process fails on its way out


if __name__ == "__main__":
    run_script(main, TrainingConfig, "train_full.yaml")
