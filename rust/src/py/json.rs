//! JSON from Python objects, straight into a buffer: no intermediate `str`, no call into Python for the usual types.

use std::fmt::Write as _;

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};

use crate::engine::error::{Error, Kind};

/// Containers inside each other: far more than data needs, far less than the smallest thread's stack holds.
const DEPTH: usize = 200;
/// Characters of a key shown in a message.
const SHOWN: usize = 40;

/// Why a value can't be encoded, and the way to it, innermost part first.
struct Refusal {
    reason: String,
    path: Vec<Step>,
}

enum Step {
    Key(String),
    Index(usize),
}

impl Refusal {
    fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), path: Vec::new() }
    }

    fn inside(mut self, step: Step) -> Self {
        self.path.push(step);
        self
    }
}

impl Refusal {
    /// What is wrong, and where in `what`.
    fn message(&self, what: &str) -> String {
        let mut message = what.to_owned();
        for step in self.path.iter().rev() {
            match step {
                Step::Key(key) if is_name(key) => message.extend([".", key]),
                Step::Key(key) => {
                    let shown: String = key.chars().take(SHOWN).collect();
                    message.extend(["[", &format!("{shown:?}"), "]"]);
                }
                Step::Index(n) => message.extend(["[", &n.to_string(), "]"]),
            }
        }
        message.extend([": ", &self.reason]);
        message
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Error::new(Kind::Payload, refusal.message("payload"))
    }
}

/// Reads well behind a dot.
fn is_name(key: &str) -> bool {
    let is_letter = |c: char| c.is_alphabetic() || c == '_';
    key.len() <= SHOWN && key.starts_with(is_letter) && key.chars().all(|c| is_letter(c) || c.is_numeric())
}

/// Appends `value` as compact JSON in UTF-8; on an error `out` holds a part of it. Stops soon after `limit` bytes.
pub(crate) fn encode(value: &Bound<'_, PyAny>, out: &mut Vec<u8>, limit: usize) -> Result<(), Error> {
    let end = out.len().saturating_add(limit);
    write_value(value, out, end, 0)?;
    crate::engine::produce::task::check_payload(out.len() > end, limit)
}

/// As `encode`, of what a handler returned: whether it is over the limit is for the caller to see. The error is its text.
pub(crate) fn encode_result(value: &Bound<'_, PyAny>, limit: usize) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(64);
    write_value(value, &mut out, limit, 0).map_err(|refusal| refusal.message("result"))?;
    Ok(out)
}

fn write_value(value: &Bound<'_, PyAny>, out: &mut Vec<u8>, end: usize, depth: usize) -> Result<(), Refusal> {
    // Exact types first: a comparison of pointers each.
    if let Ok(text) = value.cast_exact::<PyString>() {
        return write_text(text, out);
    }
    if let Ok(int) = value.cast_exact::<PyInt>() {
        return write_int(int, out);
    }
    if let Ok(dict) = value.cast_exact::<PyDict>() {
        return write_dict(dict, out, end, depth);
    }
    if value.is_none() {
        out.extend_from_slice(b"null");
        return Ok(());
    }
    if let Ok(bool) = value.cast_exact::<PyBool>() {
        out.extend_from_slice(if bool.is_true() { b"true" } else { b"false" });
        return Ok(());
    }
    if let Ok(float) = value.cast_exact::<PyFloat>() {
        return write_float(float.value(), out);
    }
    if let Ok(list) = value.cast_exact::<PyList>() {
        return write_list(list.iter(), out, end, depth);
    }
    if let Ok(tuple) = value.cast_exact::<PyTuple>() {
        return write_list(tuple.iter(), out, end, depth);
    }
    // Subclasses count as what they are made of, as in the standard library: enums of str and int, named tuples, ordered dicts.
    if let Ok(text) = value.cast::<PyString>() {
        write_text(text, out)
    } else if let Ok(int) = value.cast::<PyInt>() {
        write_int(int, out)
    } else if let Ok(float) = value.cast::<PyFloat>() {
        write_float(float.value(), out)
    } else if let Ok(dict) = value.cast::<PyDict>() {
        write_dict(dict, out, end, depth)
    } else if let Ok(list) = value.cast::<PyList>() {
        write_list(list.iter(), out, end, depth)
    } else if let Ok(tuple) = value.cast::<PyTuple>() {
        write_list(tuple.iter(), out, end, depth)
    } else {
        write_model(value, out, end, depth)
    }
}

/// Instances of models (dataclasses and the like): Python says what they consist of.
fn write_model(value: &Bound<'_, PyAny>, out: &mut Vec<u8>, end: usize, depth: usize) -> Result<(), Refusal> {
    check_depth(depth)?;
    let module = value.py().import("fastq._models");
    let plain = module.and_then(|m| m.getattr("to_plain")).and_then(|f| f.call1((value,)));
    match plain {
        Ok(plain) => write_value(&plain, out, end, depth + 1),
        Err(e) => Err(Refusal::new(e.value(value.py()).to_string())),
    }
}

