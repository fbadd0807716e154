//! The host's end of a channel.
//!
//! There is no thread behind it. Whoever waits first reads the reply ring for everybody (the
//! *leader*) and hands frames of other calls to their owners; the others sleep on a doorbell of
//! their own. A leader that leaves wakes one of them, who leads on. An event loop never leads: it
//! watches the descriptors and looks at the ring when one of them is readable.

mod lead;
mod send;

pub use send::Outgoing;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use crate::assemble::Assembler;
use crate::calls::{Calls, End, Event, SlotUpdate};
use crate::control::Control;
use crate::error::{Error, Result, Violation};
use crate::notify::Notifier;
use crate::platform::{self, Doorbell};
use crate::ring::{Consumer, Producer, nudge};
use crate::segment::{RingMemory, Segment};
use crate::spin::{HOST_PATIENCE, Spinner};
use crate::sync::{AtomicU64, Ordering};
use crate::worker::Inherited;
use crate::{Patience, Settings, lock};

/// Counts of what the channel did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Requests sent.
    pub frames_sent: u64,
    /// Frames received.
    pub frames_received: u64,
    /// Sleeps of a leader.
    pub parks: u64,
    /// Doorbells rung for the worker.
    pub rings: u64,
    /// Frames that arrived for calls given up before, and were dropped.
    pub dropped_late: u64,
}

#[derive(Debug, Default)]
struct Tally {
    frames_sent: AtomicU64,
    frames_received: AtomicU64,
    parks: AtomicU64,
    rings: AtomicU64,
}

struct Reader {
    ring: Consumer<RingMemory>,
    assembler: Assembler,
    spinner: Spinner,
    control_open: bool,
}

/// See the module's text. Every method may be called from any thread.
pub struct Host {
    owner: u32,
    segment: Segment,
    reply_memory: RingMemory,
    sender: Mutex<Producer<RingMemory>>,
    reader: Mutex<Reader>,
    calls: Mutex<Calls>,
    bell: Doorbell,
    request_bell: Doorbell,
    space_bell: Doorbell,
    control: OwnedFd,
    /// What the worker is to inherit, until it has.
    worker_end: Mutex<Option<(OwnedFd, OwnedFd)>>,
    death: OnceLock<OwnedFd>,
    tally: Tally,
    frame_limit: usize,
}

impl Host {
    /// Creates a channel with rings of `capacity` bytes and nobody at the other end yet.
    pub fn create(capacity: usize, settings: Settings) -> Result<Arc<Self>> {
        let (segment, file) = Segment::create(capacity)?;
        let (control, worker_control) = platform::control_pair()?;
        Ok(Arc::new(Self {
            owner: std::process::id(),
            reply_memory: segment.replies(),
            sender: Mutex::new(Producer::new(segment.requests())),
            reader: Mutex::new(Reader {
                ring: Consumer::new(segment.replies()),
                assembler: Assembler::new(settings.frame_limit),
                spinner: Spinner::new(settings.wait, HOST_PATIENCE),
                control_open: true,
            }),
            segment,
            calls: Mutex::new(Calls::new()),
            bell: Doorbell::new()?,
            request_bell: Doorbell::new()?,
            space_bell: Doorbell::new()?,
            control,
            worker_end: Mutex::new(Some((file, worker_control))),
            death: OnceLock::new(),
            tally: Tally::default(),
            frame_limit: settings.frame_limit,
        }))
    }

