//! Everything that depends on the operating system, behind one small interface. This is Linux's:
//! sealed memfd, eventfd, pidfd, ppoll.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::{Error, Result};

/// Creates shared memory that has no name and can change neither its size nor its seals.
pub(crate) fn create_shared_memory(length: usize) -> Result<OwnedFd> {
    let file = memfd_create("inferpool", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, length as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

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

/// Wakes a sleeper in this or another process.
#[derive(Debug)]
pub struct Doorbell(OwnedFd);

impl Doorbell {
    /// A doorbell that nobody has rung.
    pub fn new() -> Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Takes over an inherited doorbell.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Makes the descriptor readable until [`Self::drain`].
    pub fn ring(&self) {
        // The only failure is a counter at its maximum, and then it is readable already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes all rings so far.
    pub fn drain(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The two ends of a control socket. Datagrams keep their borders; closing one end is seen at the
/// other.
pub(crate) fn control_pair() -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one datagram without blocking.
pub(crate) fn send_datagram(socket: BorrowedFd<'_>, datagram: &[u8]) -> Result<(), Errno> {
    send(socket, datagram, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(drop)
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

/// Takes one datagram without blocking. An empty datagram counts as closing: no honest peer sends
/// one.
pub(crate) fn receive_datagram(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Datagram> {
    loop {
        match recv(socket, &mut *buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
            Ok((_, 0)) => return Ok(Datagram::Closed),
            Ok((_, length)) => return Ok(Datagram::Received(length)),
            Err(Errno::AGAIN) => return Ok(Datagram::Nothing),
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Datagram::Closed),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A descriptor that becomes readable when the process ends.
pub(crate) fn watch_process(pid: i32) -> Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(Error::Os(io::Error::from(io::ErrorKind::InvalidInput)))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
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

/// Sleeps until one of the descriptors is readable or closed, or the time has come. Returns which
/// are; none when the time has come. A signal ends the sleep with [`Error::Interrupted`].
pub(crate) fn wait<const N: usize>(
    fds: [Option<BorrowedFd<'_>>; N],
    until: Option<Instant>,
    gate: Option<&SignalGate>,
) -> Result<[bool; N]> {
    // A negative descriptor is skipped by the kernel.
    let mut polled = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    let timeout = until.map(|until| {
        let left = until.saturating_duration_since(Instant::now());
        libc::timespec {
            tv_sec: libc::time_t::try_from(left.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: left.subsec_nanos().into(),
        }
    });
    // SAFETY: `polled` has N entries; the timeout and the mask are null or valid for the call.
    let count = unsafe {
        libc::ppoll(
            polled.as_mut_ptr(),
            N as libc::nfds_t,
            timeout.as_ref().map_or(std::ptr::null(), |time| time),
            gate.map_or(std::ptr::null(), |gate| &raw const gate.before),
        )
    };
    if count < 0 {
        let error = io::Error::last_os_error();
        return Err(match error.kind() {
            io::ErrorKind::Interrupted => Error::Interrupted,
            _ => Error::Os(error),
        });
    }
    Ok(polled.map(|entry| entry.revents != 0))
}
