//! A connection string, taken apart as libpq does it: a URI, or pairs of keyword and value. Only the form counts here; `options` says
//! what the values mean. `tests/unit/test_conninfo.py` compares this with libpq's own parser on strings that nobody would think of.

use std::collections::BTreeMap;

use crate::engine::error::{Error, Result};

/// Words of a connection string and their values.
pub type Words = BTreeMap<&'static str, String>;

/// Every word that libpq 18 knows, with the environment variable that it takes a default from ("": none).
pub(super) const KNOWN: &[(&str, &str)] = &[
    ("application_name", "PGAPPNAME"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("client_encoding", "PGCLIENTENCODING"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("dbname", "PGDATABASE"),
    ("fallback_application_name", ""),
    ("gssdelegation", "PGGSSDELEGATION"),
    ("gssencmode", "PGGSSENCMODE"),
    ("gsslib", "PGGSSLIB"),
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("keepalives", ""),
    ("keepalives_count", ""),
    ("keepalives_idle", ""),
    ("keepalives_interval", ""),
    ("krbsrvname", "PGKRBSRVNAME"),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    ("max_protocol_version", "PGMAXPROTOCOLVERSION"),
    ("min_protocol_version", "PGMINPROTOCOLVERSION"),
    ("oauth_client_id", ""),
    ("oauth_client_secret", ""),
    ("oauth_issuer", ""),
    ("oauth_scope", ""),
    ("options", "PGOPTIONS"),
    ("passfile", "PGPASSFILE"),
    ("password", "PGPASSWORD"),
    ("port", "PGPORT"),
    ("replication", ""),
    ("require_auth", "PGREQUIREAUTH"),
    ("requirepeer", "PGREQUIREPEER"),
    ("scram_client_key", ""),
    ("scram_server_key", ""),
    ("service", "PGSERVICE"),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    ("sslcert", "PGSSLCERT"),
    ("sslcertmode", "PGSSLCERTMODE"),
    ("sslcompression", "PGSSLCOMPRESSION"),
    ("sslcrl", "PGSSLCRL"),
    ("sslcrldir", "PGSSLCRLDIR"),
    ("sslkey", "PGSSLKEY"),
    ("sslkeylogfile", ""),
    ("sslmode", "PGSSLMODE"),
    ("sslnegotiation", "PGSSLNEGOTIATION"),
    ("sslpassword", ""),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslsni", "PGSSLSNI"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("tcp_user_timeout", ""),
    ("user", "PGUSER"),
];

const SCHEMES: [&str; 2] = ["postgresql://", "postgres://"];
/// Longer than any word: what is longer is no word, but maybe a secret.
const LONGEST: usize = 40;

/// A string's words, and whether a message may quote them.
#[derive(Debug)]
pub struct Given {
    /// What the string says.
    pub words: Words,
    /// Part of its password may be taken for a host or a database: libpq cuts a URI at the first `@` or `/`, and here is another `@`.
    pub is_ambiguous: bool,
}

/// The word as `KNOWN` has it.
pub(super) fn find(word: &str) -> Option<&'static str> {
    KNOWN.binary_search_by_key(&word, |known| known.0).ok().map(|at| KNOWN[at].0)
}

/// Takes a connection string apart.
pub fn parse(text: &str) -> Result<Given> {
    if text.contains('\0') {
        return Err(broken("it holds a NUL character"));
    }
    let mut reader = Reader { words: BTreeMap::new(), is_quotable: true };
    let mut is_ambiguous = false;
    if let Some(rest) = SCHEMES.iter().find_map(|scheme| text.strip_prefix(scheme)) {
        is_ambiguous = after_credentials(rest).1.contains('@');
        reader.is_quotable = !is_ambiguous;
        reader.read_uri(rest)?;
    } else {
        reader.read_pairs(text)?;
    }
    // What a later value of the same word has replaced does not count, whatever it was.
    let text = |bytes| String::from_utf8(bytes).map_err(|_| broken("a percent-encoded part of it is not UTF-8"));
    let words: Result<Words> = reader.words.into_iter().map(|(word, bytes)| Ok((word, text(bytes)?))).collect();
    Ok(Given { words: words?, is_ambiguous })
}

/// The text itself stands in no message: what can't be read may be a password.
fn broken(what: &str) -> Error {
    Error::settings(format!(
        "the connection string can't be read: {what}. It must be a URI such as postgresql://user@host/database, or key=value pairs; \
         characters such as @ / ? # % in a password of a URI are written %40, %2F, ..., and values with spaces in pairs are quoted: 'a b'"
    ))
}

/// `isspace` in the C locale.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\x0b' | '\x0c' | '\r')
}

