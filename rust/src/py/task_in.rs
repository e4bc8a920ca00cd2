//! A `fastq.Task` on its way in: its attributes are read, checked and encoded on the caller's thread.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyFloat, PyMemoryView, PyString, PyType};

use crate::engine::error::{Error, Kind};
use crate::engine::produce::copy::Batch;
use crate::engine::produce::task::{
    DELAY_LIMIT, Format, LaneKey, NewTask, OnConflict, PRIORITY_LIMIT, Scope, TokenRule, When, check_payload,
    check_text, refused,
};
use crate::engine::run_options::RunOptions;
use crate::py::{json, run_options};

/// Types and queues remembered in one call.
const MOST_LANES: usize = 10_000;

/// What a task may not be: an error with a class of `fastq.errors`, or one that Python raised (by a property, say).
pub(crate) enum Refused {
    Engine(Error),
    Python(PyErr),
}

impl From<Error> for Refused {
    fn from(e: Error) -> Self {
        Self::Engine(e)
    }
}

impl From<PyErr> for Refused {
    fn from(e: PyErr) -> Self {
        Self::Python(e)
    }
}

type Result<T> = std::result::Result<T, Refused>;

/// A task's attributes, still Python's.
struct Fields<'py> {
    kind: Bound<'py, PyString>,
    queue: Bound<'py, PyString>,
    priority: i16,
    payload: Bound<'py, PyAny>,
    max_attempts: i16,
    when: Option<When>,
    expires_at: Option<i64>,
    token: Option<Bound<'py, PyString>>,
    rule: TokenRule,
    options: Option<RunOptions>,
}

fn task_type(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static TYPE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    TYPE.import(py, "fastq.task", "Task")
}

impl<'py> Fields<'py> {
    fn read(task: &Bound<'py, PyAny>) -> Result<Self> {
        let py = task.py();
        let class = task_type(py)?;
        if task.get_type_ptr() != class.as_type_ptr() && !task.is_instance(class)? {
            let message = format!("this is no fastq.Task but {}", task.get_type().name()?);
            return Err(refused(message).into());
        }
        let text = |name: &str, value: Bound<'py, PyAny>| {
            value
                .cast_into::<PyString>()
                .map_err(|e| refused(format!("{name} must be a str, not {}", name_of(&e.into_inner()))))
        };
        let kind = text("type", task.getattr(intern!(py, "type"))?)?;
        let queue = text("queue", task.getattr(intern!(py, "queue"))?)?;
        let payload = task.getattr(intern!(py, "payload"))?;
        let max_attempts = task.getattr(intern!(py, "max_attempts"))?;
        let max_attempts = max_attempts.extract::<i16>().ok().filter(|&n| n >= 1).ok_or_else(|| {
            refused(format!("max_attempts is {max_attempts}, but must be a whole number, 1 to {}", i16::MAX))
        })?;
        let token = task.getattr(intern!(py, "idempotency_token"))?;
        let token = if token.is_none() { None } else { Some(text("idempotency_token", token)?) };
        let extras = task.getattr(intern!(py, "_extras"))?;
        let Extras { priority, when, expires_at, rule, options } =
            if extras.is_none() { Extras::default() } else { Extras::read(&extras, token.is_some())? };
        Ok(Self { kind, queue, priority, payload, max_attempts, when, expires_at, token, rule, options })
    }

    /// The token as it stands in the table.
    fn token(&self) -> Result<Option<Cow<'_, str>>> {
        let Some(token) = &self.token else { return Ok(None) };
        let token = str_of("idempotency_token", token)?;
        check_text("idempotency_token", token)?;
        if self.rule.scope == Scope::Type {
            return Ok(Some(Cow::Borrowed(token)));
        }
        Ok(Some(self.rule.scope.key(str_of("queue", &self.queue)?, token)))
    }
}

/// What most tasks do without.
#[derive(Default)]
struct Extras {
    priority: i16,
    when: Option<When>,
    expires_at: Option<i64>,
    rule: TokenRule,
    options: Option<RunOptions>,
}

impl Extras {
    /// A `fastq.task.Extras`, checked when it was made; what was put in its place since is refused.
    fn read(extras: &Bound<'_, PyAny>, has_token: bool) -> Result<Self> {
        type Any<'py> = Bound<'py, PyAny>;
        type All<'py> = (Any<'py>, Any<'py>, Any<'py>, Any<'py>, Any<'py>, Any<'py>, Any<'py>);
        let (priority, delay, run_at, expires_at, token_options, timeout, retry) = extras
            .extract::<All<'_>>()
            .map_err(|_| refused(format!("_extras is {}, but must be what Task made of it", name_of(extras))))?;
        let wrong = || refused(format!("priority is {priority}, but must be a whole number, 0 to {PRIORITY_LIMIT}"));
        let when = if !run_at.is_none() {
            Some(When::At(read_time("run_at", &run_at)?))
        } else if delay.is_none() {
            None
        } else {
            read_delay(&delay)?
        };
        Ok(Self {
            priority: priority.extract().map_err(|_| wrong())?,
            when,
            expires_at: if expires_at.is_none() { None } else { Some(read_time("expires_at", &expires_at)?) },
            rule: if has_token && !token_options.is_none() { read_rule(&token_options)? } else { TokenRule::default() },
            options: run_options::read(&timeout, &retry).map_err(refused)?,
        })
    }
}

