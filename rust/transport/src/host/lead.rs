//! How answers arrive: who reads the ring, who sleeps, and who is woken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::calls::{Calls, End, Outcome};
use crate::control::{Control, SIZE};
use crate::error::{Error, Result, Violation};
use crate::host::{Host, Reader};
use crate::notify::Notifier;
use crate::platform::{self, Datagram, Death, Rings, SignalGate};
use crate::record::{FIRST, LAST};
use crate::ring::{Memory, asleep_before, consumed};
use crate::spin::{Budget, LONGEST};
use crate::sync::{Ordering, TryLockGuard};
use crate::{Patience, lock};

/// Control messages read before the ring gets a look again.
const CONTROL_BATCH: usize = 64;
/// The longest sleep of a leader, after which it makes sure that no wake-up was lost.
const RESCUE: Duration = Duration::from_secs(1);
/// For how long a worker may be seen asleep in front of a request before it is rung again.
const OVERSLEPT: Duration = Duration::from_secs(2);
/// Bodies up to this size are copied under the lock of the calls' table.
const COPIED_LOCKED: usize = 4096;
/// Records read before whoever waits gets a look at its own call.
const RECORD_BATCH: usize = 64;
/// And bytes, about: a batch of long records takes longer.
const BYTE_BATCH: usize = 256 * 1024;
/// Batches read before an event loop gets to the rest of its work: a fraction of a millisecond.
const BATCHES_AT_A_LOOK: usize = 16;

impl Host {
    /// Looks at everything once without waiting, and leaves the ring armed so that the next frame
    /// makes a descriptor readable, or whoever waits rung if there is more than a loop should read at
    /// a time.
    /// For event loops; `false` once the channel has ended.
    pub fn look(&self, me: &Arc<Notifier>) -> Result<bool> {
        self.check_owner()?;
        // First: a leader that leaves after it was found here rings again, and that must not be
        // taken for a ring that came before.
        me.drain();
        // A leader, if there is one, hands frames over and wakes this loop before it leaves.
        if let Some(mut reader) = self.try_lead() {
            let armed = self.look_until_armed(&mut reader, me);
            drop(reader);
            // Whoever waits has to go on where this look stopped, this loop too if nobody else does.
            let stopped = matches!(armed, Ok(false));
            self.hand_over(if stopped { None } else { Some(me) });
            armed?;
        }
        Ok(lock(&self.calls).end().is_none())
    }

