//! How the two ends of a channel come to be.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::host::Host;
use crate::platform::{self, ControlSocket, Doorbell};
use crate::segment::Segment;
use crate::worker::Inherited;
use crate::{Settings, lock};

impl Host {
    /// Creates a channel with rings of `capacity` bytes and nobody at the other end yet.
    pub fn create(capacity: usize, settings: Settings) -> Result<Arc<Self>> {
        let (segment, file) = Segment::create(capacity)?;
        let (control, worker_control) = ControlSocket::pair()?;
        let (bell, worker_bell) = Doorbell::pair()?;
        let (space_bell, worker_space_bell) = Doorbell::pair()?;
        let host = Self::assemble(segment, control, bell, space_bell, settings);
        let ends = [file, worker_control, worker_bell, worker_space_bell];
        *lock(&host.worker_ends) = Some(ends);
        Ok(Arc::new(host))
    }

    /// The descriptors for the worker to inherit, in the order of [`Inherited`], until
    /// [`Self::watch`] closes them here.
    pub fn with_inheritance<T>(&self, use_fds: impl FnOnce([BorrowedFd<'_>; 4]) -> T) -> Result<T> {
        let ends = lock(&self.worker_ends);
        Ok(use_fds(
            ends.as_ref()
                .ok_or(Error::Closed)?
                .each_ref()
                .map(OwnedFd::as_fd),
        ))
    }

    /// The same descriptors, duplicated, for a worker in this process.
    pub fn inheritance(&self) -> Result<Inherited> {
        let [segment, control, bell, space_bell] =
            self.with_inheritance(|fds| fds.map(|fd| fd.try_clone_to_owned()))?;
        Ok(Inherited {
            segment: segment?,
            control: control?,
            bell: bell?,
            space_bell: space_bell?,
        })
    }

    /// Starts watching the process that inherited the other end, whose death ends the channel.
    pub fn watch(&self, pid: i32) -> Result<()> {
        self.check_owner()?;
        let death = platform::watch_process(pid, &self.control)?;
        // Only the worker may keep its ends open, or their closing would not be seen.
        lock(&self.worker_ends).take();
        self.death.set(death).map_err(|_| Error::Closed)
    }

    /// Descriptors for an event loop to watch; when one is readable, call [`Self::look`].
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let fixed = [self.bell.as_fd(), self.control.as_fd()];
        fixed
            .into_iter()
            .chain(self.death.get().map(AsFd::as_fd))
            .collect()
    }
}
