//! What the words of a connection string mean. What libpq would do and this engine can't is refused by name, never passed over.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tokio_postgres::config::ChannelBinding;

use crate::engine::connect::hosts::Host;
use crate::engine::connect::sources::{Env, home};
use crate::engine::connect::stream::{Methods, Tcp};
use crate::engine::connect::tls::{Mode, TlsOptions};
use crate::engine::connect::words::Words;
use crate::engine::error::{Error, Result};

/// Text that stands in no message.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Which servers a session may be on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

/// A connection string's meaning.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) hosts: Vec<Host>,
    /// Try hosts and addresses in random order.
    pub(super) random: bool,
    pub user: String,
    pub(super) database: String,
    pub(super) password: Option<Secret>,
    pub(super) passfile: Option<PathBuf>,
    /// Command line options for the server.
    pub(super) settings: Option<String>,
    pub(super) application_name: Option<String>,
    /// For one address. None: not said; zero: no limit.
    pub(super) connect_timeout: Option<Duration>,
    pub(super) tcp: Tcp,
    pub(super) wanted: Wanted,
    pub(super) tls: TlsOptions,
    pub(super) channel_binding: ChannelBinding,
    /// Ways to log in that are let pass; None: all.
    pub(super) methods: Option<Methods>,
    /// Who must own the server behind a Unix socket.
    pub(super) peer: Option<String>,
}

/// Words that only have a meaning for what this engine does not do.
const REFUSED: &[(&str, &str)] = &[
    ("gssdelegation", "fastq does not use GSSAPI"),
    ("gsslib", "fastq does not use GSSAPI"),
    ("krbsrvname", "fastq does not use GSSAPI"),
    ("oauth_client_id", "fastq does not log in by OAuth"),
    ("oauth_client_secret", "fastq does not log in by OAuth"),
    ("oauth_issuer", "fastq does not log in by OAuth"),
    ("oauth_scope", "fastq does not log in by OAuth"),
    ("scram_client_key", "fastq logs in by password or certificate"),
    ("scram_server_key", "fastq logs in by password or certificate"),
    ("sslkeylogfile", "fastq writes no TLS secrets to a file"),
];

impl Options {
    /// Reads completed words. `silence`: how long sent data may stay unacknowledged, where the words leave that open.
    pub(super) fn read(words: &Words, silence: Duration, env: Env<'_>) -> Result<Self> {
        let text = |word: &str| words.get(word).filter(|value| !value.is_empty());
        for (word, why) in REFUSED {
            if text(word).is_some() {
                return Err(cannot(word, why));
            }
        }
        check_fixed(words)?;
        let user = match text("user") {
            Some(user) => user.clone(),
            None => own_name()?,
        };
        let wanted = choose(
            words,
            "target_session_attrs",
            &[
                ("any", Wanted::Any),
                ("read-write", Wanted::ReadWrite),
                ("read-only", Wanted::ReadOnly),
                ("primary", Wanted::Primary),
                ("standby", Wanted::Standby),
                ("prefer-standby", Wanted::PreferStandby),
            ],
        )?;
        let binding = [
            ("prefer", ChannelBinding::Prefer),
            ("disable", ChannelBinding::Disable),
            ("require", ChannelBinding::Require),
        ];
        let limit = number(words, "connect_timeout")?;
        let hosts = Host::read(words)?;
        let tls = TlsOptions::read(words, env)?;
        if tls.mode == Mode::VerifyFull && hosts.iter().any(|host| host.is_remote() && host.name.is_empty()) {
            return Err(cannot("sslmode=verify-full", "a server given by hostaddr alone has no name to check (host)"));
        }
        Ok(Self {
            hosts,
            random: choose(words, "load_balance_hosts", &[("disable", false), ("random", true)])?,
            database: text("dbname").unwrap_or(&user).clone(),
            user,
            password: text("password").cloned().map(Secret),
            passfile: match text("passfile") {
                Some(path) => Some(PathBuf::from(path)),
                None => home(env).map(|home| home.join(".pgpass")),
            },
            settings: text("options").cloned(),
            application_name: text("application_name").or_else(|| text("fallback_application_name")).cloned(),
            connect_timeout: limit.map(|seconds| Duration::from_secs(u64::try_from(seconds).unwrap_or(0))),
            tcp: read_tcp(words, silence)?,
            wanted,
            tls,
            channel_binding: choose(words, "channel_binding", &binding)?,
            methods: text("require_auth").map(|text| Methods::read(text)).transpose()?,
            peer: text("requirepeer").cloned(),
        })
    }

    /// Hosts and database, for messages.
    pub(super) fn place(&self) -> String {
        let hosts: Vec<_> = self.hosts.iter().map(Host::label).collect();
        format!("{}/{}", hosts.join(","), self.database)
    }
}

/// Words of which only some values can be had.
fn check_fixed(words: &Words) -> Result<()> {
    let value = |word: &str| words.get(word).map_or("", String::as_str);
    choose(words, "gssencmode", &[("prefer", ()), ("disable", ()), ("require", ())])?;
    if value("gssencmode") == "require" {
        return Err(cannot("gssencmode=require", "fastq does not use GSSAPI; sslmode=verify-full encrypts, too"));
    }
    let encoding: String = value("client_encoding").to_ascii_lowercase().replace(['-', '_'], "");
    if !matches!(encoding.as_str(), "" | "utf8" | "unicode" | "auto") {
        return Err(cannot("client_encoding", "fastq speaks UTF8 with every database"));
    }
    if !matches!(value("replication").to_ascii_lowercase().as_str(), "" | "false" | "off" | "no" | "0") {
        return Err(cannot("replication", "such a connection runs no statements"));
    }
    choose(words, "sslcompression", &[("0", ()), ("1", ())])?;
    let versions = [("3.0", ()), ("3.2", ()), ("latest", ())];
    choose(words, "max_protocol_version", &versions)?;
    choose(words, "min_protocol_version", &versions)?;
    if !matches!(value("min_protocol_version"), "" | "3.0") {
        return Err(cannot("min_protocol_version", "fastq speaks version 3.0 of the protocol"));
    }
    Ok(())
}

