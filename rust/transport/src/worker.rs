//! The worker's end of a channel.

mod reply;

pub use reply::ReplyPort;

#[cfg(not(loom))]
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::abort::{AbortToken, Vitals};
use crate::assemble::{Assembler, Frame};
use crate::error::{Error, Result, Violation};
use crate::heartbeat::Heartbeat;
use crate::platform::{self, Bell, ControlSocket, Doorbell, Rings, SignalGate};
use crate::record::Kind;
use crate::ring::{Consumer, Producer, consumed};
use crate::segment::{RingMemory, SLOTS, Segment};
use crate::spin::{CAP, Parting, Spinner, WORKER_PATIENCE};
use crate::sync::{Mutex, Ordering};
use crate::{Patience, Settings, lock};

/// The descriptors that a worker inherits.
#[cfg(not(loom))]
#[derive(Debug)]
pub struct Inherited {
    /// The shared segment.
    pub segment: OwnedFd,
    /// The control socket.
    pub control: OwnedFd,
    /// Wakes the host, and is rung by it for a new request.
    pub bell: OwnedFd,
    /// Rung by the host for space, credit and cancellation.
    pub space_bell: OwnedFd,
}

struct Outbox {
    ring: Producer<RingMemory>,
    spinner: Spinner,
}

struct Inbox {
    ring: Consumer<RingMemory>,
    assembler: Assembler,
    spinner: Spinner,
    parting: Parting,
    seen_unexpected: u64,
}

/// See the module's text. One thread receives; any thread may send.
pub struct Worker {
    segment: Segment,
    reply_memory: RingMemory,
    vitals: Arc<Vitals>,
    inbox: Mutex<Inbox>,
    outbox: Mutex<Outbox>,
    bell: Doorbell,
    space_bell: Doorbell,
    wakers: Arc<Wakers>,
    heartbeat: Mutex<Option<Heartbeat>>,
    /// Kept open after the heartbeat has ended: the host takes its closing for the end, and last
    /// frames may still follow.
    control: Arc<ControlSocket>,
    frame_limit: usize,
}

/// Wake the worker's own threads.
#[derive(Debug)]
pub(crate) struct Wakers {
    /// Whoever waits for a request.
    pub(crate) inbox: Bell,
    /// Whoever waits to send. Rung for good on shutdown.
    outbox: Bell,
}

impl Wakers {
    pub(crate) fn new() -> Result<Self> {
        let (inbox, outbox) = (Bell::new()?, Bell::new()?);
        Ok(Self { inbox, outbox })
    }

    pub(crate) fn shut_down(&self, vitals: &Vitals) {
        vitals.shutdown.store(true, Ordering::Relaxed);
        self.inbox.ring();
        self.outbox.ring();
    }
}

impl Worker {
    /// Attaches to what the host handed down and starts the heartbeat thread, which ends the
    /// process when the host, `host_pid`, dies.
    #[cfg(not(loom))]
    pub fn attach(inherited: Inherited, host_pid: i32, settings: Settings) -> Result<Arc<Self>> {
        let segment = Segment::open(inherited.segment.as_fd())?;
        let control = ControlSocket::from_fd(inherited.control);
        let bells = [inherited.bell, inherited.space_bell].map(Doorbell::from_fd);
        let worker = Self::assemble(segment, control, bells, settings)?;
        worker.start_heartbeat(host_pid)?;
        Ok(worker)
    }

