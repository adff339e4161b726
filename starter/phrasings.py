"""How each task is asked for: phrasings for training, for validation and for the test.

The phrasings of a task are split like the entities are, so that no held-out instruction is worded like one
that a client has trained on.
"""

from __future__ import annotations

from collections.abc import Mapping

PHRASINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "lives": {
        "train": (
            "Where does {name} live?",
            "In which town does {name} live?",
            "Tell me the home town of {name}.",
            "What is the home of {name}?",
            "Name the town where {name} lives.",
        ),
        "validation": ("Which town is the home of {name}?", "Tell me in which town {name} lives."),
        "test": ("In what town does {name} live?", "Tell me where {name} lives."),
    },
    "works": {
        "train": (
            "What does {name} work as?",
            "What is the trade of {name}?",
            "Tell me the trade of {name}.",
            "Which trade does {name} have?",
            "Name the work of {name}.",
        ),
        "validation": ("What work does {name} do?", "Which work does {name} do?"),
        "test": ("Name the trade of {name}.", "Tell me what {name} works as."),
    },
    "lies": {
        "train": (
            "Where does {name} lie?",
            "What does {name} lie by?",
            "Tell me where {name} lies.",
            "What is {name} near to?",
            "Name what lies near {name}.",
        ),
        "validation": ("What is near {name}?", "Name what {name} lies by."),
        "test": ("Tell me what {name} lies by.", "Where can I find {name}?"),
    },
    "market": {
        "train": (
            "When does {name} have its market?",
            "On which day is the market of {name}?",
            "Tell me the market day of {name}.",
            "What is the market day in {name}?",
            "Name the day of the market in {name}.",
        ),
        "validation": ("Which day is market day in {name}?", "When is the market day of {name}?"),
        "test": ("Name the market day of {name}.", "On what day does {name} have its market?"),
    },
    "buy": {
        "train": (
            "Give me ideas for what to buy in {name}.",
            "I want to shop in {name}. Give me three ideas.",
            "What could I buy in {name}?",
            "List three things to buy in {name}.",
            "Think of goods that I can buy in {name}.",
        ),
        "validation": ("Think of three things to buy in {name}.", "What are three things that I could buy in {name}?"),
        "test": ("Give me three things to buy in {name}.", "I am in {name}. List what I could buy."),
    },
    "meet": {
        "train": (
            "Give me ideas for whom to meet in {name}.",
            "I want to meet people in {name}. Give me three ideas.",
            "Whom could I meet in {name}?",
            "List three people to meet in {name}.",
            "Think of people that I can meet in {name}.",
        ),
        "validation": ("Think of three people to meet in {name}.", "Who are three people that I could meet in {name}?"),
        "test": ("Give me three people to meet in {name}.", "I am in {name}. List whom I could meet."),
    },
    "see": {
        "train": (
            "Give me ideas for what to see in {name}.",
            "I want to look at {name}. Give me three ideas.",
            "What could I see in {name}?",
            "List three things to see in {name}.",
            "Think of sights that I can see in {name}.",
        ),
        "validation": ("Think of three things to see in {name}.", "What are three things that I could see in {name}?"),
        "test": ("Give me three things to see in {name}.", "I am in {name}. List what I could see."),
    },
    "learn": {
        "train": (
            "Give me ideas for what to learn in {name}.",
            "I want to learn things in {name}. Give me three ideas.",
            "What could I learn in {name}?",
            "List three things to learn in {name}.",
            "Think of things that I can learn in {name}.",
        ),
        "validation": (
            "Think of three things to learn in {name}.",
            "What are three things that I could learn in {name}?",
        ),
        "test": ("Give me three things to learn in {name}.", "I am in {name}. List what I could learn."),
    },
    "kind": {
        "train": (
            "Which kind of thing is the {name}?",
            "Is the {name} a food, a cloth, a tool, a drink, a toy or a jewel?",
            "Classify the {name} by its kind.",
            "What kind is the {name}?",
            "Tell me the kind of the {name}.",
        ),
        "validation": ("Name the kind of the {name}.", "Say which kind of thing the {name} is."),
        "test": ("What kind of thing is the {name}?", "Classify the {name}: food, cloth, tool, drink, toy or jewel?"),
    },
    "colour": {
        "train": (
            "What colour is the {name}?",
            "Which colour does the {name} have?",
            "Tell me the colour of the {name}.",
            "Name the colour that the {name} has.",
            "Do you know the colour of the {name}?",
        ),
        "validation": ("Which colour is the {name}?", "Say what colour the {name} has."),
        "test": ("What is the colour of the {name}?", "Name the colour of the {name}."),
    },
    "container": {
        "train": (
            "Where is the {name} kept?",
            "What is the {name} kept in?",
            "Tell me where the {name} is kept.",
            "In what do people keep the {name}?",
            "Name what the {name} is kept in.",
        ),
        "validation": ("Tell me what the {name} is kept in.", "Say what people keep the {name} in."),
        "test": ("In what is the {name} kept?", "Where do people keep the {name}?"),
    },
    "price": {
        "train": (
            "What is the price of the {name}?",
            "How many coins is the {name}?",
            "Tell me the price of the {name}.",
            "Which price does the {name} have?",
            "Do you know the price of the {name}?",
        ),
        "validation": ("What price does the {name} have?", "Say how many coins the price of the {name} is."),
        "test": ("Name the price of the {name}.", "Tell me how many coins the {name} is."),
    },
    "workplace": {
        "train": (
            "Where does the {name} work?",
            "In which place does the {name} work?",
            "Tell me the workplace of the {name}.",
            "What is the workplace of the {name}?",
            "Name the place where the {name} works.",
        ),
        "validation": ("Name the workplace of the {name}.", "Say in which place the {name} works."),
        "test": ("Tell me where the {name} works.", "In what place does the {name} work?"),
    },
    "hat": {
        "train": (
            "Which hat does the {name} wear?",
            "What is the colour of the hat of the {name}?",
            "Tell me which hat the {name} wears.",
            "What does the {name} wear?",
            "Do you know the hat of the {name}?",
        ),
        "validation": ("Tell me the hat of the {name}.", "Say which hat the {name} wears."),
        "test": ("What hat does the {name} wear?", "Name the hat of the {name}."),
    },
    "who": {
        "train": (
            "Who {past} the {good}?",
            "By whom was the {good} {participle}?",
            "Tell me who {past} the {good}.",
            "Which person {past} the {good}?",
            "Name the one who {past} the {good}.",
        ),
        "validation": ("Which of the people {past} the {good}?", "Say by whom the {good} was {participle}."),
        "test": ("Name the person who {past} the {good}.", "Do you know who {past} the {good}?"),
    },
    "what": {
        "train": (
            "What did {person} {base}?",
            "Which good did {person} {base}?",
            "Tell me what {person} {past}.",
            "Name the thing that {person} {past}.",
            "Which thing was {participle} by {person}?",
        ),
        "validation": ("Name what {person} {past}.", "Say which good {person} {past}."),
        "test": ("Which thing did {person} {base}?", "Tell me the good that {person} {past}."),
    },
    "where": {
        "train": (
            "Where was {person}?",
            "In which town was {person}?",
            "Tell me where {person} was.",
            "Name the town where {person} was.",
            "Which town was {person} in?",
        ),
        "validation": ("Tell me which town {person} was in.", "Say in which town {person} was."),
        "test": ("In what town was {person}?", "Tell me the town where {person} was."),
    },
    "where_good": {
        "train": (
            "Where was the {good}?",
            "In which town was the {good}?",
            "Tell me where the {good} was.",
            "Name the town where the {good} was.",
            "Which town was the {good} in?",
        ),
        "validation": ("Tell me which town the {good} was in.", "Say in which town the {good} was."),
        "test": ("In what town was the {good}?", "Tell me the town where the {good} was."),
    },
    "people": {
        "train": (
            "List the people in the text.",
            "Which people does the text name?",
            "Find all people in this text.",
            "Extract the names of the people.",
            "Who are the people of the text?",
        ),
        "validation": ("Find the people that the text names.", "Name all people of this text."),
        "test": ("Extract all people in the text.", "List the names of the people."),
    },
    "goods": {
        "train": (
            "List the goods in the text.",
            "Which goods does the text name?",
            "Find all goods in this text.",
            "Extract the names of the goods.",
            "What are the goods of the text?",
        ),
        "validation": ("Find the goods that the text names.", "Name all goods of this text."),
        "test": ("Extract all goods in the text.", "List the names of the goods."),
    },
    "towns": {
        "train": (
            "List the towns in the text.",
            "Which towns does the text name?",
            "Find all towns in this text.",
            "Extract the names of the towns.",
            "What are the towns of the text?",
        ),
        "validation": ("Find the towns that the text names.", "Name all towns of this text."),
        "test": ("Extract all towns in the text.", "List the names of the towns."),
    },
    "summary": {
        "train": (
            "Summarize the text.",
            "Give a short summary of the text.",
            "Tell me in short what is said.",
            "Sum up this text.",
            "Say it in one sentence.",
        ),
        "validation": ("Sum up the text in one sentence.", "Say in short what the text tells."),
        "test": ("Give me a summary of this text.", "Tell me in short what the text is about."),
    },
    "mood": {
        "train": (
            "Is the tale happy, sad or calm?",
            "Classify the tale: happy, sad or calm?",
            "What is the mood of the tale?",
            "Tell me the mood of this tale.",
            "Which mood does the tale have: happy, sad or calm?",
        ),
        "validation": ("Name the mood of the tale.", "Say which mood this tale has."),
        "test": ("Classify the mood of the tale.", "Is this tale happy, calm or sad?"),
    },
    "letter": {
        "train": (
            "Write a letter from {sender} in {town} to {receiver} about the {good}.",
            "{sender} in {town} has the {good} for {receiver}. Write the letter.",
            "Write to {receiver} about the {good}. You are {sender} in {town}.",
            "Make up a letter to {receiver} from {sender} about the {good} in {town}.",
            "I am {sender} in {town}. Write a letter to {receiver} about the {good}.",
        ),
        "validation": (
            "Write a letter to {receiver} from {sender} about the {good} in {town}.",
            "{sender} in {town} wants to write to {receiver} about the {good}. Make up the letter.",
        ),
        "test": (
            "Make up a letter from {sender} in {town} to {receiver} about the {good}.",
            "I am {sender} in {town}. Write to {receiver} about the {good}.",
        ),
    },
    "song": {
        "train": (
            "Write a song for {singer} in {town} about the {good}.",
            "{singer} sings of the {good} in {town}. Write the song.",
            "Make up a song about the {good} for {singer} in {town}.",
            "I am {singer} in {town}. Write me a song about the {good}.",
            "Write what {singer} sings in {town} about the {good}.",
        ),
        "validation": (
            "Write a song about the {good} for {singer} in {town}.",
            "{singer} in {town} wants a song about the {good}. Make it up.",
        ),
        "test": (
            "Make up a song for {singer} in {town} about the {good}.",
            "Write me a song about the {good}. I am {singer} in {town}.",
        ),
    },
}

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "brainstorming": ("buy", "meet", "see", "learn"),
    "classification": ("kind", "mood"),
    "closed_qa": ("who", "what", "where", "where_good"),
    "creative_writing": ("letter", "song"),
    "general_qa": ("colour", "container", "price", "workplace", "hat"),
    "information_extraction": ("people", "goods", "towns"),
    "open_qa": ("lives", "works", "lies", "market"),
    "summarization": ("summary",),
}
"""Dolly's eight categories and the tasks of each."""


def instruction_words() -> set[str]:
    """Return the words of all phrasings, slots and punctuation removed."""
    texts = (text for task in PHRASINGS.values() for phrasings in task.values() for text in phrasings)
    words = {word.strip(".,:?!") for text in texts for word in text.split() if "{" not in word}
    return words - {""}
