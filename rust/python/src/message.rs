//! Messages of one plain value, as most are, to msgpack and back without a detour through Python:
//! `[kind, payload]`, where the payload is None, a bool, int, float, str or bytes.
//!
//! The format is <https://github.com/msgpack/msgpack/blob/master/spec.md>, and what comes out is
//! what msgspec makes of the same values; `tests/test_codec.py` compares the two.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyFloat, PyInt, PyString, PyTuple};
use smallvec::SmallVec;

const PAIR: u8 = 0x92;
const NIL: u8 = 0xc0;
const FALSE: u8 = 0xc2;
const TRUE: u8 = 0xc3;
const BIN: u8 = 0xc4;
const FLOAT: u8 = 0xcb;
const UINT: u8 = 0xcc;
const INT: u8 = 0xd0;
const STR: u8 = 0xd9;
const FIXSTR: u8 = 0xa0;

/// An encoded message; short ones need no memory of their own.
pub type Message = SmallVec<[u8; 128]>;

/// Encodes a pair of kind and plain payload.
pub fn encode(pair: &Bound<'_, PyTuple>) -> PyResult<Message> {
    let (kind, payload): (Bound<'_, PyString>, Bound<'_, PyAny>) = pair.extract()?;
    let mut message = Message::new();
    message.push(PAIR);
    put_text(&mut message, &kind)?;
    if let Ok(bytes) = payload.cast_exact::<PyBytes>() {
        put_sized(&mut message, BIN, bytes.as_bytes())?;
    } else if let Ok(text) = payload.cast_exact::<PyString>() {
        put_text(&mut message, text)?;
    } else if payload.is_none() {
        message.push(NIL);
    } else if let Ok(value) = payload.cast_exact::<PyBool>() {
        message.push(if value.is_true() { TRUE } else { FALSE });
    } else if let Ok(number) = payload.cast_exact::<PyFloat>() {
        message.push(FLOAT);
        message.extend(number.value().to_be_bytes());
    } else if let Ok(number) = payload.cast_exact::<PyInt>() {
        put_int(&mut message, number)?;
    } else {
        return Err(PyTypeError::new_err("the payload of a pair must be plain"));
    }
    Ok(message)
}

fn put_text(message: &mut Message, text: &Bound<'_, PyString>) -> PyResult<()> {
    let text = text
        .to_str()
        .map_err(|error| PyValueError::new_err(format!("payload cannot be encoded: {error}")))?;
    if text.len() < 32 {
        // Below 32, so the cast keeps the value.
        message.push(FIXSTR | text.len() as u8);
        message.extend_from_slice(text.as_bytes());
        return Ok(());
    }
    put_sized(message, STR, text.as_bytes())
}

/// `first` is the code for a length of one byte; those for two and four follow it.
fn put_sized(message: &mut Message, first: u8, bytes: &[u8]) -> PyResult<()> {
    let length = u32::try_from(bytes.len())
        .map_err(|_| PyValueError::new_err("payload cannot be encoded: longer than 4 GiB"))?;
    let width = if length < 1 << 8 {
        0
    } else {
        1 + u8::from(length >= 1 << 16)
    };
    message.push(first + width);
    message.extend_from_slice(&length.to_be_bytes()[4 - (1 << width)..]);
    message.extend_from_slice(bytes);
    Ok(())
}

fn put_int(message: &mut Message, number: &Bound<'_, PyInt>) -> PyResult<()> {
    let Ok(value) = number.extract::<i64>() else {
        let value: u64 = number.extract().map_err(|_| {
            PyValueError::new_err("payload cannot be encoded: an int above 64 bits")
        })?;
        message.push(UINT + 3);
        message.extend(value.to_be_bytes());
        return Ok(());
    };
    let bytes = value.to_be_bytes();
    match value {
        // The value itself, in two's complement.
        -32..0x80 => message.push(bytes[7]),
        0x80.. => {
            let width = [8, 16, 32]
                .iter()
                .filter(|bits| value >> **bits != 0)
                .count();
            message.push(UINT + width as u8);
            message.extend_from_slice(&bytes[8 - (1 << width)..]);
        }
        ..-32 => {
            let width = [7, 15, 31]
                .iter()
                .filter(|bits| value >> **bits != -1)
                .count();
            message.push(INT + width as u8);
            message.extend_from_slice(&bytes[8 - (1 << width)..]);
        }
    }
    Ok(())
}

/// Decodes a pair of kind and plain payload; `None` when the message is anything else.
pub fn decode<'py>(py: Python<'py>, message: &[u8]) -> Option<Bound<'py, PyTuple>> {
    let mut rest = Rest(message);
    if rest.byte()? != PAIR {
        return None;
    }
    let code = rest.byte()?;
    let kind = PyString::new(py, rest.text(code)?);
    let code = rest.byte()?;
    let payload = match code {
        NIL => py.None().into_bound(py),
        FALSE | TRUE => PyBool::new(py, code == TRUE).to_owned().into_any(),
        BIN..=0xc6 => {
            let length = rest.unsigned(code - BIN)?;
            PyBytes::new(py, rest.take(length.try_into().ok()?)?).into_any()
        }
        FLOAT => PyFloat::new(py, f64::from_bits(rest.unsigned(3)?)).into_any(),
        UINT..=0xcf => PyInt::new(py, rest.unsigned(code - UINT)?).into_any(),
        INT..=0xd3 => {
            let width = code - INT;
            let unused = 64 - (8 << width);
            // Shifted up and down again, which extends the sign.
            let value = (rest.unsigned(width)? << unused).cast_signed() >> unused;
            PyInt::new(py, value).into_any()
        }
        0x00..0x80 | 0xe0.. => PyInt::new(py, code.cast_signed()).into_any(),
        _ => PyString::new(py, rest.text(code)?).into_any(),
    };
    if rest.0.is_empty() {
        PyTuple::new(py, [kind.into_any(), payload]).ok()
    } else {
        None
    }
}

/// What of a message is still to be read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    /// A number of `1 << width` bytes.
    fn unsigned(&mut self, width: u8) -> Option<u64> {
        let bytes = self.take(1 << width)?;
        Some(
            bytes
                .iter()
                .fold(0, |value, &byte| value << 8 | u64::from(byte)),
        )
    }

    fn text(&mut self, code: u8) -> Option<&'a str> {
        let length = match code {
            FIXSTR..=0xbf => u64::from(code & 0x1f),
            STR..=0xdb => self.unsigned(code - STR)?,
            _ => return None,
        };
        std::str::from_utf8(self.take(length.try_into().ok()?)?).ok()
    }
}
