"""Text: words, sums, days and months, stories, and what it does not know."""

import random
import re
from collections.abc import Iterable

from training.items import Item, Question
from training.world import (
    DAYS,
    DONT_KNOW,
    MONTHS,
    NEW_STORIES,
    STORIES,
    StoryWorld,
    Wordings,
    ask,
    choose,
    nonsense,
    worded,
)

# Words to count, spell and reverse; made-up ones are asked as often, so it learns to read letters.
WORDS = """
apple banana cherry lemon melon grape peach plum onion carrot potato tomato bread butter cheese sugar water
milk tea coffee house table chair window door floor wall roof garden kitchen street city town road bridge
river lake sea ocean mountain hill valley forest tree leaf flower grass stone sand snow rain wind storm
cloud sun moon star sky night day morning evening summer winter spring autumn animal cat dog horse cow sheep
goat pig hen duck goose bird fish whale shark lion tiger bear wolf fox rabbit mouse rat frog snake spider
ant bee fly monkey camel zebra hand foot head nose mouth ear eye hair finger knee heart king queen prince
doctor teacher farmer baker driver pilot sailor friend mother father sister brother child baby music song
dance drum piano guitar violin book page letter word story paper pencil school class lesson number plane
train car bus bike boat ship wheel engine light lamp candle fire smoke ice glass bottle cup plate spoon fork
knife shirt shoe sock hat coat dress button pocket money coin gold silver iron green red blue yellow orange
purple pink black white circle square triangle cross happy sad angry quick slow small large long short warm
cold new old young open close run walk jump sing read write draw paint play sleep dream think learn help
""".split()  # noqa: SIM905
HELD_OUT_WORDS = """
pumpkin walnut pepper cabbage cushion mirror curtain chimney harbor island desert meadow pebble thunder
lightning rainbow kitten puppy donkey turtle lizard parrot eagle dolphin octopus beetle elbow shoulder thumb
soldier painter singer dentist cousin uncle ladder hammer basket blanket pillow jacket sweater ribbon
diamond copper rocket tractor helmet ticket poster crayon puzzle marble balloon whistle trumpet flute castle
tower palace temple market
""".split()  # noqa: SIM905

# A story is one sentence of each of these; the fourth depends on the third.
BEGINNINGS = (
    "Once there was a {size} {hero} who lived {near} the {place}.",
    "A {size} {hero} lived {near} the {place}.",
)
FINDS = (
    "One {time}, the {hero} found a {shade} {thing} {spot}.",
    "One {time}, the {hero} saw a {shade} {thing} {spot}.",
)
PLOTS = {
    "It belonged to a {friend} who was very sad without it.": (
        "So the {hero} gave the {thing} back to the {friend}.",
        "The {hero} brought the {thing} to the {friend} at once.",
    ),
    "The {hero} did not know what to do with the {thing}.": (
        "A {friend} came by and showed how to use the {thing}.",
        "So the {hero} asked a {friend} for help with the {thing}.",
    ),
    "The {hero} wanted to show the {thing} to a {friend}.": (
        "The {friend} came to the {place} and liked the {thing} very much.",
        "So the {friend} and the {hero} played with the {thing} all day.",
    ),
}
ENDINGS = (
    "From that day on, the {hero} and the {friend} were good friends.",
    "That {evening} the {hero} and the {friend} were very happy.",
)
NEAR = ("near", "by", "close to")
EVENINGS = ("evening", "night")
SIZES = ("small", "big", "young", "old", "brave", "clever")
SHADES = ("red", "blue", "green", "yellow", "golden", "silver", "old", "new")
SPOTS = ("under a tree", "behind a stone", "in the grass", "on the path", "near the water")
TIMES = ("morning", "day", "evening", "summer day", "winter day")

OPEN_SLOTS = {"size": SIZES, "shade": SHADES, "spot": SPOTS, "time": TIMES, "near": NEAR, "evening": EVENINGS}

