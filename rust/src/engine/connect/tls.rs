//! TLS as a connection string asks for it: which files, which versions, what is checked, and the handshake. By rustls; what its
//! verifier and libpq's see differently is evened out in `verify`.

use std::fs::{self, Metadata};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pkcs8::EncryptedPrivateKeyInfoRef;
use pkcs8::der::{Decode, SecretDocument};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, SignatureScheme, SupportedProtocolVersion};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::engine::connect::options::{Secret, cannot, choose};
use crate::engine::connect::sources::{Env, home};
use crate::engine::connect::verify::{Trust, Verifier};
use crate::engine::connect::words::Words;
use crate::engine::error::{Error, Result};

const ALPN: &[u8] = b"postgresql";

/// How much a server must prove, from nothing to all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// A file that may be named, or lie at its usual place.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    path: PathBuf,
    /// It was asked for: it must be there.
    is_given: bool,
}

impl Named {
    fn read(words: &Words, word: &str, env: Env<'_>, usual: &str) -> Option<Self> {
        match words.get(word).filter(|path| !path.is_empty()) {
            Some(path) => Some(Self { path: PathBuf::from(path), is_given: true }),
            None => home(env).map(|home| Self { path: home.join(".postgresql").join(usual), is_given: false }),
        }
    }

    /// What is known of the file; None: it is not there, and need not be.
    fn look(&self, word: &str) -> Result<Option<Metadata>> {
        match fs::metadata(&self.path) {
            // A pipe would keep whoever reads it waiting, and with it the heartbeat.
            Ok(about) if !about.is_file() => Err(wrong_file(word, &self.path, "is not a plain file")),
            Ok(about) => Ok(Some(about)),
            Err(e) if !self.is_given && matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(None)
            }
            Err(e) => Err(unreadable(word, &self.path, &e)),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CertMode {
    Allow,
    Disable,
    Require,
}

/// The words about TLS.
#[derive(Debug, Clone)]
pub(super) struct TlsOptions {
    pub(super) mode: Mode,
    /// TLS from the first byte on (PostgreSQL 17), without asking for it first.
    pub(super) direct: bool,
    system_roots: bool,
    roots: Option<Named>,
    cert: Option<Named>,
    key: Option<Named>,
    key_password: Option<Secret>,
    cert_mode: CertMode,
    crl: Option<Named>,
    crl_folder: Option<PathBuf>,
    sni: bool,
    versions: Vec<&'static SupportedProtocolVersion>,
}

impl TlsOptions {
    pub(super) fn read(words: &Words, env: Env<'_>) -> Result<Self> {
        let modes = [
            ("prefer", Mode::Prefer),
            ("disable", Mode::Disable),
            ("allow", Mode::Allow),
            ("require", Mode::Require),
            ("verify-ca", Mode::VerifyCa),
            ("verify-full", Mode::VerifyFull),
        ];
        let mode = choose(words, "sslmode", &modes)?;
        let direct = choose(words, "sslnegotiation", &[("postgres", false), ("direct", true)])?;
        if direct && mode < Mode::Require {
            return Err(cannot("sslnegotiation=direct", "it needs sslmode=require, verify-ca or verify-full"));
        }
        let system_roots = words.get("sslrootcert").is_some_and(|roots| roots == "system");
        if system_roots && mode != Mode::VerifyFull {
            return Err(cannot("sslrootcert=system", "it needs sslmode=verify-full"));
        }
        let cert_modes = [("allow", CertMode::Allow), ("disable", CertMode::Disable), ("require", CertMode::Require)];
        let text = |word: &str| words.get(word).filter(|value| !value.is_empty());
        let crl_folder = text("sslcrldir").map(PathBuf::from);
        Ok(Self {
            mode,
            direct,
            system_roots,
            roots: if system_roots { None } else { Named::read(words, "sslrootcert", env, "root.crt") },
            cert: Named::read(words, "sslcert", env, "postgresql.crt"),
            key: Named::read(words, "sslkey", env, "postgresql.key"),
            key_password: text("sslpassword").cloned().map(Secret),
            cert_mode: choose(words, "sslcertmode", &cert_modes)?,
            crl: Named::read(words, "sslcrl", env, "root.crl").filter(|crl| crl.is_given || crl_folder.is_none()),
            crl_folder,
            sni: choose(words, "sslsni", &[("1", true), ("0", false)])?,
            versions: read_versions(words)?,
        })
    }

    /// Whether a session without the client's certificate is refused.
    pub(super) fn needs_cert(&self) -> bool {
        self.cert_mode == CertMode::Require
    }

    /// Reads the files. They are read for each new connection: they are renewed while we run.
    pub(super) fn load(&self) -> Result<Tls> {
        let provider = Arc::new(ring::default_provider());
        let trust = self.load_trust(&provider)?.map(Arc::new);
        let client = self.load_client(&provider)?.map(Arc::new);
        if client.is_none() && self.needs_cert() {
            return Err(cannot("sslcertmode=require", "there is no certificate to send (sslcert)"));
        }
        Ok(Tls { options: self.clone(), provider, trust, client, was_asked: Arc::default() })
    }

    fn load_trust(&self, provider: &Arc<CryptoProvider>) -> Result<Option<Trust>> {
        if self.system_roots {
            let found = rustls_native_certs::load_native_certs();
            if found.certs.is_empty() {
                return Err(cannot("sslrootcert=system", "this system has no trusted certificates (ca-certificates)"));
            }
            return Trust::of_system(found.certs, self.load_crls()?, provider).map(Some);
        }
        let Some(roots) = &self.roots else {
            return if self.mode < Mode::VerifyCa { Ok(None) } else { Err(no_roots("no home directory is known")) };
        };
        if roots.look("sslrootcert")?.is_none() {
            return if self.mode < Mode::VerifyCa {
                Ok(None)
            } else {
                Err(no_roots(&format!("{} does not exist", roots.path.display())))
            };
        }
        // As for libpq, a file of roots that is there is used in every mode.
        let certs: Vec<CertificateDer<'static>> = read_pem("sslrootcert", &roots.path)?;
        Trust::new(certs, self.load_crls()?, provider)
            .map(Some)
            .map_err(|e| Error::settings(format!("sslrootcert {}: {}", roots.path.display(), e.message)))
    }

    fn load_crls(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        let mut crls = Vec::new();
        if let Some(crl) = &self.crl
            && crl.look("sslcrl")?.is_some()
        {
            crls.extend(read_pem("sslcrl", &crl.path)?);
        }
        if let Some(folder) = &self.crl_folder {
            let entries = fs::read_dir(folder).map_err(|e| unreadable("sslcrldir", folder, &e))?;
            for entry in entries {
                let path = entry.map_err(|e| unreadable("sslcrldir", folder, &e))?.path();
                if path.is_file() {
                    crls.extend(read_pem("sslcrldir", &path)?);
                }
            }
        }
        Ok(crls)
    }

    fn load_client(&self, provider: &CryptoProvider) -> Result<Option<CertifiedKey>> {
        let Some(cert) = self.cert.as_ref().filter(|_| self.cert_mode != CertMode::Disable) else { return Ok(None) };
        if cert.look("sslcert")?.is_none() {
            return Ok(None);
        }
        let chain: Vec<CertificateDer<'static>> = read_pem("sslcert", &cert.path)?;
        let Some(key) = &self.key else {
            return Err(cannot("sslcert", "sslkey is missing, and no home directory is known to look for it"));
        };
        let about = fs::metadata(&key.path).map_err(|e| unreadable("sslkey", &key.path, &e))?;
        check_private(&key.path, &about)?;
        let signer = provider.key_provider.load_private_key(self.load_key(&key.path)?);
        let signer =
            signer.map_err(|e| wrong_file("sslkey", &key.path, &format!("is no key that can be used: {e}")))?;
        let client = CertifiedKey::new(chain, signer);
        match client.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(Some(client)),
            Err(_) => {
                Err(wrong_file("sslkey", &key.path, &format!("does not belong to sslcert {}", cert.path.display())))
            }
        }
    }

    fn load_key(&self, path: &Path) -> Result<PrivateKeyDer<'static>> {
        let bytes = fs::read(path).map_err(|e| unreadable("sslkey", path, &e))?;
        let text = String::from_utf8_lossy(&bytes);
        if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") {
            return self.decrypt(path, &text);
        }
        if text.contains("Proc-Type: 4,ENCRYPTED") {
            return Err(wrong_file(
                "sslkey",
                path,
                "is encrypted in an old form: `openssl pkcs8 -topk8` makes a new one of it",
            ));
        }
        let key = if text.contains("-----BEGIN") {
            PrivateKeyDer::from_pem_slice(&bytes).ok()
        } else {
            PrivateKeyDer::try_from(bytes).ok()
        };
        key.ok_or_else(|| wrong_file("sslkey", path, "holds no private key"))
    }

    fn decrypt(&self, path: &Path, text: &str) -> Result<PrivateKeyDer<'static>> {
        let Some(password) = &self.key_password else {
            return Err(wrong_file("sslkey", path, "is encrypted: sslpassword is missing"));
        };
        let wrong = |what: &str| wrong_file("sslkey", path, what);
        let start = text.find("-----BEGIN ENCRYPTED").unwrap_or(0);
        let (_, sealed) = SecretDocument::from_pem(&text[start..]).map_err(|_| wrong("can't be read"))?;
        let info = EncryptedPrivateKeyInfoRef::from_der(sealed.as_bytes())
            .map_err(|_| wrong("is encrypted in a way that can't be read"))?;
        let open = info.decrypt(&password.0).map_err(|_| wrong("is encrypted, and sslpassword does not open it"))?;
        Ok(PrivateKeyDer::Pkcs8(open.as_bytes().to_vec().into()))
    }
}

