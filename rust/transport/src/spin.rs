//! Whether to spin before sleeping, learned from recent waits.

use std::time::{Duration, Instant};

use crate::platform;

/// Longest spin. Waking a sleeper takes about half of this (50 µs on the machine measured), so a
/// spin sees the answer even of a peer that slept.
pub(crate) const CAP: Duration = Duration::from_micros(100);
/// Longest spin of an event loop, all of whose tasks wait meanwhile: about as long as it takes to be
/// woken, and to go round once.
pub(crate) const OF_LOOP: Duration = Duration::from_micros(50);
/// Spins in a row that may fail before a host sleeps at once: its worker takes longer than that.
pub(crate) const HOST_PATIENCE: u32 = 4;
/// A worker spins after every request, since another one often follows: once per request that
/// costs no more than being woken.
pub(crate) const WORKER_PATIENCE: u32 = u32::MAX;
/// While sleeping at once, every so many waits spin again, to notice that the peer got quick.
const PROBE_EVERY: u32 = 16;
/// From then on the CPU is offered to others between looks: if the scheduler has put the peer on
/// this very CPU, which it likes to do on waking, it can't answer before.
pub(crate) const ALONE: Duration = Duration::from_micros(10);
/// Looks between two looks at the clock.
const LOOKS: u32 = 32;
/// A spin that has lasted its cap goes on as long as the other side was seen at work meanwhile: one
/// that copies a large frame takes longer than a cap, and if this side slept, it would be woken on
/// the other's CPU. But no more than so often, since the sign is the other side's to give.
const EXTENSIONS: u32 = 20;
/// Longest spin, extensions included.
pub(crate) const LONGEST: Duration = CAP.saturating_mul(EXTENSIONS);

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
    cap: Duration,
    patience: u32,
    failures: u32,
}

impl Spinner {
    /// Spins up to `cap`, until it fails `patience` times in a row.
    pub(crate) fn new(policy: WaitPolicy, cap: Duration, patience: u32) -> Self {
        // On one CPU the peer can't run while this side spins.
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self {
            enabled: policy == WaitPolicy::Adaptive && cpus > 1,
            cap,
            patience,
            failures: 0,
        }
    }

    /// Spins until `ready`, or until it stops being worth it; returns what `ready` said last.
    /// `part` is called when that takes long, to see to it that the two sides do not share a CPU.
    /// `sign` changes while the other side is at work for this one.
    pub(crate) fn spin(
        &mut self,
        mut ready: impl FnMut() -> bool,
        part: impl FnOnce(),
        sign: impl Fn() -> u64,
    ) -> bool {
        let mut part = Some(part);
        if ready() {
            return true;
        }
        let worth_it = self.failures < self.patience || self.failures.is_multiple_of(PROBE_EVERY);
        if !self.enabled || !worth_it {
            self.failures = self.failures.wrapping_add(1);
            return false;
        }
        let mut start = Instant::now();
        let mut seen = sign();
        let mut extensions = 0;
        loop {
            for _ in 0..LOOKS {
                std::hint::spin_loop();
                if ready() {
                    self.failures = 0;
                    return true;
                }
            }
            let spent = start.elapsed();
            if spent >= self.cap {
                let now = sign();
                if now == seen || extensions == EXTENSIONS {
                    self.failures = self.failures.wrapping_add(1);
                    return false;
                }
                (start, seen) = (Instant::now(), now);
                extensions += 1;
            }
            if spent >= ALONE {
                if let Some(part) = part.take() {
                    part();
                }
                std::thread::yield_now();
            }
        }
    }
}

/// Ends a loop that each record starts again, since they may never stop coming. A wait for one record
/// goes on once, and for that looks at no clock.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: Duration,
    gone_on: bool,
    since: Option<Instant>,
}

impl Budget {
    /// For a loop that may take about so long.
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            gone_on: false,
            since: None,
        }
    }

    /// To be asked whenever the loop would go on. Never says so in a model, which must not depend
    /// on the clock.
    pub(crate) fn is_spent(&mut self) -> bool {
        if cfg!(loom) || !std::mem::replace(&mut self.gone_on, true) {
            return false;
        }
        self.since.get_or_insert_with(Instant::now).elapsed() >= self.limit
    }
}

/// Moves this side off a CPU that it shares with the other.
#[derive(Debug)]
pub(crate) struct Parting {
    next: Instant,
}

impl Parting {
    /// Moving costs tens of microseconds, and where every CPU is busy it helps nobody.
    const PAUSE: Duration = Duration::from_millis(1);

    pub(crate) fn new() -> Self {
        Self {
            next: Instant::now(),
        }
    }

    /// Moves, if the other side was last seen on this CPU.
    pub(crate) fn part_from(&mut self, other: Option<usize>) {
        if other.is_some() && other == platform::current_cpu() && Instant::now() >= self.next {
            self.next = Instant::now() + Self::PAUSE;
            platform::leave_cpu();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn spinner() -> Spinner {
        Spinner {
            enabled: true,
            cap: Duration::from_micros(1),
            patience: 1,
            failures: 0,
        }
    }

    /// Counts how often it is asked, and says so if the other side works.
    fn sign(asked: &Cell<u32>, works: bool) -> impl Fn() -> u64 + '_ {
        move || {
            asked.set(asked.get() + 1);
            if works { asked.get().into() } else { 0 }
        }
    }

    #[test]
    fn a_budget_looks_at_no_clock_the_first_time() {
        let mut none = Budget::new(Duration::ZERO);
        assert_eq!([none.is_spent(), none.is_spent()], [false, true]);
        let mut enough = Budget::new(Duration::MAX);
        assert_eq!([enough.is_spent(), enough.is_spent()], [false, false]);
    }

    #[test]
    fn a_spin_ends_with_its_cap_if_the_other_side_does_nothing() {
        let asked = Cell::new(0);
        assert!(!spinner().spin(|| false, || (), sign(&asked, false)));
        assert_eq!(asked.get(), 2);
    }

    #[test]
    fn a_spin_goes_on_while_the_other_side_works_but_not_for_ever() {
        let asked = Cell::new(0);
        assert!(spinner().spin(|| asked.get() == 5, || (), sign(&asked, true)));
        let asked = Cell::new(0);
        assert!(!spinner().spin(|| false, || (), sign(&asked, true)));
        assert_eq!(asked.get(), 2 + EXTENSIONS);
    }
}
