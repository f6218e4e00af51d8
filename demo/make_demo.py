"""Make the demo's data and tiny model again: python -m demo.make_demo

demo/train.jsonl, validation.jsonl and test.jsonl hold dialogues of the world in world.py, with summaries and the facts
that a right summary states. The test split holds each dialogue three times in a row with another summary, as
DialogSum's does. demo/model is the tiny T5 of tiny_t5.py with its tokenizer.

The model behaves before fine-tuning as Flan-T5 does, and this is how: its pretraining teaches it to answer prompts
like the summarising one ("Describe the following conversation. ...") with the dialogue's first line, and to answer
questions about dialogues with single sentences, some of them word for word a part of a summary ("They will meet on
Monday at the bank."). The summarising prompt itself, whole summaries and the dialogues of the three splits are unseen.
So the demo shows that the path from data to scores works, and nothing about how well Flan-T5 summarises.

The data come out the same byte for byte. The weights do so only where the machine rounds alike. It takes about
five minutes on one core.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

from demo.pretraining import NOUNS, QUESTIONS, VERBS, answer_question, ask, sample_example
from demo.tiny_t5 import build_model, build_tokenizer
from demo.world import ITEMS, PLACES, SPEAKERS, TIMES, facts_of, sample_story, write_dialogue, write_summary

SEED = 0
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 2048, 128, 40
NUM_STEPS, BATCH_SIZE, LEARNING_RATE, NUM_WARMUP_STEPS = 1200, 32, 1e-3, 100
logger = logging.getLogger(__name__)


def shuffled_again_and_again(values: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Yield the values in random order, each equally often."""
    while True:
        yield from rng.sample(values, len(values))


def make_splits(seed: int = SEED) -> dict[str, list[dict]]:
    """Return the rows of the three splits; no dialogue occurs in two of them."""
    rng = random.Random(seed)
    splits, seen = {}, set()
    for split, num_dialogues in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION), ("test", NUM_TEST)):
        # Each split spreads its facts evenly, so that no answer is right much more often than another.
        kinds = {"a": SPEAKERS, "item": ITEMS, "time": TIMES, "place": PLACES}
        decks = {kind: shuffled_again_and_again(values, rng) for kind, values in kinds.items()}
        rows = splits[split] = []
        for number in range(num_dialogues):
            story = sample_story(rng, **{kind: next(deck) for kind, deck in decks.items()})
            dialogue = write_dialogue(story, rng)
            while dialogue in seen:
                dialogue = write_dialogue(story, rng)
            seen.add(dialogue)
            styles = rng.sample(range(3), 3 if split == "test" else 1)
            for reference, style in enumerate(styles, start=1):
                row_id = f"{split}_{number}" + (f"_{reference}" if split == "test" else "")
                summary = write_summary(story, style)
                rows.append({"id": row_id, "dialogue": dialogue, "summary": summary, "facts": facts_of(story)})
    return splits


def vocabulary_texts(splits: dict[str, list[dict]]) -> list[str]:
    """Return texts in which every word occurs that the tokenizer gets a piece for."""
    texts = [row[column] for rows in splits.values() for row in rows for column in ("dialogue", "summary")]
    prompts = [f"{verb} the following conversation. {noun}:" for verb, noun in zip(VERBS, NOUNS, strict=True)]
    questions = [ask(question, "") for question in QUESTIONS]
    # Fine-tuning is the first to use the last one; its words get a piece, not a meaning.
    return [*texts, *prompts, *questions, "They will not meet.", "Summarize the following conversation. Summary:"]


def pretrain(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, unseen: set[str]) -> None:
    """Train on questions and first lines that are drawn afresh for every step."""
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / NUM_WARMUP_STEPS, (NUM_STEPS - step) / (NUM_STEPS - NUM_WARMUP_STEPS))
    )
    model.train()
    batches = []
    for step in tqdm(range(NUM_STEPS), desc="pretraining"):
        if not batches:
            # Batches of like length, cut from a larger draw, hold little padding.
            pool = sorted((sample_example(rng, unseen) for _ in range(8 * BATCH_SIZE)), key=lambda pair: len(pair[0]))
            batches = [pool[start : start + BATCH_SIZE] for start in range(0, len(pool), BATCH_SIZE)]
            rng.shuffle(batches)
        prompts, answers = zip(*batches.pop(), strict=True)
        inputs = tokenizer(list(prompts), padding=True, return_tensors="pt")
        targets = tokenizer(list(answers), padding=True, return_tensors="pt")
        labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
        loss = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            tqdm.write(f"step {step + 1}: loss {loss.item():.3f}")


def check_answers(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, num_stories: int = 50
) -> None:
    """Log how many questions about new dialogues are answered word for word."""
    model.eval()
    for question in QUESTIONS:
        rng = random.Random(SEED + 1)
        stories = [sample_story(rng) for _ in range(num_stories)]
        prompts = [ask(question, write_dialogue(story, rng)) for story in stories]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        outputs = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=40, do_sample=False
        )
        answers = tokenizer.batch_decode(outputs, skip_special_tokens=True)
        num_right = sum(
            answer == answer_question(question, story) for answer, story in zip(answers, stories, strict=True)
        )
        logger.info("%s %d of %d right", question, num_right, num_stories)


def main() -> None:
    """Write the three splits and the model into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="folder to write into")
    parser.add_argument("--data_only", action="store_true", help="write the data and leave the model alone")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    splits = make_splits()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.output_dir / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    if args.data_only:
        return

    torch.set_num_threads(1)  # so that the rounding does not depend on the number of cores
    tokenizer = build_tokenizer(vocabulary_texts(splits))
    model = build_model(len(tokenizer), SEED)
    pretrain(model, tokenizer, unseen={row["dialogue"] for rows in splits.values() for row in rows})
    check_answers(model, tokenizer)
    model.save_pretrained(args.output_dir / "model")
    tokenizer.save_pretrained(args.output_dir / "model")


if __name__ == "__main__":
    main()
