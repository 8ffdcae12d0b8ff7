"""Families of prompts about general knowledge and about short texts: tasks `factual` and `reading`."""

import random
from typing import Final, NamedTuple

from deploy.triton.workload.calculation import DAYS, NAMES
from deploy.triton.workload.case import Case, Family, other


class Country(NamedTuple):
    """Facts about a country that do not change often."""

    name: str
    capital: str
    continent: str
    currency: str
    language: str


COUNTRIES: Final = tuple(
    Country(*line.split("; "))
    for line in (
        "Japan; Tokyo; Asia; yen; Japanese", "Kenya; Nairobi; Africa; Kenyan shilling; Swahili",
        "Norway; Oslo; Europe; Norwegian krone; Norwegian", "Brazil; Brasília; South America; real; Portuguese",
        "Poland; Warsaw; Europe; zloty; Polish", "Hungary; Budapest; Europe; forint; Hungarian",
        "Thailand; Bangkok; Asia; baht; Thai", "Vietnam; Hanoi; Asia; dong; Vietnamese",
        "Sweden; Stockholm; Europe; Swedish krona; Swedish", "Denmark; Copenhagen; Europe; Danish krone; Danish",
        "Iceland; Reykjavik; Europe; Icelandic króna; Icelandic",
        "Mexico; Mexico City; North America; Mexican peso; Spanish",
        "Peru; Lima; South America; sol; Spanish", "Chile; Santiago; South America; Chilean peso; Spanish",
        "Colombia; Bogotá; South America; Colombian peso; Spanish", "Egypt; Cairo; Africa; Egyptian pound; Arabic",
        "Morocco; Rabat; Africa; dirham; Arabic", "Ethiopia; Addis Ababa; Africa; birr; Amharic",
        "Ghana; Accra; Africa; cedi; English", "Turkey; Ankara; Asia; Turkish lira; Turkish",
        "Mongolia; Ulaanbaatar; Asia; tugrik; Mongolian", "South Korea; Seoul; Asia; won; Korean",
        "Indonesia; Jakarta; Asia; rupiah; Indonesian", "Georgia; Tbilisi; Asia; lari; Georgian",
        "Romania; Bucharest; Europe; leu; Romanian", "Serbia; Belgrade; Europe; dinar; Serbian",
        "Albania; Tirana; Europe; lek; Albanian", "Ukraine; Kyiv; Europe; hryvnia; Ukrainian",
        "Portugal; Lisbon; Europe; euro; Portuguese", "Greece; Athens; Europe; euro; Greek",
        "Finland; Helsinki; Europe; euro; Finnish", "Cuba; Havana; North America; Cuban peso; Spanish",
        "Nepal; Kathmandu; Asia; Nepalese rupee; Nepali", "Bangladesh; Dhaka; Asia; taka; Bengali",
        "Uruguay; Montevideo; South America; Uruguayan peso; Spanish", "Senegal; Dakar; Africa; CFA franc; French",
    )
)  # fmt: skip

ELEMENTS: Final = (
    ("hydrogen", "H", 1), ("helium", "He", 2), ("lithium", "Li", 3), ("carbon", "C", 6), ("nitrogen", "N", 7),
    ("oxygen", "O", 8), ("neon", "Ne", 10), ("sodium", "Na", 11), ("magnesium", "Mg", 12), ("aluminium", "Al", 13),
    ("silicon", "Si", 14), ("sulphur", "S", 16), ("chlorine", "Cl", 17), ("potassium", "K", 19), ("calcium", "Ca", 20),
    ("iron", "Fe", 26), ("nickel", "Ni", 28), ("copper", "Cu", 29), ("zinc", "Zn", 30), ("silver", "Ag", 47),
    ("tin", "Sn", 50), ("iodine", "I", 53), ("tungsten", "W", 74), ("gold", "Au", 79), ("mercury", "Hg", 80),
    ("lead", "Pb", 82),
)  # fmt: skip

