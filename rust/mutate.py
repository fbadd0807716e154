"""Weakens one memory ordering or one check of the transport at a time, and sees that a test fails.

Run by ``make mutate``. Ends with a table, and with an error if a mutant survives. Each mutant is
applied to a copy of the crate; what must catch it is named with it, so that the run stays short.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120


@dataclass(frozen=True)
class Mutant:
    """One change, and the kind of test that must notice it."""

    file: str
    before: str
    after: str
    caught_by: str
    """``"loom"`` and some of a model's name, ``"lib"``, or the name of a test target."""
    occurrence: int = 0


MUTANTS = [
    # Orderings.
    Mutant(
        "ring.rs",
        "tail().store(self.tail, Ordering::Release)",
        "tail().store(self.tail, Ordering::Relaxed)",
        "loom ring_tests",
    ),
    Mutant(
        "ring.rs",
        "tail().load(Ordering::Acquire)",
        "tail().load(Ordering::Relaxed)",
        "loom ring_tests",
    ),
    Mutant(
        "ring.rs",
        "head().store(self.head, Ordering::Release)",
        "head().store(self.head, Ordering::Relaxed)",
        "loom ring_tests",
    ),
    Mutant(
        "ring.rs",
        "head().load(Ordering::Acquire)",
        "head().load(Ordering::Relaxed)",
        "loom ring_tests",
    ),
    Mutant("ring.rs", "fence(Ordering::SeqCst);", "fence(Ordering::AcqRel);", "loom ring_tests", 0),
    Mutant("ring.rs", "fence(Ordering::SeqCst);", "fence(Ordering::AcqRel);", "loom ring_tests", 1),
    Mutant("ring.rs", "fence(Ordering::SeqCst);", "fence(Ordering::AcqRel);", "loom ring_tests", 2),
    Mutant("ring.rs", "fence(Ordering::SeqCst);", "fence(Ordering::AcqRel);", "loom ring_tests", 3),
    Mutant("ring.rs", "fence(Ordering::SeqCst);", "", "loom ring_tests", 0),
    Mutant("ring.rs", "fence(Ordering::SeqCst);", "", "loom ring_tests", 1),
    Mutant("ring.rs", "fence(Ordering::SeqCst);", "", "loom ring_tests", 2),
    Mutant("ring.rs", "fence(Ordering::SeqCst);", "", "loom ring_tests", 3),
    Mutant(
        "ring.rs",
        "producer_armed().store(1, Ordering::Release)",
        "producer_armed().store(1, Ordering::Relaxed)",
        "loom what_is_noted",
    ),
    Mutant(
        "ring.rs",
        "compare_exchange(1, 0, Ordering::Acquire, Ordering::Relaxed)",
        "compare_exchange(1, 0, Ordering::Relaxed, Ordering::Relaxed)",
        "loom what_is_noted",
    ),
    # The order of steps that waiting relies on.
    Mutant(
        "ring.rs",
        "if self.head != self.tail || self.refresh()? {\n            self.disarm();",
        "if false {\n            self.disarm();",
        "loom ring_tests",
    ),
    Mutant("ring.rs", "if ready(self)? {", "if false && ready(self)? {", "loom ring_tests"),
    Mutant(
        "host/lead.rs",
        "            armed?;\n        }\n",
        "            armed?;\n        }\n        me.drain();\n",
        "loom event_loop",
    ),
    Mutant(
        "host/lead.rs",
        "if calls.has_other_waiter(me) && self.try_lead().is_some() {",
        "if false {",
        "loom callers_hand",
    ),
    Mutant("host/send.rs", "calls.mark_sent(call);", "", "loom cancel_against"),
    Mutant(
        "calls.rs",
        "if header.kind.is_terminal() {\n            self.free_slots",
        "if false {\n            self.free_slots",
        "lib",
    ),
    Mutant("calls.rs", "call.frames.len() != 1 || ", "", "lib"),
    Mutant("host.rs", "self.hand_over_locked(&calls, None);", "", "loom brief_spin"),
    Mutant(
        "worker/reply.rs",
        "if !self.advance_held(state, outbox, kind, item)? {",
        "if false {",
        "channel",
    ),
    Mutant(
        "worker/reply.rs",
        "|| (self.has_credit(&state, kind) && ring.fits(length)?))",
        "|| ring.fits(length)?)",
        "loom stream_beyond",
    ),
    Mutant("heartbeat.rs", "self.wakers.shut_down(&self.vitals);", "", "loom close_against"),
    Mutant("host.rs", "if nudge(&self.reply_memory) {", "if false {", "loom stream_beyond"),
    # Checks of what the peer wrote.
    Mutant("ring.rs", "tail < self.tail\n            ||", "false ||", "hostile"),
    Mutant("ring.rs", "|| tail - self.head > self.memory.capacity() as u64", "", "hostile"),
    Mutant("ring.rs", "|| !tail.is_multiple_of(ALIGN as u64)", "", "hostile"),
    Mutant("ring.rs", "head < self.head ||", "", "properties"),
    Mutant("ring.rs", "|| head > self.tail", "", "hostile"),
    Mutant("ring.rs", "|| !head.is_multiple_of(ALIGN as u64)", "", "hostile"),
    Mutant("ring.rs", "space > capacity - offset || ", "", "hostile"),
    Mutant("ring.rs", " || space as u64 > self.tail - self.head", "", "hostile"),
    Mutant(
        "ring.rs", "if space != self.memory.capacity() - record.offset {", "if false {", "hostile"
    ),
    Mutant(
        "ring.rs",
        "            if record.header.kind == Kind::Pad {",
        "            if false {",
        "hostile",
    ),
    Mutant("ring.rs", " && self.has_space(capacity)?)", ")", "properties"),
    Mutant("ring.rs", "header.total.max(header.span() as u64)", "header.total", "properties"),
    Mutant("spin.rs", "if now == seen ||", "if true ||", "lib"),
    Mutant("spin.rs", " || extensions == EXTENSIONS", "", "lib"),
    Mutant("record.rs", "_ => return Err(Violation::Kind),", "_ => Self::Data,", "hostile"),
    Mutant(
        "record.rs",
        "if header.flags & !(FIRST | LAST | for_requests) != 0 {",
        "if false {",
        "hostile",
    ),
    Mutant("record.rs", "if u64::from(header.length) > header.total {", "if false {", "hostile"),
    Mutant(
        "assemble.rs", "if partial.filled + length > partial.body.len() {", "if false {", "hostile"
    ),
    Mutant("assemble.rs", "if complete != (header.flags & LAST != 0) {", "if false {", "lib"),
    Mutant("assemble.rs", "if total > self.limit {", "if false {", "hostile"),
    Mutant(
        "assemble.rs",
        "if known.is_some_and(|partial| !header.kind.replaces(partial.first.kind)) {",
        "if false {",
        "hostile",
    ),
    Mutant("record.rs", " && other == Self::Data", "", "lib"),
    Mutant("worker/reply.rs", "self.kind == kind && self.total == total", "true", "channel"),
    Mutant("worker/reply.rs", "&& !kind.replaces(partial.kind)", "&& false", "channel"),
    Mutant("assemble.rs", "partial.first.kind == header.kind\n            &&", "", "lib"),
    Mutant("assemble.rs", "&& partial.first.sequence == header.sequence", "", "lib"),
    Mutant("assemble.rs", "&& partial.first.slot == header.slot", "", "lib"),
    Mutant("assemble.rs", "&& partial.first.total == header.total", "", "hostile"),
    Mutant("assemble.rs", "if same && header.length > 0 {", "if same {", "hostile"),
    Mutant("body.rs", "count > MAX_PARTS || ", "", "properties"),
    Mutant("body.rs", " || lengths.len() < count * 8", "", "properties"),
    Mutant("body.rs", "if end > body.len() {", "if false {", "properties"),
    Mutant("body.rs", "if end != body.len() {", "if false {", "properties"),
    Mutant(
        "calls.rs",
        "if matches!(header.kind, Kind::Pad | Kind::Request) {",
        "if false {",
        "hostile",
    ),
    Mutant(
        "calls.rs",
        "if call.slot() != Some(header.slot) || !call.sent {",
        "if !call.sent {",
        "hostile",
    ),
    Mutant(
        "calls.rs",
        "if call.slot() != Some(header.slot) || !call.sent {",
        "if call.slot() != Some(header.slot) {",
        "lib",
    ),
    Mutant("calls.rs", "if header.sequence != call.next_sequence {", "if false {", "hostile"),
    Mutant("calls.rs", "&& unread >= WINDOW", "&& false", "hostile"),
    Mutant(
        "calls.rs",
        "if !self.settle_question(id) {\n            return Err(Violation::Control);\n        }",
        "self.settle_question(id);",
        "hostile",
    ),
    Mutant("calls.rs", "if self.questions >= MAX_QUESTIONS {", "if false {", "lib"),
    Mutant(
        "host/lead.rs",
        "buffer.get(..length)",
        "buffer.get(..length.min(SIZE))",
        "hostile",
    ),
    Mutant("host/lead.rs", "if reader.rings > self.tally.arms.get() {", "if false {", "hostile"),
    Mutant(
        "platform.rs",
        "SendFlags::DONTWAIT | SendFlags::NOSIGNAL",
        "SendFlags::NOSIGNAL",
        "hostile",
        0,
    ),
    Mutant(
        "platform.rs",
        "SendFlags::DONTWAIT | SendFlags::NOSIGNAL",
        "SendFlags::NOSIGNAL",
        "hostile",
        1,
    ),
    Mutant("worker.rs", "header.kind != Kind::Request || ", "", "hostile"),
    Mutant("worker.rs", " || header.slot >= SLOTS", "", "hostile"),
    Mutant("worker.rs", " || header.sequence != 0", "", "hostile"),
    # What a host knows of its worker without asking.
    Mutant(
        "host.rs", "Ok(!lock(&self.calls).is_held(call))", "{ let _ = call; Ok(true) }", "channel"
    ),
    Mutant("host.rs", "self.pump_what_is_there(&mut reader, None);", "", "channel"),
    # Records that never stop coming.
    Mutant("host/lead.rs", "0..BATCHES_AT_A_LOOK", "0..usize::MAX", "hostile"),
    Mutant("host/lead.rs", "if stopped { None } else { Some(me) }", "Some(me)", "hostile"),
    Mutant("spin.rs", ".elapsed() >= self.limit", ".elapsed().is_zero()", "lib"),
    Mutant(
        "calls.rs", "call.received - call.published >= WINDOW", "call.received >= WINDOW", "channel"
    ),
    Mutant(
        "host/send.rs",
        "(&self.request_memory) >= position",
        "(&self.request_memory) > position",
        "channel",
    ),
    Mutant("host.rs", "self.try_withdrawals();", "", "channel"),
    Mutant("host/send.rs", "Some(call) if !calls.is_undecided(call) => true,", "", "channel"),
]


