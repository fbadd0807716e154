//! Everything that depends on the operating system, behind one small interface.
//!
//! Here is what every POSIX system has: mappings, sockets, signal masks. What differs is in one of
//! two backends: `linux` (sealed memfd, eventfd, pidfd, ppoll), and with the feature `posix` a
//! portable one (`shm_open`, pipes, `poll`) that runs on Linux too, so that it is tested.

#[cfg(not(feature = "posix"))]
#[path = "platform/linux.rs"]
mod system;
#[cfg(feature = "posix")]
#[path = "platform/posix.rs"]
mod system;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Instant;

use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use crate::control::SIZE;
use crate::error::{Error, Result};
use crate::sync::{AtomicU32, Ordering};

pub(crate) use system::{Bell, Death, create_shared_memory, current_cpu, leave_cpu, watch_process};

pub(crate) fn file_size(file: BorrowedFd<'_>) -> Result<usize> {
    usize::try_from(fstat(file)?.st_size).map_err(|_| Error::Os(Errno::FBIG.into()))
}

/// A shared mapping, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is plain memory, reached through raw pointers and atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `map_shared` with this length; no borrow of it can outlive `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
    }
}

pub(crate) fn map_shared(file: BorrowedFd<'_>, length: usize) -> Result<Mapping> {
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let start = unsafe {
        mmap(
            std::ptr::null_mut(),
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            file,
            0,
        )
    }?;
    let start = NonNull::new(start.cast()).ok_or(Error::Os(Errno::NOMEM.into()))?;
    Ok(Mapping { start, length })
}

/// Something to wait for: that a descriptor becomes readable or is closed at the other end, or the
/// latter alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    fd: BorrowedFd<'a>,
    events: libc::c_short,
}

impl<'a> Source<'a> {
    fn readable(fd: BorrowedFd<'a>) -> Self {
        let events = libc::POLLIN;
        Self { fd, events }
    }

    /// For a descriptor whose data is somebody else's business.
    #[cfg_attr(not(feature = "posix"), expect(dead_code))]
    fn closed(fd: BorrowedFd<'a>) -> Self {
        Self { fd, events: 0 }
    }
}

/// What a look at a doorbell found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rings {
    /// So many rings were taken; there may be more.
    Taken(usize),
    /// The other end is gone.
    Closed,
}

/// Wakes the process at the other end, and is rung by it.
///
/// A socket, because its calls can be told one by one not to block. A descriptor's own
/// `O_NONBLOCK` is no help: it belongs to both processes, so a hostile peer can clear it.
#[derive(Debug)]
pub(crate) struct Doorbell(OwnedFd);