/// User and password of a URI without its scheme, where it has them, and what follows.
fn after_credentials(text: &str) -> (Option<&str>, &str) {
    match text.find(['@', '/']) {
        Some(at) if text[at..].starts_with('@') => (Some(&text[..at]), &text[at + 1..]),
        _ => (None, text),
    }
}

/// Cuts `text` before the first of `ends`.
fn cut<'a>(text: &'a str, ends: &[char]) -> (&'a str, &'a str) {
    text.split_at(text.find(ends).unwrap_or(text.len()))
}

struct Reader {
    words: BTreeMap<&'static str, Vec<u8>>,
    /// Whether an unknown word may be named: it might be the rest of a password.
    is_quotable: bool,
}

impl Reader {
    fn read_pairs(&mut self, text: &str) -> Result<()> {
        let mut rest = text.trim_start_matches(is_space);
        while !rest.is_empty() {
            let to = rest.find(|c| c == '=' || is_space(c)).unwrap_or(rest.len());
            let (name, after) = rest.split_at(to);
            let Some(after) = after.trim_start_matches(is_space).strip_prefix('=') else {
                return Err(broken("a word in it has no \"=\" after it"));
            };
            let (value, after) = read_value(after.trim_start_matches(is_space))?;
            self.store(name.as_bytes(), value.into_bytes())?;
            // An unquoted password with a space in it goes on as the next word.
            self.is_quotable = !matches!(find(name), Some("password" | "sslpassword" | "oauth_client_secret"));
            rest = after.trim_start_matches(is_space);
        }
        Ok(())
    }

    fn read_uri(&mut self, text: &str) -> Result<()> {
        let (credentials, mut rest) = after_credentials(text);
        if let Some(credentials) = credentials {
            let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
            self.store_part("user", user)?;
            self.store_part("password", password)?;
        }
        let (mut hosts, mut ports) = (String::new(), String::new());
        loop {
            let host;
            if let Some(inner) = rest.strip_prefix('[') {
                let closed = inner.split_once(']');
                (host, rest) = closed.ok_or_else(|| broken("an IPv6 address in it has no closing \"]\""))?;
                if host.is_empty() {
                    return Err(broken("an IPv6 address in it is empty"));
                }
                if !rest.is_empty() && !rest.starts_with([':', '/', '?', ',']) {
                    return Err(broken("after the \"]\" of an IPv6 address must come a \":\", \"/\", \"?\" or \",\""));
                }
            } else {
                (host, rest) = cut(rest, &[':', '/', '?', ',']);
            }
            hosts.push_str(host);
            if let Some(after) = rest.strip_prefix(':') {
                let port;
                (port, rest) = cut(after, &['/', '?', ',']);
                ports.push_str(port);
            }
            let Some(more) = rest.strip_prefix(',') else { break };
            rest = more;
            hosts.push(',');
            ports.push(',');
        }
        self.store_part("host", &hosts)?;
        self.store_part("port", &ports)?;
        if let Some(path) = rest.strip_prefix('/') {
            let database;
            (database, rest) = cut(path, &['?']);
            self.store_part("dbname", database)?;
        }
        self.read_parameters(rest.strip_prefix('?').unwrap_or(""))
    }

