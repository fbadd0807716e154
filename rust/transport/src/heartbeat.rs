//! The worker's heartbeat: a thread that answers the control socket whatever the model is doing.
//!
//! It never touches Python, so a handler that holds the GIL does not delay it. It sleeps until
//! the host asks something or dies; an idle worker's heartbeat uses no CPU.

use std::sync::Arc;

use crate::abort::Vitals;
use crate::control::{Control, Progress, SIZE};
use crate::error::{Error, Result};
use crate::platform::{self, Bell, ControlSocket, Datagram, Death, SignalGate};
use crate::sync::Ordering;
use crate::sync::thread::{Builder, JoinHandle};
use crate::worker::Wakers;

/// Exit status of a worker whose host died. Nobody is left to see it but a process listing.
const HOST_DIED: i32 = 113;
/// The thread's stack; it keeps a few hundred bytes.
const STACK: usize = 64 * 1024;

#[derive(Debug)]
pub(crate) struct Heartbeat {
    thread: JoinHandle<()>,
    stop: Arc<Bell>,
}

struct Beat {
    control: Arc<ControlSocket>,
    host: Death,
    stop: Arc<Bell>,
    vitals: Arc<Vitals>,
    wakers: Arc<Wakers>,
}

impl Heartbeat {
    /// Starts the thread.
    pub(crate) fn start(
        control: Arc<ControlSocket>,
        host_pid: i32,
        vitals: Arc<Vitals>,
        wakers: Arc<Wakers>,
    ) -> Result<Self> {
        let host = platform::watch_process(host_pid, &control)?;
        // The descriptor may name a stranger if the host died first and its id was reused.
        if !platform::is_parent(host_pid) {
            return Err(Error::PeerDied);
        }
        let stop = Arc::new(Bell::new()?);
        let beat = Beat {
            control,
            host,
            stop: Arc::clone(&stop),
            vitals,
            wakers,
        };
        // The new thread inherits the mask: signals are for the main thread.
        let gate = SignalGate::close();
        let thread = Builder::new()
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
            Some(self.control.source()),
            Some(self.host.source()),
            Some(self.stop.source()),
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
            match self.control.receive(&mut buffer) {
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
                self.wakers.shut_down(&self.vitals);
                (Control::Ack, nonce)
            }
            _ => {
                self.vitals
                    .unexpected_control
                    .fetch_add(1, Ordering::Relaxed);
                // The dispatch loop logs it.
                self.wakers.inbox.ring();
                return;
            }
        };
        match self.control.send(&answer.to_wire(nonce)) {
            // A host that asks and never reads loses answers, nothing else.
            Ok(()) | Err(Error::QueueFull) => {}
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