ABOUT_COUNTRIES: Final = (
    "Like every country, it has several large towns besides, which visitors sometimes take for the seat of government.",
    "Atlases and encyclopaedias agree on this, and it has not changed for a long time.",
    "If you travel there, it is worth reading about the history of the place before you go.",
    "The climate, the landscape and the food differ a good deal from one part of the country to the next.",
    "Neighbouring countries share some of this heritage, but each of them has its own traditions.",
)
ABOUT_ELEMENTS: Final = (
    "The periodic table orders the elements by the number of protons in the nucleus of their atoms.",
    "Symbols have one or two letters, and some of them come from the Latin name rather than the English one.",
    "Its properties follow from the arrangement of the electrons around the nucleus.",
    "Chemists all over the world use the same symbols and numbers, whatever language they speak.",
    "It occurs in nature in compounds as well, and it has many uses in industry and in daily life.",
)


def country(chance: random.Random) -> Case:
    """A fact about a country."""
    one = chance.choice(COUNTRIES)
    what = chance.choice(("capital", "currency", "continent", "language"))
    question, stated = {
        "capital": (f"What is the capital of {one.name}?", f"The capital of {one.name} is {{a}}."),
        "currency": (f"Which currency is used in {one.name}?", f"The currency of {one.name} is the {{a}}."),
        "continent": (
            f"On which continent is {one.capital}, the capital of {one.name}?",
            f"{one.capital} is in {{a}}.",
        ),
        "language": (f"What is an official language of {one.name}?", f"An official language of {one.name} is {{a}}."),
    }[what]
    facts = [
        f"Its capital is {one.capital}.", f"People there pay with the {one.currency}.",
        f"It belongs to {one.continent}.", f"Many of its people speak {one.language}.",
    ]  # fmt: skip
    del facts[("capital", "currency", "continent", "language").index(what)]
    right = str(getattr(one, what))
    return Case(
        prompt=question,
        right=right,
        wrong=other(chance, [str(getattr(another, what)) for another in COUNTRIES], right),
        full=f"{stated} {' '.join(facts)} Questions about {one.name} often ask for its {what}, and this is the answer "
        f"that "
        f"reference works give.",
        more=ABOUT_COUNTRIES,
        steps=f"The question is about {one.name}, and it asks for the {what}.",
        brief=stated,
        shortest="{a}.",
    )


def element(chance: random.Random) -> Case:
    """Symbol or atomic number of an element, in both directions."""
    name, symbol, number = chance.choice(ELEMENTS)
    by_symbol, by_number = f"it has the symbol {symbol}", f"each of its atoms has {number} protons"
    question, right, stated, fact = chance.choice(
        (
            (f"What is the chemical symbol for {name}?", symbol, f"The symbol for {name} is {{a}}.", by_number),
            (f"What is the atomic number of {name}?", str(number), f"The atomic number of {name} is {{a}}.", by_symbol),
            (f"Which chemical element has the symbol {symbol}?", name, f"{symbol} stands for {{a}}.", by_number),
            (f"Which chemical element has the atomic number {number}?", name, f"Number {number} is {{a}}.", by_symbol),
        )
    )
    place = 1 if right == symbol else 2 if right == str(number) else 0
    return Case(
        prompt=question,
        right=right,
        wrong=str(other(chance, [one[place] for one in ELEMENTS], (name, symbol, number)[place])),
        full=f"{stated} In the periodic table every element has its own place, with a symbol and a number. About this "
        f"one "
        f"we also know that {fact}, and the table shows which other elements behave in a similar way.",
        more=ABOUT_ELEMENTS,
        steps=f"In the periodic table {fact}.",
        brief=stated,
        shortest="{a}.",
    )


CAREFUL: Final = (
    "The text says so directly, and nothing else in it speaks against this.",
    "The other details that the text mentions do not matter for this question.",
    "One has to read the passage to the end, because the decisive words come late.",
    "Since the question asks only about the text, nothing beyond it has to be known.",
    "The remaining sentences of the passage give some background, but they do not change the answer.",
)


def opening_hours(chance: random.Random) -> Case:
    """A rule with an exception."""
    what = chance.choice(("museum", "library", "swimming pool", "town hall", "gallery", "market", "archive"))
    usual, late = chance.randint(4, 7), chance.randint(8, 11)
    exception, closed = chance.sample(DAYS, 2)
    asked = chance.choice((exception, other(chance, DAYS, exception, closed)))
    right, wrong = (late, usual) if asked == exception else (usual, late)
    return Case(
        prompt=f'Read: "The {what} opens at ten and closes at {usual}, except on {exception}s, when it stays open '
        f"until "
        f'{late}. It is closed on {closed}s." When does it close on {asked}s?',
        right=f"{right}",
        wrong=f"{wrong}",
        full=f"According to the text, the {what} normally closes at {usual}, and {exception}s are an exception, "
        f"because it "
        f"then stays open until {late}. The question is about {asked}s. So on {asked}s the {what} closes at {{a}}. On "
        f"{closed}s it does not open at all.",
        more=CAREFUL,
        steps=f"Usually {usual}; {exception}s {late}. {asked}s: {{a}}.",
        brief=f"On {asked}s the {what} closes at {{a}}.",
        shortest="At {a}.",
    )


