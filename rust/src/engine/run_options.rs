//! A task's own timeout and retry policy, as they are stored with it: one line of JSON before the payload.
//!
//! Only tasks that have some are stored so, with a format of their own (docs/adr/0004-run-options.md); every move carries both unseen.

use std::time::Duration;

use jiter::JsonValue;

use crate::engine::produce::task::DELAY_LIMIT;

/// Bytes that the line may have. The longest that is written has under 200.
const LINE_LIMIT: usize = 1_024;
/// Highest exponent (`ExponentialBackoff` of _backoff.py).
const EXPONENT_LIMIT: f64 = 64.0;

/// How long a task waits after an attempt that failed, of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Retry {
    /// Always so many seconds.
    Constant(f64),
    /// As `ExponentialBackoff` does.
    Exponential {
        /// Of the attempt's number.
        exponent: f64,
        /// The share by which a wait may be longer or shorter.
        jitter: f64,
        /// Seconds that no wait exceeds.
        maximum: f64,
    },
}

/// What a task says of its own runs.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RunOptions {
    /// Seconds that an attempt may take; `None`: as its type has it.
    pub timeout: Option<f64>,
    /// `None`: as its type has it.
    pub retry: Option<Retry>,
}

fn is_duration(seconds: f64) -> bool {
    (0.0..=DELAY_LIMIT).contains(&seconds)
}

impl RunOptions {
    /// What is wrong with it, if anything is.
    pub fn check(&self) -> Result<(), String> {
        if let Some(seconds) = self.timeout.filter(|s| !is_duration(*s) || *s == 0.0) {
            return Err(format!("timeout is {seconds}, but must be above 0 and at most {DELAY_LIMIT:.0} seconds"));
        }
        match self.retry {
            Some(Retry::Constant(seconds)) if !is_duration(seconds) => {
                Err(format!("retry's wait is {seconds}, but must be 0 to {DELAY_LIMIT:.0} seconds"))
            }
            Some(Retry::Exponential { exponent, .. }) if !(0.0..=EXPONENT_LIMIT).contains(&exponent) => {
                Err(format!("retry's exponent is {exponent}, but must be 0 to {EXPONENT_LIMIT:.0}"))
            }
            Some(Retry::Exponential { jitter, .. }) if !(0.0..=1.0).contains(&jitter) => {
                Err(format!("retry's jitter is {jitter}, but must be 0 to 1"))
            }
            Some(Retry::Exponential { maximum, .. }) if !is_duration(maximum) => {
                Err(format!("retry's maximum is {maximum}, but must be 0 to {DELAY_LIMIT:.0} seconds"))
            }
            _ => Ok(()),
        }
    }

    /// How long an attempt may take.
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
    }

    /// The line, with its end.
    pub fn line(&self) -> String {
        let timeout = self.timeout.map(|seconds| format!("\"timeout\":{seconds}"));
        let retry = self.retry.map(|retry| match retry {
            Retry::Constant(seconds) => format!("\"retry\":{{\"constant\":{seconds}}}"),
            Retry::Exponential { exponent, jitter, maximum } => format!(
                "\"retry\":{{\"exponential\":{{\"exponent\":{exponent},\"jitter\":{jitter},\"maximum\":{maximum}}}}}"
            ),
        });
        let words: Vec<_> = timeout.into_iter().chain(retry).collect();
        format!("{{{}}}\n", words.join(","))
    }

    /// Takes the line off what is stored: what it says, and the payload. The error says what is wrong with it.
    pub fn split(stored: &[u8]) -> Result<(Self, &[u8]), String> {
        let end = stored.iter().take(LINE_LIMIT).position(|&byte| byte == b'\n');
        let (line, payload) = end.and_then(|at| stored.split_at_checked(at)).ok_or("its line has no end")?;
        Ok((Self::read(line)?, payload.get(1..).unwrap_or_default()))
    }

    fn read(line: &[u8]) -> Result<Self, String> {
        let words = JsonValue::parse(line, false).map_err(|e| e.to_string())?;
        let mut options = Self::default();
        for (name, value) in object("its line", &words)? {
            match name.as_ref() {
                "timeout" => options.timeout = Some(number(name, value)?),
                "retry" => options.retry = Some(read_retry(value)?),
                // Not passed over: what its producer meant by it would be left undone.
                _ => return Err(format!("{name} is not known to this version")),
            }
        }
        options.check()?;
        Ok(options)
    }
}

fn read_retry(value: &JsonValue<'_>) -> Result<Retry, String> {
    let [(name, value)] = object("retry", value)? else { return Err("retry names not one policy".into()) };
    match name.as_ref() {
        "constant" => Ok(Retry::Constant(number(name, value)?)),
        "exponential" => {
            let words = object(name, value)?;
            let word = |name: &str| {
                let found = words.iter().find(|(key, _)| key == name);
                found.map_or_else(|| Err(format!("{name} is missing")), |(_, value)| number(name, value))
            };
            Ok(Retry::Exponential { exponent: word("exponent")?, jitter: word("jitter")?, maximum: word("maximum")? })
        }
        _ => Err(format!("retry's {name} is not known to this version")),
    }
}

