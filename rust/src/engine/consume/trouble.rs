//! Troubles that last: each kind said once when it begins, and once that all are over, whatever is tried in between.

use std::collections::HashSet;
use std::fmt::Display;

use crate::engine::consume::Shared;
use crate::engine::error::Error;
use crate::engine::logs::{Level, Said};

/// One trouble of one part of the engine.
#[derive(Debug)]
pub struct Trouble {
    part: &'static str,
    said: Said,
}

impl Trouble {
    /// None, so far.
    pub fn new(part: &'static str) -> Self {
        Self { part, said: Said::default() }
    }

    /// It was met (again). Each further time is for who looks at debug messages.
    pub fn note(&mut self, shared: &Shared, e: &Error, message: impl Display) {
        let level = if self.said.is_news(e) { Level::Warning } else { Level::Debug };
        shared.log(level, self.part, message.to_string());
    }

    /// What failed has worked.
    pub fn end(&mut self, shared: &Shared, message: &str) {
        if self.said.end() {
            shared.log(Level::Info, self.part, message);
        }
    }
}

/// Ids that are remembered, so that a culprit is named once, however often it comes again.
const NAMED: usize = 1_000;

/// Culprits that were named: tasks or consumers that a statement fails for.
#[derive(Debug, Default)]
pub struct Named(HashSet<i64>);

impl Named {
    /// Whether it is new here.
    pub fn add(&mut self, id: i64) -> bool {
        if self.0.len() >= NAMED {
            self.0.clear();
        }
        self.0.insert(id)
    }

    /// How loudly to say it: each further time is for who looks at debug messages.
    pub fn level(&mut self, id: i64) -> Level {
        if self.add(id) { Level::Error } else { Level::Debug }
    }
}

/// Names of tasks or consumers for a message: the first few, and how many more.
pub fn some_of(ids: &[i64]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<String> = ids.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = if ids.len() > SHOWN { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_named() {
        assert_eq!(some_of(&[7]), "7");
        assert_eq!(some_of(&[1, 2, 3, 4, 5]), "1, 2, 3, 4, 5");
        assert_eq!(some_of(&[1, 2, 3, 4, 5, 6]), "1, 2, 3, 4, 5, …");
    }
}