/// A `fastq.task.TokenOptions`, which checked itself when it was made; what was put in its place since is refused.
fn read_rule(options: &Bound<'_, PyAny>) -> Result<TokenRule> {
    let read = |options: &Bound<'_, PyAny>| -> Option<TokenRule> {
        let (scope, until, ttl, on_conflict) = options.extract::<(String, String, Option<f64>, String)>().ok()?;
        let scope = match scope.as_str() {
            "type" => Scope::Type,
            "queue" => Scope::Queue,
            "global" => Scope::Global,
            _ => return None,
        };
        let until_end = match until.as_str() {
            "removed" => false,
            "ended" => true,
            _ => return None,
        };
        let on_conflict = match on_conflict.as_str() {
            "existing" => OnConflict::Existing,
            "raise" => OnConflict::Raise,
            "replace" => OnConflict::Replace { payload: true, time: true },
            "replace_payload" => OnConflict::Replace { payload: true, time: false },
            "replace_time" => OnConflict::Replace { payload: false, time: true },
            _ => return None,
        };
        if ttl.is_some_and(|seconds| !(0.0..=DELAY_LIMIT).contains(&seconds)) {
            return None;
        }
        #[allow(clippy::cast_possible_truncation, reason = "a century in microseconds is far below 2⁶³")]
        let ttl = ttl.map(|seconds| (seconds * 1e6).ceil() as i64);
        Some(TokenRule { scope, until_end, ttl, on_conflict })
    };
    let wrong = || refused(format!("token_options is {}, but must be what Task made of its options", name_of(options)));
    Ok(read(options).ok_or_else(wrong)?)
}

fn name_of(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "this".to_owned(), |name| name.to_string())
}

fn str_of<'a>(what: &str, text: &'a Bound<'_, PyString>) -> Result<&'a str> {
    text.to_str().map_err(|_| refused(format!("{what} holds a lone surrogate, which UTF-8 can't")).into())
}

fn read_delay(delay: &Bound<'_, PyAny>) -> Result<Option<When>> {
    let seconds = delay
        .cast::<PyFloat>()
        .map(PyFloatMethods::value)
        .or_else(|_| delay.extract::<f64>())
        .map_err(|_| refused(format!("delay must be a number of seconds, not {}", name_of(delay))))?;
    Ok(When::after(seconds)?)
}

/// An aware datetime as microseconds since the Unix epoch.
fn read_time(name: &str, time: &Bound<'_, PyAny>) -> Result<i64> {
    static EPOCH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = time.py();
    let epoch = EPOCH.get_or_try_init(py, || {
        let datetime = py.import("datetime")?;
        let utc = datetime.getattr("timezone")?.getattr("utc")?;
        datetime.getattr("datetime")?.call_method1("fromtimestamp", (0, utc)).map(Bound::unbind)
    })?;
    let wrong = |why: &str| refused(format!("{name} {why}, but must be an aware datetime"));
    match time.call_method0(intern!(py, "utcoffset")) {
        Err(_) => return Err(wrong(&format!("is {}", name_of(time))).into()),
        Ok(offset) if offset.is_none() => return Err(wrong("is naive").into()),
        Ok(_) => {}
    }
    let since = time.sub(epoch).map_err(|_| wrong(&format!("is {}", name_of(time))))?;
    let part = |name: &str| since.getattr(name)?.extract::<i64>();
    // A datetime ends with the year 9999: far from what 64 bits of microseconds hold.
    Ok((part("days")? * 86_400 + part("seconds")?) * 1_000_000 + part("microseconds")?)
}

fn format_of(payload: &Bound<'_, PyAny>) -> Format {
    let is_json = payload.is_exact_instance_of::<PyDict>()
        || !(payload.is_instance_of::<PyBytes>()
            || payload.is_instance_of::<PyByteArray>()
            || payload.is_instance_of::<PyMemoryView>());
    if is_json { Format::Json } else { Format::Bytes }
}