    fn read_parameters(&mut self, text: &str) -> Result<()> {
        let mut rest = text;
        while !rest.is_empty() {
            let (one, more) = rest.split_once('&').unwrap_or((rest, ""));
            rest = more;
            let Some((name, value)) = one.split_once('=') else {
                return Err(broken("a parameter after its \"?\" has no \"=\""));
            };
            if value.contains('=') {
                return Err(broken("a parameter after its \"?\" has more than one \"=\""));
            }
            let (name, value) = (decode(name)?, decode(value)?);
            // As JDBC writes it.
            if (name.as_slice(), value.as_slice()) == (b"ssl", b"true") {
                self.store(b"sslmode", b"require".to_vec())?;
            } else {
                self.store(&name, value)?;
            }
        }
        Ok(())
    }

    /// A part of a URI; an empty one leaves the default.
    fn store_part(&mut self, name: &'static str, text: &str) -> Result<()> {
        if text.is_empty() { Ok(()) } else { self.store(name.as_bytes(), decode(text)?) }
    }

    fn store(&mut self, name: &[u8], value: Vec<u8>) -> Result<()> {
        let name = std::str::from_utf8(name).unwrap_or_default();
        // The name that sslmode had before PostgreSQL 7.4.
        let (name, value) = match name {
            "requiressl" if value.starts_with(b"1") => ("sslmode", b"require".to_vec()),
            "requiressl" => ("sslmode", b"prefer".to_vec()),
            _ => (name, value),
        };
        let Some(word) = find(name) else { return Err(unknown(name, self.is_quotable)) };
        self.words.insert(word, value);
        Ok(())
    }
}

pub(super) fn unknown(name: &str, is_quotable: bool) -> Error {
    let is_word = (1..=LONGEST).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if is_quotable && is_word {
        return Error::settings(format!("the connection string has an unknown word: {name:?}"));
    }
    broken("it has a word that PostgreSQL does not know")
}

/// One value, quoted or up to the next space, and what follows it.
fn read_value(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let (mut chars, is_quoted) = match text.strip_prefix('\'') {
        Some(inner) => (inner.chars(), true),
        None => (text.chars(), false),
    };
    loop {
        match chars.next() {
            None if is_quoted => return Err(broken("a quoted value in it has no closing quote")),
            None => break,
            Some('\'') if is_quoted => break,
            Some(c) if !is_quoted && is_space(c) => break,
            Some('\\') => value.extend(chars.next()),
            Some(c) => value.push(c),
        }
    }
    Ok((value, chars.as_str()))
}

/// Percent-decodes a part of a URI; spaces around it do not count.
fn decode(text: &str) -> Result<Vec<u8>> {
    let text = text.trim_matches(' ');
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b' ' => return Err(broken("a space in a URI is written %20")),
            b'%' => {
                let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
                let code = digit().zip(digit()).and_then(|(high, low)| u8::try_from(16 * high + low).ok());
                let wrong = || broken("a % in it is not followed by two hexadecimal digits other than 00");
                code.filter(|&code| code != 0).ok_or_else(wrong)?
            }
            other => other,
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<(&'static str, String)> {
        parse(text).expect("readable").words.into_iter().collect()
    }

    #[test]
    fn known_words_are_sorted() {
        assert!(KNOWN.is_sorted_by_key(|known| known.0));
    }

    #[test]
    fn reads_both_forms() {
        let same = [("dbname", "d b"), ("host", "a,::1"), ("password", "p'w"), ("port", "1,2"), ("user", "u")];
        let same = same.map(|(name, value)| (name, value.to_owned()));
        assert_eq!(words("postgresql://u:p%27w@a:1,[::1]:2/d%20b"), same);
        assert_eq!(words(r"host=a,::1  port = 1,2 user=u password=p\'w dbname='d b'"), same);
    }

    #[test]
    fn names_an_unknown_word_but_no_secret() {
        let message = |text: &str| parse(text).expect_err("refused").message;
        assert!(message("host=h passwrod=hunter2").contains("passwrod"));
        for text in [
            "hunter2",
            "host=h hunter2",
            "password=a hunter2=b",
            "postgresql://u:a/b@h?hunter2=c@d",
            "password='hunter2",
            "postgresql://u:hunter2%@h",
        ] {
            assert!(!message(text).contains("hunter2"), "{text}");
        }
    }
}
