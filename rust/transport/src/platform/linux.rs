//! Linux: sealed memfd, eventfd, pidfd, ppoll.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{RecvFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{sched_getaffinity, sched_setaffinity};

use super::{ControlSocket, SignalGate, Source};
use crate::error::{Error, Result};

/// Keeps the borders of messages.
pub(super) const CONTROL_SOCKET: SocketType = SocketType::SEQPACKET;
/// Forks may keep it open: nobody takes its closing alone for a death, there are pidfds for that.
pub(super) type ControlFd = OwnedFd;
/// Which flags of a receive this system has for such a socket.
pub(super) const CONTROL_FLAGS: RecvFlags = RecvFlags::all();

pub(super) fn control_fd(fd: OwnedFd) -> ControlFd {
    fd
}

/// Newer than what the crate libc knows.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Lets nobody send descriptors to this socket, from Linux 6.16 on. The kernel would close them within
/// a receive here, which for one of TCP may take as long as its owner has it linger.
pub(super) fn refuse_descriptors(socket: &OwnedFd) {
    let no: libc::c_int = 0;
    // SAFETY: the value is as long as said. An older kernel refuses the option.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const no).cast(),
            size_of_val(&no) as libc::socklen_t,
        );
    }
}

/// Creates shared memory that has no name and can change neither its size nor its seals.
pub(crate) fn create_shared_memory(length: usize) -> Result<OwnedFd> {
    let file = memfd_create("inferpool", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, length as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Wakes a sleeper in this process.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    /// A bell that nobody has rung.
    pub(crate) fn new() -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(eventfd(0, flags)?))
    }

    /// Makes the bell readable until [`Self::drain`].
    pub(crate) fn ring(&self) {
        // The only failure is a counter at its maximum, and then it is readable already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes all rings so far.
    pub(crate) fn drain(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source::readable(self.0.as_fd())
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Becomes readable when a process ends.
#[derive(Debug)]
pub(crate) struct Death(OwnedFd);

impl Death {
    pub(crate) fn source(&self) -> Source<'_> {
        Source::readable(self.0.as_fd())
    }
}

impl AsFd for Death {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Watches the process; `control`, the socket to it, is for systems that have no better way.
pub(crate) fn watch_process(pid: i32, _control: &ControlSocket) -> Result<Death> {
    let pid = Pid::from_raw(pid).ok_or(Error::Os(io::Error::from(io::ErrorKind::InvalidInput)))?;
    Ok(Death(pidfd_open(pid, PidfdFlags::empty())?))
}

/// The CPU that runs this thread, for now.
pub(crate) fn current_cpu() -> Option<usize> {
    Some(rustix::thread::sched_getcpu())
}

/// Has the scheduler move this thread to another CPU, if it may use one. Where it may run stays as
/// it was.
pub(crate) fn leave_cpu() {
    let Ok(allowed) = sched_getaffinity(None) else {
        return;
    };
    let mut others = allowed;
    others.unset(rustix::thread::sched_getcpu());
    // An empty set is refused, and then the thread stays where it is.
    if sched_setaffinity(None, &others).is_ok() {
        let _ = sched_setaffinity(None, &allowed);
    }
}

/// `poll` that lets the gate's signals through while it sleeps.
pub(super) fn poll(
    polled: &mut [libc::pollfd],
    until: Option<Instant>,
    gate: Option<&SignalGate>,
) -> io::Result<()> {
    let timeout = until.map(|until| {
        let left = until.saturating_duration_since(Instant::now());
        libc::timespec {
            tv_sec: libc::time_t::try_from(left.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: left.subsec_nanos().into(),
        }
    });
    // SAFETY: the slice is as long as said; the timeout and the mask are null or valid for the call.
    let count = unsafe {
        libc::ppoll(
            polled.as_mut_ptr(),
            polled.len() as libc::nfds_t,
            timeout.as_ref().map_or(std::ptr::null(), |time| time),
            gate.map_or(std::ptr::null(), |gate| &raw const gate.before),
        )
    };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
