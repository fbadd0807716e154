//! How answers arrive: who reads the ring, who sleeps, and who is woken.

use std::os::fd::AsFd;
use std::sync::{Arc, MutexGuard, TryLockError};
use std::time::Instant;

use crate::calls::{End, Outcome};
use crate::control::{Control, SIZE};
use crate::error::{Error, Result, Violation};
use crate::host::{Host, Reader};
use crate::notify::Notifier;
use crate::platform::{self, Datagram};
use crate::sync::Ordering;
use crate::{Patience, lock};

/// Control messages read before the ring gets a look again.
const CONTROL_BATCH: usize = 64;
/// Records read before whoever waits gets a look at its own call.
const RECORD_BATCH: usize = 64;

impl Host {
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
    pub(super) fn hand_over(&self, me: &Arc<Notifier>) {
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
}
