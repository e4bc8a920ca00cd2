//! Which servers a connection string names: lists of hosts, addresses and ports, matched as libpq does.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use tokio::net::lookup_host;

use crate::engine::connect::words::Words;
use crate::engine::error::{Error, Result};

/// Where PostgreSQL's packages, and psycopg's libpq, look for a server when no host is named.
pub(super) const SOCKET_FOLDER: &str = "/var/run/postgresql";
const PORT: u16 = 5432;

/// Where one server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// The folder of a Unix socket, or `@` and an abstract name.
    Unix(String),
    /// A numeric address (`hostaddr`).
    Address(String),
    /// A name to look up, or a numeric address.
    Name(String),
}

/// One server to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    /// What `host` says: for the certificate's name and the passfile.
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) port: u16,
}

impl Host {
    /// The servers that `words` name, at least one.
    pub(super) fn read(words: &Words) -> Result<Vec<Self>> {
        let list = |word: &str| {
            let value = words.get(word).map_or("", String::as_str);
            if value.is_empty() { Vec::new() } else { value.split(',').collect() }
        };
        let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
        let count = if addresses.is_empty() { names.len().max(1) } else { addresses.len() };
        let unmatched = |word: &str, found: usize| {
            Err(Error::settings(format!("the connection string names {count} servers, but {word} has {found} entries")))
        };
        if !addresses.is_empty() && !names.is_empty() && names.len() != count {
            return unmatched("host", names.len());
        }
        if ports.len() > 1 && ports.len() != count {
            return unmatched("port", ports.len());
        }
        let one = |at: usize| {
            let name = names.get(at).copied().unwrap_or("");
            let address = addresses.get(at).copied().unwrap_or("");
            let place = if !address.is_empty() {
                check_address(address)?;
                Place::Address(address.to_owned())
            } else if name.is_empty() {
                Place::Unix(SOCKET_FOLDER.to_owned())
            } else if name.starts_with(['/', '@']) {
                Place::Unix(name.to_owned())
            } else {
                Place::Name(name.to_owned())
            };
            let port = ports.get(at).or_else(|| ports.first()).copied().unwrap_or("");
            Ok(Self { name: name.to_owned(), place, port: read_port(port)? })
        };
        (0..count).map(one).collect()
    }

    /// Whether it is reached over TCP.
    pub(super) fn is_remote(&self) -> bool {
        !matches!(self.place, Place::Unix(_))
    }

    /// For messages.
    pub(super) fn label(&self) -> String {
        let at = |name: &str| {
            if name.contains(':') { format!("[{name}]:{}", self.port) } else { format!("{name}:{}", self.port) }
        };
        match &self.place {
            Place::Unix(folder) => format!("{folder}:{}", self.port),
            Place::Name(name) => at(name),
            Place::Address(address) if self.name.is_empty() || self.name == *address => at(address),
            Place::Address(address) => format!("{} ({address})", at(&self.name)),
        }
    }

    /// The name that a passfile has it under.
    pub(super) fn passfile_name(&self) -> &str {
        match &self.place {
            Place::Unix(folder) if folder == SOCKET_FOLDER => "localhost",
            Place::Address(address) if self.name.is_empty() => address,
            _ => &self.name,
        }
    }

    /// The path of the Unix socket; an abstract one begins with a NUL.
    pub(super) fn socket_path(&self) -> Option<String> {
        let Place::Unix(folder) = &self.place else { return None };
        let path = Path::new(folder).join(format!(".s.PGSQL.{}", self.port)).display().to_string();
        Some(path.strip_prefix('@').map_or(path.clone(), |name| format!("\0{name}")))
    }

    /// The addresses to try, in turn.
    pub(super) async fn resolve(&self) -> std::result::Result<Vec<SocketAddr>, String> {
        let name = match &self.place {
            Place::Unix(_) => return Ok(Vec::new()),
            Place::Name(name) | Place::Address(name) => name,
        };
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(vec![(address, self.port).into()]);
        }
        match lookup_host((name.as_str(), self.port)).await {
            Ok(found) => Ok(found.collect()),
            Err(e) => Err(format!("the host's name can't be resolved: {}", plain(&e))),
        }
    }
}

/// Without the prefix that Rust's standard library puts before getaddrinfo's words.
fn plain(e: &std::io::Error) -> String {
    let text = e.to_string();
    text.strip_prefix("failed to lookup address information: ").map_or(text.clone(), str::to_owned)
}

fn check_address(text: &str) -> Result<()> {
    // A zone (`fe80::1%eth0`) is left to the system.
    if text.split('%').next().is_some_and(|address| address.parse::<IpAddr>().is_ok()) {
        return Ok(());
    }
    Err(Error::settings("hostaddr in the connection string holds something that is not a numeric address"))
}

fn read_port(text: &str) -> Result<u16> {
    let text = text.trim_ascii();
    if text.is_empty() {
        return Ok(PORT);
    }
    // Its text may be a piece of a password.
    let wrong = || Error::settings("port in the connection string must be a number from 1 to 65535");
    text.parse::<u16>().ok().filter(|&port| port > 0).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(pairs: &[(&'static str, &str)]) -> Result<Vec<Host>> {
        Host::read(&pairs.iter().map(|(word, value)| (*word, (*value).to_owned())).collect())
    }

    fn labels(pairs: &[(&'static str, &str)]) -> Vec<String> {
        hosts(pairs).expect("read").iter().map(Host::label).collect()
    }

    #[test]
    fn lists_are_matched() {
        assert_eq!(labels(&[]), ["/var/run/postgresql:5432"]);
        assert_eq!(labels(&[("host", "a,b"), ("port", "1")]), ["a:1", "b:1"]);
        assert_eq!(labels(&[("host", "a,,/tmp"), ("port", "1,,3")]), ["a:1", "/var/run/postgresql:5432", "/tmp:3"]);
        assert_eq!(labels(&[("host", "a,"), ("hostaddr", "::1,127.0.0.1")]), ["a:5432 (::1)", "127.0.0.1:5432"]);
        assert_eq!(labels(&[("host", "::1")]), ["[::1]:5432"]);
        for wrong in [
            &[("host", "a,b"), ("port", "1,2,3")][..],
            &[("host", "a"), ("hostaddr", "::1,::2")],
            &[("port", "0")],
            &[("port", "x")],
            &[("hostaddr", "localhost")],
        ] {
            hosts(wrong).expect_err("refused");
        }
    }

    #[test]
    fn sockets_have_paths() {
        let path = |host| hosts(&[("host", host)]).expect("read")[0].socket_path();
        assert_eq!(path("/tmp").as_deref(), Some("/tmp/.s.PGSQL.5432"));
        assert_eq!(path("@name").as_deref(), Some("\0name/.s.PGSQL.5432"));
        assert_eq!(path("name"), None);
    }

    #[test]
    fn the_passfile_knows_a_server_by_its_name() {
        let name = |pairs: &[(&'static str, &str)]| hosts(pairs).expect("read")[0].passfile_name().to_owned();
        assert_eq!(name(&[]), "localhost");
        assert_eq!(name(&[("host", "/tmp")]), "/tmp");
        assert_eq!(name(&[("host", "h"), ("hostaddr", "::1")]), "h");
        assert_eq!(name(&[("hostaddr", "::1")]), "::1");
    }
}
