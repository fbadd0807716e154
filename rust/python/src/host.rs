//! The host's classes.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use inferpool_transport::control::Control;
use inferpool_transport::ring::is_valid_capacity;
use inferpool_transport::{Error, Event, Host, Notifier, Outgoing, Patience};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::event::{self, PyEvent, is_short_message, messages};
use crate::python::{Parts, Raised, SENT_AT_ONCE, deadline, patiently, settings};

/// The doorbell of an event loop.
#[pyclass(frozen, name = "LoopNotifier", module = "inferpool._transport")]
pub struct PyLoopNotifier(Arc<Notifier>);

#[pymethods]
impl PyLoopNotifier {
    #[classattr]
    const SPACE: u64 = Notifier::SPACE;

    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(Notifier::for_loop().map_err(Raised::from)?))
    }

    fn fileno(&self) -> i32 {
        std::os::fd::AsFd::as_fd(&*self.0).as_raw_fd()
    }

    fn take_ready(&self) -> Vec<u64> {
        self.0.take_ready()
    }
}

/// The host's end of a channel.
#[pyclass(frozen, name = "HostChannel", module = "inferpool._transport")]
pub struct PyHostChannel(Arc<Host>);

#[pymethods]
impl PyHostChannel {
    #[new]
    #[pyo3(signature = (*, ring_capacity, frame_limit, wait))]
    fn new(ring_capacity: usize, frame_limit: usize, wait: &str) -> PyResult<Self> {
        if !is_valid_capacity(ring_capacity) {
            return Err(PyValueError::new_err(format!(
                "ring_capacity must be a power of two from 128 to 2**31, not {ring_capacity}"
            )));
        }
        let host = Host::create(ring_capacity, settings(frame_limit, wait)?);
        Ok(Self(host.map_err(Raised::from)?))
    }

    fn worker_fds(&self) -> PyResult<[i32; 4]> {
        let fds = self.0.with_inheritance(|fds| fds.map(|fd| fd.as_raw_fd()));
        Ok(fds.map_err(Raised::from)?)
    }

    fn watch(&self, pid: i32) -> PyResult<()> {
        Ok(self.0.watch(pid).map_err(Raised::from)?)
    }

    fn descriptors(&self) -> Vec<i32> {
        self.0
            .descriptors()
            .iter()
            .map(AsRawFd::as_raw_fd)
            .collect()
    }

    #[pyo3(signature = (parts, notifier=None))]
    fn open(
        &self,
        py: Python<'_>,
        parts: Parts,
        notifier: Option<&PyLoopNotifier>,
    ) -> PyResult<PyCall> {
        let notifier = notifier.map(|notifier| &notifier.0);
        let mut outgoing = Outgoing::default();
        let sent = self.send_at_once(py, &mut outgoing, &parts, notifier)?;
        Ok(self.call(outgoing, sent, parts, notifier))
    }

    #[pyo3(signature = (parts, notifier=None))]
    fn ask(
        &self,
        py: Python<'_>,
        parts: Parts,
        notifier: Option<&PyLoopNotifier>,
    ) -> PyResult<Py<PyAny>> {
        let notifier = notifier.map(|notifier| &notifier.0);
        let mut outgoing = Outgoing::for_whole_answer();
        let sent = self.send_at_once(py, &mut outgoing, &parts, None)?;
        let Some(id) = outgoing.call().filter(|_| sent) else {
            self.0.withdraw(&outgoing);
            return Ok(py.None());
        };
        // The GIL is kept: to give it away and to get it back takes as long as the answer.
        if let Some(frame) = self.0.spin_for_answer(id).map_err(Raised::from)? {
            return event::parts(py, frame);
        }
        if let Some(notifier) = notifier {
            self.0.set_waiter(id, notifier);
        }
        let call = self.call(outgoing, sent, parts, notifier);
        Ok(Py::new(py, call)?.into_any())
    }

    #[pyo3(signature = (notifier=None))]
    fn ping(&self, notifier: Option<&PyLoopNotifier>) -> PyResult<PyCall> {
        let notifier = notifier.map(|notifier| Arc::clone(&notifier.0));
        let asked = self.0.ask(Control::Ping, notifier.as_ref());
        let state = CallState {
            unsent: None,
            sent: true,
            id: Some(asked.map_err(Raised::from)?),
            position: None,
            finished: false,
        };
        Ok(PyCall {
            host: Arc::clone(&self.0),
            notifier,
            state: Mutex::new(state),
            busy: false.into(),
        })
    }

    fn look(&self, py: Python<'_>, notifier: &PyLoopNotifier) -> PyResult<bool> {
        let notifier = &notifier.0;
        Ok(py.detach(|| self.0.look(notifier)).map_err(Raised::from)?)
    }