impl Doorbell {
    /// Both ends.
    pub(crate) fn pair() -> Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        system::refuse_descriptors(&ours);
        Ok((Self(ours), theirs))
    }

    /// Takes over an inherited end.
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Makes the other end readable until [`Self::drain`] is called there.
    pub(crate) fn ring(&self) {
        // A full socket is readable already, and that the peer is gone is noticed elsewhere.
        let _ = send(&self.0, b"!", SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }

    /// Takes rings of this end, and says how many those were.
    pub(crate) fn drain(&self) -> Rings {
        let mut rings = [0; 64];
        match recv(&self.0, &mut rings, RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(Errno::CONNRESET | Errno::PIPE) => Rings::Closed,
            Ok((_, count)) => Rings::Taken(count),
            Err(_) => Rings::Taken(0),
        }
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source::readable(self.0.as_fd())
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a look at a control socket found.
pub(crate) enum Datagram {
    /// A datagram of so many bytes, cut to the buffer.
    Received(usize),
    /// Nothing is waiting.
    Nothing,
    /// The other end is closed.
    Closed,
}

/// One end of a control socket. Messages keep their borders; closing one end is seen at the other.
#[derive(Debug)]
pub(crate) struct ControlSocket(system::ControlFd);

impl ControlSocket {
    /// Both ends.
    pub(crate) fn pair() -> Result<(Self, OwnedFd)> {
        let kind = system::CONTROL_SOCKET;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        system::refuse_descriptors(&ours);
        Ok((Self(system::control_fd(ours)), theirs))
    }

    /// Takes over an inherited end.
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(system::control_fd(fd))
    }

    /// Sends one message without blocking.
    pub(crate) fn send(&self, message: &[u8; SIZE]) -> Result<()> {
        match send(&self.0, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(Errno::AGAIN) => Err(Error::QueueFull),
            Err(_) => Err(Error::PeerDied),
        }
    }

    /// Takes one message without blocking. An empty one counts as closing: no honest peer sends
    /// one. Descriptors that come with it, where they are not refused, are closed by the kernel, as
    /// no room is given for them.
    pub(crate) fn receive(&self, buffer: &mut [u8; SIZE]) -> Result<Datagram> {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        loop {
            match recv(&self.0, &mut *buffer, flags & system::CONTROL_FLAGS) {
                Ok((_, 0)) => return Ok(Datagram::Closed),
                Ok((_, length)) => return Ok(Datagram::Received(length)),
                Err(Errno::AGAIN) => return Ok(Datagram::Nothing),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Datagram::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source::readable(self.0.as_fd())
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether this process was started by the process with this id, and that one still lives.
pub(crate) fn is_parent(pid: i32) -> bool {
    rustix::process::getppid().is_some_and(|parent| parent.as_raw_nonzero().get() == pid)
}

/// Ends the process at once: no destructors, no exit handlers, whatever other threads do.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` takes any status and does not return.
    unsafe { libc::_exit(status) }
}

/// How many forks lie between this process and the first one that asked. Costs one load, where
/// asking for the process id is a system call.
pub(crate) fn fork_depth() -> u32 {
    static DEPTH: AtomicU32 = AtomicU32::new(0);
    static COUNTING: std::sync::Once = std::sync::Once::new();
    extern "C" fn count() {
        DEPTH.fetch_add(1, Ordering::Relaxed);
    }
    COUNTING.call_once(|| {
        // SAFETY: the handler only touches an atomic, which is allowed in a forked child.
        unsafe { libc::pthread_atfork(None, None, Some(count)) };
    });
    DEPTH.load(Ordering::Relaxed)
}

/// Holds back this thread's signals from a last look at pending ones until [`wait`] sleeps, so that
/// none can slip in between and be noticed only after the sleep.
#[derive(Debug)]
pub struct SignalGate {
    before: libc::sigset_t,
}

impl SignalGate {
    /// Blocks signals in this thread until dropped; [`wait`] lets them through while it sleeps.
    pub fn close() -> Self {
        // SAFETY: both sets are plain values that the calls initialise.
        unsafe {
            let mut all = std::mem::zeroed();
            let mut before = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self { before }
        }
    }
}

impl Drop for SignalGate {
    fn drop(&mut self) {
        // SAFETY: `before` is the mask that `close` found.
        unsafe {
            libc::pthread_sigmask(
                libc::SIG_SETMASK,
                &raw const self.before,
                std::ptr::null_mut(),
            );
        }
    }
}

/// Sleeps until something happens to one of the sources, or the time has come. Returns to which;
/// to none when the time has come. A signal ends the sleep with [`Error::Interrupted`], but not one
/// that comes with the end of the time: who only looks has not slept.
pub(crate) fn wait<const N: usize>(
    sources: [Option<Source<'_>>; N],
    until: Option<Instant>,
    gate: Option<&SignalGate>,
) -> Result<[bool; N]> {
    // A negative descriptor is skipped by the kernel.
    let mut polled = sources.map(|source| libc::pollfd {
        fd: source.map_or(-1, |source| source.fd.as_raw_fd()),
        events: source.map_or(0, |source| source.events),
        revents: 0,
    });
    match system::poll(&mut polled, until, gate) {
        Ok(()) => Ok(polled.map(|entry| entry.revents != 0)),
        Err(error) if error.kind() != std::io::ErrorKind::Interrupted => Err(Error::Os(error)),
        Err(_) if until.is_some_and(|until| until <= Instant::now()) => Ok([false; N]),
        Err(_) => Err(Error::Interrupted),
    }
}
