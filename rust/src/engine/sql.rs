//! The SQL of sql/, built in. A statement names its objects `fastq.<name>`; the schema is put in once, at start.

use std::collections::HashMap;

use crate::engine::error::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/sql.rs"));

/// PostgreSQL cuts identifiers at 63 bytes; the channel `fastq:<schema>` must fit too.
pub const SCHEMA_BYTES: usize = 57;

/// Refuses a schema name that PostgreSQL would refuse or cut, or that could not stand in a quoted name or literal as it is.
pub fn check_schema_name(schema: &str) -> Result<()> {
    let wrong = |why: &str| Err(Error::settings(format!("schema {schema:?}: {why}")));
    if schema.is_empty() {
        return wrong("a schema's name can't be empty");
    }
    if schema.len() > SCHEMA_BYTES {
        return wrong("a schema's name must be at most 57 bytes long");
    }
    if schema.chars().any(|c| c.is_control() || matches!(c, '"' | '\'' | '\\' | '%' | '{' | '}')) {
        return wrong("a schema's name must hold no quotes, backslashes, percent signs, braces or control characters");
    }
    if schema.starts_with("pg_") || schema == "information_schema" {
        return wrong("PostgreSQL keeps this name for itself");
    }
    Ok(())
}

/// `text` with the prefix `fastq.` replaced by the quoted schema. Comments are left as they are, which does no harm.
pub fn render(text: &str, schema: &str) -> Result<String> {
    check_schema_name(schema)?;
    let quoted = format!("\"{schema}\".");
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some(at) = rest.find("fastq.") {
        let (before, after) = rest.split_at(at);
        out.push_str(before);
        let inside = before.chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
        out.push_str(if inside { "fastq." } else { &quoted });
        rest = &after["fastq.".len()..];
    }
    out.push_str(rest);
    Ok(out)
}

/// The channel that a schema's consumers listen on.
pub fn channel(schema: &str) -> String {
    format!("fastq:{schema}")
}

/// All statements, rendered for one schema.
#[derive(Debug)]
pub struct Statements {
    /// The schema's name, unquoted.
    pub schema: String,
    texts: HashMap<&'static str, String>,
}

impl Statements {
    /// Renders every statement for `schema`.
    pub fn new(schema: &str) -> Result<Self> {
        let texts = QUERIES.iter().map(|(name, text)| Ok((*name, render(text, schema)?))).collect::<Result<_>>()?;
        Ok(Self { schema: schema.to_owned(), texts })
    }

    /// A statement's text. Panics on a name that sql/queries doesn't hold, which a test rules out.
    pub fn text(&self, name: &str) -> &str {
        self.texts.get(name).unwrap_or_else(|| panic!("sql/queries/{name}.sql is missing"))
    }

    /// A statement that names a leaf's tables by `{leaf}`.
    pub fn leaf_text(&self, name: &str, leaf: i16) -> String {
        self.text(name).replace("{leaf}", &format!("{leaf:02}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_alone_is_replaced() {
        assert_eq!(
            render("SELECT fastq.a, nextval('fastq.b'), myfastq.c", "q x").unwrap(),
            "SELECT \"q x\".a, nextval('\"q x\".b'), myfastq.c"
        );
    }

    #[test]
    fn names_that_postgresql_would_refuse_or_cut_are_refused() {
        for name in ["", "pg_x", "information_schema", "a\"b", "a'b", "a\0b", &"x".repeat(58)] {
            assert!(check_schema_name(name).is_err(), "{name:?}");
        }
        for name in ["fastq", "Fast Q", "queue-2", &"x".repeat(57)] {
            assert!(check_schema_name(name).is_ok(), "{name:?}");
        }
    }
}