    fn cancel(&self, call: u64) {
        self.0.cancel(call);
    }

    fn close(&self) {
        self.0.close();
    }

    #[getter]
    fn ended(&self) -> PyResult<bool> {
        // No end: a forked child would go on to end the worker of its parent.
        self.0.check_owner().map_err(Raised::from)?;
        Ok(self.0.end().is_some())
    }

    #[pyo3(signature = (timeout=None))]
    fn wait_death(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let until = deadline(timeout)?;
        loop {
            match py.detach(|| self.0.wait_death(until)) {
                Err(Error::Interrupted) => py.check_signals()?,
                result => return Ok(result.map_err(Raised::from)?),
            }
        }
    }

    #[getter]
    fn reader_behind(&self) -> bool {
        self.0.is_reader_behind()
    }

    fn in_flight(&self) -> Vec<u64> {
        self.0.in_flight()
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, count) in self.0.counters().named() {
            dict.set_item(name, count)?;
        }
        Ok(dict)
    }
}

impl PyHostChannel {
    /// Sends a small request, if that takes no waiting; says whether it is out.
    fn send_at_once(
        &self,
        py: Python<'_>,
        outgoing: &mut Outgoing,
        parts: &Parts,
        notifier: Option<&Arc<Notifier>>,
    ) -> PyResult<bool> {
        parts.with(py, |body| {
            let small = body.total() <= SENT_AT_ONCE;
            Ok(small
                // What fails here fails in `send` again, which reports it.
                && self.0.try_send_at_once(outgoing, body, notifier)
                    .unwrap_or(false))
        })
    }

    fn call(
        &self,
        outgoing: Outgoing,
        sent: bool,
        parts: Parts,
        notifier: Option<&Arc<Notifier>>,
    ) -> PyCall {
        let state = CallState {
            id: outgoing.call(),
            position: outgoing.position(),
            unsent: if sent { None } else { Some((outgoing, parts)) },
            sent,
            finished: false,
        };
        PyCall {
            host: Arc::clone(&self.0),
            notifier: notifier.cloned(),
            state: Mutex::new(state),
            busy: false.into(),
        }
    }
}

/// Messages that are handed over together: enough to make little of what a hand-over costs, and few
/// enough to be a small part of a call's window.
const MESSAGES: usize = 128;

struct CallState {
    /// The request until it is all out, but while a thread is sending it.
    unsent: Option<(Outgoing, Parts)>,
    /// Whether it is all out.
    sent: bool,
    id: Option<u64>,
    /// Where the request's first record ends in the ring.
    position: Option<u64>,
    finished: bool,
}

/// One call.
#[pyclass(frozen, name = "Call", module = "inferpool._transport")]
pub struct PyCall {
    host: Arc<Host>,
    notifier: Option<Arc<Notifier>>,
    state: Mutex<CallState>,
    /// One thread at a time sends or waits.
    busy: std::sync::atomic::AtomicBool,
}

#[pymethods]
impl PyCall {
    #[getter]
    fn id(&self) -> u64 {
        self.state().id.unwrap_or(0)
    }

    #[getter]
    fn sent(&self) -> bool {
        self.state().sent
    }

    #[getter]
    fn taken(&self) -> bool {
        let state = self.state();
        // A worker that has only part of a request waits for the rest, or for its withdrawal.
        let position = state.position.filter(|_| state.sent);
        position.is_some_and(|position| self.host.has_taken(position))
    }

    fn is_over(&self, py: Python<'_>) -> PyResult<bool> {
        let Some(id) = self.state().id else {
            return Ok(true);
        };
        Ok(py.detach(|| self.host.is_over(id)).map_err(Raised::from)?)
    }

    /// Sends what fits now.
    fn try_send(&self, py: Python<'_>) -> PyResult<bool> {
        let _turn = self.take_turn()?;
        self.with_unsent(|outgoing, parts| {
            let waiter = self.notifier.as_ref();
            parts.with(py, |body| {
                let sent = py.detach(|| self.host.try_send(outgoing, body, waiter));
                Ok(sent.map_err(Raised::from)?)
            })
        })
        .map(|sent| sent.unwrap_or(true))
    }

    fn await_space(&self, py: Python<'_>) -> PyResult<bool> {
        let _turn = self.take_turn()?;
        let Some(waiter) = &self.notifier else {
            return Err(PyRuntimeError::new_err("this call has no event loop"));
        };
        self.with_unsent(|outgoing, _| {
            // A thread that sends may hold a lock for as long as the worker takes to read.
            let armed = py.detach(|| self.host.await_space(outgoing, waiter));
            Ok(armed.map_err(Raised::from)?)
        })
        .map(|armed| armed.unwrap_or(false))
    }