fn type_name(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "this object".to_owned(), |name| name.to_string())
}

fn write_dict(dict: &Bound<'_, PyDict>, out: &mut Vec<u8>, end: usize, depth: usize) -> Result<(), Refusal> {
    check_depth(depth)?;
    out.push(b'{');
    let mut is_first = true;
    for (key, value) in dict.iter() {
        if !is_first {
            out.push(b',');
        }
        is_first = false;
        let Ok(text) = key.cast::<PyString>() else {
            return Err(Refusal::new(format!("a key is {}, but JSON has only str", type_name(&key))));
        };
        write_text(text, out)?;
        out.push(b':');
        if let Err(e) = write_value(&value, out, end, depth + 1) {
            return Err(e.inside(Step::Key(text.to_string_lossy().into_owned())));
        }
        if out.len() > end {
            break;
        }
    }
    out.push(b'}');
    Ok(())
}

fn write_list<'py>(
    values: impl Iterator<Item = Bound<'py, PyAny>>,
    out: &mut Vec<u8>,
    end: usize,
    depth: usize,
) -> Result<(), Refusal> {
    check_depth(depth)?;
    out.push(b'[');
    for (n, value) in values.enumerate() {
        if n > 0 {
            out.push(b',');
        }
        write_value(&value, out, end, depth + 1).map_err(|e| e.inside(Step::Index(n)))?;
        if out.len() > end {
            break;
        }
    }
    out.push(b']');
    Ok(())
}

fn check_depth(depth: usize) -> Result<(), Refusal> {
    if depth < DEPTH {
        return Ok(());
    }
    Err(Refusal::new(format!("more than {DEPTH} containers inside each other, or one that holds itself")))
}

fn write_text(text: &Bound<'_, PyString>, out: &mut Vec<u8>) -> Result<(), Refusal> {
    let Ok(text) = text.to_str() else {
        return Err(Refusal::new("a str holds a lone surrogate, which UTF-8 can't"));
    };
    out.push(b'"');
    let mut rest = text.as_bytes();
    while let Some(at) = first_escaped(rest) {
        out.extend_from_slice(&rest[..at]);
        write_escape(rest[at], out);
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
    out.push(b'"');
    Ok(())
}

fn is_escaped(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

/// Where the first byte is that JSON wants escaped. Sixteen at a time, which the compiler turns into vector instructions.
fn first_escaped(text: &[u8]) -> Option<usize> {
    let mut chunks = text.chunks_exact(16);
    let mut at = 0;
    for chunk in &mut chunks {
        if chunk.iter().fold(false, |found, &b| found | is_escaped(b)) {
            break;
        }
        at += 16;
    }
    text[at..].iter().position(|&b| is_escaped(b)).map(|n| at + n)
}

fn write_escape(byte: u8, out: &mut Vec<u8>) {
    let short = match byte {
        b'"' => b'"',
        b'\\' => b'\\',
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        0x08 => b'b',
        0x0c => b'f',
        _ => {
            let hex = b"0123456789abcdef";
            let (high, low) = (hex[usize::from(byte >> 4)], hex[usize::from(byte & 15)]);
            out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
            return;
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

fn write_int(int: &Bound<'_, PyInt>, out: &mut Vec<u8>) -> Result<(), Refusal> {
    if let Ok(value) = int.extract::<i64>() {
        write_i64(value, out);
        return Ok(());
    }
    // `int.__repr__`, since a subclass (an enum) may show itself differently. Python refuses numbers of thousands of digits.
    let digits = int.py().get_type::<PyInt>().call_method1("__repr__", (int,));
    match digits.and_then(|digits| Ok(digits.cast_into::<PyString>()?.to_string())) {
        Ok(digits) => {
            out.extend_from_slice(digits.as_bytes());
            Ok(())
        }
        Err(_) => Err(Refusal::new("an int has more digits than Python converts (sys.set_int_max_str_digits)")),
    }
}

fn write_i64(value: i64, out: &mut Vec<u8>) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut left = value.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + u8::try_from(left % 10).unwrap_or(0);
        left /= 10;
        if left == 0 {
            break;
        }
    }
    if value < 0 {
        out.push(b'-');
    }
    out.extend_from_slice(&digits[at..]);
}

fn write_float(value: f64, out: &mut Vec<u8>) -> Result<(), Refusal> {
    if !value.is_finite() {
        return Err(Refusal::new(format!(
            "{} is not a number that JSON has",
            if value.is_nan() { "NaN" } else { "infinity" }
        )));
    }
    // Rust's debug form is the shortest that reads back as the same number, and always shows that it is no integer.
    let mut text = Text(out);
    write!(text, "{value:?}").map_err(|_| Refusal::new("a float can't be written"))
}

/// `fmt::Write` into bytes.
struct Text<'a>(&'a mut Vec<u8>);

impl std::fmt::Write for Text<'_> {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        self.0.extend_from_slice(s.as_bytes());
        Ok(())
    }
}
