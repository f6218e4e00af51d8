"""What the tiny model is pretrained on: questions about dialogues, and prompts that want the first line.

The answers are single sentences, some of them word for word a part of a summary. No whole summary of a dialogue is
among them, nor is the prompt that asks for one: that is left to fine-tuning.
"""

import random

from demo.world import sample_story, when, write_dialogue

FIRST_LINE_SHARE = 0.2
# Words of prompts that are answered with the dialogue's first line.
VERBS = "Describe Shorten Report Explain Review Repeat Discuss Outline Condense Read".split()
NOUNS = "Description Report Explanation Review Outline Notes Text Result Answer Line".split()

# Each question and how often it is asked; who asks and for which thing is the hardest to learn.
QUESTIONS = {
    "Who asks whom?": 3,
    "Who wants what?": 4,
    "Who will do what?": 3,
    "What is it about?": 2,
    "What is the reply?": 2,
    "When will they meet?": 2,
    "Where will they meet?": 2,
    "When and where will they meet?": 2,
}
# What {a} wants to do and what {b} will do, for each scenario.
DEEDS = {
    "borrow": ("borrow", "lend the {item}"),
    "buy": ("buy", "sell the {item}"),
    "repair": ("repair", "repair the {item}"),
    "return": ("return", "get the {item} back"),
}


def answer_question(question: str, story: dict) -> str:
    """Return the answer to one of QUESTIONS."""
    wanted, deed = DEEDS[story["scenario"]]
    answers = {
        "Who asks whom?": "{a} asks {b}.",
        "Who wants what?": f"{{a}} wants to {wanted} the {{item}}.",
        "Who will do what?": f"{{b}} {'will' if story['agrees'] else 'will not'} {deed}.",
        "What is it about?": "the {item}",
        "What is the reply?": "{b} agrees." if story["agrees"] else "{b} refuses because {b} {reason}.",
    }
    if story["agrees"]:
        answers |= {
            "When will they meet?": "They will meet {when}.",
            "Where will they meet?": "They will meet at the {place}.",
            "When and where will they meet?": "They will meet {when} at the {place}.",
        }
    return answers.get(question, "They will not meet.").format(**story, when=when(story["time"]))


def ask(question: str, dialogue: str) -> str:
    """Return the prompt for a question about a dialogue."""
    return f"Answer the question about the following conversation.\n{dialogue}\nQuestion: {question} Answer:"


def sample_example(rng: random.Random, unseen: set[str]) -> tuple[str, str]:
    """Draw a prompt and its answer, about a dialogue that is not in unseen."""
    story = sample_story(rng)
    dialogue = write_dialogue(story, rng)
    if dialogue in unseen:
        return sample_example(rng, unseen)
    if rng.random() < FIRST_LINE_SHARE:
        prompt = f"{rng.choice(VERBS)} the following conversation.\n{dialogue}\n{rng.choice(NOUNS)}:"
        return prompt, dialogue.splitlines()[0]
    question = rng.choices(list(QUESTIONS), list(QUESTIONS.values()))[0]
    return ask(question, dialogue), answer_question(question, story)
