//! Making a session: hosts and their addresses in turn, encrypted or not, until one of them will do; or an error that says what became
//! of each.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::task::Poll;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::{Client, Config, Connection, SimpleQueryMessage};

use crate::engine::connect::backoff::random_u64;
use crate::engine::connect::fault::{Fault, seconds};
use crate::engine::connect::hosts::{Host, Place};
use crate::engine::connect::options::{Options, Wanted};
use crate::engine::connect::passfile::{self, Found};
use crate::engine::connect::stream::{Done, Gate, Wire};
use crate::engine::connect::tls::{Mode, Tls};
use crate::engine::error::{Error, Result};

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// A session that is logged in, and the half of it that has to be driven.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) connection: Connection<Wire, Wire>,
    /// The server, for messages.
    pub(super) place: String,
}

/// Makes a session by `deadline`.
pub(super) async fn dial(options: &Options, deadline: Instant) -> Result<Session> {
    let needs_tls = options.tls.mode != Mode::Disable && options.hosts.iter().any(Host::is_remote);
    let tls = if needs_tls { Some(options.tls.load()?) } else { None };
    let mut order: Vec<&Host> = options.hosts.iter().collect();
    if options.random {
        shuffle(&mut order);
    }
    let passes = match options.wanted {
        Wanted::PreferStandby => vec![Wanted::Standby, Wanted::Any],
        one => vec![one],
    };
    let mut dialer =
        Dialer { options, tls, deadline, waits_for: Mutex::new(""), told: Vec::new(), last: Fault::gone("") };
    for (pass, wanted) in passes.iter().enumerate() {
        for (at, host) in order.iter().enumerate() {
            let to_come = order.len() - at - 1 + order.len() * (passes.len() - pass - 1);
            if let Some(session) = dialer.try_host(host, *wanted, to_come).await {
                return Ok(session);
            }
            if dialer.last.is_final {
                return Err(dialer.failed());
            }
        }
    }
    Err(dialer.failed())
}

struct Dialer<'a> {
    options: &'a Options,
    tls: Option<Tls>,
    deadline: Instant,
    /// What an answer is waited for to, after "no answer".
    waits_for: Mutex<&'static str>,
    /// What became of which address.
    told: Vec<(String, String)>,
    last: Fault,
}

