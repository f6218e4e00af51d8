"""Fine-tune Flan-T5 with LoRA to summarise dialogues: frozen weights, a small trained adapter.

accelerate launch train_lora.py                                   # google/flan-t5-base on knkarthick/dialogsum
accelerate launch train_lora.py --demo                            # no network, minutes on two CPU cores
accelerate launch --multi_gpu --num_processes 8 train_lora.py     # the same training, eight times the GPUs
accelerate launch train_lora.py --train_file my.csv --validation_file dev.csv --output_dir out
python train_lora.py --help                                       # every setting
"""

from utils.config import LoraTrainingConfig
from utils.launch.command_line import show_help_if_asked

if __name__ == "__main__":
    show_help_if_asked(LoraTrainingConfig, "train_lora.yaml", __doc__)  # before the imports, which take seconds

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
from utils.modeling.loading import check_sizes, load_tokenizer
from utils.modeling.lora import add_lora, load_frozen_base, merge_adapter, use_settings_of_adapter
from utils.training.checkpointing import Checkpointer
from utils.training.loop import train
from utils.training.optimization import build_lr_scheduler, build_optimizer
from utils.training.resources.batch_size import choose_batch_size
from utils.training.resources.preflight import report_preflight
from utils.training.tracking import describe_run, finish_run, start_run


def main(config: LoraTrainingConfig):
    config = use_settings_of_adapter(config)
    check_output_dir(config)
    train_rows = load_rows(config, "train", config.max_train_samples)
    validation_rows = load_rows(config, "validation", config.max_eval_samples, not config.needs_validation)
    accelerator = start_accelerator(config)

    tokenizer = load_tokenizer(config.model_name_or_path)
    model = add_lora(load_frozen_base(accelerator, config), config)
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
    if config.merge_into:
        # The merge loads base and adapter anew: the trained ones need not be in memory beside them.
        model, optimizer, lr_scheduler = accelerator.free_memory(model, optimizer, lr_scheduler)
        merge_adapter(accelerator, tokenizer, train_data, config)
    finish_run(accelerator, config, checkpointer.run)


if __name__ == "__main__":
    run_script(main, LoraTrainingConfig, "train_lora.yaml")
