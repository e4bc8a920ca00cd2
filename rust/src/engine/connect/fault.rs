//! Why an attempt to connect failed, in words that say which part is wrong.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};

use crate::engine::connect::verify::WrongName;
use crate::engine::error::{Error, Kind};

/// Why one attempt failed.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) message: String,
    /// It may go better with TLS instead of without, or the other way round.
    pub(super) other_way: bool,
    /// The server, or a check of ours, said no. Else nobody is there now, which may pass.
    pub(super) is_final: bool,
    /// The server's SQLSTATE, where it answered.
    pub(super) sqlstate: Option<String>,
}

impl Fault {
    /// Nobody, or not the right one, is there now.
    pub(super) fn gone(message: impl Into<String>) -> Self {
        Self { message: message.into(), other_way: false, is_final: false, sqlstate: None }
    }

    /// A no that stays: other hosts are not to be tried. As for libpq, a refused login is an answer.
    pub(super) fn denied(message: impl Into<String>) -> Self {
        Self { is_final: true, ..Self::gone(message) }
    }

    /// As the engine's error.
    pub(super) fn error(self, message: String) -> Error {
        if self.is_final {
            let sqlstate = self.sqlstate.unwrap_or_default();
            return Error::new(Kind::Database { sqlstate, transient: false }, message);
        }
        Error { closing: self.sqlstate, ..Error::lost(message) }
    }

    /// The socket's error.
    pub(super) fn of_io(e: &io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                Self::gone("the server closed the connection")
            }
            _ => Self::gone(e.to_string()),
        }
    }

    /// What failed while TLS was set up.
    pub(super) fn of_tls(e: &io::Error) -> Self {
        let fault = match e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(e) => Self::denied(explain(e)),
            None if e.kind() == io::ErrorKind::Other => Self::denied(e.to_string()),
            None => Self::of_io(e),
        };
        Self { other_way: true, ..fault }
    }

    /// What failed between the handshake and the end of the login. `note`: why the passfile was not used.
    pub(super) fn of_login(e: &tokio_postgres::Error, note: Option<&str>) -> Self {
        let note = note.map(|note| format!(" ({note})")).unwrap_or_default();
        if let Some(db) = e.as_db_error() {
            let code = db.code().code();
            let hint = db.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
            let message = format!("{} [{code}]{hint}", db.message());
            // Whoever is refused now will be refused later: the login (28), no such database, no right to connect to it.
            let (is_login, is_final) =
                (code.starts_with("28"), ["28", "3D", "42"].contains(&code.get(..2).unwrap_or("")));
            let message = if is_login { message + &note } else { message };
            return Self { message, other_way: is_login, is_final, sqlstate: Some(code.to_owned()) };
        }
        let source = e.source();
        if let Some(e) = source.and_then(|source| source.downcast_ref::<io::Error>()) {
            return match e.get_ref().map(|inner| inner.downcast_ref::<rustls::Error>()) {
                Some(Some(e)) => Self { other_way: true, ..Self::denied(explain(e)) },
                Some(None) if e.kind() == io::ErrorKind::PermissionDenied => Self::denied(e.to_string()),
                _ => Self::of_io(e),
            };
        }
        let cause = source.map(ToString::to_string).unwrap_or_default();
        match (e.to_string().as_str(), cause.as_str()) {
            ("invalid configuration", "password missing") => Self::denied(format!(
                "the server asks for a password, and there is none (password, PGPASSWORD or a passfile){note}"
            )),
            ("authentication error", "server did not use channel binding") => {
                Self::denied("channel_binding is required, and the server does not do it on this connection")
            }
            ("authentication error", "unsupported authentication method") => {
                Self::denied("the server asks for GSSAPI, SSPI or Kerberos, which fastq does not speak")
            }
            ("authentication error", cause) => Self::denied(format!("the login failed: {cause}")),
            _ if e.is_closed() => Self::of_io(&io::ErrorKind::UnexpectedEof.into()),
            (text, "") => Self::gone(text),
            (text, cause) => Self::gone(format!("{text}: {cause}")),
        }
    }
}

/// What rustls says, for somebody who has to put it right.
fn explain(e: &rustls::Error) -> String {
    let certificate = match e {
        rustls::Error::InvalidCertificate(certificate) => certificate,
        rustls::Error::AlertReceived(alert) => return explain_alert(*alert),
        other => return format!("TLS failed: {other}"),
    };
    let why = match certificate {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "is not trusted: none of the roots in sslrootcert has issued it"
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "has expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => "is not valid yet",
        CertificateError::Revoked => "is revoked (sslcrl, sslcrldir)",
        CertificateError::UnknownRevocationStatus => {
            "can't be checked: no revocation list of its issuer is in sslcrl or sslcrldir"
        }
        CertificateError::ExpiredRevocationList | CertificateError::ExpiredRevocationListContext { .. } => {
            "can't be checked: the revocation list of its issuer (sslcrl, sslcrldir) is out of date"
        }
        CertificateError::Other(other) => match other.0.downcast_ref::<WrongName>() {
            Some(wrong) => return wrong.to_string(),
            None => return format!("the server's certificate is not accepted: {other}"),
        },
        other => return format!("the server's certificate is not accepted: {other}"),
    };
    format!("the server's certificate {why}")
}

fn explain_alert(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::CertificateRequired => "asks for a certificate of the client (sslcert, sslkey)",
        AlertDescription::UnknownCA
        | AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::DecryptError => "does not accept the client's certificate (sslcert)",
        AlertDescription::CertificateExpired => "does not accept the client's certificate (sslcert): it has expired",
        AlertDescription::CertificateRevoked => "does not accept the client's certificate (sslcert): it is revoked",
        AlertDescription::ProtocolVersion => {
            "speaks no version of TLS from ssl_min_protocol_version to ssl_max_protocol_version"
        }
        other => return format!("the server ended the TLS handshake: {other:?}"),
    };
    format!("the server {why}")
}

/// A time limit, for messages.
pub(super) fn seconds(limit: Duration) -> String {
    if limit < Duration::from_secs(1) {
        return format!("{} ms", limit.as_millis());
    }
    let text = format!("{:.1}", limit.as_secs_f64());
    format!("{} s", text.strip_suffix(".0").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_short() {
        let texts = [10_000, 9_999, 3_333, 50].map(|ms| seconds(Duration::from_millis(ms)));
        assert_eq!(texts, ["10 s", "10 s", "3.3 s", "50 ms"]);
    }

    #[test]
    fn a_denial_is_no_lost_connection() {
        assert!(!Fault::denied("no").error("no".to_owned()).is_lost());
        assert!(Fault::gone("no".to_owned()).error("no".to_owned()).is_lost());
    }
}