fn read_versions(words: &Words) -> Result<Vec<&'static SupportedProtocolVersion>> {
    let read = |word: &str, default: &str| {
        let given = words.get(word).filter(|value| !value.is_empty()).map_or(default, String::as_str);
        let names = ["tlsv1", "tlsv1.1", "tlsv1.2", "tlsv1.3"];
        names.iter().position(|name| *name == given.to_ascii_lowercase()).ok_or_else(|| {
            Error::settings(format!("{word} in the connection string must be one of TLSv1, TLSv1.1, TLSv1.2, TLSv1.3"))
        })
    };
    let (least, most) = (read("ssl_min_protocol_version", "TLSv1.2")?, read("ssl_max_protocol_version", "TLSv1.3")?);
    let versions: Vec<_> = [(2, &TLS12), (3, &TLS13)].into_iter().filter(|(n, _)| (least..=most).contains(n)).collect();
    if versions.is_empty() {
        return Err(cannot(
            "ssl_max_protocol_version",
            "it is below ssl_min_protocol_version, or below TLSv1.2, the oldest that fastq speaks",
        ));
    }
    Ok(versions.into_iter().map(|(_, version)| version).collect())
}

fn unreadable(word: &str, path: &Path, e: &io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::NotFound => wrong_file(word, path, "does not exist"),
        _ => wrong_file(word, path, &format!("can't be read: {e}")),
    }
}