    /// `false` when there was more than a loop should read at a time.
    fn look_until_armed(&self, reader: &mut Reader, me: &Arc<Notifier>) -> Result<bool> {
        self.react(reader, me, Some(Instant::now()), None)?;
        self.rescue_worker(reader);
        for _ in 0..BATCHES_AT_A_LOOK {
            let more = self.pump(reader, Some(me));
            if !more && (lock(&self.calls).end().is_some() || self.arm(reader)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits for `goal`, which is asked again after everything that happens. `skip_park` runs
    /// before each sleep and can call it off. The caller registers before, and afterwards first
    /// takes that back and then calls [`Self::hand_over`], however this ends.
    pub(super) fn wait_for<T>(
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
            self.tally.parks.add(1);
            let [rung] = platform::wait([Some(me.source())], until, gate)?;
            if !rung {
                return goal().ok_or(Error::TimedOut);
            }
            me.drain();
        }
    }

    fn lead<T>(
        &self,
        mut reader: TryLockGuard<'_, Reader>,
        me: &Arc<Notifier>,
        patience: Patience<'_>,
        goal: &mut dyn FnMut() -> Option<T>,
        skip_park: &mut dyn FnMut() -> Result<bool>,
    ) -> Result<T> {
        let reader = &mut *reader;
        let mut budget = Budget::new(LONGEST);
        loop {
            let more = self.pump(reader, Some(me));
            if let Some(got) = goal() {
                return Ok(got);
            }
            let (until, gate) = match patience {
                Patience::Park { until, gate } => (until, gate),
                Patience::Spin => {
                    if (more || self.spin_for_record(reader)) && !budget.is_spent() {
                        continue;
                    }
                    return Err(Error::WouldPark);
                }
            };
            if more || skip_park()? || !self.arm(reader) {
                // Frames for others may never stop coming.
                if until.is_some_and(|until| until <= Instant::now()) {
                    return Err(Error::TimedOut);
                }
                continue;
            }
            self.tally.parks.add(1);
            let slice = Instant::now() + RESCUE;
            let sleep_until = until.map_or(slice, |until| until.min(slice));
            let woken = self.react(reader, me, Some(sleep_until), gate);
            if matches!(woken, Ok(false)) {
                self.rescue(reader);
            }
            reader.ring.disarm();
            woken?;
            if until.is_some_and(|until| until <= Instant::now()) {
                self.pump(reader, Some(me));
                return goal().ok_or(Error::TimedOut);
            }
        }
    }

    /// After a sleep that only the clock ended, with the flag still up unless somebody took it down:
    /// counts what should have ended the sleep, and does what was missed.
    fn rescue(&self, reader: &mut Reader) {
        let overslept = || asleep_before(&self.reply_memory).is_some();
        // Twice: a worker that has just published is about to take the flag down.
        if overslept() {
            std::thread::yield_now();
            self.tally.rescued_waits.add(overslept().into());
        }
        self.rescue_worker(reader);
    }

    /// Rings a worker that sleeps in front of a request. Waits are shorter than that takes to be
    /// sure of, so what was seen stays with the reader. Models have no clock for it.
    fn rescue_worker(&self, reader: &mut Reader) {
        if cfg!(loom) {
            return;
        }
        let asleep = asleep_before(&self.request_memory).map(|read| (read, Instant::now()));
        match (asleep, reader.unread) {
            (Some((read, now)), Some((before, since))) if read == before => {
                if now.duration_since(since) < OVERSLEPT {
                    return;
                }
                self.tally.rescued_waits.add(1);
                self.ring(&self.bell);
            }
            _ => {}
        }
        reader.unread = asleep;
    }

    /// Spins until there is something to read, as long as that pays.
    fn spin_for_record(&self, reader: &mut Reader) -> bool {
        let Reader { ring, spinner, .. } = reader;
        let won = spinner.spin(
            || ring.is_ready(),
            || self.note_cpu(),
            // It changes while a request is copied out.
            || consumed(&self.request_memory),
        );
        self.tally.spins_won.add_alone(won.into());
        won
    }

    /// Tells the worker where this side waits, so that it can go elsewhere.
    pub(super) fn note_cpu(&self) {
        let cpu = platform::current_cpu().map_or(0, |cpu| cpu as u64 + 1);
        self.segment.host_cpu().store(cpu, Ordering::Relaxed);
    }

    /// Whether this side may sleep now. Not if there is something to read.
    fn arm(&self, reader: &mut Reader) -> bool {
        self.tally.arms.add(1);
        reader.ring.arm().unwrap_or_else(|violation| {
            self.violated(violation);
            false
        })
    }

    pub(super) fn try_lead(&self) -> Option<TryLockGuard<'_, Reader>> {
        self.reader.try_lock()
    }

    /// After this thread stopped reading the ring: if nobody else does, somebody who waits must.
    pub(super) fn hand_over(&self, me: Option<&Arc<Notifier>>) {
        self.hand_over_locked(&lock(&self.calls), me);
    }

    /// As [`Self::hand_over`], under the lock of the calls' table.
    pub(super) fn hand_over_locked(&self, calls: &Calls, me: Option<&Arc<Notifier>>) {
        if calls.has_other_waiter(me) && self.try_lead().is_some() {
            calls.wake_successor(me);
        }
    }

    /// Takes up to a batch of records off the ring; `true` when there may be more.
    pub(super) fn pump(&self, reader: &mut Reader, me: Option<&Arc<Notifier>>) -> bool {
        if !reader.ring.is_ready() {
            return false;
        }
        // 584 years fit.
        let heard = self.created.elapsed().as_nanos() as u64;
        self.heard.store(heard, Ordering::Relaxed);
        self.take_records(reader, me).unwrap_or_else(|violation| {
            self.violated(violation);
            false
        })
    }

    /// Takes what has arrived: no more than the ring holds, since a worker may go on for ever.
    pub(super) fn pump_what_is_there(&self, reader: &mut Reader, me: Option<&Arc<Notifier>>) {
        let end = reader.ring.position() + self.reply_memory.capacity() as u64;
        while self.pump(reader, me) && reader.ring.position() < end {}
    }

    fn take_records(
        &self,
        reader: &mut Reader,
        me: Option<&Arc<Notifier>>,
    ) -> Result<bool, Violation> {
        let mut calls = lock(&self.calls);
        let mut bytes = 0;
        for _ in 0..RECORD_BATCH {
            if calls.end().is_some() {
                return Ok(false);
            }
            let Some(record) = reader.ring.peek()? else {
                return Ok(false);
            };
            calls.admit(&record.header)?;
            let length = record.header.length as usize;
            let kept = (length <= COPIED_LOCKED).then_some(calls);
            let frame = reader.assembler.accept(&reader.ring, &record)?;
            if reader.ring.release(record) {
                self.ring(&self.space_bell);
            }
            let flags = record.header.flags;
            self.tally
                .fragments_received
                .add_alone((flags != FIRST | LAST).into());
            calls = kept.unwrap_or_else(|| lock(&self.calls));
            if let Some(frame) = frame {
                self.tally.frames_received.add_alone(1);
                self.tally.bytes_received.add_alone(frame.body.len() as u64);
                if calls.end().is_none() {
                    calls.deliver(frame, me)?;
                }
            }
            bytes += length;
            if bytes >= BYTE_BATCH {
                break;
            }
        }
        Ok(true)
    }

    /// Sleeps, then deals with what ended that; `false` when nothing did.
    fn react(
        &self,
        reader: &mut Reader,
        me: &Arc<Notifier>,
        until: Option<Instant>,
        gate: Option<&SignalGate>,
    ) -> Result<bool> {
        let sources = [
            Some(self.bell.source()),
            reader.control_open.then(|| self.control.source()),
            self.death.get().map(Death::source),
            Some(me.source()),
        ];
        let [rung, control, dead, own] = platform::wait(sources, until, gate)?;
        if rung {
            self.take_rings(reader, me);
        }
        if own && !me.is_loop() {
            me.drain();
        }
        if control {
            self.read_control(reader, me)?;
        }
        if dead {
            self.finish_after_reading(reader, me);
        }
        Ok(rung || control || dead || own)
    }

    fn take_rings(&self, reader: &mut Reader, me: &Arc<Notifier>) {
        match self.bell.drain() {
            Rings::Taken(count) => reader.rings += count as u64,
            Rings::Closed => self.finish_after_reading(reader, me),
        }
        if reader.rings > self.tally.arms.get() {
            self.violated(Violation::Doorbell);
        }
        lock(&self.calls).notify_space_waiters();
    }

    /// The worker is gone, or as good as that; what it committed before still counts.
    fn finish_after_reading(&self, reader: &mut Reader, me: &Arc<Notifier>) {
        self.pump_what_is_there(reader, Some(me));
        self.finish(End::PeerDied);
    }

    fn read_control(&self, reader: &mut Reader, me: &Arc<Notifier>) -> Result<()> {
        let mut buffer = [0; SIZE];
        for _ in 0..CONTROL_BATCH {
            let datagram = match self.control.receive(&mut buffer)? {
                Datagram::Received(length) => buffer.get(..length),
                Datagram::Nothing => return Ok(()),
                Datagram::Closed => {
                    // If the process lives on, whoever owns it ends it.
                    reader.control_open = false;
                    self.finish_after_reading(reader, me);
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
                lock(&self.calls).answer(nonce, outcome, Some(me))
            });
            if let Err(violation) = accepted {
                self.violated(violation);
                return Ok(());
            }
        }
        Ok(())
    }
}