    pub(crate) fn assemble(
        segment: Segment,
        control: ControlSocket,
        [bell, space_bell]: [Doorbell; 2],
        settings: Settings,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            inbox: Mutex::new(Inbox {
                ring: Consumer::new(segment.requests()),
                assembler: Assembler::new(settings.frame_limit),
                spinner: Spinner::new(settings.wait, CAP, WORKER_PATIENCE),
                parting: Parting::new(),
                seen_unexpected: 0,
            }),
            outbox: Mutex::new(Outbox {
                ring: Producer::new(segment.replies()),
                spinner: Spinner::new(settings.wait, CAP, WORKER_PATIENCE),
            }),
            reply_memory: segment.replies(),
            segment,
            vitals: Arc::default(),
            bell,
            space_bell,
            wakers: Arc::new(Wakers::new()?),
            heartbeat: Mutex::new(None),
            control: Arc::new(control),
            frame_limit: settings.frame_limit,
        }))
    }

    pub(crate) fn start_heartbeat(&self, host_pid: i32) -> Result<()> {
        let control = Arc::clone(&self.control);
        let (vitals, wakers) = (Arc::clone(&self.vitals), Arc::clone(&self.wakers));
        let heartbeat = Heartbeat::start(control, host_pid, vitals, wakers)?;
        *lock(&self.heartbeat) = Some(heartbeat);
        Ok(())
    }

    /// The next request if it is there already. Never waits.
    pub fn poll(&self) -> Result<Option<Frame>> {
        self.take_request(&mut lock(&self.inbox))
    }

    /// The next request, or `None` when there is something else to look at: the worker is to shut
    /// down, or [`Self::unexpected_control`] has grown.
    pub fn receive(&self, patience: Patience<'_>) -> Result<Option<Frame>> {
        let mut inbox = lock(&self.inbox);
        loop {
            let unexpected = self.unexpected_control();
            if self.is_shutting_down() || unexpected != inbox.seen_unexpected {
                inbox.seen_unexpected = unexpected;
                return Ok(None);
            }
            if let Some(frame) = self.take_request(&mut inbox)? {
                return Ok(Some(frame));
            }
            let Inbox {
                ring,
                spinner,
                parting,
                ..
            } = &mut *inbox;
            match patience {
                Patience::Spin => {
                    let ready = || ring.is_ready() || self.is_shutting_down();
                    let part = || parting.part_from(self.host_cpu());
                    if !spinner.spin(ready, part, || consumed(&self.reply_memory)) {
                        return Err(Error::WouldPark);
                    }
                }
                Patience::Park { until, gate } => {
                    if inbox.ring.arm()? {
                        let woken = park(&self.bell, &self.wakers.inbox, until, gate);
                        inbox.ring.disarm();
                        woken?;
                    }
                }
            }
        }
    }

    fn host_cpu(&self) -> Option<usize> {
        let cpu = self.segment.host_cpu().load(Ordering::Relaxed);
        usize::try_from(cpu).ok()?.checked_sub(1)
    }

    fn take_request(&self, inbox: &mut Inbox) -> Result<Option<Frame>> {
        while let Some(record) = inbox.ring.peek()? {
            let header = record.header;
            if header.kind != Kind::Request || header.slot >= SLOTS || header.sequence != 0 {
                return Err(Violation::Kind.into());
            }
            let frame = inbox.assembler.accept(&inbox.ring, &record)?;
            if inbox.ring.release(record) {
                self.bell.ring();
            }
            if frame.is_some() {
                self.vitals.requests.fetch_add(1, Ordering::Relaxed);
                return Ok(frame);
            }
        }
        Ok(None)
    }

    /// Whether the host asked the worker to end.
    pub fn is_shutting_down(&self) -> bool {
        self.vitals.shutdown.load(Ordering::Relaxed)
    }

    /// Control messages so far that made no sense and were dropped.
    pub fn unexpected_control(&self) -> u64 {
        self.vitals.unexpected_control.load(Ordering::Relaxed)
    }

    /// Ends the worker from within, as if the host had asked.
    pub fn shut_down(&self) {
        self.wakers.shut_down(&self.vitals);
    }

    /// Set when the worker shuts down.
    pub fn abort_token(&self) -> AbortToken {
        AbortToken::of_worker(Arc::clone(&self.vitals))
    }

    /// Ends the heartbeat thread and waits for it.
    pub fn join_heartbeat(&self) {
        if let Some(heartbeat) = lock(&self.heartbeat).take() {
            heartbeat.join();
        }
    }
}

/// Sleeps until a doorbell is rung from outside or from within.
fn park(
    bell: &Doorbell,
    waker: &Bell,
    until: Option<Instant>,
    gate: Option<&SignalGate>,
) -> Result<()> {
    let [rung, woken] = platform::wait([Some(bell.source()), Some(waker.source())], until, gate)?;
    if rung && bell.drain() == Rings::Closed {
        return Err(Error::PeerDied);
    }
    if woken {
        waker.drain();
    }
    if rung || woken {
        Ok(())
    } else {
        Err(Error::TimedOut)
    }
}