fn wrong_file(word: &str, path: &Path, what: &str) -> Error {
    Error::settings(format!("{word} {} {what}", path.display()))
}

fn no_roots(why: &str) -> Error {
    Error::settings(format!(
        "sslmode asks for a check of the server's certificate, but there are no roots to check it with: {why}; \
         name a file by sslrootcert, or sslrootcert=system for those that this system trusts"
    ))
}

fn read_pem<T: PemObject>(word: &str, path: &Path) -> Result<Vec<T>> {
    let bytes = fs::read(path).map_err(|e| unreadable(word, path, &e))?;
    let items: std::result::Result<Vec<T>, _> = T::pem_slice_iter(&bytes).collect();
    match items {
        Ok(items) if !items.is_empty() => Ok(items),
        _ => Err(wrong_file(word, path, "holds nothing of its kind in PEM form")),
    }
}

/// A key that others may read is refused, as by libpq: 0600, or 0640 where it is root's.
fn check_private(path: &Path, about: &Metadata) -> Result<()> {
    if !about.is_file() {
        return Err(wrong_file("sslkey", path, "is not a plain file"));
    }
    let too_open = if about.uid() == 0 { 0o037 } else { 0o077 };
    if about.mode() & too_open != 0 {
        let what = "may be read by others: chmod 0600 makes it private (0640 will do for a file of root's)";
        return Err(wrong_file("sslkey", path, what));
    }
    Ok(())
}

/// Files read, ready for handshakes.
#[derive(Debug)]
pub(super) struct Tls {
    options: TlsOptions,
    provider: Arc<CryptoProvider>,
    trust: Option<Arc<Trust>>,
    client: Option<Arc<CertifiedKey>>,
    /// Whether the server has asked for a certificate in the last handshake.
    was_asked: Arc<AtomicBool>,
}

impl Tls {
    /// Makes the handshake with `host`; answers the stream and what SCRAM binds to.
    pub(super) async fn shake(
        &self,
        stream: TcpStream,
        host: &str,
    ) -> io::Result<(TlsStream<TcpStream>, Option<Vec<u8>>)> {
        let connector = TlsConnector::from(Arc::new(self.config(host).map_err(io::Error::other)?));
        self.was_asked.store(false, Ordering::Relaxed);
        // A host that is no name for a certificate has nothing to send as one; `Verifier` checks names itself.
        let name = ServerName::try_from(host.to_owned()).unwrap_or(ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED)));
        let stream = connector.connect(name, stream).await?;
        let session = stream.get_ref().1;
        if self.options.direct && session.alpn_protocol() != Some(ALPN) {
            return Err(io::Error::other(
                "the server does not take TLS from the first byte on (sslnegotiation=direct)",
            ));
        }
        if self.options.needs_cert() && !self.was_asked.load(Ordering::Relaxed) {
            return Err(io::Error::other("the server does not ask for a certificate, and sslcertmode requires that"));
        }
        let end_point =
            session.peer_certificates().and_then(<[_]>::first).and_then(|cert| super::verify::end_point(cert));
        Ok((stream, end_point))
    }

    fn config(&self, host: &str) -> std::result::Result<ClientConfig, rustls::Error> {
        let host = (self.options.mode == Mode::VerifyFull).then(|| host.to_owned());
        let verifier = Verifier::new(self.trust.clone(), host, &self.provider);
        let asked = Asked { client: self.client.clone(), was_asked: Arc::clone(&self.was_asked) };
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&self.options.versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(asked));
        config.enable_sni = self.options.sni;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// Gives the client's certificate to a server that asks for one, and notes that it asked.
#[derive(Debug)]
struct Asked {
    client: Option<Arc<CertifiedKey>>,
    was_asked: Arc<AtomicBool>,
}

impl ResolvesClientCert for Asked {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.was_asked.store(true, Ordering::Relaxed);
        self.client.clone()
    }

    fn has_certs(&self) -> bool {
        true
    }
}
