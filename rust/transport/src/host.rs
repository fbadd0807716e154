//! The host's end of a channel.
//!
//! There is no thread behind it. Whoever waits first reads the reply ring for everybody (the
//! *leader*) and hands frames of other calls to their owners; the others sleep on a doorbell of
//! their own. A leader that leaves wakes one of them, who leads on. An event loop never leads: it
//! watches the descriptors and looks at the ring when one of them is readable.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError};
use std::time::Instant;

use crate::assemble::{Assembler, fragment};
use crate::body::Gather;
use crate::calls::{Calls, End, Event, Outcome, SlotUpdate};
use crate::control::{Control, SIZE};
use crate::error::{Error, Result, Violation};
use crate::notify::Notifier;
use crate::platform::{self, Datagram, Doorbell};
use crate::record::{Header, Kind, LAST};
use crate::ring::{Consumer, Producer, nudge};
use crate::segment::{RingMemory, Segment};
use crate::spin::{HOST_PATIENCE, Spinner};
use crate::sync::{AtomicU64, Ordering};
use crate::worker::Inherited;
use crate::{Patience, Settings, lock};

/// Control messages read before the ring gets a look again.
const CONTROL_BATCH: usize = 64;
/// Records read before whoever waits gets a look at its own call.
const RECORD_BATCH: usize = 64;

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

/// A request on its way, and how much of it is out.
#[derive(Debug, Default)]
pub struct Outgoing {
    opened: Option<(u64, u32)>,
    at: Option<usize>,
    done: bool,
}

impl Outgoing {
    /// Id of the call, once there is one.
    pub fn call(&self) -> Option<u64> {
        self.opened.map(|(call, _)| call)
    }
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

    /// Sends a request, or as much of it as fits now; `true` when it is all out. Called again with
    /// the same arguments it goes on. `waiter` is told when the call has something, and when there
    /// may be space again.
    pub fn try_send(
        &self,
        outgoing: &mut Outgoing,
        body: &Gather<'_>,
        waiter: Option<&Arc<Notifier>>,
    ) -> Result<bool> {
        self.check_owner()?;
        if body.total() > self.frame_limit {
            return Err(Error::TooLarge {
                size: body.total(),
                limit: self.frame_limit,
            });
        }
        if outgoing.done {
            return Ok(true);
        }
        let Some((call, slot)) = self.open_call(outgoing, waiter)? else {
            return Ok(false);
        };
        let mut sender = lock(&self.sender);
        let pushed = self.push_records(&mut sender, outgoing, (call, slot), body);
        drop(sender);
        match pushed {
            Err(Error::Protocol(violation)) => Err(self.violated(violation)),
            other => other,
        }
    }

