"""The small world of the demo: who asks whom for which thing, as a dialogue and as a summary.

One person asks the other to lend, sell, repair or take back something. The other refuses and says why, or agrees, and
then they settle when and where to meet. A word of the wrong kind often stands nearby: a thing that is not wanted, a
day or a place that is turned down, a day on which a refused thing was asked for. So no summary follows from spotting
words.
"""

import random

SPEAKERS = ("#Person1#", "#Person2#")
ITEMS = (
    "ladder drill tent bicycle camera guitar radio lamp suitcase projector heater printer "
    "kettle blender mower scanner toaster piano clock scooter violin telescope typewriter tractor"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
HOURS = "two three four five seven eight nine ten".split()
TIMES = [*DAYS, *(f"{hour} o'clock" for hour in HOURS)]
PLACES = (
    "library station park cafe office market museum school bakery garage church harbor theater hospital bank pool"
).split()

SMALL_TALK = (
    ("Hello, how are you?", "Fine, thanks."),
    ("Good morning.", "Good morning."),
    ("It is nice to see you.", "It is nice to see you too."),
    ("How was your weekend?", "It was great."),
    ("You look tired.", "Yes, I slept badly."),
    ("What a lovely day!", "Yes, it is."),
)
# What the asking person says; {item} is wanted, {other} is not.
REQUESTS = {
    "borrow": (
        "Could I borrow your {item}?",
        "I need a {item}. May I borrow yours?",
        "I have a {other}, but no {item}. Could I borrow yours?",
        "May I borrow your {other}? Sorry, I mean your {item}.",
    ),
    "buy": (
        "I would like to buy your {item}.",
        "Are you selling your {item}? I want to buy it.",
        "You are selling a {other} and a {item}. I would like to buy the {item}.",
        "I want to buy your {other}. Sorry, I mean your {item}.",
    ),
    "repair": (
        "Could you repair my {item}?",
        "My {item} is broken. Could you repair it?",
        "My {other} is fine, but my {item} is broken. Could you repair it?",
        "Could you repair my {other}? Sorry, I mean my {item}.",
    ),
    "return": (
        "I would like to bring back your {item}.",
        "I still have your {item}. May I bring it back?",
        "You have got your {other}, but I still have your {item}. May I bring it back?",
        "I want to bring back your {other}. Sorry, I mean your {item}.",
    ),
}
# What the other person says when refusing, and how a summary puts it.
REFUSALS = {
    "borrow": (
        ("I need it myself.", "needs it"),
        ("My brother has it.", "has given it to a brother"),
        ("I never lend it.", "never lends it"),
    ),
    "buy": (
        ("I have sold it already.", "has sold it already"),
        ("I want to keep it.", "wants to keep it"),
        ("My sister will get it.", "has promised it to a sister"),
    ),
    "repair": (
        ("I am too busy this week.", "is too busy"),
        ("I have no tools here.", "has no tools"),
        ("I don't know how to do it.", "does not know how"),
    ),
    "return": (
        ("I have bought a new one.", "has bought a new one"),
        ("I have no room for it.", "has no room for it"),
        ("It was a gift for you.", "meant it as a gift"),
    ),
}
# Three ways to write each summary: {a} asks, {b} answers.
WISHES = {
    "borrow": (
        "{a} wants to borrow {b}'s {item}",
        "{a} asks {b} to lend the {item}",
        "{b} {will} lend {a} the {item}",
    ),
    "buy": ("{a} wants to buy {b}'s {item}", "{a} asks {b} to sell the {item}", "{b} {will} sell {a} the {item}"),
    "repair": (
        "{a} wants {b} to repair the {item}",
        "{a} asks {b} to repair the {item}",
        "{b} {will} repair {a}'s {item}",
    ),
    "return": (
        "{a} wants to return {b}'s {item}",
        "{a} asks {b} to take back the {item}",
        "{b} {will} get the {item} back from {a}",
    ),
}
AGREED = (
    "{wish}. {b} agrees, and they will meet {when} at the {place}.",
    "{wish}. They will meet at the {place} {when}.",
    "{wish}. They will meet {when} at the {place}.",
)
REFUSED = (
    "{wish}, but {b} {reason}.",
    "{wish}. {b} refuses because {b} {reason}.",
    "{wish} because {b} {reason}.",
)
# Turns that settle a time, a place, or both; the asking person begins. {no_time} and {no_place} are turned down.
TIME_TALKS = (
    ("When can we meet?", "Please come {time}."),
    ("Can we meet {time}?", "Yes, that is fine."),
    ("Can we meet {no_time}?", "No, I am busy then. Please come {time}."),
    ("When can we meet?", "Are you free {no_time}?", "No, but I am free {time}.", "Fine."),
)
PLACE_TALKS = (
    ("Where can we meet?", "At the {place}."),
    ("Shall we meet at the {place}?", "Yes, I will be there."),
    ("Shall we meet at the {no_place}?", "No, it is too far. The {place} is better."),
    ("Where can we meet?", "Is the {no_place} fine?", "No, I would rather go to the {place}.", "Good."),
)
JOINT_TALKS = (
    ("When and where can we meet?", "Please come to the {place} {time}."),
    ("Can we meet at the {place} {no_time}?", "The {place} is fine, but please come {time}."),
    ("Can we meet at the {no_place} {time}?", "The {no_place} is closed then. Please come to the {place}."),
)


def when(time: str) -> str:
    """Return the time with its preposition."""
    return f"on {time}" if time in DAYS else f"at {time}"


def sample_story(rng: random.Random, **fixed: str) -> dict:
    """Draw what happens: scenario, who asks, thing, and either a reason to refuse or a time and a place."""
    story = {
        "scenario": rng.choice(list(REQUESTS)),
        "a": rng.choice(SPEAKERS),
        "item": rng.choice(ITEMS),
        "time": rng.choice(TIMES),
        "place": rng.choice(PLACES),
        "agrees": rng.random() < 0.75,
        **fixed,
    }
    story["b"] = SPEAKERS[story["a"] == SPEAKERS[0]]
    story["other"] = rng.choice([item for item in ITEMS if item != story["item"]])
    story["no_time"] = rng.choice([time for time in TIMES if time != story["time"]])
    story["no_place"] = rng.choice([place for place in PLACES if place != story["place"]])
    story["excuse"], story["reason"] = rng.choice(REFUSALS[story["scenario"]])
    return story


def write_dialogue(story: dict, rng: random.Random) -> str:
    """Return the dialogue of a story, one turn a line; #Person1# always speaks first."""
    words = {**story, "time": when(story["time"]), "no_time": when(story["no_time"])}
    request = rng.choice(REQUESTS[story["scenario"]])
    if not story["agrees"] and rng.random() < 0.3:
        request += " I could come {no_time}."
    greeting, answer = rng.choice(SMALL_TALK)
    if story["a"] == SPEAKERS[1]:
        lines = [greeting, f"{answer} {request}"]
    else:
        lines = rng.choice(([request], [greeting, answer, request]))

    if story["agrees"]:
        lines.append(rng.choice(("Sure.", "Of course.", "Yes, gladly.", "No problem.")))
        talks = [rng.choice(TIME_TALKS), rng.choice(PLACE_TALKS)]
        rng.shuffle(talks)
        talks = talks if rng.random() < 0.7 else [rng.choice(JOINT_TALKS)]
        lines += [line for talk in talks for line in talk]
        lines.append(rng.choice(("Thank you.", "Great, see you then.", "Good, until then.")))
    else:
        no = rng.choice(("Sorry, no.", "I am afraid not.", "Sorry, I can't help you."))
        lines += [f"{no} {{excuse}}", rng.choice(("What a pity.", "I see. Thank you anyway.", "Never mind."))]
    return "\n".join(f"{SPEAKERS[turn % 2]}: {line.format(**words)}" for turn, line in enumerate(lines))


def write_summary(story: dict, style: int) -> str:
    """Return the summary of a story in one of the three styles."""
    words = {**story, "when": when(story["time"]), "will": "will" if story["agrees"] else "will not"}
    wish = WISHES[story["scenario"]][style].format(**words)
    outcomes = AGREED if story["agrees"] else REFUSED
    return outcomes[style].format(wish=wish, **words)


def facts_of(story: dict) -> dict[str, str]:
    """Return the facts that a right summary of this story holds; who is the one who asks."""
    kinds = {"who": "a", "item": "item"} | ({"time": "time", "place": "place"} if story["agrees"] else {})
    return {kind: story[key] for kind, key in kinds.items()}
