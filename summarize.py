"""Summarise dialogues that have no reference, with a model that was trained here or any other.

python summarize.py --model ./flan-t5-base-dialogsum-lora < chat.txt              # one dialogue, its summary on stdout
accelerate launch summarize.py --input_file chats.jsonl --output_file summaries.jsonl
python summarize.py --model google/flan-t5-base --input_file chats.csv --dialogue_column text --output_file out.csv
accelerate launch summarize.py --demo                                             # the demo's test rows
python summarize.py --help                                                        # every setting
"""

from utils.config import SummaryConfig
from utils.launch.command_line import show_help_if_asked

if __name__ == "__main__":
    show_help_if_asked(SummaryConfig, "summarize.yaml", __doc__)  # before the imports, which take seconds

import sys
from pathlib import Path

from accelerate import Accelerator

from utils.generation.partial_texts import Summary, remove_batches
from utils.generation.summaries import choose_dtype, load_summarizer
from utils.generation.texts import (
    check_files,
    check_output_file,
    is_finished,
    read_in_parts,
    read_one,
    write_summaries,
)
from utils.launch.locks import lock_output_file
from utils.launch.processes import start_evaluation
from utils.launch.script import run_script


def main(config: SummaryConfig):
    check_files(config)
    accelerator = start_evaluation()
    config = choose_dtype(accelerator, config)
    if config.output_file is None:
        summarize_one(accelerator, config)
    else:
        with lock_output_file(accelerator, Path(config.output_file), lambda: check_output_file(config)):
            if not is_finished(accelerator, config):
                summarize_file(accelerator, config)
    accelerator.wait_for_everyone()  # the launcher ends all when one process fails on its way out


def summarize_one(accelerator: Accelerator, config: SummaryConfig):
    dialogue = read_one(accelerator, config)
    summarize, _ = load_summarizer(accelerator, config)
    summary = summarize([dialogue])[dialogue]
    if accelerator.is_main_process:
        sys.stdout.write(f"{summary.text}\n")


def summarize_file(accelerator: Accelerator, config: SummaryConfig):
    summarize, model_hash = load_summarizer(accelerator, config)
    summaries: dict[bytes, Summary] = {}  # by the SHA-256 of the dialogue
    for dialogues in read_in_parts(config):
        new = {key: dialogue for key, dialogue in dialogues.items() if key not in summaries}
        if new:
            found = summarize(list(new.values()))
            summaries |= {key: found[dialogue] for key, dialogue in new.items()}
    if accelerator.is_main_process:
        write_summaries(config, summaries, model_hash)
        remove_batches(config.partial_texts)


if __name__ == "__main__":
    run_script(main, SummaryConfig, "summarize.yaml")