/// How a payload is stored, with the task's own run options or without.
fn stored_as(payload: &Bound<'_, PyAny>, options: Option<RunOptions>) -> Format {
    match (format_of(payload), options) {
        (Format::Json, Some(_)) => Format::JsonWithOptions,
        (Format::Bytes, Some(_)) => Format::BytesWithOptions,
        (format, _) => format,
    }
}

/// The limit is the payload's own.
fn encode(
    payload: &Bound<'_, PyAny>,
    format: Format,
    options: Option<RunOptions>,
    out: &mut Vec<u8>,
    limit: usize,
) -> Result<()> {
    if let Some(options) = options {
        out.extend_from_slice(options.line().as_bytes());
    }
    match format {
        Format::Json | Format::JsonWithOptions => json::encode(payload, out, limit)?,
        Format::Bytes | Format::BytesWithOptions => {
            if let Ok(bytes) = payload.cast::<PyBytes>() {
                check_payload(bytes.as_bytes().len() > limit, limit)?;
                out.extend_from_slice(bytes.as_bytes());
            } else if let Ok(array) = payload.cast::<PyByteArray>() {
                check_payload(array.len() > limit, limit)?;
                out.extend_from_slice(&array.to_vec());
            } else {
                let bytes = payload.call_method0("tobytes")?;
                let bytes = bytes.cast::<PyBytes>().map_err(PyErr::from)?;
                check_payload(bytes.as_bytes().len() > limit, limit)?;
                out.extend_from_slice(bytes.as_bytes());
            }
        }
    }
    Ok(())
}

/// Reads tasks; remembers the types and queues it saw, so that a name is checked once.
pub(crate) struct Reader<'py> {
    limit: usize,
    /// The names seen last: tasks of a load mostly share the very same `str` objects.
    last: Option<(Bound<'py, PyString>, Bound<'py, PyString>, Arc<LaneKey>)>,
    /// By type and queue: one a priority.
    lanes: HashMap<String, HashMap<String, Vec<Arc<LaneKey>>>>,
}

impl<'py> Reader<'py> {
    /// One whose payloads may have `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, last: None, lanes: HashMap::new() }
    }

    /// Appends a task to a batch. On an error the batch is as before.
    pub(crate) fn add(&mut self, task: &Bound<'py, PyAny>, batch: &mut Batch) -> Result<()> {
        let fields = Fields::read(task)?;
        let token = fields.token()?;
        let limit = self.limit;
        let lane = self.lane(&fields)?;
        let at = batch.group(lane, fields.max_attempts, fields.when.is_some(), fields.expires_at.is_some());
        let (payload, options) = (&fields.payload, fields.options);
        let format = stored_as(payload, options);
        let token = token.as_deref().map(|token| (token, fields.rule));
        batch
            .push(at, fields.when, fields.expires_at, token, format, |out| encode(payload, format, options, out, limit))
    }

    fn lane(&mut self, fields: &Fields<'py>) -> Result<&Arc<LaneKey>> {
        let is_known = matches!(&self.last, Some((kind, queue, lane))
            if kind.is(&fields.kind) && queue.is(&fields.queue) && lane.priority == fields.priority);
        if !is_known {
            let (kind, queue) = (str_of("type", &fields.kind)?, str_of("queue", &fields.queue)?);
            let known = self.lanes.get(kind).and_then(|queues| queues.get(queue));
            let lane = if let Some(lane) = known.into_iter().flatten().find(|lane| lane.priority == fields.priority) {
                Arc::clone(lane)
            } else {
                let lane = LaneKey::new(queue, kind, fields.priority)?;
                if self.lanes.len() >= MOST_LANES {
                    self.lanes.clear();
                }
                let queues = self.lanes.entry(kind.to_owned()).or_default();
                queues.entry(queue.to_owned()).or_default().push(Arc::clone(&lane));
                lane
            };
            self.last = Some((fields.kind.clone(), fields.queue.clone(), lane));
        }
        match &self.last {
            Some((_, _, lane)) => Ok(lane),
            None => Err(Error::new(Kind::Enqueue, "no lane was found").into()),
        }
    }
}

/// Reads one task.
pub(crate) fn read(task: &Bound<'_, PyAny>, limit: usize) -> Result<NewTask> {
    let fields = Fields::read(task)?;
    let lane = LaneKey::new(str_of("queue", &fields.queue)?, str_of("type", &fields.kind)?, fields.priority)?;
    let token = fields.token()?.map(Cow::into_owned);
    let format = stored_as(&fields.payload, fields.options);
    let mut payload = Vec::with_capacity(128);
    encode(&fields.payload, format, fields.options, &mut payload, limit)?;
    Ok(NewTask {
        lane,
        max_attempts: fields.max_attempts,
        format: format.code(),
        payload,
        when: fields.when,
        expires_at: fields.expires_at,
        token,
        rule: fields.rule,
        is_of_many: false,
    })
}
