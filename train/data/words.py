"""The words that conversations are made of, and invented ones that no list holds.

Contract: constants and pure functions of a seeded generator.
"""

from __future__ import annotations

from random import Random

NAMES = (
    "Ada",
    "Bruno",
    "Clara",
    "Dario",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Iris",
    "Jonas",
    "Karin",
    "Leo",
    "Mira",
    "Nils",
    "Olga",
    "Pablo",
    "Quinn",
    "Rosa",
    "Sven",
    "Tara",
    "Ugo",
    "Vera",
    "Wanda",
    "Xenia",
    "Yara",
    "Zeno",
    "Anton",
    "Bella",
    "Carlo",
    "Diana",
    "Emil",
    "Flora",
)
CITIES = (
    "Oslo",
    "Paris",
    "Lima",
    "Cairo",
    "Delhi",
    "Rome",
    "Berlin",
    "Madrid",
    "Kyoto",
    "Quito",
    "Dublin",
    "Vienna",
    "Lisbon",
    "Prague",
    "Athens",
    "Boston",
    "Toronto",
    "Sydney",
    "Nairobi",
    "Hanoi",
    "Beijing",
    "Shanghai",
    "Tokyo",
    "Seoul",
)
ADJECTIVES = (
    "red",
    "blue",
    "green",
    "silver",
    "golden",
    "wooden",
    "broken",
    "quiet",
    "heavy",
    "narrow",
    "bright",
    "frozen",
    "hollow",
    "gentle",
    "ancient",
    "yellow",
    "purple",
    "tiny",
    "rusty",
    "velvet",
)
NOUNS = (
    "lantern",
    "bridge",
    "garden",
    "letter",
    "engine",
    "mirror",
    "basket",
    "ladder",
    "kettle",
    "anchor",
    "window",
    "hammer",
    "river",
    "forest",
    "harbor",
    "market",
    "island",
    "castle",
    "wagon",
    "violin",
    "blanket",
    "candle",
    "compass",
    "feather",
    "bottle",
    "pillow",
    "tunnel",
    "orchard",
)
VERBS = ("stands", "waits", "sleeps", "rests", "turns", "grows", "hides", "moves")
PLACES = ("behind", "beside", "under", "near", "above")
COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black", "pink", "brown")
PETS = ("cat", "dog", "bird", "horse")
JOBS = ("baker", "doctor", "teacher", "painter", "farmer", "pilot", "lawyer", "singer")
_KEPT = (12, 16)  # so many of the adjectives and nouns are kept for facts
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "tr", "st")
_VOWELS = ("a", "e", "i", "o", "u")
_ENDS = ("", "n", "r", "l", "s")


def invented(random: Random) -> str:
    """A name that is in no list, two or three syllables."""
    count = random.choice((2, 2, 3))
    parts = [random.choice(_ONSETS) + random.choice(_VOWELS) for _ in range(count)]
    return ("".join(parts) + random.choice(_ENDS)).capitalize()


def name(random: Random) -> str:
    """A person's name, known or invented."""
    return random.choice(NAMES) if random.random() < 0.5 else invented(random)


def city(random: Random) -> str:
    """A place's name, known or invented."""
    return random.choice(CITIES) if random.random() < 0.5 else invented(random)


def thing(random: Random) -> str:
    """What facts are about: "the red lantern"; fillers never speak of it."""
    return f"the {random.choice(ADJECTIVES[: _KEPT[0]])} {random.choice(NOUNS[: _KEPT[1]])}"


def filler(random: Random) -> str:
    """A sentence that says nothing of use, about other things than facts are."""
    adjectives, nouns = ADJECTIVES[_KEPT[0] :], NOUNS[_KEPT[1] :]
    adjective, noun = random.choice(adjectives), random.choice(nouns)
    verb, place, other = random.choice(VERBS), random.choice(PLACES), random.choice(nouns)
    return random.choice(
        (
            f"The {adjective} {noun} {verb} {place} the {other}.",
            f"A {noun} {verb} {place} the {adjective} {other}.",
            f"Every {noun} {verb} {place} a {other}.",
        )
    )