fn object<'a, 'j>(
    name: &str,
    value: &'a JsonValue<'j>,
) -> Result<&'a [(std::borrow::Cow<'j, str>, JsonValue<'j>)], String> {
    match value {
        JsonValue::Object(words) => Ok(words),
        _ => Err(format!("{name} is no JSON object")),
    }
}

fn number(name: &str, value: &JsonValue<'_>) -> Result<f64, String> {
    match value {
        JsonValue::Float(number) => Ok(*number),
        #[allow(clippy::cast_precision_loss, reason = "durations of a century and less")]
        JsonValue::Int(number) => Ok(*number as f64),
        _ => Err(format!("{name} is no number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPONENTIAL: Retry = Retry::Exponential { exponent: 2.5, jitter: 0.1, maximum: 1e-7 };

    #[test]
    fn what_is_written_is_read() {
        for timeout in [None, Some(30.0), Some(0.1), Some(1e-6), Some(DELAY_LIMIT)] {
            for retry in [None, Some(Retry::Constant(0.0)), Some(Retry::Constant(1.0 / 3.0)), Some(EXPONENTIAL)] {
                let options = RunOptions { timeout, retry };
                let stored = [options.line().as_bytes(), b"a\nb"].concat();
                assert_eq!(RunOptions::split(&stored), Ok((options, &b"a\nb"[..])));
            }
        }
        let options = RunOptions { timeout: Some(30.0), retry: Some(Retry::Constant(5.0)) };
        assert_eq!(options.line(), "{\"timeout\":30,\"retry\":{\"constant\":5}}\n");
    }

    #[test]
    fn the_longest_line_is_far_below_the_limit() {
        let number = f64::MIN_POSITIVE;
        let retry = Some(Retry::Exponential { exponent: 1.0 / 3.0, jitter: 0.1 + 0.2, maximum: DELAY_LIMIT / 7.0 });
        assert!(RunOptions { timeout: Some(DELAY_LIMIT / 3.0), retry }.line().len() < 200);
        // Nobody's time, but even this one is read again.
        let tiny = RunOptions { timeout: Some(number), retry: None };
        assert_eq!(RunOptions::split(tiny.line().as_bytes()).unwrap().0, tiny);
    }

    #[test]
    fn a_damaged_line_is_an_error() {
        let long = vec![b' '; LINE_LIMIT + 1];
        for bad in [
            &b""[..],
            b"{}",
            b"\n",
            b"null\n",
            b"[]\n",
            b"{\"timeout\":30",
            b"{\"timeout\":}\n",
            b"{\"timeout\":0}\n",
            b"{\"timeout\":-1}\n",
            b"{\"timeout\":1e300}\n",
            b"{\"timeout\":NaN}\n",
            b"{\"timeout\":\"30\"}\n",
            b"{\"timeout\":true}\n",
            b"{\"timeout\":99999999999999999999999}\n",
            b"{\"later\":1}\n",
            b"{\"retry\":5}\n",
            b"{\"retry\":{}}\n",
            b"{\"retry\":{\"constant\":-1}}\n",
            b"{\"retry\":{\"constant\":5,\"exponential\":{}}}\n",
            b"{\"retry\":{\"linear\":5}}\n",
            b"{\"retry\":{\"exponential\":{\"exponent\":2,\"jitter\":0.1}}}\n",
            b"{\"retry\":{\"exponential\":{\"exponent\":65,\"jitter\":0.1,\"maximum\":1}}}\n",
            b"{\"retry\":{\"exponential\":{\"exponent\":2,\"jitter\":2,\"maximum\":1}}}\n",
            b"{\"retry\":{\"exponential\":{\"exponent\":2,\"jitter\":0,\"maximum\":-1}}}\n",
            b"\xff\xfe\n",
            &long,
        ] {
            assert!(RunOptions::split(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn what_no_task_may_have_is_refused() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, DELAY_LIMIT * 2.0] {
            assert!(RunOptions { timeout: Some(bad), retry: None }.check().is_err(), "{bad}");
        }
        for bad in [-1.0, f64::NAN, f64::INFINITY] {
            let retries = [
                Retry::Constant(bad),
                Retry::Exponential { exponent: bad, jitter: 0.0, maximum: 0.0 },
                Retry::Exponential { exponent: 0.0, jitter: bad, maximum: 0.0 },
                Retry::Exponential { exponent: 0.0, jitter: 0.0, maximum: bad },
            ];
            for retry in retries {
                assert!(RunOptions { timeout: None, retry: Some(retry) }.check().is_err(), "{retry:?}");
            }
        }
    }
}
