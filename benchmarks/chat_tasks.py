"""Two template-generated tasks for a small chat model: classify a review's sentiment, and convert a sentence to JSON.

python grpo.py --model DIRECTORY --learning-rate 1e-5 --task benchmarks/chat_tasks.py:Extraction
"""

import json
import random
import zlib

from common.tasks import Task

WORDS = {
    "name": "Aisha Bruno Carla Dmitri Elif Farid Greta Hana Igor Jonas Keiko Lucia Mateo Nadia Oscar Priya Rosa Tariq",
    "city": "Ankara Bergen Cordoba Dakar Eindhoven Florence Geneva Hanoi Izmir Jaipur Kyoto Leeds Malmo Naples Porto",
    "positive": "brilliant charming comfortable delightful excellent friendly lovely perfect superb wonderful",
    "negative": "awful boring broken dirty disappointing horrible noisy rude terrible useless",
    "thing": "book concert film guide hotel laptop lecture meal museum phone room train",
}


class Templated(Task):
    """Random problems with one user message each; a checksum of it decides whether the problem is held out."""

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
        return f"Review: {review}\nIs this review positive or negative? Answer with one word.", answer

    def reward(self, problem, response):
        return float(response.strip().rstrip(".").lower() == problem["answer"])


class Extraction(Templated):
    """A sentence about a person as a JSON object. The reward is 1 if it has exactly the right keys and values."""

    def make_problem(self, rng):
        name, city = (rng.choice(WORDS[kind].split()) for kind in ("name", "city"))
        age = rng.randint(18, 79)
        sentence = rng.choice([
            f"{name} is {age} years old and lives in {city}.",
            f"Meet {name} from {city}, who is {age}.",
            f"At {age}, {name} has just moved to {city}.",
            f"In {city} we talked to {name}, {age}.",
        ])  # fmt: skip
        order = 'Write this as a JSON object with the keys "name", "age" and "city". Answer with the JSON only.'
        return f"{sentence}\n{order}", {"name": name, "age": age, "city": city}

    def reward(self, problem, response):
        try:
            found = json.loads(response)
        except (ValueError, RecursionError):
            found = None
        is_object = isinstance(found, dict)
        right = is_object and {key: str(value) for key, value in found.items()} == {
            key: str(value) for key, value in problem["answer"].items()
        }
        return {"reward": float(right), "parses": float(is_object)}