    /// The descriptors for the worker to inherit, in the order of [`Inherited`], until
    /// [`Self::watch`] closes those that only the worker may keep.
    pub fn with_inheritance<T>(&self, use_fds: impl FnOnce([BorrowedFd<'_>; 5]) -> T) -> Result<T> {
        let ends = lock(&self.worker_end);
        let (file, control) = ends.as_ref().ok_or(Error::Closed)?;
        Ok(use_fds([
            file.as_fd(),
            control.as_fd(),
            self.bell.as_fd(),
            self.request_bell.as_fd(),
            self.space_bell.as_fd(),
        ]))
    }

    /// The same descriptors, duplicated, for a worker in this process.
    pub fn inheritance(&self) -> Result<Inherited> {
        let [segment, control, host_bell, request_bell, space_bell] =
            self.with_inheritance(|fds| fds.map(|fd| fd.try_clone_to_owned()))?;
        Ok(Inherited {
            segment: segment?,
            control: control?,
            host_bell: host_bell?,
            request_bell: request_bell?,
            space_bell: space_bell?,
        })
    }

    /// Starts watching the process that inherited the other end, whose death ends the channel.
    pub fn watch(&self, pid: i32) -> Result<()> {
        self.check_owner()?;
        let death = platform::watch_process(pid)?;
        // Only the worker may keep its end open, or its closing would not be seen.
        lock(&self.worker_end).take();
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

    /// Asks the heartbeat a question; its answer is the returned call's outcome.
    pub fn ask(&self, question: Control, waiter: Option<&Arc<Notifier>>) -> Result<u64> {
        self.check_owner()?;
        self.notice_death()?;
        let nonce = {
            let mut calls = lock(&self.calls);
            let nonce = calls.open_control()?;
            calls.set_waiter(nonce, waiter);
            nonce
        };
        let sent = platform::send_datagram(self.control.as_fd(), &question.to_wire(nonce));
        if let Err(errno) = sent {
            lock(&self.calls).abandon(nonce);
            return Err(match errno {
                rustix::io::Errno::AGAIN => Error::QueueFull,
                _ => Error::PeerDied,
            });
        }
        Ok(nonce)
    }

    /// What happened to the call next, if anything did. Never waits.
    pub fn poll(&self, call: u64) -> Result<Option<Event>> {
        self.check_owner()?;
        Ok(self.take(call))
    }

    /// Waits for what happens to the call next.
    pub fn wait(&self, call: u64, patience: Patience<'_>) -> Result<Event> {
        self.check_owner()?;
        let me = Notifier::of_thread()?;
        lock(&self.calls).set_waiter(call, Some(&me));
        let waited = self.wait_for(&me, patience, &mut || self.take(call), &mut || Ok(false));
        // In this order: a leader must not choose as its successor one that leaves too.
        lock(&self.calls).set_waiter(call, None);
        self.hand_over(&me);
        waited
    }

    fn take(&self, call: u64) -> Option<Event> {
        self.update(|calls| {
            calls
                .take(call)
                .map_or((None, None), |(event, update)| (Some(event), update))
        })
    }

    /// Cancels the call: it ends here at once, and the worker is told. Does nothing to a call that
    /// has its outcome.
    pub fn cancel(&self, call: u64) {
        if std::process::id() == self.owner {
            self.update(|calls| ((), calls.cancel(call)));
        }
    }

    /// Cancels the call and forgets it: nobody will ask for its outcome.
    pub fn abandon(&self, call: u64) {
        if std::process::id() == self.owner {
            self.update(|calls| ((), calls.abandon(call)));
        }
    }

    /// Changes a call and tells the worker what it has to know of that.
    fn update<T>(&self, change: impl FnOnce(&mut Calls) -> (T, Option<SlotUpdate>)) -> T {
        let mut calls = lock(&self.calls);
        let (result, update) = change(&mut calls);
        let Some(update) = update else { return result };
        // Before unlocking: afterwards the slot may be another call's.
        match update {
            SlotUpdate::Consumed { slot, bytes } => {
                self.segment
                    .slot(slot)
                    .consumed
                    .store(bytes, Ordering::Release);
            }
            SlotUpdate::Cancelled { slot, call } => {
                self.segment
                    .slot(slot)
                    .cancelled
                    .store(call, Ordering::Release);
            }
        }
        drop(calls);
        if nudge(&self.reply_memory) {
            self.ring(&self.space_bell);
        }
        result
    }

    /// Ends the channel on this side and asks the worker to end. Calls without an outcome are lost,
    /// before the worker hears of it and could answer something else.
    pub fn close(&self) {
        if std::process::id() == self.owner {
            lock(&self.calls).finish(End::Closed);
            // Nobody reads the answer, and a worker that can't be told is for its owner to end.
            let question = Control::Shutdown.to_wire(0);
            let _ = platform::send_datagram(self.control.as_fd(), &question);
        }
    }

    /// How the channel ended, if it has.
    pub fn end(&self) -> Option<End> {
        lock(&self.calls).end()
    }

    /// Waits until the worker process has ended; `false` when the time came first. A worker that
    /// was never watched counts as ended.
    pub fn wait_death(&self, until: Option<Instant>) -> Result<bool> {
        self.check_owner()?;
        let Some(death) = self.death.get() else {
            return Ok(true);
        };
        let [dead] = platform::wait([Some(death.as_fd())], until, None)?;
        Ok(dead)
    }

    /// Calls that have no outcome yet.
    pub fn in_flight(&self) -> Vec<u64> {
        lock(&self.calls).undecided()
    }

    /// Counts so far.
    pub fn counters(&self) -> Counters {
        Counters {
            frames_sent: self.tally.frames_sent.load(Ordering::Relaxed),
            frames_received: self.tally.frames_received.load(Ordering::Relaxed),
            parks: self.tally.parks.load(Ordering::Relaxed),
            rings: self.tally.rings.load(Ordering::Relaxed),
            dropped_late: lock(&self.calls).dropped_late,
        }
    }

    fn check_owner(&self) -> Result<()> {
        if std::process::id() == self.owner {
            Ok(())
        } else {
            Err(Error::Forked)
        }
    }

    fn ring(&self, bell: &Doorbell) {
        self.tally.rings.fetch_add(1, Ordering::Relaxed);
        bell.ring();
    }

    /// Before a new call: a worker that died unwatched must not take it.
    fn notice_death(&self) -> Result<()> {
        let Some(death) = self.death.get() else {
            return Ok(());
        };
        let [dead] = platform::wait([Some(death.as_fd())], Some(Instant::now()), None)?;
        if dead { Err(Error::PeerDied) } else { Ok(()) }
    }

    /// Ends the channel because of a violation, unless it has ended: what still arrives then may
    /// well be for calls that are forgotten.
    fn violated(&self, violation: Violation) -> Error {
        let mut calls = lock(&self.calls);
        calls.finish(End::Violated(violation));
        calls.end().map_or(Error::Protocol(violation), Error::from)
    }

    fn finish(&self, end: End) {
        lock(&self.calls).finish(end);
    }
}