impl Dialer<'_> {
    /// Tries one host; what went wrong is noted.
    async fn try_host(&mut self, host: &Host, wanted: Wanted, to_come: usize) -> Option<Session> {
        let mut addresses = match self.resolve(host, to_come).await {
            Ok(addresses) => addresses,
            Err(why) => {
                self.note(host.label(), Fault::gone(why));
                return None;
            }
        };
        if self.options.random {
            shuffle(&mut addresses);
        }
        for (at, address) in addresses.iter().enumerate() {
            let label = match address {
                Some(address) if addresses.len() > 1 => format!("{} ({})", host.label(), address.ip()),
                _ => host.label(),
            };
            let limit = self.limit(addresses.len() - at + to_come);
            if limit.is_zero() {
                self.note(label, Fault::gone("not tried, as the time for connecting was over"));
                continue;
            }
            *self.waits_for.lock() = "";
            let fault = match timeout(limit, self.try_address(host, *address, wanted)).await {
                Ok(Ok(session)) => return Some(session),
                Ok(Err(fault)) => fault,
                Err(_) => Fault::gone(format!("no answer{} within {}", self.waits_for.lock(), seconds(limit))),
            };
            self.note(label, fault);
            if self.last.is_final {
                break;
            }
        }
        None
    }

    fn note(&mut self, label: String, fault: Fault) {
        self.told.push((label, fault.message.clone()));
        self.last = fault;
    }

    /// None stands for the host's Unix socket.
    async fn resolve(&self, host: &Host, to_come: usize) -> std::result::Result<Vec<Option<SocketAddr>>, String> {
        if !host.is_remote() {
            return Ok(vec![None]);
        }
        let limit = self.limit(1 + to_come);
        match timeout(limit, host.resolve()).await {
            Ok(Ok(found)) if found.is_empty() => Err("the host's name has no address".to_owned()),
            Ok(found) => found.map(|found| found.into_iter().map(Some).collect()),
            Err(_) => Err(format!("the host's name was not resolved within {}", seconds(limit))),
        }
    }

    /// How long the next address may take, with `share` of them still to try: as the connection string says, or a fair part of what is
    /// left, so that a host that never answers leaves time for the others.
    fn limit(&self, share: usize) -> Duration {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.options.connect_timeout {
            Some(limit) if limit > Duration::ZERO => limit.min(left),
            _ => left / u32::try_from(share.max(1)).unwrap_or(u32::MAX),
        }
    }

    async fn try_address(
        &self,
        host: &Host,
        address: Option<SocketAddr>,
        wanted: Wanted,
    ) -> std::result::Result<Session, Fault> {
        let encrypted: &[bool] = match self.options.tls.mode {
            _ if address.is_none() => &[false],
            Mode::Disable => &[false],
            Mode::Allow => &[false, true],
            Mode::Prefer => &[true, false],
            Mode::Require | Mode::VerifyCa | Mode::VerifyFull => &[true],
        };
        let mut before: Option<Fault> = None;
        for (at, is_encrypted) in encrypted.iter().enumerate() {
            let fault = match self.open(host, address, *is_encrypted, wanted).await {
                Ok(session) => return Ok(session),
                Err(fault) => fault,
            };
            if fault.other_way && at + 1 < encrypted.len() {
                before = Some(fault);
                continue;
            }
            return Err(match before {
                Some(before) if before.message != fault.message => {
                    let (tls, plain) = if *is_encrypted { (&fault, &before) } else { (&before, &fault) };
                    let message = format!("with TLS: {}; without: {}", tls.message, plain.message);
                    Fault { message, ..fault }
                }
                _ => fault,
            });
        }
        Err(Fault::gone("no way to connect is left"))
    }

    async fn open(
        &self,
        host: &Host,
        address: Option<SocketAddr>,
        is_encrypted: bool,
        wanted: Wanted,
    ) -> std::result::Result<Session, Fault> {
        *self.waits_for.lock() = "";
        let gate = self.options.methods.map(Gate::new);
        let (wire, is_encrypted) = match address {
            None => (Wire::unix(self.open_socket(host).await?, gate), false),
            Some(address) => {
                let stream = TcpStream::connect(address).await.map_err(|e| Fault::of_io(&e))?;
                self.options.tcp.apply(&stream).map_err(|e| Fault::of_io(&e))?;
                match self.tls.as_ref().filter(|_| is_encrypted) {
                    Some(tls) => self.encrypt(stream, host, tls, gate).await?,
                    None => (Wire::tcp(stream, gate), false),
                }
            }
        };
        if !is_encrypted && host.is_remote() && self.options.tls.needs_cert() {
            return Err(Fault::denied("sslcertmode requires a certificate, and the connection is not encrypted"));
        }
        *self.waits_for.lock() = " to the login";
        let (config, note) = self.config(host, is_encrypted);
        let done = config.connect_raw(wire, Done).await;
        let (client, mut connection) = done.map_err(|e| Fault::of_login(&e, note.as_deref()))?;
        check(&client, &mut connection, wanted).await?;
        Ok(Session { client, connection, place: format!("{}/{}", host.label(), self.options.database) })
    }

    async fn open_socket(&self, host: &Host) -> std::result::Result<UnixStream, Fault> {
        let path = host.socket_path().unwrap_or_default();
        let stream = UnixStream::connect(&path).await.map_err(|e| Fault::of_io(&e))?;
        if let Some(wanted) = &self.options.peer {
            let uid = stream.peer_cred().map_err(|e| Fault::of_io(&e))?.uid();
            let user = nix::unistd::User::from_uid(uid.into()).ok().flatten();
            let name = user.map_or_else(|| format!("user id {uid}"), |user| user.name);
            if name != *wanted {
                return Err(Fault::denied(format!("requirepeer is {wanted:?}, but the server is run by {name:?}")));
            }
        }
        Ok(stream)
    }

    /// Asks for TLS and makes the handshake. A server without TLS goes on in plain text where that is let pass.
    async fn encrypt(
        &self,
        mut stream: TcpStream,
        host: &Host,
        tls: &Tls,
        gate: Option<Gate>,
    ) -> std::result::Result<(Wire, bool), Fault> {
        *self.waits_for.lock() = " to the request for TLS";
        if !self.options.tls.direct {
            stream.write_all(&SSL_REQUEST).await.map_err(|e| Fault::of_io(&e))?;
            match stream.read_u8().await.map_err(|e| Fault::of_io(&e))? {
                b'S' => {}
                b'N' if self.options.tls.mode == Mode::Prefer => return Ok((Wire::tcp(stream, gate), false)),
                b'N' => return Err(Fault::denied("the server does not speak TLS, and sslmode asks for it")),
                // Its text could be anybody's: nothing is encrypted yet.
                b'E' => return Err(Fault::gone("the server answered the request for TLS with an error")),
                _ => return Err(Fault::gone("what answers there is no PostgreSQL")),
            }
        }
        let name = match &host.place {
            Place::Address(address) if host.name.is_empty() => address,
            _ => &host.name,
        };
        let shaken = tls.shake(stream, name).await.map_err(|e| match e.kind() {
            // An older server takes the handshake for a broken greeting, and hangs up.
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset if self.options.tls.direct => {
                Fault::denied("the server closed the connection: sslnegotiation=direct needs PostgreSQL 17")
            }
            _ => Fault::of_tls(&e),
        })?;
        Ok((Wire::tls(shaken.0, gate, shaken.1), true))
    }

    /// For tokio-postgres, and why the passfile was not used.
    fn config(&self, host: &Host, is_encrypted: bool) -> (Config, Option<String>) {
        let options = self.options;
        let mut config = Config::new();
        config.user(&options.user).dbname(&options.database).channel_binding(options.channel_binding);
        // The stream is encrypted when it gets it: that it is, is all it has to know.
        config.ssl_mode(if is_encrypted { SslMode::Require } else { SslMode::Disable });
        config.ssl_negotiation(SslNegotiation::Direct);
        if let Some(settings) = &options.settings {
            config.options(settings);
        }
        if let Some(name) = &options.application_name {
            config.application_name(name);
        }
        let mut note = None;
        if let Some(password) = &options.password {
            config.password(&password.0);
        } else if let Some(path) = &options.passfile {
            let port = host.port.to_string();
            let key = passfile::Key {
                host: host.passfile_name(),
                port: &port,
                database: &options.database,
                user: &options.user,
            };
            match passfile::look_up(path, key) {
                Found::Password(password) if !password.is_empty() => drop(config.password(password)),
                Found::Password(_) | Found::Nothing => {}
                Found::Ignored(why) => note = Some(why),
            }
        }
        (config, note)
    }

    fn failed(self) -> Error {
        let place = self.options.place();
        let (_, first) = self.told.first().map_or(("", ""), |(label, why)| (label.as_str(), why.as_str()));
        let why = if self.told.iter().all(|(_, why)| why == first) {
            first.to_owned()
        } else {
            let parts: Vec<_> = self.told.iter().map(|(label, why)| format!("{label}: {why}")).collect();
            parts.join("; ")
        };
        let message = format!("could not connect to {place}: {why}");
        self.last.error(message)
    }
}