    #[pyo3(signature = (timeout=None))]
    fn send(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        let _turn = self.take_turn()?;
        let until = deadline(timeout)?;
        self.with_unsent(|outgoing, parts| {
            parts.with(py, |body| {
                patiently(py, until, |patience| {
                    loop {
                        let sent = self.host.try_send(outgoing, body, None);
                        // From here on another thread can cancel the call.
                        self.state().id = outgoing.call();
                        if sent? {
                            return Ok(());
                        }
                        self.host.wait_to_send(outgoing, patience)?;
                    }
                })
            })
        })?;
        Ok(())
    }

    fn poll(&self, py: Python<'_>) -> PyResult<Option<PyEvent>> {
        let _turn = self.take_turn()?;
        let Some(event) = self.host.poll(self.sent_id()?).map_err(Raised::from)? else {
            return Ok(None);
        };
        self.arrived(py, event).map(Some)
    }

    /// Short messages that have arrived, as one msgpack array; `None` when the next is none.
    fn poll_messages<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let _turn = self.take_turn()?;
        let frames = self
            .host
            .poll_frames(self.sent_id()?, MESSAGES, is_short_message)
            .map_err(Raised::from)?;
        messages(py, &frames)
    }

    /// Spins for an event as long as that pays; whether there is one.
    fn spin(&self, py: Python<'_>) -> PyResult<bool> {
        let _turn = self.take_turn()?;
        let id = self.sent_id()?;
        Ok(py.detach(|| self.host.spin(id)).map_err(Raised::from)?)
    }

    #[pyo3(signature = (timeout=None))]
    fn next(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<PyEvent> {
        let _turn = self.take_turn()?;
        let id = self.sent_id()?;
        // An item of a stream is often there already; then the GIL need not be given away.
        if let Some(event) = self.host.poll(id).map_err(Raised::from)? {
            return self.arrived(py, event);
        }
        let until = deadline(timeout)?;
        let event = patiently(py, until, |patience| self.host.wait(id, patience))?;
        self.arrived(py, event)
    }

    #[pyo3(signature = (timeout=None))]
    fn answer(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<Py<PyAny>>> {
        let _turn = self.take_turn()?;
        let id = self.sent_id()?;
        let attempt = |patience: Patience<'_>| self.host.wait_for_answer(id, patience);
        let Some(frame) = patiently(py, deadline(timeout)?, attempt)? else {
            return Ok(None);
        };
        self.state().finished = true;
        event::parts(py, frame).map(Some)
    }

    fn cancel(&self) {
        if let Some(id) = self.state().id {
            self.host.cancel(id);
        }
    }

    fn abandon(&self) {
        // Whoever waits for the call must be told, and gives it up later.
        let Ok(_turn) = self.take_turn() else {
            return self.cancel();
        };
        let mut state = self.state();
        if state.finished {
            return;
        }
        state.finished = true;
        match (&state.unsent, state.id) {
            (Some((outgoing, _)), _) => self.host.withdraw(outgoing),
            (None, Some(id)) => self.host.abandon(id),
            (None, None) => {}
        }
    }
}

impl PyCall {
    fn state(&self) -> std::sync::MutexGuard<'_, CallState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sent_id(&self) -> PyResult<u64> {
        let state = self.state();
        match state.id {
            Some(id) if !state.finished => Ok(id),
            _ => Err(PyRuntimeError::new_err("the call is not in flight")),
        }
    }

    fn arrived(&self, py: Python<'_>, event: Event) -> PyResult<PyEvent> {
        if matches!(event, Event::Done(_)) {
            self.state().finished = true;
        }
        PyEvent::from_event(py, event)
    }

    /// Takes the unsent request out while `send` works on it, so that no lock is held without the
    /// GIL, and puts it back if it is not all out. `None` if it was before.
    fn with_unsent<T>(
        &self,
        send: impl FnOnce(&mut Outgoing, &Parts) -> PyResult<T>,
    ) -> PyResult<Option<T>> {
        let Some((mut outgoing, parts)) = self.state().unsent.take() else {
            return Ok(None);
        };
        let result = send(&mut outgoing, &parts);
        let mut state = self.state();
        state.id = outgoing.call();
        state.position = outgoing.position();
        state.sent = outgoing.is_done();
        if !state.sent {
            state.unsent = Some((outgoing, parts));
        }
        result.map(Some)
    }

    fn take_turn(&self) -> PyResult<Turn<'_>> {
        if self.busy.swap(true, Ordering::Acquire) {
            return Err(PyRuntimeError::new_err(
                "another thread is waiting for this call",
            ));
        }
        Ok(Turn(self))
    }
}

impl Drop for PyCall {
    fn drop(&mut self) {
        self.abandon();
    }
}

struct Turn<'a>(&'a PyCall);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
    }
}
