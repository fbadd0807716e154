//! The worker's heartbeat: a thread that answers the control socket whatever the model is doing.
//!
//! It never touches Python, so a handler that holds the GIL does not delay it. It sleeps until
//! the host asks something or dies; an idle worker's heartbeat uses no CPU.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::io::Errno;

use crate::abort::Vitals;
use crate::control::{Control, Progress, SIZE};
use crate::error::{Error, Result};
use crate::platform::{self, Datagram, Doorbell, SignalGate};
use crate::sync::Ordering;

/// Exit status of a worker whose host died. Nobody is left to see it but a process listing.
const HOST_DIED: i32 = 113;
/// The thread's stack; it keeps a few hundred bytes.
const STACK: usize = 64 * 1024;

#[derive(Debug)]
pub(crate) struct Heartbeat {
    thread: JoinHandle<()>,
    stop: Arc<Doorbell>,
}

struct Beat {
    control: Arc<OwnedFd>,
    host: OwnedFd,
    stop: Arc<Doorbell>,
    vitals: Arc<Vitals>,
    bells: Vec<Arc<Doorbell>>,
}

impl Heartbeat {
    /// Starts the thread. `bells` are rung on shutdown.
    pub(crate) fn start(
        control: Arc<OwnedFd>,
        host_pid: i32,
        vitals: Arc<Vitals>,
        bells: Vec<Arc<Doorbell>>,
    ) -> Result<Self> {
        let host = platform::watch_process(host_pid)?;
        // The descriptor may name a stranger if the host died first and its id was reused.
        if !platform::is_parent(host_pid) {
            return Err(Error::PeerDied);
        }
        let stop = Arc::new(Doorbell::new()?);
        let beat = Beat {
            control,
            host,
            stop: Arc::clone(&stop),
            vitals,
            bells,
        };
        // The new thread inherits the mask: signals are for the main thread.
        let gate = SignalGate::close();
        let thread = std::thread::Builder::new()
            .name("inferpool-heart".into())
            .stack_size(STACK)
            .spawn(move || beat.run())?;
        drop(gate);
        Ok(Self { thread, stop })
    }

    pub(crate) fn join(self) {
        self.stop.ring();
        // The thread can't panic on anything a peer sends; if it did, there is nothing to save.
        let _ = self.thread.join();
    }
}

impl Beat {
    fn run(self) {
        let fds = [
            Some(self.control.as_fd()),
            Some(self.host.as_fd()),
            Some(self.stop.as_fd()),
        ];
        loop {
            match platform::wait(fds, None, None) {
                Ok([_, _, true]) => return,
                Ok([_, true, _]) => platform::exit_now(HOST_DIED),
                Ok(_) => self.serve(),
                Err(Error::Interrupted) => {}
                Err(_) => platform::exit_now(HOST_DIED),
            }
        }
    }

    fn serve(&self) {
        let mut buffer = [0; SIZE];
        loop {
            match platform::receive_datagram(self.control.as_fd(), &mut buffer) {
                Ok(Datagram::Received(length)) => self.answer(buffer.get(..length)),
                Ok(Datagram::Nothing) => return,
                Ok(Datagram::Closed) | Err(_) => platform::exit_now(HOST_DIED),
            }
        }
    }

    /// Answers one datagram. What makes no sense is counted and dropped.
    fn answer(&self, datagram: Option<&[u8]>) {
        let message = datagram.map(Control::from_wire);
        let (answer, nonce) = match message {
            Some(Ok((Control::Ping, nonce))) => (Control::Pong(self.progress()), nonce),
            Some(Ok((Control::Shutdown, nonce))) => {
                self.vitals.shutdown.store(true, Ordering::Relaxed);
                for bell in &self.bells {
                    bell.ring();
                }
                (Control::Ack, nonce)
            }
            _ => {
                self.vitals
                    .unexpected_control
                    .fetch_add(1, Ordering::Relaxed);
                // The dispatch loop logs it.
                if let Some(bell) = self.bells.first() {
                    bell.ring();
                }
                return;
            }
        };
        match platform::send_datagram(self.control.as_fd(), &answer.to_wire(nonce)) {
            // A host that asks and never reads loses answers, nothing else.
            Ok(()) | Err(Errno::AGAIN) => {}
            Err(_) => platform::exit_now(HOST_DIED),
        }
    }

    fn progress(&self) -> Progress {
        Progress {
            requests: self.vitals.requests.load(Ordering::Relaxed),
            replies: self.vitals.replies.load(Ordering::Relaxed),
            finished: self.vitals.finished.load(Ordering::Relaxed),
            polls: self.vitals.polls.load(Ordering::Relaxed),
        }
    }
}
