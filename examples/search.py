"""Search your notes by meaning, and let the chat model answer from what was found.

python examples/search.py "what do bees eat?"
"""

from __future__ import annotations

import sys

import numpy as np

from inferpool import Pool

NOTES = [
    "Honeybees eat nectar and pollen, and turn nectar into honey for the winter.",
    "The library closes at six on weekdays and at noon on Saturdays.",
    "A hive has one queen, some drones and tens of thousands of workers.",
    "Sourdough needs flour, water, salt and a lot of patience.",
]


def main(question: str) -> None:
    with Pool(chat="smollm2", embed="minilm") as pool:
        # One batch for the notes; normalised vectors, so the dot product is the cosine.
        scores = pool.embed(NOTES) @ pool.embed([question])[0]
        best = NOTES[int(np.argmax(scores))]
        print(f"found: {best}\n")
        messages = [
            {"role": "system", "content": f"Answer in one sentence. You know this: {best}"},
            {"role": "user", "content": question},
        ]
        with pool.chat.stream(messages, max_tokens=64, temperature=0, timeout=60) as answer:
            for delta in answer:
                print(delta.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "what do bees eat?")
