//! Whether a call should stop, readable from any thread and from native code.

use std::ffi::c_void;
use std::sync::Arc;

use crate::segment::Segment;
use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// What the worker's threads share: the shutdown flag and the progress counts.
#[derive(Debug, Default)]
pub(crate) struct Vitals {
    pub(crate) shutdown: AtomicBool,
    pub(crate) requests: AtomicU64,
    pub(crate) replies: AtomicU64,
    pub(crate) finished: AtomicU64,
    pub(crate) polls: AtomicU64,
    pub(crate) unexpected_control: AtomicU64,
}

/// Whether the host has marked the call, which is in this slot, as cancelled.
pub(crate) fn is_cancelled(segment: &Segment, slot: u32, call: u64) -> bool {
    segment.slot(slot).cancelled.load(Ordering::Relaxed) == call
}

/// Set once the worker shuts down or a call of the token is cancelled; never cleared.
///
/// The host marks a cancelled call in the shared segment, so the mark is seen at the next look,
/// whichever threads of the worker get to run.
#[derive(Debug)]
pub struct AbortToken {
    vitals: Arc<Vitals>,
    /// Slot and id of each call that it stands for.
    calls: Vec<(Segment, u32, u64)>,
}

impl AbortToken {
    pub(crate) fn of_worker(vitals: Arc<Vitals>) -> Self {
        Self {
            vitals,
            calls: Vec::new(),
        }
    }

    pub(crate) fn of_call(vitals: Arc<Vitals>, segment: Segment, slot: u32, call: u64) -> Self {
        Self {
            vitals,
            calls: vec![(segment, slot, call)],
        }
    }

    /// Set once this token is, or `other`, of the same worker.
    pub fn union(&self, other: &Self) -> Self {
        Self {
            vitals: Arc::clone(&self.vitals),
            calls: [&self.calls[..], &other.calls].concat(),
        }
    }

    /// Whether the host has cancelled a call of this token.
    pub fn is_cancelled(&self) -> bool {
        self.calls
            .iter()
            .any(|(segment, slot, call)| is_cancelled(segment, *slot, *call))
    }

    /// Whether work for this token should stop.
    pub fn is_set(&self) -> bool {
        self.vitals.shutdown.load(Ordering::Relaxed) || self.is_cancelled()
    }

    /// As [`Self::is_set`], for whoever works: each look counts as progress.
    pub fn look(&self) -> bool {
        self.vitals.polls.fetch_add(1, Ordering::Relaxed);
        self.is_set()
    }

    /// [`Self::look`] for native code.
    ///
    /// # Safety
    /// `token` must point to a live [`AbortToken`].
    pub unsafe extern "C" fn poll(token: *mut c_void) -> bool {
        // SAFETY: the caller's promise.
        let token = unsafe { &*token.cast::<Self>() };
        token.look()
    }
}
