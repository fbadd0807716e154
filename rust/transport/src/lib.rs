//! Framed shared memory between a host and one worker process.
//!
//! A host creates a [`Host`] channel, hands its descriptors to a child process, and the child
//! attaches a [`Worker`] to them. Requests and answers travel as frames through two rings in one
//! sealed segment ([`ring`], [`record`], [`segment`]); questions that must be answered whatever the
//! worker is doing travel over a control socket ([`control`], [`heartbeat`]).
//!
//! Layers, each of which knows only those before it: `record` and `ring` (bytes), `assemble` and
//! `body` (frames), `calls` and `flow` (calls), `host` and `worker` (waiting).

mod abort;
mod assemble;
pub mod body;
mod buffer;
mod calls;
pub mod control;
mod error;
mod flow;
mod heartbeat;
mod host;
#[cfg(loom)]
#[cfg(test)]
mod model;
mod notify;
#[cfg_attr(loom, path = "model/platform.rs")]
mod platform;
pub mod record;
pub mod ring;
#[cfg_attr(loom, path = "model/segment.rs")]
mod segment;
mod spin;
mod sync;
mod worker;

pub use error::{Error, Result, Violation};

#[cfg(not(loom))]
pub use self::worker::Inherited;
pub use self::{
    abort::AbortToken,
    assemble::{Assembler, Frame},
    buffer::Body,
    calls::{End, Event, Outcome},
    host::{Counters, Host, Outgoing},
    notify::Notifier,
    platform::SignalGate,
    spin::WaitPolicy,
    worker::{ReplyPort, Worker},
};

/// What both ends of a channel agree on.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Bytes of the largest frame.
    pub frame_limit: usize,
    /// How to wait.
    pub wait: WaitPolicy,
}

/// How far one attempt to wait may go.
#[derive(Debug, Clone, Copy)]
pub enum Patience<'a> {
    /// Spin if it pays, then fail with [`Error::WouldPark`].
    Spin,
    /// Sleep until something happens or the time has come.
    Park {
        /// When to fail with [`Error::TimedOut`].
        until: Option<std::time::Instant>,
        /// Lets signals through during the sleep only.
        gate: Option<&'a SignalGate>,
    },
}

/// Locks a mutex whose data stays consistent even if a holder panicked.
pub(crate) fn lock<T>(mutex: &sync::Mutex<T>) -> sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// As [`lock`], unless somebody holds it.
pub(crate) fn try_lock<T>(mutex: &sync::Mutex<T>) -> Option<sync::MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(std::sync::TryLockError::WouldBlock) => None,
    }
}
