"""Families of prompts whose right answer is computed: tasks `math` and `reasoning`."""

import random

from deploy.triton.workload.case import Case, Family, other

NAMES = (
    "Maria", "Tom", "Ann", "Jonas", "Lara", "Omar", "Ines", "Paul", "Mei", "David", "Sofia", "Karim", "Nora", "Felix",
    "Aisha", "Leo", "Eva", "Hugo", "Yuki", "Clara",
)  # fmt: skip
GOODS = (
    ("notebook", 2, 6), ("pen", 1, 3), ("lamp", 12, 40), ("mug", 4, 11), ("ticket", 8, 25), ("chair", 30, 80),
    ("book", 9, 28), ("plant", 5, 19), ("scarf", 10, 30), ("basket", 6, 18),
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

CHECKS = (
    "One can check this by working backwards from the result, which leads to the numbers in the question again.",
    "The order of the steps does not matter here, as long as none of them is left out.",
    "It helps to write down every intermediate result before going on to the next step.",
    "A rough estimate with rounded numbers gives a value of the same size, so the result is plausible.",
    "The units fit as well, since every step used the same ones.",
)


def purchase(chance: random.Random) -> Case:
    """The sum of two kinds of goods."""
    who = chance.choice(NAMES)
    first, low, high = chance.choice(GOODS)
    second, low_2, high_2 = other(chance, GOODS, (first, low, high))
    n, m, p, q = chance.randint(2, 9), chance.randint(2, 9), chance.randint(low, high), chance.randint(low_2, high_2)
    total = n * p + m * q
    return Case(
        prompt=f"{who} buys {n} {first}s at {p} euros each and {m} {second}s at {q} euros each. How much does it cost?",
        right=str(total),
        wrong=str(total + chance.choice((-p, p, q, 10))),
        full=f"Let us add up the two parts. The {first}s cost {n} times {p} euros, which is {n * p} euros. The "
        f"{second}s cost {m} times {q} euros, which is {m * q} euros. Together that makes {n * p} plus {m * q}, so "
        f"{who} pays {{a}} euros in all.",
        more=CHECKS,
        steps=f"{first.capitalize()}s: {n} × {p} = {n * p}. {second.capitalize()}s: {m} × {q} = {m * q}. Sum: {{a}} "
        f"euros.",
        brief=f"{n} {first}s and {m} {second}s cost {{a}} euros together.",
        shortest="{a} euros.",
    )


def discount(chance: random.Random) -> Case:
    """A price reduced by a percentage."""
    what, price, percent = chance.choice(GOODS)[0], 20 * chance.randint(2, 20), 5 * chance.randint(1, 10)
    off = price * percent // 100
    return Case(
        prompt=f"A shop reduces a {what} from {price} euros by {percent} percent. What does it cost now?",
        right=str(price - off),
        wrong=str(price - percent if percent != off else price - off - 10),
        full=f"First we need the reduction. {percent} percent of {price} euros is {price} times {percent} divided by "
        f"100, which is {off} euros. The new price is the old one less the reduction, {price} minus {off}, so the "
        f"{what} now costs {{a}} euros.",
        more=CHECKS,
        steps=f"{percent} % of {price} = {off}. {price} − {off}: {{a}} euros.",
        brief=f"With {percent} percent off, the {what} costs {{a}} euros.",
        shortest="{a} euros.",
    )


def journey(chance: random.Random) -> Case:
    """Distance from speed and time."""
    who, speed, hours = chance.choice(NAMES), 10 * chance.randint(2, 12), chance.randint(2, 9)
    rest = chance.randint(1, 5) * 10
    return Case(
        prompt=f"{who} drives at {speed} km/h for {hours} hours, then another {rest} km. How many kilometres is that?",
        right=str(speed * hours + rest),
        wrong=str(speed * hours + chance.choice((0, -rest, 2 * rest))),
        full=f"The distance at constant speed is the speed times the time. At {speed} km/h, {hours} hours make {speed} "
        f"times {hours}, which is {speed * hours} kilometres. The other {rest} kilometres are added to that. "
        f"Altogether "
        f"{who} drives {{a}} kilometres.",
        more=CHECKS,
        steps=f"{speed} × {hours} = {speed * hours} km. Plus {rest}: {{a}} km.",
        brief=f"{who} drives {{a}} kilometres altogether.",
        shortest="{a} km.",
    )


def workers(chance: random.Random) -> Case:
    """Inverse proportion."""
    m = chance.randint(2, 12)
    n = other(chance, range(2, 13), m)
    days = n * chance.randint(1, 4)
    job = chance.choice(("paint a hall", "pick a field of apples", "lay a pavement", "sort an archive", "build a wall"))
    return Case(
        prompt=f"{m} workers need {days} days to {job}. How many days do {n} workers need at the same pace?",
        right=str(m * days // n),
        wrong=str(days + n - m) if days > m else str(days),
        full=f"The whole job takes {m} times {days}, that is {m * days} days of one worker. If {n} workers share these "
        f"{m * days} days of work, each of them works {m * days} divided by {n} days. So they need {{a}} days: the "
        f"number of days is inversely proportional to the number of workers.",
        more=CHECKS,
        steps=f"Work: {m} × {days} = {m * days} worker-days. Divided by {n}: {{a}} days.",
        brief=f"{n} workers need {{a}} days for the same work.",
        shortest="{a} days.",
    )


def rectangle(chance: random.Random) -> Case:
    """Perimeter from area and width."""
    width, length = chance.randint(3, 15), chance.randint(4, 24)
    what = chance.choice(("garden", "poster", "carpet", "field", "table", "window"))
    return Case(
        prompt=f"A rectangular {what} is {width} dm wide and has an area of {width * length} square decimetres. "
        "What is its perimeter in decimetres?",
        right=str(2 * (width + length)),
        wrong=str(width + length),
        full=f"The area is width times length, so the length is {width * length} divided by {width}, which is {length} "
        f"decimetres. The perimeter is twice the sum of width and length: {width} plus {length} is {width + length}, "
        f"and twice that is {{a}}. The perimeter is {{a}} decimetres.",
        more=CHECKS,
        steps=f"Length: {width * length} / {width} = {length}. Twice {width} + {length}: {{a}} dm.",
        brief=f"The {what} has a perimeter of {{a}} decimetres.",
        shortest="{a} dm.",
    )


def average(chance: random.Random) -> Case:
    """The missing value of a mean."""
    who, mean = chance.choice(NAMES), chance.randint(20, 80)
    known = [chance.randint(mean - 15, mean + 5) for _ in range(3)]
    last = 4 * mean - sum(known)
    return Case(
        prompt=f"In four rounds of a game {who} scores {mean} points on average. The first three rounds brought "
        f"{known[0]}, {known[1]} and {known[2]} points. How many points did the fourth bring?",
        right=str(last),
        wrong=str(mean if last != mean else mean + 4),
        full=f"An average of {mean} in four rounds means a total of four times {mean}, which is {4 * mean} points. The "
        f"first three rounds brought {known[0]} plus {known[1]} plus {known[2]}, which is {sum(known)} points. The "
        f"rest "
        f"came in the last round: {4 * mean} minus {sum(known)} is {{a}} points.",
        more=CHECKS,
        steps=f"Total: 4 × {mean} = {4 * mean}. First three: {sum(known)}. Difference: {{a}} points.",
        brief="The fourth round brought {a} points.",
        shortest="{a} points.",
    )


def tallest(chance: random.Random) -> Case:
    """The extreme of an order of four."""
    a, b, c, d = chance.sample(NAMES, 4)
    adjective, superlative = chance.choice(
        (("taller", "tallest"), ("older", "oldest"), ("faster", "fastest"), ("stronger", "strongest"))
    )
    facts = [f"{a} is {adjective} than {b}.", f"{b} is {adjective} than {c}.", f"{d} is {adjective} than {a}."]
    chance.shuffle(facts)
    return Case(
        prompt=f"{' '.join(facts)} Who is the {superlative} of the four?",
        right=d,
        wrong=a,
        full=f"Let us bring the four into an order. {a} is {adjective} than {b}, and {b} is {adjective} than {c}, so "
        f"{a} "
        f"comes before {b} and {b} before {c}. {d} is {adjective} than {a}, so {d} comes before all the others. The "
        f"{superlative} of the four is {{a}}, and {c} is at the other end.",
        more=REASONS,
        steps=f"{d} > {a}, {a} > {b}, {b} > {c}. First of all: {{a}}.",
        brief=f"The {superlative} is {{a}}, as the comparisons together show.",
        shortest="{a}.",
    )


def syllogism(chance: random.Random) -> Case:
    """A valid conclusion, or one that does not follow."""
    kind, group, trait = chance.choice(
        (("roses", "flowers", "fade quickly"), ("trams", "vehicles", "run at night"),
         ("owls", "birds", "hunt at night"), ("violins", "instruments", "are old"),
         ("cottages", "houses", "have a garden"), ("bakers", "craftsmen", "rise early"),
         ("novels", "books", "are translated"), ("kayaks", "boats", "are red"), ("lemons", "fruits", "are imported"))
    )  # fmt: skip
    where = chance.choice(("in the village", "on the island", "in the catalogue", "in the story", "in our town"))
    if chance.random() < 0.5:
        premise, right, wrong = f"All {group} {where} {trait}.", "Yes", "No"
        why = f"the {kind} are among the {group}, and every one of those is said to have the property"
    else:
        premise, right, wrong = f"Some {group} {where} {trait}.", "No", "Yes"
        why = f"the {group} with the property need not include any {kind}"
    return Case(
        prompt=f"All {kind} {where} are {group}. {premise} Does it follow that some of the {kind} {trait}?",
        right=right,
        wrong=wrong,
        full=f"{{a}}. To see this, look at what the two statements say about the {kind} {where}. The first one makes "
        f"them a part of the {group}. The second one is about the {group}. Now {why}. This settles whether the "
        f"conclusion has to be true whenever both statements are.",
        more=REASONS,
        steps=f"The {kind} are part of the {group}; {why}. So: {{a}}.",
        brief=f"{{a}}, because {why}.",
        shortest="{a}.",
    )


def weekday(chance: random.Random) -> Case:
    """The weekday after some days."""
    start, days = chance.randrange(7), chance.randint(9, 120)
    right = DAYS[(start + days) % 7]
    event = chance.choice(("exam", "holiday", "concert", "match", "deadline", "wedding", "launch"))
    return Case(
        prompt=f"Today is {DAYS[start]}, and the {event} is in {days} days. On which weekday is it?",
        right=right,
        wrong=DAYS[(start + days + chance.choice((-1, 1))) % 7],
        full=f"Weekdays repeat after seven days, so only the remainder counts. {days} divided by 7 is {days // 7} "
        f"with a "
        f"remainder of {days % 7}. The {days // 7} whole weeks lead to a {DAYS[start]} again, and from there we count "
        f"{days % 7} more. That leads to {{a}}, so the {event} is on a {{a}}.",
        more=REASONS,
        steps=f"{days} = {days // 7} × 7 + {days % 7}. {DAYS[start]} plus {days % 7}: {{a}}.",
        brief=f"The {event} is on a {{a}}, counting from {DAYS[start]}.",
        shortest="{a}.",
    )


def sequence(chance: random.Random) -> Case:
    """The next number of a sequence."""
    first, step, growth = chance.randint(1, 12), chance.randint(2, 9), chance.randint(1, 5)
    numbers = [first]
    for place in range(5):
        numbers.append(numbers[-1] + step + growth * place)
    shown, gaps = numbers[:5], [step + growth * place for place in range(5)]
    return Case(
        prompt=f"Which number continues the sequence {', '.join(map(str, shown))}?",
        right=str(numbers[5]),
        wrong=str(numbers[4] + gaps[3]),
        full=f"Look at the differences between neighbouring numbers: they are {', '.join(map(str, gaps[:4]))}. Each "
        f"difference is {growth} larger than the one before, so the next one is {gaps[4]}. Adding {gaps[4]} to the "
        f"last "
        f"number, {shown[4]}, gives {{a}}. The sequence therefore continues with {{a}}.",
        more=REASONS,
        steps=f"Differences: {', '.join(map(str, gaps[:4]))}, next {gaps[4]}. {shown[4]} + {gaps[4]}: {{a}}.",
        brief="It continues with {a}, because the differences grow evenly.",
        shortest="{a}.",
    )


def boxes(chance: random.Random) -> Case:
    """Where a thing is, when exactly one label is true."""
    colours = chance.sample(("red", "blue", "green", "yellow", "white", "black"), 3)
    thing = chance.choice(("coin", "key", "ring", "letter", "stamp"))
    return Case(
        prompt=f'A {thing} is in one of three boxes. The {colours[0]} box says: "It is here." The {colours[1]} box '
        f"says: "
        f'"It is not here." The {colours[2]} box says: "It is not in the {colours[0]} box." Only one label is true. '
        f"Where is the {thing}?",
        right=f"in the {colours[1]} box",
        wrong=f"in the {colours[0]} box",
        full=f"The labels of the {colours[0]} and the {colours[2]} box contradict each other, so exactly one of them "
        f"is "
        f"true. Since only one label is true in all, the label of the {colours[1]} box must be false. It says that the "
        f"{thing} is not there, so it is there. The {thing} is {{a}}.",
        more=REASONS,
        steps=f"{colours[0].capitalize()} and {colours[2]} contradict, so one is true; {colours[1]} is false. {{a}}.",
        brief="It is {a}, since only one label is true.",
        shortest="{a}.",
    )


REASONS = (
    "Puzzles of this kind become easy once the given statements are written down in order.",
    "No other answer agrees with everything that is said in the question.",
    "It is tempting to answer from the first statement alone, but all of them have to be used.",
    "One can test the result by assuming the opposite, which soon leads to a contradiction.",
    "Nothing beyond what the question says has to be known for this conclusion.",
    "If one of the statements were changed, the result could of course be a different one.",
)

MATH: tuple[Family, ...] = (purchase, discount, journey, workers, rectangle, average)
REASONING: tuple[Family, ...] = (tallest, syllogism, weekday, sequence, boxes)