fn read_tcp(words: &Words, silence: Duration) -> Result<Tcp> {
    // 0 leaves it to the system. Linux's own two hours would leave a silent link unnoticed. There the user timeout, where it is set, decides
    // for the keepalives too, whatever their count is: ours is found out after `silence`; elsewhere after 25 s.
    let chosen = |word, default: u32| -> Result<Option<u32>> {
        let given = number(words, word)?.map(|n| u32::try_from(n).unwrap_or(0));
        Ok(Some(given.unwrap_or(default)).filter(|&n| n > 0))
    };
    let seconds = |n: u32| Duration::from_secs(u64::from(n));
    let silence = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
    Ok(Tcp {
        keepalives: number(words, "keepalives")? != Some(0),
        idle: chosen("keepalives_idle", 10)?.map(seconds),
        interval: chosen("keepalives_interval", 5)?.map(seconds),
        count: chosen("keepalives_count", 3)?,
        user_timeout: chosen("tcp_user_timeout", silence)?.map(|ms| Duration::from_millis(u64::from(ms))),
    })
}

/// An error about a word that is understood and can't be followed.
pub(super) fn cannot(word: &str, why: &str) -> Error {
    Error::settings(format!("{word} in the connection string can't be followed: {why}"))
}

/// One of a word's values; the first is the default. An empty value is none of them, as for libpq.
pub(super) fn choose<T: Copy>(words: &Words, word: &str, values: &[(&str, T)]) -> Result<T> {
    let Some(given) = words.get(word) else { return Ok(values[0].1) };
    values.iter().find(|(name, _)| name == given).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = values.iter().map(|(name, _)| *name).collect();
        Error::settings(format!("{word} in the connection string must be one of {}", names.join(", ")))
    })
}

/// A whole number, where the word is there.
pub(super) fn number(words: &Words, word: &str) -> Result<Option<i32>> {
    let Some(given) = words.get(word) else { return Ok(None) };
    let wrong = |_| Error::settings(format!("{word} in the connection string must be a whole number"));
    given.trim_ascii().parse().map(Some).map_err(wrong)
}

/// The user that this process runs as.
fn own_name() -> Result<String> {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
    user.map(|user| user.name).ok_or_else(|| {
        Error::settings("the connection string names no user, and the user that this process runs as has no name")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::connect::words::parse;

    fn read(text: &str) -> Result<Options> {
        let words = parse(text)?.words;
        Options::read(&words, Duration::from_secs(30), &|name| (name == "HOME").then(|| "/nowhere".to_owned()))
    }

    #[test]
    fn defaults() {
        let options = read("user=u host=h").expect("read");
        assert_eq!(options.database, "u");
        assert_eq!(options.place(), "h:5432/u");
        assert_eq!(options.tcp.idle, Some(Duration::from_secs(10)));
        assert_eq!(options.tcp.user_timeout, Some(Duration::from_secs(30)));
        assert_eq!(options.passfile, Some(PathBuf::from("/nowhere/.pgpass")));
        assert_eq!((options.wanted, options.connect_timeout), (Wanted::Any, None));
        assert!(read("host=h").is_ok_and(|options| !options.user.is_empty()));
    }

    #[test]
    fn zero_leaves_it_to_the_system() {
        let options = read("user=u keepalives_idle=0 tcp_user_timeout=0 keepalives_count=' 7 '").expect("read");
        assert_eq!((options.tcp.idle, options.tcp.user_timeout, options.tcp.count), (None, None, Some(7)));
        assert!(options.tcp.keepalives);
        assert!(!read("user=u keepalives=0").expect("read").tcp.keepalives);
    }

    #[test]
    fn a_password_is_not_printed() {
        let options = read("user=u password=hunter2 sslpassword=hunter2").expect("read");
        assert!(!format!("{options:?}").contains("hunter2"));
    }

    #[test]
    fn what_cannot_be_followed_is_named() {
        for (text, word) in [
            ("gssencmode=require", "gssencmode"),
            ("krbsrvname=x", "krbsrvname"),
            ("client_encoding=LATIN1", "client_encoding"),
            ("replication=database", "replication"),
            ("min_protocol_version=3.2", "min_protocol_version"),
            ("target_session_attrs=primry", "target_session_attrs"),
            ("sslmode=''", "sslmode"),
            ("connect_timeout=1.5", "connect_timeout"),
            ("require_auth=gss", "require_auth"),
            ("require_auth=md5,!password", "require_auth"),
            ("sslmode=prefer sslnegotiation=direct", "sslnegotiation"),
            ("sslmode=require sslrootcert=system", "sslmode"),
            ("ssl_max_protocol_version=TLSv1.1", "ssl_max_protocol_version"),
        ] {
            let error = read(&format!("user=u {text}")).expect_err(text);
            assert!(error.message.contains(word), "{text}: {}", error.message);
        }
        for text in ["gssencmode=prefer", "client_encoding=utf-8", "replication=off", "require_auth=!md5,!password"] {
            read(&format!("user=u {text}")).expect(text);
        }
    }
}
