"""How many threads compute: as many as allowed, or fewer while others need the CPUs."""

from __future__ import annotations

__all__ = ["ThreadCount"]

# Threads wait for each other after every node of a graph, so one that has to share its CPU holds
# all of them up. Beside a busy process a token of SmolLM2 took two threads 22 ms on 2 CPUs, and one
# thread 9.

# What is looked at together: a few steps, so that a single hiccup changes nothing.
_WINDOW_SECONDS = 0.02
# Of the CPU time they could use, two threads got 0.78 and more in each such window on a quiet
# machine with 2 CPUs, and 0.5 beside a busy process.
_LEAST_SHARE = 0.65
# Seconds until twice as many threads are tried again, doubled each time that this was in vain.
_FIRST_WAIT = 0.1
_LONGEST_WAIT = 1.6


class ThreadCount:
    """A number of threads, by how much of the CPUs they get.

    Attributes:
        most: the largest number.
        now: the number to compute with.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.now = most
        self._wait = _FIRST_WAIT
        self._wall = 0.0
        self._cpu = 0.0
        self._changed = 0.0  # when, in seconds on the clock of `took`
        self._trying = False

    def took(self, *, began: float, ended: float, cpu: float) -> bool:
        """Take note of a computation with `now` threads, and say whether `now` is another one.

        Args:
            began: when it began, in seconds on any clock that goes forward.
            ended: when it ended.
            cpu: seconds of CPU time that the process used meanwhile.
        """
        self._wall += ended - began
        self._cpu += cpu
        if self._wall < _WINDOW_SECONDS:
            return False
        got = self._cpu / self._wall
        self._wall = self._cpu = 0.0
        if self.now > 1 and got < _LEAST_SHARE * self.now:
            if self._trying:
                self._wait = min(2 * self._wait, _LONGEST_WAIT)
            return self._change(max(1, min(round(got), self.now - 1)), ended, trying=False)
        if self._trying:
            self._wait, self._trying = _FIRST_WAIT, False
        if self.now < self.most and ended - self._changed >= self._wait:
            return self._change(min(2 * self.now, self.most), ended, trying=True)
        return False

    def _change(self, number: int, at: float, *, trying: bool) -> bool:
        self.now, self._changed, self._trying = number, at, trying
        return True
