//! The one place where atomics, locks and threads come from: the standard library's, or loom's under
//! `--cfg loom`.

use std::sync::TryLockError;

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
};
#[cfg(loom)]
pub(crate) use loom::{thread, thread_local};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
};
#[cfg(not(loom))]
pub(crate) use std::{thread, thread_local};

/// A lock that is only ever tried. The flag says who has the value, in an order that loom checks;
/// loom's own mutex takes a thread that is about to try for one that waits.
#[derive(Debug)]
pub(crate) struct TryLock<T> {
    held: AtomicBool,
    value: std::sync::Mutex<T>,
}

/// Gives the lock back when dropped: first the value, then the flag.
#[derive(Debug)]
pub(crate) struct TryLockGuard<'a, T> {
    value: std::sync::MutexGuard<'a, T>,
    _held: Held<'a>,
}

#[derive(Debug)]
struct Held<'a>(&'a AtomicBool);

impl<T> TryLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            held: AtomicBool::new(false),
            value: std::sync::Mutex::new(value),
        }
    }

    /// The value, unless somebody has it.
    pub(crate) fn try_lock(&self) -> Option<TryLockGuard<'_, T>> {
        self.held
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .ok()?;
        let _held = Held(&self.held);
        match self.value.try_lock() {
            Ok(value) => Some(TryLockGuard { value, _held }),
            Err(TryLockError::Poisoned(poisoned)) => Some(TryLockGuard {
                value: poisoned.into_inner(),
                _held,
            }),
            Err(TryLockError::WouldBlock) => {
                debug_assert!(false, "the flag lets one at a time at the value");
                None
            }
        }
    }
}

impl<T> std::ops::Deref for TryLockGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> std::ops::DerefMut for TryLockGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}
