//! Whether to spin before sleeping, learned from recent waits.

use std::time::{Duration, Instant};

/// Longest spin. Waking a sleeper takes about this long (50 to 100 µs on the machines measured),
/// so spinning this long at most doubles the cost of a wait that ends asleep.
const CAP: Duration = Duration::from_micros(60);
/// Spins in a row that may fail before this side sleeps at once.
const PATIENCE: u32 = 4;
/// While sleeping at once, every so many waits spin again, to notice that the peer got quick.
const PROBE_EVERY: u32 = 32;
/// Looks between two looks at the clock.
const LOOKS: u32 = 32;

/// How a side waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitPolicy {
    /// Spin while it pays.
    Adaptive,
    /// Sleep at once.
    Park,
}

/// The spinning half of a wait.
#[derive(Debug)]
pub(crate) struct Spinner {
    enabled: bool,
    failures: u32,
}

impl Spinner {
    pub(crate) fn new(policy: WaitPolicy) -> Self {
        // On one CPU the peer can't run while this side spins.
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self {
            enabled: policy == WaitPolicy::Adaptive && cpus > 1,
            failures: 0,
        }
    }

    /// Spins until `ready`, or until it stops being worth it; returns what `ready` said last.
    pub(crate) fn spin(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        if ready() {
            return true;
        }
        let worth_it = self.failures < PATIENCE || self.failures.is_multiple_of(PROBE_EVERY);
        if !self.enabled || !worth_it {
            self.failures = self.failures.wrapping_add(1).max(PATIENCE);
            return false;
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                std::hint::spin_loop();
                if ready() {
                    self.failures = 0;
                    return true;
                }
            }
            if start.elapsed() >= CAP {
                self.failures = self.failures.wrapping_add(1);
                return false;
            }
        }
    }
}
