//! The worker's classes.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use inferpool_transport::body::Gather;
use inferpool_transport::record::Kind;
use inferpool_transport::{Inherited, Patience, ReplyPort, Worker};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::abort::PyAbortToken;
use crate::event::parts;
use crate::python::{CallTimeout, Parts, Raised, SENT_AT_ONCE, deadline, patiently, settings};

/// The worker's end of a channel.
#[pyclass(frozen, name = "WorkerChannel", module = "inferpool._transport")]
pub struct PyWorkerChannel(Arc<Worker>);

#[pymethods]
impl PyWorkerChannel {
    #[new]
    #[pyo3(signature = (fds, *, host_pid, frame_limit, wait))]
    fn new(fds: [i32; 4], host_pid: i32, frame_limit: usize, wait: &str) -> PyResult<Self> {
        let settings = settings(frame_limit, wait)?;
        if fds.iter().any(|&fd| fd < 0) {
            return Err(PyValueError::new_err("descriptors must not be negative"));
        }
        // SAFETY: the caller hands over descriptors that the process inherited for this purpose.
        let [segment, control, bell, space_bell] =
            fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let inherited = Inherited {
            segment,
            control,
            bell,
            space_bell,
        };
        Ok(Self(
            Worker::attach(inherited, host_pid, settings).map_err(Raised::from)?,
        ))
    }

    #[pyo3(signature = (timeout=None))]
    fn receive(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<PyRequest>> {
        let frame = if timeout == Some(0.0) {
            self.0.poll().map_err(Raised::from)?
        } else {
            let attempt = |patience: Patience<'_>| self.0.receive(patience);
            match patiently(py, deadline(timeout)?, attempt) {
                Err(error) if error.is_instance_of::<CallTimeout>(py) => None,
                received => received?,
            }
        };
        let Some(frame) = frame else { return Ok(None) };
        let port = ReplyPort::new(Arc::clone(&self.0), &frame.header);
        let parts = parts(py, frame)?;
        let abort = PyOnceLock::new();
        Ok(Some(PyRequest { port, parts, abort }))
    }

    #[getter]
    fn shutting_down(&self) -> bool {
        self.0.is_shutting_down()
    }

    #[getter]
    fn unexpected_control(&self) -> u64 {
        self.0.unexpected_control()
    }

    #[getter]
    fn abort(&self) -> PyAbortToken {
        self.0.abort_token().into()
    }

    fn shut_down(&self) {
        self.0.shut_down();
    }

    fn join_heartbeat(&self, py: Python<'_>) {
        py.detach(|| self.0.join_heartbeat());
    }
}

/// One request, and where its answers go.
#[pyclass(frozen, name = "Request", module = "inferpool._transport")]
pub struct PyRequest {
    port: ReplyPort,
    #[pyo3(get)]
    parts: Py<PyAny>,
    /// Made when it is first asked for, and kept: native code may hold its address.
    abort: PyOnceLock<Py<PyAbortToken>>,
}

#[pymethods]
impl PyRequest {
    #[getter]
    fn call(&self) -> u64 {
        self.port.call()
    }

    #[getter]
    fn abort(&self, py: Python<'_>) -> PyResult<Py<PyAbortToken>> {
        let make = || Py::new(py, PyAbortToken::from(self.port.abort_token()));
        Ok(self.abort.get_or_try_init(py, make)?.clone_ref(py))
    }

    #[getter]
    fn cancelled(&self) -> bool {
        self.port.is_cancelled()
    }

    fn send(&self, py: Python<'_>, parts: Parts) -> PyResult<()> {
        parts.with(py, |body| self.send_frame(py, Kind::Data, body))
    }

    fn try_send(&self, py: Python<'_>, parts: Parts) -> PyResult<bool> {
        parts.with(py, |body| match self.port.try_send(Kind::Data, body) {
            Some(sent) => Ok(sent.map(|()| true).map_err(Raised::from)?),
            None => Ok(false),
        })
    }

    fn fail(&self, py: Python<'_>, parts: Parts) -> PyResult<()> {
        parts.with(py, |body| self.send_frame(py, Kind::Error, body))
    }

    fn end(&self, py: Python<'_>) -> PyResult<()> {
        self.send_frame(py, Kind::End, &Gather::empty())
    }
}

impl PyRequest {
    fn send_frame(&self, py: Python<'_>, kind: Kind, body: &Gather<'_>) -> PyResult<()> {
        if body.total() <= SENT_AT_ONCE
            && let Some(sent) = self.port.try_send(kind, body)
        {
            return Ok(sent.map_err(Raised::from)?);
        }
        patiently(py, None, |patience| self.port.send(kind, body, patience))
    }
}