/// Refuses a server that is not of the wanted kind.
async fn check(
    client: &Client,
    connection: &mut Connection<Wire, Wire>,
    wanted: Wanted,
) -> std::result::Result<(), Fault> {
    if wanted == Wanted::Any {
        return Ok(());
    }
    // PostgreSQL 14 says both at the login; a pooler in front of it may not.
    let (standby, read_only) =
        (is_on(connection, "in_hot_standby"), is_on(connection, "default_transaction_read_only"));
    let fits = match wanted {
        Wanted::Any | Wanted::PreferStandby => true,
        Wanted::Primary | Wanted::Standby => {
            let is_standby = match standby {
                Some(standby) => standby,
                None => ask(client, connection, "SELECT pg_catalog.pg_is_in_recovery()").await?,
            };
            is_standby == (wanted == Wanted::Standby)
        }
        Wanted::ReadWrite | Wanted::ReadOnly => {
            let is_read_only = match standby.zip(read_only) {
                Some((standby, read_only)) => standby || read_only,
                None => ask(client, connection, "SHOW transaction_read_only").await?,
            };
            is_read_only == (wanted == Wanted::ReadOnly)
        }
    };
    let why = match wanted {
        _ if fits => return Ok(()),
        Wanted::ReadWrite => "the session is read-only",
        Wanted::ReadOnly => "the session is not read-only",
        Wanted::Primary => "the server is in recovery",
        Wanted::Any | Wanted::Standby | Wanted::PreferStandby => "the server is not in recovery",
    };
    Err(Fault::gone(format!("{why}, and target_session_attrs asks for another")))
}

/// What the server said of a parameter at the login.
fn is_on(connection: &Connection<Wire, Wire>, name: &str) -> Option<bool> {
    connection.parameter(name).map(|value| value == "on")
}

/// Whether the server's answer is yes.
async fn ask(client: &Client, connection: &mut Connection<Wire, Wire>, text: &str) -> std::result::Result<bool, Fault> {
    let drive = poll_fn(|cx| {
        loop {
            match connection.poll_message(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    let answer = tokio::select! {
        answer = client.simple_query(text) => answer.map_err(|e| Fault::of_login(&e, None))?,
        () = drive => return Err(Fault::of_io(&io::ErrorKind::UnexpectedEof.into())),
    };
    let value = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(|value| value == "on" || value == "t"),
        _ => None,
    });
    Ok(value.unwrap_or(false))
}

/// Fisher and Yates.
fn shuffle<T>(items: &mut [T]) {
    for last in (1..items.len()).rev() {
        let other = usize::try_from(random_u64() % (last as u64 + 1)).unwrap_or(0);
        items.swap(last, other);
    }
}
