//! Arrays as text: parameters and answers of the statements that may go over somebody else's connection, see `enqueue_tx.sql`.

use std::fmt::{Display, Write};

use bytes::BytesMut;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

use crate::engine::connect::Link;
use crate::engine::error::{Error, Result};

type Failed = Box<dyn std::error::Error + Sync + Send>;

/// The parameters of one statement.
pub type Params = Vec<String>;

/// A text, whatever it is declared as.
#[derive(Debug)]
pub struct AnyText(pub String);

impl<'a> FromSql<'a> for AnyText {
    fn from_sql(_: &Type, raw: &'a [u8]) -> std::result::Result<Self, Failed> {
        Ok(Self(std::str::from_utf8(raw)?.to_owned()))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

impl ToSql for AnyText {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> std::result::Result<IsNull, Failed> {
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// Runs such a statement on the producer's own connection; answers its arrays of numbers.
pub(super) async fn ask(link: &Link, name: &'static str, params: Params) -> Result<Vec<Vec<i64>>> {
    let params: Vec<_> = params.into_iter().map(AnyText).collect();
    let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|p| p as &(dyn ToSql + Sync)).collect();
    let rows = link.query(name, &params).await?;
    let row = rows.first().ok_or_else(|| Error::lost("a statement answered no row"))?;
    let mut arrays = Vec::with_capacity(row.len());
    for n in 0..row.len() {
        let text = row.try_get::<_, AnyText>(n)?.0;
        let numbers = text.trim_matches(['{', '}']).split(',').filter(|n| !n.is_empty()).map(str::parse);
        let numbers = numbers.collect::<std::result::Result<_, _>>();
        arrays.push(numbers.map_err(|_| Error::lost("a statement answered no array of numbers"))?);
    }
    Ok(arrays)
}

/// An element more of an array.
pub(super) fn add(text: &mut String, value: impl Display) {
    text.push(if text.is_empty() { '{' } else { ',' });
    // Writing to a String does not fail.
    _ = write!(text, "{value}");
}

/// An element more, or a null.
pub(super) fn add_or_null(text: &mut String, value: Option<impl Display>) {
    match value {
        Some(value) => add(text, value),
        None => add(text, "NULL"),
    }
}

/// An element more of an array of bytes.
pub(super) fn add_bytes(text: &mut String, value: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    text.reserve(2 * value.len() + 8);
    text.push_str(if text.is_empty() { r#"{"\\x"# } else { r#","\\x"# });
    for byte in value {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text.push('"');
}

/// The array as it is sent.
pub(super) fn close(mut text: String) -> String {
    if text.is_empty() {
        return "{}".to_owned();
    }
    if !text.ends_with('}') {
        text.push('}');
    }
    text
}

/// An array of bytes as text.
pub fn bytes<'a>(values: impl Iterator<Item = &'a [u8]>) -> String {
    let mut text = String::new();
    values.for_each(|value| add_bytes(&mut text, value));
    close(text)
}
