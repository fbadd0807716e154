//! Models, which loom runs in every order that the memory model allows, up to a bound on
//! preemptions (`LOOM_MAX_PREEMPTIONS`, 3 unless set) where a model does not say that it is
//! exhaustive.
//!
//! The code under test is production's. Only what lies below it is loom's: in `memory` each 32
//! bytes of a ring are an `UnsafeCell` that fails a model when two threads touch it unordered, and
//! `platform` is an operating system in which a wake-up that gets lost leaves its thread blocked,
//! which loom reports as a deadlock.

mod channel_tests;
mod ring_tests;

use std::sync::atomic::{AtomicUsize, Ordering};

/// What happened in any of a model's executions, to prove that the model reaches what it is about.
#[derive(Default)]
struct Seen {
    executions: AtomicUsize,
    sleeps: AtomicUsize,
    spared: AtomicUsize,
}

impl Seen {
    fn count(counter: &AtomicUsize) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes how an attempt to arm ended, and passes that on.
    fn armed(&self, armed: bool) -> bool {
        Self::count(if armed { &self.sleeps } else { &self.spared });
        armed
    }
}

/// Runs the model in every order, and returns how often it ran, slept and was spared a sleep.
fn explore(
    name: &str,
    preemptions: Option<usize>,
    model: impl Fn(&std::sync::Arc<Seen>) + Send + Sync + 'static,
) -> (usize, usize, usize) {
    let seen = std::sync::Arc::new(Seen::default());
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 100_000;
    builder.check({
        let seen = std::sync::Arc::clone(&seen);
        move || {
            Seen::count(&seen.executions);
            model(&seen);
        }
    });
    let read = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    let (executions, sleeps) = (read(&seen.executions), read(&seen.sleeps));
    let bound = preemptions.map_or("exhaustive".into(), |bound| format!("{bound} preemptions"));
    println!("loom: {name}: {executions} executions, {bound}");
    (executions, sleeps, read(&seen.spared))
}

/// The bound of models too large to be exhausted.
fn bounded() -> Option<usize> {
    let asked = std::env::var("LOOM_MAX_PREEMPTIONS").ok();
    Some(asked.and_then(|bound| bound.parse().ok()).unwrap_or(3))
}

/// For models with a sleeper: both outcomes of arming must have come up.
fn assert_slept_and_was_spared((executions, sleeps, spared): (usize, usize, usize)) {
    assert!(executions > 10, "only {executions} executions");
    assert!(
        sleeps > 0 && spared > 0,
        "{sleeps} sleeps, {spared} spared of one"
    );
}
