//! Whether the server is who it should be. rustls' verifier checks the chain; names are matched here as libpq matches them (a name alone
//! in the certificate's subject counts, too), and a self-signed certificate that is itself among the roots is trusted, as by OpenSSL.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_cert::Certificate;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode, Encode, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use crate::engine::error::{Error, Result};

/// Roots and revocation lists, checked once.
#[derive(Debug)]
pub(super) struct Trust {
    chain: Arc<WebPkiServerVerifier>,
    /// Certificates among the roots that are nobody's root: OpenSSL takes them as links of a chain, not as its end.
    links: Vec<CertificateDer<'static>>,
    /// Self-signed certificates that are trusted as they are; none where revocation lists are to be asked.
    own: Vec<CertificateDer<'static>>,
}

impl Trust {
    /// The certificates of `sslrootcert`.
    pub(super) fn new(
        certs: Vec<CertificateDer<'static>>,
        crls: Vec<CertificateRevocationListDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self> {
        let is_self_signed = |cert: &CertificateDer<'_>| {
            Certificate::from_der(cert)
                .is_ok_and(|cert| cert.tbs_certificate().issuer() == cert.tbs_certificate().subject())
        };
        let (roots, links): (Vec<_>, Vec<_>) = certs.into_iter().partition(is_self_signed);
        let own = if crls.is_empty() { roots.clone() } else { Vec::new() };
        Self::build(roots, links, own, crls, provider)
    }