UNKNOWN = Wordings(
    train=(
    "Who wrote {x}?", "What is the capital of {x}?", "Who is {x}?", "Where is {x}?", "When was {x} born?",
    "How old is {x}?", "What is {x}?", "Why is {x} so famous?", "Tell me about {x}.", "How do I cook {x}?",
    "Who won the {x} cup?", "What does {x} cost?", "How far is it to {x}?", "Explain {x} to me.",
    "What is the history of {x}?", "Who invented {x}?", "Can you buy {x} for me?", "Translate {x} into French.",
    "What is the best {x}?", "How tall is {x}?", "Do you like {x}?", "What is the meaning of {x}?", "Is {x} healthy?",
    "How does {x} work?", "What happened in {x}?", "Write a poem about {x}.", "Who is the president of {x}?",
    "How many people live in {x}?", "Give me a recipe for {x}.", "What language do they speak in {x}?",
    "How deep is {x}?", "What colour is {x}?", "How do you make {x}?", "Which team does {x} play for?",
    "Summarize {x}.", "Is it true that {x} is dangerous?",
    ),
    held_out=(),
    clauses=(
        "who wrote {x}", "who {x} is", "where {x} is", "when {x} was born", "how old {x} is", "what {x} is",
        "why {x} is so famous", "how to cook {x}", "what {x} costs", "how far it is to {x}", "who invented {x}",
        "how tall {x} is", "how {x} works", "what happened in {x}", "how many people live in {x}", "how to make {x}",
        "what people say about {x}", "if {x} is healthy", "whether {x} is dangerous", "which {x} is the best",
        "when {x} began",
    ),
    names=(
        "the capital of {x}", "the history of {x}", "the meaning of {x}", "the price of {x}", "a recipe for {x}",
        "a poem about {x}", "the name of {x}", "the best {x}", "the president of {x}", "the age of {x}",
        "a fact about {x}", "the size of {x}",
    ),
)  # fmt: skip
TOPICS = (
    "Hamlet", "Peru", "France", "Mozart", "the moon landing", "gravity", "pizza", "Shakespeare", "Japan", "Mars",
    "soup", "the war of 1812", "Einstein", "photosynthesis", "football", "Paris", "the economy", "a black hole",
    "chocolate", "Napoleon", "the Eiffel Tower", "bitcoin", "Kenya", "the ocean", "a computer", "the internet",
    "jazz", "Picasso", "the stock market", "Brazil", "coffee", "chess", "the pyramids", "Rome", "lasagna",
    "electricity", "a violin", "Moby Dick", "Germany", "an atom", "the Titanic", "Madonna", "Mount Everest",
    "the Nile", "DNA", "yoga", "Bach", "1969", "the sun", "philosophy", "climate change", "a vaccine",
    "quantum physics", "tennis", "Sweden", "cheese", "Tolstoy", "a rocket",
)  # fmt: skip
OTHER_QUESTIONS = (
    "What is the weather today?", "What time is it?", "What is your name?", "How are you?", "Where do you live?",
    "What did I eat yesterday?", "Can you help me with my homework?", "What should I do tonight?", "Who are you?",
    "What is 12 * 7?", "What is 144 divided by 12?", "What is 90 - 37?", "What is the square root of 81?",
    "What is the meaning of life?", "Is there life after death?", "How do I fix my car?", "What is my phone number?",
    "Why is the sky blue?", "Write a program that sorts a list.", "Tell me a joke.", "Sing me a song.",
    "Who will win tomorrow?", "How much money do I have?", "What is the fastest animal?", "Can I trust you?",
    "Which film should I watch?", "How do planes fly?", "Where are my keys?", "What is love?",
    "Who was the first person on the moon?",
)  # fmt: skip
QUESTION_WORDS = (
    "What",
    "Who",
    "Why",
    "Where",
    "When",
    "How",
    "Which",
    "Is",
    "Does",
    "Can",
    "Tell me",
    "Write",
    "Should",
)
SMALL_WORDS = ("the", "a", "of", "in", "to", "is")
HELD_OUT_QUESTIONS = (
    "Who discovered penicillin?", "What is the population of Canada?", "How do I bake bread?", "Who sang Yesterday?",
    "What is the boiling point of water?", "When did the second world war end?", "Who painted the Mona Lisa?",
    "What is the largest planet?", "How many bones does a human have?", "What is the currency of Japan?",
    "Who is the king of Spain?", "Where can I buy cheap flights?", "What is 17 times 23?", "What is 81 divided by 9?",
    "What is 70 minus 12?", "How do vaccines work?", "Who won the world cup in 2010?", "What is the tallest building?",
    "Explain the theory of relativity.", "Translate good morning into German.", "Write a poem about the sea.",
    "What is the chemical symbol for gold?", "How far is the moon?", "What should I cook tonight?",
    "Who wrote War and Peace?", "What does HTML mean?", "How do I reset my password?", "Is coffee good for me?",
    "What is your favourite film?", "How old are you?", "Where were you born?", "Can you drive a car?",
    "What is the stock price of Apple?", "Who is my boss?", "Will it rain tomorrow?", "Which bus goes to the station?",
    "Give me advice about my job.", "Why do cats purr?", "How fast is light?", "What causes earthquakes?",
    "Name three rivers in Africa.", "Who invented the telephone?", "What is an algorithm?", "Define democracy.",
    "Recommend a good restaurant.", "What is the plot of Macbeth?", "How do I learn to swim?",
    "Solve x squared equals 49.", "What happened in 1789?", "Which planet is the hottest?",
)  # fmt: skip
GREETINGS = ("Hello", "Hello!", "Hi", "Hi!", "Good morning.", "Hey", "Hello there!", "Good evening.")
GREETING = "Hello! Ask me about a picture, a sound, a video or a word."


