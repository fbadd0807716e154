//! Any POSIX system: `shm_open` and unlink, pipes, `poll`.
//!
//! What is weaker than on Linux: the segment is not sealed, so a hostile worker can cut it off and
//! end the host with SIGBUS; a process counts as dead when its end of the control socket is closed,
//! see [`ControlFd`]; a signal that comes just before a sleep is served up to [`SLICE`] late, or after
//! it if it has no end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, fcntl_setfl, ftruncate};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketType};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::shm;

use super::{ControlSocket, SignalGate, Source};
use crate::error::Result;

/// Not every system has message sockets that notice their closing. Messages are small enough to
/// stay in one piece, and one that does not is taken for a violation.
pub(super) const CONTROL_SOCKET: SocketType = SocketType::STREAM;
/// Which flags of a receive this system has for such a socket: TRUNC would discard data.
pub(super) const CONTROL_FLAGS: RecvFlags = RecvFlags::DONTWAIT;

/// Longest sleep of a thread that handles signals.
const SLICE: Duration = Duration::from_millis(50);

/// Creates shared memory whose name is gone when this returns.
pub(crate) fn create_shared_memory(length: usize) -> Result<OwnedFd> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let mut number = now.map_or(0, |age| age.subsec_nanos());
    loop {
        // Short: 31 bytes are all that some systems take.
        let name = format!("/inferpool-{:x}-{number:x}", std::process::id());
        let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
        match shm::open(&name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => {
                shm::unlink(&name)?;
                ftruncate(&file, length as u64)?;
                return Ok(file);
            }
            Err(Errno::EXIST) => number = number.wrapping_add(1),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Wakes a sleeper in this process.
#[derive(Debug)]
pub(crate) struct Bell {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Bell {
    /// A bell that nobody has rung.
    pub(crate) fn new() -> Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setfl(&reader, OFlags::NONBLOCK)?;
        fcntl_setfl(&writer, OFlags::NONBLOCK)?;
        Ok(Self { reader, writer })
    }

    /// Makes the bell readable until [`Self::drain`].
    pub(crate) fn ring(&self) {
        // A full pipe is readable already.
        let _ = rustix::io::write(&self.writer, b"!");
    }

    /// Takes all rings so far, or so many that the rest makes it readable again.
    pub(crate) fn drain(&self) {
        let _ = rustix::io::read(&self.reader, &mut [0; 64]);
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source::readable(self.reader.as_fd())
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

/// One end of a control socket, whose closing tells the other end that this process is dead. So
/// forks of this process must not keep it open: a child gets `/dev/null` in its place.
#[derive(Debug)]
pub(super) struct ControlFd(OwnedFd);

/// The descriptors of all ends that this process opened, plus one; 0 is free. A fixed table, since a
/// forked child may touch nothing that a lock guards. An end without a place stays open in forks.
static ENDS: [AtomicI32; 1024] = [const { AtomicI32::new(0) }; 1024];

fn swap_end(from: i32, to: i32) {
    let mut places = ENDS.iter();
    places.find(|place| {
        place
            .compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    });
}

/// Runs in a forked child, where only calls that are safe in a signal's handler are allowed.
extern "C" fn leave_ends() {
    // SAFETY: the path is a C string; the other calls take any descriptor.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        for end in &ENDS {
            let fd = end.swap(0, Ordering::Relaxed) - 1;
            if null >= 0 && fd >= 0 && libc::dup2(null, fd) == fd {
                libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
        libc::close(null);
    }
}

pub(super) fn control_fd(fd: OwnedFd) -> ControlFd {
    static WATCHING: Once = Once::new();
    WATCHING.call_once(|| {
        // SAFETY: the handler does what a forked child may.
        unsafe { libc::pthread_atfork(None, None, Some(leave_ends)) };
    });
    swap_end(0, fd.as_raw_fd() + 1);
    ControlFd(fd)
}

/// There is no portable way.
pub(super) fn refuse_descriptors(_socket: &OwnedFd) {}

impl AsFd for ControlFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for ControlFd {
    fn drop(&mut self) {
        swap_end(self.0.as_raw_fd() + 1, 0);
    }
}

/// Sees the process's end of its control socket closed.
#[derive(Debug)]
pub(crate) struct Death(ControlFd);

impl Death {
    pub(crate) fn source(&self) -> Source<'_> {
        Source::closed(self.0.as_fd())
    }
}

impl AsFd for Death {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Watches the process at the other end of `control`.
pub(crate) fn watch_process(pid: i32, control: &ControlSocket) -> Result<Death> {
    if pid <= 0 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
    }
    Ok(Death(control_fd(control.as_fd().try_clone_to_owned()?)))
}

/// There is no portable way to know.
pub(crate) fn current_cpu() -> Option<usize> {
    None
}

/// Nor to leave.
pub(crate) fn leave_cpu() {}

/// `poll` in slices short enough to notice signals that came before the sleep: one that ends before
/// its wait does counts as interrupted, so that the caller looks at its signals and waits on.
pub(super) fn poll(
    polled: &mut [libc::pollfd],
    until: Option<Instant>,
    gate: Option<&SignalGate>,
) -> io::Result<()> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    // Who waits without end, as an idle worker does, is to use no CPU.
    let slice = gate.and(left).map(|_| SLICE);
    let timeout = [left, slice].into_iter().flatten().min();
    // Rounded up, so that a wait of less than a millisecond is not a busy loop.
    let milliseconds = timeout.map_or(-1, |time| {
        libc::c_int::try_from(time.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX)
    });
    if let Some(gate) = gate {
        // SAFETY: the mask is the one that the gate found.
        unsafe {
            let mask = &raw const gate.before;
            libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut());
        }
    }
    // SAFETY: the slice is as long as said.
    match unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as _, milliseconds) } {
        -1 => Err(io::Error::last_os_error()),
        0 if timeout != left => Err(io::ErrorKind::Interrupted.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Datagram;
    use super::*;
    use crate::control::SIZE;

    #[test]
    fn a_fork_that_lives_on_does_not_keep_a_control_socket_open() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        let watched = ControlSocket::from_fd(theirs);
        let (forked, says_forked) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        // SAFETY: the child calls nothing but what is safe in a signal's handler.
        let child = unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::write(says_forked.as_raw_fd(), b"!".as_ptr().cast(), 1);
                libc::pause();
                libc::_exit(0);
            }
            child
        };
        rustix::io::read(&forked, &mut [0; 1]).unwrap();
        drop(ours);
        let found = watched.receive(&mut [0; SIZE]);
        // SAFETY: the child is ours, and was not waited for.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        assert!(matches!(found, Ok(Datagram::Closed)));
    }
}
