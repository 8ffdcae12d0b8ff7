"""Text for answers that are not recorded: plausible in length and shape, and it says what it is."""

import random
import re
from hashlib import blake2b

from deploy.triton.stand_in.workload import CHARACTERS_PER_TOKEN

ADMISSION = "This answer was made up by a stand-in model, which has no recorded text for this prompt."
SHORT_ADMISSION = "Made up by a stand-in model."
ADMISSION_FROM_TOKENS = 40
SHORT_ADMISSION_FROM_TOKENS = 12

_OPENINGS = (
    "In short,", "To begin with,", "As a rule,", "In practice,", "For example,", "By contrast,", "Besides,",
    "Above all,", "In most cases,", "On the other hand,", "As a result,", "In addition,", "More precisely,",
)  # fmt: skip
_SUBJECTS = (
    "the main point", "the usual approach", "a common mistake", "the first step", "the underlying idea",
    "the simplest case", "a good example", "the important difference", "the overall effect", "the next part",
    "a careful reading", "the short version", "the question itself",
)  # fmt: skip
_VERBS = (
    "depends on", "follows from", "is explained by", "has much to do with", "goes back to", "is limited by",
    "can be seen in", "is easier to grasp with", "leads to", "is usually compared with",
)  # fmt: skip
_OBJECTS = (
    "the context", "the details that are given", "a few simple assumptions", "what is already known",
    "how the parts fit together", "the time that is available", "the purpose behind it", "the conditions at the start",
    "a closer look at the facts", "several smaller causes", "the order of the steps", "what one wants to achieve",
)  # fmt: skip
_WORD = re.compile(r"[A-Za-z]{5,}")


def made_up_text(prompt: str, *, tokens: int, key: str) -> str:
    """A text of about `tokens` tokens; the same arguments always give the same text.

    Args:
        prompt: some of its words are taken up.
        key: what else the text shall depend on, such as the model and the level.
    """
    seed = int.from_bytes(blake2b(f"{key}\x1f{prompt}".encode(), digest_size=8).digest(), "big")
    chance = random.Random(seed)
    topics = _WORD.findall(prompt[:2_000]) or ["this"]
    length = max(2, round(tokens * CHARACTERS_PER_TOKEN))
    sentences: list[str] = []
    if tokens >= ADMISSION_FROM_TOKENS:
        sentences.append(ADMISSION)
    elif tokens >= SHORT_ADMISSION_FROM_TOKENS:
        sentences.append(SHORT_ADMISSION)
    written = sum(len(sentence) + 1 for sentence in sentences)
    while written < length:
        topic = chance.choice(topics).lower()
        middle = f"{chance.choice(_SUBJECTS)} of {topic} {chance.choice(_VERBS)} {chance.choice(_OBJECTS)}"
        sentence = f"{chance.choice(_OPENINGS)} {middle}." if tokens > 8 else f"{topic.capitalize()}, as it seems."
        sentences.append(sentence)
        written += len(sentence) + 1
    text = " ".join(sentences)
    cut = text.rfind(" ", 0, length + 1)
    return (text[:length] if cut <= 0 else text[:cut]).rstrip(" ,.") + "."
