"""A role of one's own: count words in a process that may be killed at any time.

    python examples/word_count.py

The worker imports this file by its name, so everything below the guard stays with the host.
"""

from __future__ import annotations

import collections

from inferpool import CallTimeout, Pool, Role


class Counter:
    """The session: lives as long as the worker, and remembers between calls."""

    def __init__(self) -> None:
        self.words: collections.Counter[str] = collections.Counter()

    def close(self) -> None:
        """Called once, when the worker ends."""


def make_session(role_config, abort):
    return Counter()


def add(reply, text, state):
    state.session.words.update(text.lower().split())
    reply.send("total", state.session.words.total())


def most_common(reply, number, state):
    for word, times in state.session.words.most_common(number):
        reply.send("word", {"word": word, "times": times})


def stall(reply, payload, state):
    while not reply.abort.is_set():  # a call that was given up says so here
        pass


HANDLERS = {"add": add, "most_common": most_common, "stall": stall}


def main() -> None:
    role = Role(session="word_count:make_session", handlers="word_count:HANDLERS")
    with Pool(words=role) as pool:
        for text in ("the bee and the flower", "the hive"):
            print("words so far:", pool.call("words", "add", text))
        try:
            pool.call("words", "stall", timeout=0.2)
        except CallTimeout:
            print("one call took too long; the worker is still there:")
        for item in pool.stream("words", "most_common", 2):
            print(f"  {item['times']} x {item['word']}")


if __name__ == "__main__":
    main()
