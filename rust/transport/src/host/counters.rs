//! Counts of what a channel did.

use crate::sync::{AtomicU64, Ordering};

/// Counts since the channel was created; each only grows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Requests sent.
    pub frames_sent: u64,
    /// Frames received, the last ones of calls included.
    pub frames_received: u64,
    /// Bytes of the requests' bodies.
    pub bytes_sent: u64,
    /// Bytes of the received bodies.
    pub bytes_received: u64,
    /// Records, either way, of frames that took more than one.
    pub fragments: u64,
    /// Sleeps of a waiting thread.
    pub parks: u64,
    /// Waits that ended while the thread was spinning.
    pub spins_won: u64,
    /// Doorbells rung for the worker.
    pub wakes_sent: u64,
    /// Records published for a worker that was awake.
    pub wakes_suppressed: u64,
    /// Requests that had to wait for space in the request ring, or for a free call slot.
    pub full_waits: u64,
    /// Sleeps that only the clock ended though there was something to do: lost wake-ups. Zero
    /// unless there is a bug here.
    pub rescued_waits: u64,
    /// Frames that arrived for calls given up before, and were dropped.
    pub dropped_late: u64,
    /// Violations of the format by the worker; the first one ends the channel.
    pub violations: u64,
}

impl Counters {
    /// Names and values.
    pub fn named(&self) -> [(&'static str, u64); 13] {
        [
            ("frames_sent", self.frames_sent),
            ("frames_received", self.frames_received),
            ("bytes_sent", self.bytes_sent),
            ("bytes_received", self.bytes_received),
            ("fragments", self.fragments),
            ("parks", self.parks),
            ("spins_won", self.spins_won),
            ("wakes_sent", self.wakes_sent),
            ("wakes_suppressed", self.wakes_suppressed),
            ("full_waits", self.full_waits),
            ("rescued_waits", self.rescued_waits),
            ("dropped_late", self.dropped_late),
            ("violations", self.violations),
        ]
    }
}

/// A count that any thread may read.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    /// Adds where only one thread at a time does, which spares a locked instruction.
    pub(super) fn add_alone(&self, more: u64) {
        self.0
            .store(self.get().wrapping_add(more), Ordering::Relaxed);
    }

    /// Adds where several threads may.
    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is counted outside of the calls' table.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Under the sender's lock.
    pub(super) frames_sent: Count,
    pub(super) bytes_sent: Count,
    pub(super) fragments_sent: Count,
    pub(super) wakes_suppressed: Count,
    /// Under the reader's lock.
    pub(super) frames_received: Count,
    pub(super) bytes_received: Count,
    pub(super) fragments_received: Count,
    pub(super) spins_won: Count,
    /// Under no lock.
    pub(super) parks: Count,
    pub(super) wakes_sent: Count,
    pub(super) full_waits: Count,
    pub(super) rescued_waits: Count,
    pub(super) violations: Count,
    /// Times that this side announced a sleep, after each of which the worker may ring once. Counted
    /// before, see SYNC POINT E in `ring`.
    pub(super) arms: Count,
}

impl Tally {
    pub(super) fn counters(&self, dropped_late: u64) -> Counters {
        Counters {
            frames_sent: self.frames_sent.get(),
            frames_received: self.frames_received.get(),
            bytes_sent: self.bytes_sent.get(),
            bytes_received: self.bytes_received.get(),
            fragments: self.fragments_sent.get() + self.fragments_received.get(),
            parks: self.parks.get(),
            spins_won: self.spins_won.get(),
            wakes_sent: self.wakes_sent.get(),
            wakes_suppressed: self.wakes_suppressed.get(),
            full_waits: self.full_waits.get(),
            rescued_waits: self.rescued_waits.get(),
            dropped_late,
            violations: self.violations.get(),
        }
    }
}
