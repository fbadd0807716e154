//! What arrives: events of a call, with their bodies as buffers.

use std::ffi::c_int;

use inferpool_transport::body;
use inferpool_transport::control::Progress;
use inferpool_transport::{Body, Error, Event, Frame, Outcome};
use pyo3::exceptions::{PyBufferError, PyMemoryError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyMemoryView, PySlice};

use crate::message;
use crate::python::Raised;

/// Received bytes, as a writable buffer.
#[pyclass(frozen, name = "Body", module = "inferpool._transport")]
pub struct PyBody(Body);

#[pymethods]
impl PyBody {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// # Safety
    /// `view` comes from the interpreter.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let body = &slf.get().0;
        let length = ffi::Py_ssize_t::try_from(body.len())
            .map_err(|_| PyBufferError::new_err("body too large for a buffer"))?;
        // SAFETY: the view holds a reference to `slf`, which keeps the bytes in place; nothing in
        // Rust reads them after they were handed to Python.
        let filled = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                body.shared_ptr().cast(),
                length,
                0,
                flags,
            )
        };
        if filled == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

/// A message of up to so many bytes is copied into a `bytes` object: that costs less than a view.
const SHORT_MESSAGE: usize = 4096;

/// What a frame's body holds: a short message of one plain value as that pair, anything else as a
/// list of its parts, which are views of the same memory, but for a short message.
pub fn parts(py: Python<'_>, frame: Frame) -> PyResult<Py<PyAny>> {
    let body = frame.body.as_slice();
    let ranges = body::parse(body).map_err(|violation| Raised::from(Error::from(violation)))?;
    if let [message] = &ranges[..]
        && message.len() <= SHORT_MESSAGE
        && let Some(pair) = message::decode(py, &body[message.clone()])
    {
        return Ok(pair.into_any().unbind());
    }
    let mut ranges = ranges.into_iter();
    let mut parts = Vec::with_capacity(ranges.len());
    if ranges
        .as_slice()
        .first()
        .is_some_and(|message| message.len() <= SHORT_MESSAGE)
    {
        parts.extend(
            ranges
                .next()
                .map(|range| PyBytes::new(py, &body[range]).into_any().unbind()),
        );
    }
    if ranges.len() > 0 {
        let body = frame
            .body
            .settled()
            .ok_or_else(|| PyMemoryError::new_err("no memory for a body"))?;
        let whole = PyMemoryView::from(Bound::new(py, PyBody(body))?.as_any())?;
        // Not `PySlice::new`, which leaks its bounds in PyO3 0.30.
        let slice = py.get_type::<PySlice>();
        for range in ranges {
            let bounds = slice.call1((range.start, range.end))?;
            parts.push(whole.get_item(bounds)?.unbind());
        }
    }
    Ok(PyList::new(py, parts)?.into_any().unbind())
}

/// Whether a frame is nothing but a short message.
pub fn is_short_message(frame: &Frame) -> bool {
    let body = frame.body.as_slice();
    body.len() <= SHORT_MESSAGE && matches!(body::parse(body).as_deref(), Ok([_]))
}

/// Messages that [`is_short_message`] accepted, as one msgpack array; `None` when there are none.
pub fn messages<'py>(py: Python<'py>, frames: &[Frame]) -> PyResult<Option<Bound<'py, PyBytes>>> {
    // Array 32: a marker and the number of items, big endian
    // (https://github.com/msgpack/msgpack/blob/master/spec.md#array-format-family).
    let Some(count) = u32::try_from(frames.len()).ok().filter(|&count| count > 0) else {
        return Ok(None);
    };
    let mut array = vec![0xdd];
    array.extend(count.to_be_bytes());
    for frame in frames {
        let body = frame.body.as_slice();
        let ranges = body::parse(body).map_err(|violation| Raised::from(Error::from(violation)))?;
        ranges
            .into_iter()
            .for_each(|range| array.extend(&body[range]));
    }
    Ok(Some(PyBytes::new(py, &array)))
}

/// How far a worker has come. Each count only grows.
#[pyclass(frozen, get_all, name = "Progress", module = "inferpool._transport")]
pub struct PyProgress {
    requests: u64,
    replies: u64,
    finished: u64,
    polls: u64,
}

impl From<Progress> for PyProgress {
    fn from(progress: Progress) -> Self {
        let Progress {
            requests,
            replies,
            finished,
            polls,
        } = progress;
        Self {
            requests,
            replies,
            finished,
            polls,
        }
    }
}

/// The next thing that happened to a call.
#[pyclass(frozen, get_all, name = "Event", module = "inferpool._transport")]
pub struct PyEvent {
    kind: &'static str,
    parts: Py<PyAny>,
    progress: Option<Py<PyProgress>>,
}

impl PyEvent {
    /// Converts an event; one that says that the channel ended becomes an error.
    pub fn from_event(py: Python<'_>, event: Event) -> PyResult<Self> {
        let plain = |kind| Self {
            kind,
            parts: PyList::empty(py).into_any().unbind(),
            progress: None,
        };
        Ok(match event {
            Event::Data(frame) => Self::with_parts(py, "data", frame)?,
            Event::Done(Outcome::Failed(frame)) => Self::with_parts(py, "error", frame)?,
            Event::Done(Outcome::Ended | Outcome::Acknowledged) => plain("end"),
            Event::Done(Outcome::Pong(progress)) => {
                let progress = Py::new(py, PyProgress::from(progress))?;
                Self {
                    kind: "pong",
                    parts: PyList::empty(py).into_any().unbind(),
                    progress: Some(progress),
                }
            }
            Event::Done(Outcome::Cancelled) => {
                return Err(Raised::from(Error::Cancelled).into());
            }
            Event::Done(Outcome::Lost(end)) => {
                return Err(Raised::from(Error::from(end)).into());
            }
        })
    }

    fn with_parts(py: Python<'_>, kind: &'static str, frame: Frame) -> PyResult<Self> {
        Ok(Self {
            kind,
            parts: parts(py, frame)?,
            progress: None,
        })
    }
}