def vote(chance: random.Random) -> Case:
    """A number that follows from others."""
    yes, no, absent = (chance.randint(3, 30) for _ in range(3))
    club, plan = chance.choice(("choir", "council", "club", "board", "union")), chance.choice(
        ("the new statutes", "a trip to the coast", "higher fees", "the proposal", "a new logo")
    )  # fmt: skip
    return Case(
        prompt=f'Read: "Of the {yes + no + absent} members of the {club}, {yes} voted for {plan}, {no} against it, '
        f"and the "
        f'others did not vote." How many did not vote?',
        right=str(absent),
        wrong=str(yes + no) if yes + no != absent else str(absent + yes),
        full=f"The text says that the {club} has {yes + no + absent} members. {yes} of them voted for {plan} and {no} "
        f"against it, so {yes + no} members voted. All the others did not vote: {yes + no + absent} minus {yes + no} "
        f"is {{a}} members.",
        more=CAREFUL,
        steps=f"Voted: {yes} + {no} = {yes + no}. {yes + no + absent} − {yes + no}: {{a}}.",
        brief="{a} members did not vote.",
        shortest="{a}.",
    )


def borrowed(chance: random.Random) -> Case:
    """Who has what in the end."""
    first, second, third = chance.sample(NAMES, 3)
    thing = chance.choice(("bicycle", "coat", "camera", "tent", "guitar", "ladder", "umbrella", "drill"))
    place = chance.choice(("at the lake", "in the park", "at the station", "after the concert", "on the ferry"))
    asked = chance.choice(("owner", "last"))
    question, right, wrong = (
        (f"Whose {thing} was it?", first, second) if asked == "owner" else (f"Who had the {thing} last?", third, second)
    )
    return Case(
        prompt=f'Read: "{second} met {third} {place}. {second} had borrowed a {thing} from {first} the day before and '
        f"now "
        f'lent it to {third}, who needed it more." {question}',
        right=right,
        wrong=wrong,
        full=f"The {thing} passes through several hands in this text. It first belonged to {first}. {second} had "
        f"borrowed it "
        f"the day before the meeting. When {second} and {third} met {place}, {second} lent it on to {third}. The "
        f"answer "
        f"to the question is therefore {{a}}.",
        more=CAREFUL,
        steps=f"{first} lent it to {second}, {second} to {third}. Answer: {{a}}.",
        brief="The text says that it was {a}.",
        shortest="{a}.",
    )


def rebuilt(chance: random.Random) -> Case:
    """A year that follows from another."""
    what = chance.choice(("bridge", "church tower", "theatre", "mill", "harbour wall", "school", "lighthouse"))
    built, lost = chance.randint(1720, 1890), chance.randint(1895, 1950)
    later, harm = chance.randint(2, 19), chance.choice(("a flood", "a fire", "a storm", "an earthquake"))
    return Case(
        prompt=f'Read: "The {what} was built in {built}, destroyed by {harm} in {lost} and rebuilt {later} years '
        f"later, "
        f'larger than before." In which year was it rebuilt?',
        right=str(lost + later),
        wrong=str(lost),
        full=f"The text gives the year in which the {what} was destroyed by {harm}, {lost}, and says that it was "
        f"rebuilt "
        f"{later} years later. Adding {later} years to {lost} gives {{a}}. So the {what}, first built in {built}, was "
        f"rebuilt in {{a}}.",
        more=CAREFUL,
        steps=f"Destroyed {lost}, plus {later} years: {{a}}.",
        brief=f"The {what} was rebuilt in {{a}}.",
        shortest="{a}.",
    )


FACTUAL: tuple[Family, ...] = (country, element)
READING: tuple[Family, ...] = (opening_hours, vote, borrowed, rebuilt)