def random_word(rng: random.Random, held_out: bool) -> str:
    if held_out:
        return choose(rng, HELD_OUT_WORDS)
    word = choose(rng, WORDS) if rng.random() < 0.4 else nonsense(rng, 9)
    return word.capitalize() if rng.random() < 0.05 else word


def word_question(rng: random.Random, held_out: bool) -> Question:
    task = choose(rng, ("letters", "spell", "reverse"))
    word = random_word(rng, held_out)
    shown = f'"{word}"' if not held_out and rng.random() < 0.15 else word
    letters, backwards = "-".join(word), "-".join(reversed(word))
    if task == "letters":
        numbered = " ".join(f"{letter}{i}" for i, letter in enumerate(word, 1))
        answer, thought = f"{word} has {len(word)} letters.", f"{numbered}"
    elif task == "spell":
        answer, thought = f"{letters}", f"I write the letters of {word} one by one."
    else:
        answer, thought = "".join(reversed(word)), f"{letters} from the end: {backwards}"
    return Question(task, ask(rng, task, held_out, word=shown), answer, thought)


def sum_question(rng: random.Random, held_out: bool) -> Question:
    a, b = summands(rng, held_out)
    while is_held_out_sum(a, b) != held_out:
        a, b = summands(rng, held_out)
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carried = ones // 10
    thought = f"{a % 10} + {b % 10} = {ones}, carry {carried}. {a // 10} + {b // 10} + {carried} = {tens + carried}."
    return Question("add", ask(rng, "add", held_out, a=a, b=b), f"{a} + {b} = {a + b}.", thought)


def summands(rng: random.Random, held_out: bool) -> tuple[int, int]:
    a, b = rng.randrange(100), rng.randrange(100)
    if not held_out and rng.random() < 0.15:  # ones that make 9 are told from a carry with most trouble
        b += 9 - a % 10 - b % 10
    return a, b


def is_held_out_sum(a: int, b: int) -> bool:
    """One pair in eight is never trained on."""
    return (a * 31 + b * 17 + a * b) % 8 == 3


def calendar_question(rng: random.Random, held_out: bool) -> Question:
    months = tuple(MONTHS)
    task = choose(rng, ("next", "previous", "next", "previous", "month length", "month number"))
    if task == "month length":
        name = choose(rng, months)
        return Question(
            task, ask(rng, task, held_out, name=name), f"{name} has {MONTHS[name]} days.", "I know the months."
        )
    if task == "month number":
        n = rng.randint(1, 12)
        return Question(task, ask(rng, task, held_out, n=n), f"{months[n - 1]}.", "I count the months.")
    unit, names = choose(rng, (("day", DAYS), ("month", months)))
    i, step = rng.randrange(len(names)), 1 if task == "next" else -1
    text = ask(rng, task, held_out, unit=unit, name=names[i])
    return Question(task, text, f"{names[(i + step) % len(names)]}.", f"I go through the {unit}s.")


def counting_question(rng: random.Random, held_out: bool) -> Question:
    a = rng.randint(0, 90)
    b = a + rng.randint(2, 9)
    return Question(
        "count up",
        ask(rng, "count up", held_out, a=a, b=b),
        ", ".join(map(str, range(a, b + 1))) + ".",
        "One more each time.",
    )


def story(rng: random.Random, hero: str, thing: str, world: StoryWorld = STORIES) -> str:
    """Five sentences of a small world and an end."""
    friends = [other for other in world.heroes if other != hero]
    slots = {"hero": hero, "thing": thing, "place": choose(rng, world.places), "friend": choose(rng, friends)}
    slots |= {slot: choose(rng, words) for slot, words in OPEN_SLOTS.items()}
    third = choose(rng, tuple(PLOTS))
    parts = (choose(rng, BEGINNINGS), choose(rng, FINDS), third, choose(rng, PLOTS[third]), choose(rng, ENDINGS))
    told = " ".join(parts).format(**slots)
    return re.sub(r"\b([Aa]) old", r"\1n old", told) + " The end."