    fn push_records(
        &self,
        sender: &mut Producer<RingMemory>,
        outgoing: &mut Outgoing,
        (call, slot): (u64, u32),
        body: &Gather<'_>,
    ) -> Result<bool> {
        if !self.push_withdrawals(sender)? {
            return Ok(false);
        }
        let total = body.total();
        while !outgoing.done {
            let (flags, window) = fragment(total, sender.max_body(), outgoing.at.unwrap_or(0));
            let end = window.end;
            let header = request_header(call, slot, flags, window.len(), total);
            // Held over the first push, so that neither a cancellation nor an answer comes between
            // the record and the note that it is out.
            let calls = lock(&self.calls);
            if let Some(end) = calls.end() {
                return Err(end.into());
            }
            let first = outgoing.at.is_none();
            if first && !calls.is_undecided(call) {
                return Err(Error::Cancelled);
            }
            let guard = first.then_some(calls);
            let pushed = sender.push(&header, |write| body.copy(window, write))?;
            let Some(ring) = pushed else { return Ok(false) };
            if let Some(mut calls) = guard {
                calls.mark_sent(call);
            }
            if ring {
                self.ring(&self.request_bell);
            }
            outgoing.at = Some(end);
            outgoing.done = end == total;
        }
        self.tally.frames_sent.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// Tells the worker of requests that were given up half sent: their last record is empty.
    fn push_withdrawals(&self, sender: &mut Producer<RingMemory>) -> Result<bool> {
        loop {
            let mut calls = lock(&self.calls);
            let Some(&(call, slot)) = calls.withdrawn.last() else {
                return Ok(true);
            };
            let header = request_header(call, slot, LAST, 0, 0);
            let Some(ring) = sender.push(&header, |_| ())? else {
                return Ok(false);
            };
            calls.withdrawn.pop();
            drop(calls);
            if ring {
                self.ring(&self.request_bell);
            }
        }
    }

    fn open_call(
        &self,
        outgoing: &mut Outgoing,
        waiter: Option<&Arc<Notifier>>,
    ) -> Result<Option<(u64, u32)>> {
        if outgoing.opened.is_none() {
            self.notice_death()?;
            let mut calls = lock(&self.calls);
            outgoing.opened = calls.open()?;
            if let Some((call, slot)) = outgoing.opened {
                self.segment.slot(slot).consumed.store(0, Ordering::Relaxed);
                calls.set_waiter(call, waiter);
            }
        }
        Ok(outgoing.opened)
    }

    /// Waits until [`Self::try_send`] may get further.
    pub fn wait_to_send(&self, outgoing: &Outgoing, patience: Patience<'_>) -> Result<()> {
        self.check_owner()?;
        let me = Notifier::of_thread()?;
        let waited = self.wait_for(
            &me,
            patience,
            &mut || {
                // Before the look, so that a leader who leaves after it knows of this waiter.
                lock(&self.calls).add_space_waiter(&me);
                self.may_send(outgoing).then_some(())
            },
            &mut || Ok(!self.await_space(outgoing, &me)?),
        );
        lock(&self.calls).remove_space_waiter(&me);
        self.hand_over(&me);
        waited
    }

    /// Registers `waiter` to be told when there may be space; `false` when there is some already.
    pub fn await_space(&self, outgoing: &Outgoing, waiter: &Arc<Notifier>) -> Result<bool> {
        lock(&self.calls).add_space_waiter(waiter);
        if outgoing.opened.is_none() {
            return Ok(!self.may_send(outgoing));
        }
        let mut sender = lock(&self.sender);
        let length = sender.max_body();
        let armed = sender.arm(|ring| ring.fits(length));
        drop(sender);
        let armed = armed.map_err(|violation| self.violated(violation))?;
        if !armed {
            // The flag was everybody's, and now it is down.
            lock(&self.calls).notify_space_waiters();
        }
        Ok(armed && !self.may_send(outgoing))
    }

    /// Whether [`Self::try_send`] would get further or fail.
    fn may_send(&self, outgoing: &Outgoing) -> bool {
        let calls = lock(&self.calls);
        match outgoing.call() {
            _ if calls.end().is_some() => true,
            None => calls.has_free_slot(),
            Some(call) if outgoing.at.is_none() && !calls.is_undecided(call) => true,
            Some(_) => {
                drop(calls);
                let mut sender = lock(&self.sender);
                let length = sender.max_body();
                sender.fits(length).unwrap_or(true)
            }
        }
    }

    /// Gives a request up that is not all out. Once part of it is with the worker, the worker has
    /// to be told, as soon as there is space for that.
    pub fn withdraw(&self, outgoing: &Outgoing) {
        if let (Some((call, slot)), Some(_), false) = (outgoing.opened, outgoing.at, outgoing.done)
        {
            lock(&self.calls).withdrawn.push((call, slot));
        }
        if let Some(call) = outgoing.call() {
            self.abandon(call);
        }
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

    /// Looks at everything once without waiting, and leaves the ring armed so that the next frame
    /// makes a descriptor readable. For event loops; `false` once the channel has ended.
    pub fn look(&self, me: &Arc<Notifier>) -> Result<bool> {
        self.check_owner()?;
        // A leader, if there is one, hands frames over and wakes this loop before it leaves.
        if let Some(mut reader) = self.try_lead() {
            let looked = self.look_until_armed(&mut reader, me);
            drop(reader);
            self.hand_over(me);
            looked?;
        }
        Ok(lock(&self.calls).end().is_none())
    }

    fn look_until_armed(&self, reader: &mut Reader, me: &Arc<Notifier>) -> Result<()> {
        let now = Instant::now();
        self.react(
            reader,
            me,
            Patience::Park {
                until: Some(now),
                gate: None,
            },
        )?;
        loop {
            while self.pump(reader, me)? {}
            if lock(&self.calls).end().is_some() || self.arm(reader)? {
                return Ok(());
            }
        }
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

    /// Waits for `goal`, which is asked again after everything that happens. `skip_park` runs
    /// before each sleep and can call it off. The caller registers before, and afterwards first
    /// takes that back and then calls [`Self::hand_over`], however this ends.
    fn wait_for<T>(
        &self,
        me: &Arc<Notifier>,
        patience: Patience<'_>,
        goal: &mut dyn FnMut() -> Option<T>,
        skip_park: &mut dyn FnMut() -> Result<bool>,
    ) -> Result<T> {
        loop {
            if let Some(got) = goal() {
                return Ok(got);
            }
            if let Some(reader) = self.try_lead() {
                return self.lead(reader, me, patience, goal, skip_park);
            }
            // Somebody leads. It looks for other waiters after it has unlocked, and this one was
            // registered before it tried the lock, so one of the two always notices the other.
            let Patience::Park { until, gate } = patience else {
                return Err(Error::WouldPark);
            };
            if skip_park()? {
                continue;
            }
            let [rung] = platform::wait([Some(me.as_fd())], until, gate)?;
            if !rung {
                return goal().ok_or(Error::TimedOut);
            }
            me.drain();
        }
    }

    fn lead<T>(
        &self,
        mut reader: MutexGuard<'_, Reader>,
        me: &Arc<Notifier>,
        patience: Patience<'_>,
        goal: &mut dyn FnMut() -> Option<T>,
        skip_park: &mut dyn FnMut() -> Result<bool>,
    ) -> Result<T> {
        let reader = &mut *reader;
        loop {
            let more = self.pump(reader, me)?;
            if let Some(got) = goal() {
                return Ok(got);
            }
            if more {
                continue;
            }
            let Patience::Park { until, .. } = patience else {
                let Reader { ring, spinner, .. } = &mut *reader;
                if spinner.spin(|| ring.is_ready()) {
                    continue;
                }
                return Err(Error::WouldPark);
            };
            if skip_park()? || !self.arm(reader)? {
                continue;
            }
            self.tally.parks.fetch_add(1, Ordering::Relaxed);
            let woken = self.react(reader, me, patience);
            reader.ring.disarm();
            if !woken? && until.is_some_and(|until| until <= Instant::now()) {
                return goal().ok_or(Error::TimedOut);
            }
        }
    }

    fn arm(&self, reader: &mut Reader) -> Result<bool> {
        reader
            .ring
            .arm()
            .map_err(|violation| self.violated(violation))
    }

    fn try_lead(&self) -> Option<MutexGuard<'_, Reader>> {
        match self.reader.try_lock() {
            Ok(reader) => Some(reader),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// After this thread stopped reading the ring: if nobody else does, somebody who waits must.
    fn hand_over(&self, me: &Arc<Notifier>) {
        let calls = lock(&self.calls);
        if calls.has_other_waiter(me) && self.try_lead().is_some() {
            calls.wake_successor(me);
        }
    }

    /// Takes up to a batch of records off the ring; `true` when there may be more.
    fn pump(&self, reader: &mut Reader, me: &Arc<Notifier>) -> Result<bool> {
        self.take_records(reader, me)
            .map_err(|violation| self.violated(violation))
    }

    fn take_records(&self, reader: &mut Reader, me: &Arc<Notifier>) -> Result<bool, Violation> {
        for _ in 0..RECORD_BATCH {
            let Some(record) = reader.ring.peek()? else {
                return Ok(false);
            };
            {
                let calls = lock(&self.calls);
                if calls.end().is_some() {
                    return Ok(false);
                }
                calls.admit(&record.header)?;
            }
            let frame = reader.assembler.accept(&reader.ring, &record)?;
            if reader.ring.release(record) {
                self.ring(&self.space_bell);
            }
            if let Some(frame) = frame {
                self.tally.frames_received.fetch_add(1, Ordering::Relaxed);
                lock(&self.calls).deliver(frame, me)?;
            }
        }
        Ok(true)
    }

    /// Sleeps as far as `patience` goes, then deals with what woke it; `false` when nothing did.
    fn react(
        &self,
        reader: &mut Reader,
        me: &Arc<Notifier>,
        patience: Patience<'_>,
    ) -> Result<bool> {
        let Patience::Park { until, gate } = patience else {
            return Err(Error::WouldPark);
        };
        let fds = [
            Some(self.bell.as_fd()),
            reader.control_open.then(|| self.control.as_fd()),
            self.death.get().map(AsFd::as_fd),
            Some(me.as_fd()),
        ];
        let [rung, control, dead, own] = platform::wait(fds, until, gate)?;
        if rung {
            self.bell.drain();
            lock(&self.calls).notify_space_waiters();
        }
        if own && !me.is_loop() {
            me.drain();
        }
        if control {
            self.read_control(reader, me)?;
        }
        if dead {
            // What the worker committed before it died still counts.
            while self.pump(reader, me)? {}
            self.finish(End::PeerDied);
        }
        Ok(rung || control || dead || own)
    }

    fn read_control(&self, reader: &mut Reader, me: &Arc<Notifier>) -> Result<()> {
        let mut buffer = [0; SIZE];
        for _ in 0..CONTROL_BATCH {
            let datagram = match platform::receive_datagram(self.control.as_fd(), &mut buffer)? {
                Datagram::Received(length) => buffer.get(..length),
                Datagram::Nothing => return Ok(()),
                Datagram::Closed => {
                    // A worker without its control socket is as good as dead; if the process
                    // lives on, whoever owns it ends it.
                    reader.control_open = false;
                    while self.pump(reader, me)? {}
                    self.finish(End::PeerDied);
                    return Ok(());
                }
            };
            let answered = datagram
                .ok_or(Violation::Control)
                .and_then(Control::from_wire);
            let accepted = answered.and_then(|(message, nonce)| {
                let outcome = match message {
                    Control::Pong(progress) => Outcome::Pong(progress),
                    Control::Ack => Outcome::Acknowledged,
                    Control::Ping | Control::Shutdown => return Err(Violation::Control),
                };
                lock(&self.calls).answer(nonce, outcome, me)
            });
            accepted.map_err(|violation| self.violated(violation))?;
        }
        Ok(())
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

fn request_header(call: u64, slot: u32, flags: u16, length: usize, total: usize) -> Header {
    Header {
        // A record is at most a quarter of a ring of at most 2 GiB.
        length: length as u32,
        kind: Kind::Request,
        flags,
        call,
        sequence: 0,
        slot,
        total: total as u64,
    }
}
