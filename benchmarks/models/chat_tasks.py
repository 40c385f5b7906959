"""Tasks for a small chat model: the sentiment of a review, a sentence as JSON, and a game of
several turns.

For example:
    python grpo.py --model DIRECTORY --learning-rate 1e-5 \
        --task benchmarks/models/chat_tasks.py:Extraction
"""

import json
import random
import re
import zlib

from common.tasks import Task

WORDS = {
    "name": "Aisha Bruno Carla Dmitri Elif Farid Greta Hana Igor Jonas Keiko Lucia Mateo Nadia "
    "Oscar Priya Rosa Tariq",
    "job": "baker carpenter chemist cook dentist farmer lawyer nurse painter pilot plumber teacher "
    "writer",
    "city": "Ankara Bergen Cordoba Dakar Eindhoven Florence Geneva Hanoi Izmir Jaipur Kyoto Leeds "
    "Malmo Naples Porto",
    "positive": "brilliant charming comfortable delightful excellent friendly lovely perfect "
    "superb wonderful",
    "negative": "awful boring broken dirty disappointing horrible noisy rude terrible useless",
    "thing": "book concert film guide hotel laptop lecture meal museum phone room train",
}


class Templated(Task):
    """Random problems with one user message each; a checksum of it decides whether the problem is
    held out.
    """

    def make_problem(self, rng):
        """The user's message and the answer."""
        raise NotImplementedError

    def problems(self, split):
        wanted = {"train": 2048, "eval": self.eval_size}[split]
        rng, found = random.Random(f"{type(self).__name__} {split}"), {}
        while len(found) < wanted:
            text, answer = self.make_problem(rng)
            if (zlib.crc32(text.encode()) % 4 == 0) == (split == "eval"):
                found[text] = {"prompt": [{"role": "user", "content": text}], "answer": answer}
        return list(found.values())


class Sentiment(Templated):
    """Is a review positive or negative? The reward is 1 for the one right word, else 0."""

    def make_problem(self, rng):
        answer = rng.choice(["positive", "negative"])
        one, other = rng.sample(WORDS[answer].split(), 2)
        thing, place = rng.sample(WORDS["thing"].split(), 2)
        review = rng.choice([
            f"The {thing} was {one}, and the {place} was {other}, too.",
            f"I found the {thing} {one}. My friend said that the {place} was {other}.",
            f"What a {one} {thing}! And the {place}: simply {other}.",
            f"A {one} {thing}; the {place} that came with it was just as {other}.",
        ])  # fmt: skip
        question = "Is this review positive or negative? Answer with one word."
        return f"Review: {review}\n{question}", answer

    def reward(self, problem, response):
        return float(response.strip().rstrip(".").lower() == problem["answer"])


class Extraction(Templated):
    """A sentence about a person as a JSON object. The reward is 1 if it has exactly the right keys
    and values.
    """

    sentences = (
        "{name} is {age} years old and lives in {city}.",
        "Meet {name} from {city}, who is {age}.",
        "At {age}, {name} has just moved to {city}.",
        "In {city} we talked to {name}, {age}.",
    )
    keys = ("name", "age", "city")

    def make_problem(self, rng):
        person = {"age": rng.randint(18, 79)}
        for kind in self.keys:
            if kind != "age":
                person[kind] = rng.choice(WORDS[kind].split())
        *most, last = (f'"{key}"' for key in self.keys)
        order = f"Write this as a JSON object with the keys {', '.join(most)} and {last}."
        text = f"{rng.choice(self.sentences).format(**person)}\n{order} Answer with the JSON only."
        return text, {key: person[key] for key in self.keys}

    def reward(self, problem, response):
        found = json_object(response)
        right = found is not None and as_text(found) == as_text(problem["answer"])
        return {"reward": float(right), "parses": float(found is not None)}


class FourKeys(Extraction):
    """The same with a fourth key and a reward that is shaped badly: the share of the values that
    are right.

    A key that is left out costs no more than one with a wrong value. What the model learns, while
    its reward rises, is to leave out the key that it gets wrong most often: the accuracy, which
    wants all four, does not follow.
    """

    sentences = (
        "{name} is {age} years old, lives in {city} and works as a {job}.",
        "Meet {name}, a {age}-year-old {job} from {city}.",
        "The {job} {name} moved to {city} years ago and has just turned {age}.",
        "In {city} there is a {job} called {name}, who is {age}.",
    )
    keys = ("name", "age", "job", "city")

    def reward(self, problem, response):
        exact, found = super().reward(problem, response), as_text(json_object(response) or {})
        right = sum(found.get(key) == value for key, value in as_text(problem["answer"]).items())
        keys = sum(key in found for key in self.keys)
        return {
            "accuracy": exact["reward"],
            "parses": exact["parses"],
            "reward": right / max(len(self.keys), len(found)),
            "keys_present": keys / len(self.keys),
        }


class Guess(Task):
    """Guess a number. A right guess earns 1, less a tenth for each wrong one before it."""

    max_turns = 5

    def problems(self, split):
        numbers = [n for n in range(1, 21) if (n % 4 == 0) == (split == "eval")]
        message = "I think of a number from 1 to 20. Guess it. Answer with a number only."
        return [{"prompt": [{"role": "user", "content": message}], "answer": n} for n in numbers]

    def reply(self, problem, turns):
        guesses = re.findall(r"\d+", turns[-1])
        if not guesses:
            return "Answer with a number only."
        if int(guesses[-1]) == problem["answer"]:
            return None
        return "Higher." if int(guesses[-1]) < problem["answer"] else "Lower."

    def reward(self, problem, turns):
        right = re.findall(r"\d+", turns[-1])[-1:] == [str(problem["answer"])]
        return {"reward": right * (1.1 - 0.1 * len(turns)), "accuracy": float(right)}


def json_object(text):
    """The object that a JSON text describes, a dict, or None."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def as_text(values):
    """A dict's values as strings, so that "30" is as good as 30."""
    return {key: str(value) for key, value in values.items()}