    /// The certificates that the system trusts.
    pub(super) fn of_system(
        certs: Vec<CertificateDer<'static>>,
        crls: Vec<CertificateRevocationListDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self> {
        Self::build(certs, Vec::new(), Vec::new(), crls, provider)
    }

    fn build(
        roots: Vec<CertificateDer<'static>>,
        links: Vec<CertificateDer<'static>>,
        own: Vec<CertificateDer<'static>>,
        crls: Vec<CertificateRevocationListDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self> {
        let mut store = RootCertStore::empty();
        // One that can't be read does not make the others useless: the system has some of those.
        store.add_parsable_certificates(roots);
        let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(provider))
            .with_crls(crls)
            .enforce_revocation_expiration();
        let chain = builder.build().map_err(|e| Error::settings(format!("its certificates can't be used: {e}")))?;
        Ok(Self { chain, links, own })
    }

    fn check(&self, cert: &CertificateDer<'_>, chain: &[CertificateDer<'_>], now: UnixTime) -> TlsResult<()> {
        if self.own.iter().any(|own| own == cert) {
            return check_time(cert, now);
        }
        let links: Vec<_> = chain.iter().chain(&self.links).cloned().collect();
        // The verifier comes to the name last: whoever fails there has proved all else.
        let any = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        match self.chain.verify_server_cert(cert, &links, &any, &[], now) {
            Ok(_)
            | Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

type TlsResult<T> = std::result::Result<T, rustls::Error>;

fn check_time(cert: &CertificateDer<'_>, now: UnixTime) -> TlsResult<()> {
    let cert = Certificate::from_der(cert).map_err(|_| CertificateError::BadEncoding)?;
    let validity = cert.tbs_certificate().validity();
    if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

/// The check of one handshake.
#[derive(Debug)]
pub(super) struct Verifier {
    trust: Option<Arc<Trust>>,
    /// The name that the certificate must bear, where that counts.
    host: Option<String>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    /// Without `trust` any certificate will do.
    pub(super) fn new(trust: Option<Arc<Trust>>, host: Option<String>, provider: &CryptoProvider) -> Self {
        Self { trust, host, algorithms: provider.signature_verification_algorithms }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> TlsResult<ServerCertVerified> {
        if let Some(trust) = &self.trust {
            trust.check(end_entity, intermediates, now)?;
        }
        if let Some(host) = &self.host {
            let names = Names::read(end_entity).ok_or(CertificateError::BadEncoding)?;
            if !names.fit(host) {
                let wrong = WrongName { host: host.clone(), names: names.list() };
                return Err(CertificateError::Other(OtherError(Arc::new(wrong))).into());
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> TlsResult<HandshakeSignatureValid> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> TlsResult<HandshakeSignatureValid> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The certificate is another server's.
#[derive(Debug)]
pub(super) struct WrongName {
    host: String,
    names: String,
}

impl fmt::Display for WrongName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server's certificate is for {}, not for {:?}", self.names, self.host)
    }
}

impl std::error::Error for WrongName {}

/// The names in a certificate.
#[derive(Debug, Default)]
struct Names {
    dns: Vec<String>,
    addresses: Vec<Vec<u8>>,
    common: Option<String>,
}

impl Names {
    fn read(der: &[u8]) -> Option<Self> {
        let cert = Certificate::from_der(der).ok()?;
        let cert = cert.tbs_certificate();
        let mut names = Self::default();
        if let Some((_, found)) = cert.get_extension::<SubjectAltName>().ok()? {
            for name in found.0 {
                match name {
                    GeneralName::DnsName(name) => names.dns.push(name.to_string()),
                    GeneralName::IpAddress(address) => names.addresses.push(address.as_bytes().to_vec()),
                    _ => {}
                }
            }
        }
        let parts = cert.subject().as_ref().iter().flat_map(|part| part.as_ref().iter());
        let common = parts.filter(|part| part.oid == COMMON_NAME).find(|part| {
            matches!(part.value.tag(), Tag::Utf8String | Tag::PrintableString | Tag::TeletexString | Tag::Ia5String)
        });
        names.common = common.and_then(|part| std::str::from_utf8(part.value.value()).ok().map(str::to_owned));
        Some(names)
    }

    /// The subject's name counts only where there is no other name of the host's kind.
    fn fit(&self, host: &str) -> bool {
        let common = self.common.as_deref();
        match host.parse::<IpAddr>() {
            Ok(address) => {
                let bytes = match address {
                    IpAddr::V4(v4) => v4.octets().to_vec(),
                    IpAddr::V6(v6) => v6.octets().to_vec(),
                };
                let by_name = || self.dns.iter().any(|name| fits(name, host));
                self.addresses.contains(&bytes)
                    || by_name()
                    || (self.addresses.is_empty() && common.is_some_and(|name| fits(name, host)))
            }
            Err(_) if self.dns.is_empty() => common.is_some_and(|name| fits(name, host)),
            Err(_) => self.dns.iter().any(|name| fits(name, host)),
        }
    }

    fn list(&self) -> String {
        let address = |bytes: &Vec<u8>| {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
            let v6 = <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from);
            v4.or(v6).map_or_else(|_| "?".to_owned(), |address| address.to_string())
        };
        let mut names: Vec<_> = self.dns.iter().map(|name| format!("{name:?}")).collect();
        names.extend(self.addresses.iter().map(address));
        if names.is_empty() {
            names.extend(self.common.iter().map(|name| format!("{name:?}")));
        }
        if names.is_empty() { "no name".to_owned() } else { names.join(", ") }
    }
}

/// Whether a certificate's name is `host`'s: the same but for case, or `*.` and all but the first part.
fn fits(name: &str, host: &str) -> bool {
    if name.contains('\0') {
        return false;
    }
    let star = || {
        let suffix = name.strip_prefix('*').filter(|suffix| suffix.len() > 1 && suffix.starts_with('.'))?;
        let first = host.len().checked_sub(suffix.len())?;
        let (first, rest) = (host.get(..first)?, host.get(first..)?);
        Some(rest.eq_ignore_ascii_case(suffix) && !first.contains('.'))
    };
    name.eq_ignore_ascii_case(host) || star().unwrap_or(false)
}

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
/// Hashes in the parameters of RSA-PSS.
const HASHES: [(ObjectIdentifier, Hash); 3] = [
    (ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1"), Hash::Sha256),
    (ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.2"), Hash::Sha384),
    (ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.3"), Hash::Sha512),
];

#[derive(Debug, Clone, Copy)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

/// The hash of the server's certificate that SCRAM's channel binding uses (RFC 5929, `tls-server-end-point`): by the algorithm that the
/// certificate is signed with, SHA-256 in place of weaker ones. None where that algorithm has no hash of its own, such as Ed25519.
pub(super) fn end_point(der: &[u8]) -> Option<Vec<u8>> {
    let cert = Certificate::from_der(der).ok()?;
    let algorithm = cert.signature_algorithm();
    let hash = match algorithm.oid.to_string().as_str() {
        // MD5, SHA-1 and SHA-256 with RSA; SHA-1 and SHA-256 with ECDSA.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => Hash::Sha256,
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Hash::Sha384,
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Hash::Sha512,
        _ if algorithm.oid == RSA_PSS => {
            // Its own hash is the first one named there; without one it is SHA-1.
            let parameters = algorithm.parameters.as_ref().and_then(|any| any.to_der().ok()).unwrap_or_default();
            let at = |oid: &ObjectIdentifier| {
                let oid = oid.as_bytes();
                parameters.windows(oid.len()).position(|window| window == oid)
            };
            let named =
                HASHES.iter().filter_map(|(oid, hash)| at(oid).map(|at| (at, *hash))).min_by_key(|found| found.0);
            named.map_or(Hash::Sha256, |found| found.1)
        }
        _ => return None,
    };
    Some(match hash {
        Hash::Sha256 => Sha256::digest(der).to_vec(),
        Hash::Sha384 => Sha384::digest(der).to_vec(),
        Hash::Sha512 => Sha512::digest(der).to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dns: &[&str], addresses: &[&[u8]], common: Option<&str>) -> Names {
        Names {
            dns: dns.iter().map(|name| (*name).to_owned()).collect(),
            addresses: addresses.iter().map(|address| address.to_vec()).collect(),
            common: common.map(str::to_owned),
        }
    }

    #[test]
    fn a_star_stands_for_one_part() {
        for (name, host, is_fit) in [
            ("db.example.com", "DB.Example.com", true),
            ("*.example.com", "db.example.com", true),
            ("*.example.com", "a.db.example.com", false),
            ("*.example.com", "example.com", false),
            ("*example.com", "example.com", false),
            ("*.", "a.", false),
            ("db.*.com", "db.example.com", false),
            ("db.example.com\0.evil.com", "db.example.com", false),
            ("*.com", "é.com", true),
        ] {
            assert_eq!(fits(name, host), is_fit, "{name} {host}");
        }
    }

    #[test]
    fn the_subjects_name_counts_where_there_is_no_other() {
        assert!(names(&[], &[], Some("db")).fit("db"));
        assert!(!names(&["other"], &[], Some("db")).fit("db"));
        assert!(names(&[], &[&[127, 0, 0, 1]], Some("db")).fit("db"));
        assert!(names(&[], &[&[127, 0, 0, 1]], None).fit("127.0.0.1"));
        assert!(!names(&[], &[&[127, 0, 0, 1]], Some("127.0.0.2")).fit("127.0.0.2"));
        assert!(names(&["x"], &[], Some("127.0.0.2")).fit("127.0.0.2"));
        assert!(!names(&[], &[], None).fit("db"));
    }

    #[test]
    fn lists_what_a_certificate_is_for() {
        assert_eq!(names(&["a"], &[&[127, 0, 0, 1]], Some("c")).list(), "\"a\", 127.0.0.1");
        assert_eq!(names(&[], &[], Some("c")).list(), "\"c\"");
        assert_eq!(names(&[], &[], None).list(), "no name");
    }
}
