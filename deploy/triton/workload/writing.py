"""Families of prompts without a particular right answer: tasks `instruction` and `summary`."""

import random
from typing import Final

from deploy.triton.workload.calculation import DAYS, NAMES
from deploy.triton.workload.case import Case, Family

KIND: Final = (
    "It means a great deal to me, and I will not forget it.",
    "Please tell me whenever I can do something for you in return.",
    "I know that you had plans of your own, so I do not take this for granted.",
    "I look forward to seeing you soon and to telling you more about it.",
    "Until then I wish you all the best, and please give my regards to everybody.",
    "If anything is unclear, simply call me in the evening.",
)
SURE: Final = (
    "You can of course change any part of this so that it fits your own style.",
    "It is easy to remember and to spell, and it looks good on a sign.",
    "If you have more time or a larger budget, there is room for one or two additions.",
    "Other people whom you ask may have different tastes, so compare a few suggestions.",
    "Begin in good time, because most of the trouble comes from doing everything on the last day.",
)


def note(chance: random.Random) -> Case:
    """A short note of thanks."""
    to, sender = chance.sample(NAMES, 2)
    deed, short = chance.choice(
        (("covering my shift", "the shift"), ("watering my plants", "the plants"), ("lending me your car", "the car"),
         ("helping me move", "the move"), ("looking after my dog", "the dog"), ("the lovely dinner", "dinner"),
         ("proofreading my report", "the report"), ("repairing my bicycle", "the repair"))
    )  # fmt: skip
    day = chance.choice(DAYS)
    return Case(
        prompt=f"Write a short thank-you note from {sender} to {to} for {deed} on {day}.",
        full=f"Dear {to}, thank you so much for {deed} on {day}. It came at just the right moment, when I did not "
        f"know how "
        f"to manage everything at once. Because of you I could breathe again and look after the things that could not "
        f"wait. Warm regards, {sender}.",
        more=KIND,
        steps=f"Reason: {deed} on {day}. Dear {to}, thank you for {deed}; it helped me a lot. I owe you one. {sender}",
        brief=f"Dear {to}, thank you very much for {deed} on {day}. It helped me a lot. {sender}",
        shortest=f"Thanks for {short}, {to}! {sender}",
    )


def invitation(chance: random.Random) -> Case:
    """An invitation."""
    event = chance.choice(("birthday", "house-warming", "barbecue", "reading evening", "games night", "farewell party"))
    place, day = (
        chance.choice(("my garden", "the community hall", "our flat", "the lake", "the office")),
        chance.choice(DAYS),
    )
    hour = chance.randint(3, 8)
    return Case(
        prompt=f"Write an invitation to a {event} in {place} on {day} at {hour} o'clock.".replace(
            "in the lake", "at the lake"
        ),
        full=f"Dear friends, I would like to invite you to a {event}. It takes place on {day}, and we begin at {hour} "
        f"o'clock; the place is {place}. There will be something to eat and to drink, so all that you need to bring is "
        f"good humour. Please let me know by the day before whether you can come.",
        more=KIND,
        steps=f"What, when, where, reply: {event}, {day} at {hour}, {place}. You are all invited; please let me know.",
        brief=f"You are invited to my {event} on {day} at {hour} o'clock. The place is {place}. Please let me know.",
        shortest=f"{event.capitalize()}: {day}, {hour} o'clock, {place}.",
    )


def naming(chance: random.Random) -> Case:
    """A name for a business, with a reason."""
    size = chance.choice(("small", "family", "new", "mobile"))
    trade, name, first, second = chance.choice(
        (("bakery", "Morning Crust", "early hours", "good bread"), ("bookshop", "The Last Page", "stories", "quiet"),
         ("bicycle workshop", "Spoke and Chain", "wheels", "craft"), ("flower shop", "Green Hour", "plants", "calm"),
         ("coffee bar", "Second Cup", "coffee", "company"), ("toy shop", "Wooden Horse", "childhood", "play"),
         ("tailor's", "Fine Thread", "cloth", "care"), ("boat hire", "Slow Water", "the river", "leisure"))
    )  # fmt: skip
    town = chance.choice(("by the sea", "in the old town", "near the station", "in a village", "on the market square"))
    return Case(
        prompt=f"Suggest a name for a {size} {trade} {town} and explain it.",
        full=f"I suggest the name {name}. A {size} {trade} {town} lives from people who pass by and come back, so the "
        f"name has "
        f"to be short and friendly. {name} makes one think of {first} and of {second}, which is what customers look "
        f"for. "
        f"It promises something without sounding like advertising.",
        more=SURE,
        steps=f"Needs: short, friendly, about {first} and {second}. So: {name}.",
        brief=f"{name}: it makes one think of {first} and {second}, and it is short.",
        shortest=f"{name}.",
    )


def plan(chance: random.Random) -> Case:
    """A plan for an afternoon."""
    who = chance.choice(("two children", "my parents", "a colleague", "old friends", "a school class"))
    place = chance.choice(("a museum of technology", "the zoo", "a castle", "the harbour", "a botanical garden"))
    weather, meal = (
        chance.choice(("rain", "sun", "snow", "wind")),
        chance.choice(("cake", "soup", "ice cream", "pancakes")),
    )
    hours = chance.randint(2, 5)
    return Case(
        prompt=f"Plan {hours} hours with {who} at {place} in the {weather}, with {meal} at the end.",
        full=f"Meet at the entrance of {place} and buy the tickets in advance, so that nobody has to wait in the "
        f"{weather}. "
        f"Spend the first half of the {hours} hours on the two or three things that {who} like best, and leave out the "
        f"rest. Then sit down for a while, and use the last part for something that everybody can take part in. At the "
        f"end there is {meal} in a café nearby.",
        more=SURE,
        steps=f"{hours} h: tickets early, best things first, rest, something together; then {meal}. Dress for "
        f"{weather}.",
        brief=f"See the best parts of {place} first, take a break, do one thing together, and end with {meal}.",
        shortest=f"Best parts, break, {meal}.",
    )


