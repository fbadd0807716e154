"""For tests of code that uses inferpool: no model, no download, and every way to fail.

- `scripted_chat` and `scripted_embed` are roles for a real `inferpool.Pool`. Their workers do what
  a script says, as late as it says, and fail where it says.
- `InProcessChannel` serves a role's handlers in the test's own process, for tests of handlers.
- `signal_worker` stops, continues or kills a worker from outside.
"""

from inferpool.testing.channel import InProcessChannel
from inferpool.testing.faults import Fault, signal_worker
from inferpool.testing.script import scripted_chat, scripted_embed

__all__ = ["Fault", "InProcessChannel", "scripted_chat", "scripted_embed", "signal_worker"]
