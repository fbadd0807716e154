//! Who is told when something happens to a call: a thread that sleeps, or an event loop.

use std::cell::RefCell;
#[cfg(not(loom))]
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::error::Result;
use crate::lock;
use crate::platform::{Bell, Source, fork_depth};
use crate::sync::{Mutex, thread_local};

/// A doorbell inside this process, and for an event loop the list of what rang it.
#[derive(Debug)]
pub struct Notifier {
    bell: Bell,
    ready: Option<Mutex<Vec<u64>>>,
}

impl Notifier {
    /// Stands for "there may be space to send" in the list that [`Self::take_ready`] returns.
    pub const SPACE: u64 = u64::MAX;

    /// For an event loop, which watches the descriptor and asks what is ready.
    pub fn for_loop() -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            bell: Bell::new()?,
            ready: Some(Mutex::default()),
        }))
    }

    /// The calling thread's own, made when it first waits. After a fork another one: the bell is one
    /// for both processes, and each would take rings that are meant for the other.
    pub(crate) fn of_thread() -> Result<Arc<Self>> {
        thread_local! {
            #[cfg_attr(
                not(loom),
                expect(clippy::missing_const_for_thread_local, reason = "loom's macro has no const")
            )]
            static OWN: RefCell<Option<(u32, Arc<Notifier>)>> = RefCell::new(None);
        }
        OWN.with(|own| {
            let mut own = own.borrow_mut();
            let depth = fork_depth();
            if let Some((made_at, notifier)) = &*own
                && *made_at == depth
            {
                return Ok(Arc::clone(notifier));
            }
            let notifier = Arc::new(Self {
                bell: Bell::new()?,
                ready: None,
            });
            *own = Some((depth, Arc::clone(&notifier)));
            Ok(notifier)
        })
    }

    /// Calls that became ready since the last time, [`Self::SPACE`] among them.
    pub fn take_ready(&self) -> Vec<u64> {
        self.ready
            .as_ref()
            .map_or_else(Vec::new, |ready| std::mem::take(&mut *lock(ready)))
    }

    pub(crate) fn is_loop(&self) -> bool {
        self.ready.is_some()
    }

    /// Notes that call `id` has something; `awake` leaves out the ring, for one that tells itself.
    pub(crate) fn notify(&self, id: u64, awake: bool) {
        if let Some(ready) = &self.ready {
            lock(ready).push(id);
        }
        if !awake {
            self.bell.ring();
        }
    }

    /// Asks the waiter to come and look, with nothing for it in particular.
    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    pub(crate) fn drain(&self) {
        self.bell.drain();
    }

    pub(crate) fn source(&self) -> Source<'_> {
        self.bell.source()
    }
}

#[cfg(not(loom))]
impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_forked_child_does_not_take_its_parents_rings() {
        let own = Notifier::of_thread().unwrap();
        own.ring();
        let is_rung = |notifier: &Notifier| {
            let sources = [Some(notifier.source())];
            crate::platform::wait(sources, Some(std::time::Instant::now()), None).unwrap() == [true]
        };
        // SAFETY: the child makes a bell, for which it needs no lock but the allocator's, which is
        // free after a fork, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let rung = Notifier::of_thread().is_ok_and(|other| is_rung(&other));
            crate::platform::exit_now(rung.into());
        }
        let mut status = -1;
        // SAFETY: `status` is valid for the call.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child was rung for its parent");
        assert!(is_rung(&own) && Arc::ptr_eq(&own, &Notifier::of_thread().unwrap()));
    }
}