BACKGROUND: Final = (
    "The text leaves open what will come of it in the longer run.",
    "It names the reasons of both sides without taking one of them.",
    "Altogether it describes a change that concerns many people in the place.",
    "The figures that it gives are meant to show how large the effect is.",
    "The author mentions these points in the order in which they happened.",
)


def council(chance: random.Random) -> Case:
    """A decision that divides a town."""
    day, months = chance.choice(DAYS), chance.randint(3, 18)
    what = chance.choice(
        ("close the main street to cars", "open the library on Sundays", "plant trees along the market square",
         "turn the old mill into flats", "make buses free of charge", "build a second bridge")
    )  # fmt: skip
    against, fear = chance.choice(
        (("Shop owners", "losing customers"), ("Some residents", "more noise"), ("Neighbours", "high costs"))
    )
    pro, hope = chance.choice(
        (("families", "cleaner air"), ("young people", "more life"), ("commuters", "shorter ways"))
    )
    return Case(
        prompt=f'Summarise: "The town council decided on {day} to {what}. {against} are afraid of {fear}, while {pro} '
        f"hope for "
        f"{hope}. The trial will last {months} months; after that the council will look at the figures and decide "
        f'again."',
        full=f"On {day} the town council took the decision to {what}. Opinions about it differ: {against.lower()} "
        f"fear {fear}, "
        f"whereas {pro} look forward to {hope}. The measure is a trial for {months} months. After this time the "
        f"council "
        f"will examine the figures and take a new decision.",
        more=BACKGROUND,
        steps=f"Decision: {what}. Against: {fear}. For: {hope}. Trial of {months} months, then a new decision.",
        brief=f"The council will {what} for a trial of {months} months; {against.lower()} fear {fear}, {pro} hope for "
        f"{hope}.",
        shortest=f"The council will {what}, on trial.",
    )


def survey(chance: random.Random) -> Case:
    """Results of a survey."""
    asked, first = 100 * chance.randint(5, 40), chance.randint(40, 60)
    second = chance.randint(15, 35)
    topic, one, two, rest = chance.choice(
        (("how they travel to work", "take the car", "take the train", "cycle"),
         ("where they shop", "go to supermarkets", "order online", "go to the market"),
         ("how they heat", "use gas", "use wood", "have heat pumps"),
         ("how they spend the evening", "watch films", "read", "meet friends"))
    )  # fmt: skip
    years = chance.randint(2, 12)
    return Case(
        prompt=f'Summarise: "The survey asked {asked} people {topic}. {first} percent {one}, {second} percent {two}, '
        f"and the "
        f'others {rest}. Compared with {years} years ago, the last group has doubled."',
        full=f"In a survey {asked} people were asked {topic}. The largest group, {first} percent, {one}, and another "
        f"{second} "
        f"percent {two}. The remaining {100 - first - second} percent {rest}. This last group is twice as large as it "
        f"was {years} years ago, which is the most remarkable result.",
        more=BACKGROUND,
        steps=f"{asked} asked: {first} % {one}, {second} % {two}, the rest {rest}; the rest doubled in {years} years.",
        brief=f"Of {asked} people {first} percent {one} and {second} percent {two}; those who {rest} have doubled.",
        shortest=f"Most {one}; more {rest}.",
    )


def history(chance: random.Random) -> Case:
    """What a new thing did to a place."""
    thing, year = (
        chance.choice(("railway", "canal", "paper mill", "tramway", "road over the pass")),
        chance.randint(1810, 1935),
    )
    place, years = chance.choice(("the valley", "the island", "the upper town", "the coast")), chance.randint(10, 40)
    sold = chance.choice(("milk", "cheese", "fruit", "fish", "wool"))
    return Case(
        prompt=f'Summarise: "When the first {thing} reached {place} in {year}, the villages changed. Farmers could '
        f"sell {sold} "
        f"in the city, young people left for the factories, and in summer the first tourists arrived. Within {years} "
        f'years the number of inhabitants had doubled."',
        full=f"The arrival of the first {thing} in {year} transformed the villages of {place}. Farmers were now able "
        f"to sell "
        f"{sold} in the city, while many young people left home to work in factories. In summer the first tourists "
        f"came. "
        f"Although some had moved away, the population doubled within {years} years.",
        more=BACKGROUND,
        steps=f"{thing.capitalize()} in {year}: {sold} sold in the city, young people leave, tourists come; twice as "
        f"many people "
        f"after {years} years.",
        brief=f"The {thing} of {year} brought trade in {sold} and tourists to {place}; the population doubled in "
        f"{years} years.",
        shortest=f"The {thing} of {year} transformed {place}.",
    )


INSTRUCTION: tuple[Family, ...] = (note, invitation, naming, plan)
SUMMARY: tuple[Family, ...] = (council, survey, history)