def command(caught_by: str) -> tuple[list[str], dict[str, str]]:
    """What runs the tests, and the environment that it needs beside this one."""
    cargo = ["cargo", "test", "--quiet", "--locked", "-p", "inferpool-transport"]
    if caught_by.startswith("loom"):
        flags = {
            "RUSTFLAGS": "--cfg loom -C debug-assertions",
            "LOOM_MAX_PREEMPTIONS": "2",
            # Compiling takes longer than the models do.
            "CARGO_PROFILE_RELEASE_LTO": "off",
            "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "16",
        }
        return [*cargo, "--release", "--target-dir", "target/loom", "--lib", caught_by[5:]], flags
    target = ["--lib"] if caught_by == "lib" else ["--test", caught_by]
    return [*cargo, "--target-dir", "target/mutants", *target], {}


def verdict(tree: Path, mutant: Mutant) -> str:
    """Apply the mutant, run what must catch it, and take it back."""
    source = tree / "rust/transport/src" / mutant.file
    text = source.read_text()
    pieces = text.split(mutant.before)
    if len(pieces) <= mutant.occurrence + 1:
        return "NOT FOUND"
    at = mutant.occurrence + 1
    mutated = mutant.before.join(pieces[:at]) + mutant.after + mutant.before.join(pieces[at:])
    source.write_text(mutated)
    arguments, environment = command(mutant.caught_by)
    try:
        done = subprocess.run(
            arguments,
            check=False,
            cwd=tree,
            env={**os.environ, **environment, "RUST_BACKTRACE": "0"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "caught (a hang)"
    finally:
        source.write_text(text)
    if "could not compile" in done.stderr:
        return "DOES NOT COMPILE"
    return "SURVIVED" if done.returncode == 0 else "caught"


def main() -> None:
    """Try every mutant, or those whose file and text hold the argument."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutant for mutant in MUTANTS if wanted in f"{mutant.file} {mutant.before}"]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("Cargo.toml", "Cargo.lock", "clippy.toml"):
            shutil.copy(ROOT / name, tree / name)
        shutil.copytree(ROOT / "rust", tree / "rust", ignore=shutil.ignore_patterns("corpus"))
        for mutant in chosen:
            said = verdict(tree, mutant)
            failures += not said.startswith("caught")
            what = " ".join(mutant.before.split())[:60]
            print(f"{said:16} {mutant.caught_by:20} {mutant.file:14} {what}", flush=True)
    print(f"mutants: {len(chosen)} tried, {len(chosen) - failures} caught")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