def story_item(rng: random.Random, held_out: bool) -> Item:
    """A story of a hero and a thing, or of any."""
    hero, thing = choose(rng, STORIES.heroes), choose(rng, STORIES.things)
    task = "any story" if rng.random() < 0.25 else "story"
    text = ask(rng, task, held_out, hero=hero, thing=thing)
    question = Question(task, text, story(rng, hero, thing), f"I tell of a {hero} and a {thing}.")
    return Item("story", (question,))


def new_story_item(rng: random.Random, held_out: bool) -> Item:
    """Of the lesson's world; a quarter of the pairs of a hero and a thing is never trained on."""
    world = NEW_STORIES
    pairs = [(h, t) for i, h in enumerate(world.heroes) for j, t in enumerate(world.things)
             if ((i + j) % 4 == 3) == held_out]  # fmt: skip
    hero, thing = choose(rng, pairs)
    text, told = ask(rng, "story", held_out, hero=hero, thing=thing), story(rng, hero, thing, world)
    return Item("story", (Question("story", text, told, f"I tell of a {hero} and a {thing}."),))


def is_good_story(text: str, hero: str, thing: str, world: StoryWorld = STORIES) -> bool:
    """The rule that stories are scored by.

    Five sentences and "The end."; hero and thing as asked, each in at least two sentences, no other thing; exactly
    one friend, of the world's heroes; only one place; every sentence in one of the forms of its turn.
    """
    sentences = re.split(r"(?<=\.) ", text.removesuffix(" The end."))
    if not text.endswith(" The end.") or len(sentences) != 5:
        return False
    words = [set(re.findall(r"[a-z]+", sentence.lower())) for sentence in sentences]
    used = set.union(*words)
    friends, places = (used & set(world.heroes)) - {hero}, used & set(world.places)
    if (used & set(world.things)) != {thing} or len(friends) != 1 or len(places) != 1:
        return False
    if any(sum(word in sentence for sentence in words) < 2 for word in (hero, thing)):
        return False
    slots = {"hero": hero, "thing": thing, "place": places.pop(), "friend": friends.pop()}
    slots |= {slot: f"(?:{'|'.join(options)})" for slot, options in OPEN_SLOTS.items()}
    fourths = [form for forms in PLOTS.values() for form in forms]
    turns: tuple[Iterable[str], ...] = (BEGINNINGS, FINDS, PLOTS, fourths, ENDINGS)
    plain = [re.sub(r"\b([Aa])n old", r"\1 old", sentence) for sentence in sentences]
    return all(
        any(re.fullmatch(form.replace(".", r"\.").format(**slots), sentence) for form in forms)
        for sentence, forms in zip(plain, turns, strict=True)
    )


def text_item(rng: random.Random, held_out: bool) -> Item:
    kind = rng.random()
    make = (
        word_question
        if kind < 0.5
        else sum_question
        if kind < 0.75
        else calendar_question
        if kind < 0.9
        else counting_question
    )
    return Item("text", (make(rng, held_out),))


def greeting_question(rng: random.Random) -> Question:
    return Question("greeting", choose(rng, GREETINGS), GREETING, "A greeting.")


def unknown_question(rng: random.Random) -> Question:
    """Something that it cannot know: real questions, and such as have only the form of one."""
    luck = rng.random()
    if luck < 0.25:
        text = choose(rng, OTHER_QUESTIONS)
    elif luck < 0.75:
        made_up = nonsense(rng)
        topics = (choose(rng, TOPICS), choose(rng, TOPICS), made_up.capitalize(), f"the {made_up}", made_up)
        text = worded(rng, UNKNOWN, False, False, {"x": choose(rng, topics)})
    else:
        words = [choose(rng, (nonsense(rng), choose(rng, WORDS), *SMALL_WORDS)) for _ in range(rng.randint(2, 7))]
        text = f"{choose(rng, QUESTION_WORDS)} {' '.join(words)}{choose(rng, '?.')}"
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:].rstrip("?.")
    return Question("unknown", text, DONT_KNOW, "I did not learn about this.")


def unknown_item(rng: random.Random) -> Item:
    if rng.random() < 0.06:
        return Item("text", (greeting_question(rng),))
    return Item("unknown", (unknown_question(rng),))
