//! What a connection string leaves open and libpq fills in: the service's section of a service file, then the environment.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::engine::connect::words::{KNOWN, Words, find};
use crate::engine::error::{Error, Result};

/// Where the system's service file lies, unless PGSYSCONFDIR says otherwise: Debian's place, and that of psycopg's own libpq.
const SYSTEM_FOLDER: &str = "/etc/postgresql-common";
/// Variables that are not taken over. What they ask for has no effect here (GSSAPI is never used), or another effect than for libpq (the
/// encoding is always UTF-8), and they are set for other programs; the same words in a connection string are refused.
const IGNORED: [&str; 5] = ["client_encoding", "gssdelegation", "gsslib", "krbsrvname", "sslcompression"];

/// The environment, as a function so that tests can have their own.
pub(super) type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The process's own environment.
pub(super) fn process_env(name: &str) -> Option<String> {
    env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// The user's home directory.
pub(super) fn home(env: Env<'_>) -> Option<PathBuf> {
    env("HOME").filter(|home| !home.is_empty()).map(PathBuf::from).or_else(env::home_dir)
}

/// All words: those given, then those of the service, then those of the environment. `service` itself is resolved and gone.
pub(super) fn complete(given: &Words, env: Env<'_>) -> Result<Words> {
    let mut words = given.clone();
    if let Some(service) = words.remove("service").or_else(|| env("PGSERVICE")) {
        add_service(&mut words, &service, env)?;
    }
    let of_environment = |(word, variable): &(&'static str, &str)| {
        if variable.is_empty() || *word == "service" || IGNORED.contains(word) {
            return None;
        }
        env(variable).map(|value| (*word, value))
    };
    for (word, value) in KNOWN.iter().filter_map(of_environment) {
        words.entry(word).or_insert(value);
    }
    if !words.contains_key("sslmode") {
        // The name before PostgreSQL 7.4, which libpq still reads.
        let required = env("PGREQUIRESSL").is_some_and(|value| value.starts_with('1'));
        let system = words.get("sslrootcert").is_some_and(|value| value == "system");
        if required {
            words.insert("sslmode", "require".to_owned());
        } else if system {
            words.insert("sslmode", "verify-full".to_owned());
        }
    }
    Ok(words)
}

fn add_service(words: &mut Words, service: &str, env: Env<'_>) -> Result<()> {
    let own = match env("PGSERVICEFILE") {
        Some(path) => Some(PathBuf::from(path)),
        None => home(env).map(|home| home.join(".pg_service.conf")).filter(|path| path.exists()),
    };
    let folder = env("PGSYSCONFDIR").unwrap_or_else(|| SYSTEM_FOLDER.to_owned());
    let system = Some(Path::new(&folder).join("pg_service.conf")).filter(|path| path.exists());
    for path in own.into_iter().chain(system) {
        let text = fs::read(&path)
            .map_err(|e| Error::settings(format!("the service file {} can't be read: {e}", path.display())))?;
        if add_section(words, service, &String::from_utf8_lossy(&text), &path)? {
            return Ok(());
        }
    }
    Err(Error::settings(format!(
        "service {service:?} is defined in no service file (PGSERVICEFILE, else ~/.pg_service.conf; {folder}/pg_service.conf)"
    )))
}

/// Adds what `[service]` says, where nothing was said before. False: there is no such section. The first of several counts.
fn add_section(words: &mut Words, service: &str, text: &str, path: &Path) -> Result<bool> {
    let mut is_found = false;
    for (number, line) in (1..).zip(text.lines()) {
        let wrong =
            |what: &str| Err(Error::settings(format!("line {number} of the service file {} {what}", path.display())));
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(section) = line.strip_prefix('[') {
            if is_found {
                break;
            }
            is_found = section.strip_prefix(service).is_some_and(|rest| rest.starts_with(']'));
            continue;
        }
        if !is_found {
            continue;
        }
        if line.starts_with("ldap") {
            return wrong("asks for a look-up by LDAP, which fastq does not do");
        }
        let Some((word, value)) = line.split_once('=') else {
            return wrong("is neither [name] nor word=value");
        };
        match find(word) {
            Some("service") => return wrong("names another service, which may not be"),
            Some(word) => drop(words.entry(word).or_insert_with(|| value.to_owned())),
            // The word itself may be the rest of a password.
            None => return wrong("has a word that PostgreSQL does not know"),
        }
    }
    Ok(is_found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(pairs: &[(&'static str, &str)]) -> Words {
        pairs.iter().map(|(word, value)| (*word, (*value).to_owned())).collect()
    }

    fn env_of<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        |name| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned())
    }

    #[test]
    fn the_string_beats_the_environment() {
        let env = env_of(&[("PGHOST", "of-env"), ("PGUSER", "of-env"), ("PGCLIENTENCODING", "LATIN1")]);
        let done = complete(&words(&[("user", "given")]), &env).expect("complete");
        assert_eq!(done, words(&[("host", "of-env"), ("user", "given")]));
    }

    #[test]
    fn system_roots_ask_for_the_name_too() {
        let done = complete(&words(&[("sslrootcert", "system")]), &env_of(&[])).expect("complete");
        assert_eq!(done["sslmode"], "verify-full");
        let env = env_of(&[("PGSSLMODE", "require")]);
        assert_eq!(complete(&words(&[("sslrootcert", "system")]), &env).expect("complete")["sslmode"], "require");
        assert_eq!(complete(&Words::new(), &env_of(&[("PGREQUIRESSL", "1")])).expect("complete")["sslmode"], "require");
    }

    #[test]
    fn a_service_fills_what_is_open() {
        let text = "# c\n[other]\nhost=no\n[mine]\n host=h\nuser=of-service\n[mine]\nport=1\n";
        let mut done = words(&[("user", "given")]);
        assert!(add_section(&mut done, "mine", text, Path::new("f")).expect("readable"));
        assert_eq!(done, words(&[("host", "h"), ("user", "given")]));
        assert!(!add_section(&mut done, "min", text, Path::new("f")).expect("readable"));
        for wrong in ["[s]\nhost", "[s]\nservice=t", "[s]\nhunter2=1", "[s]\nldap://x"] {
            let error = add_section(&mut Words::new(), "s", wrong, Path::new("f")).expect_err("refused");
            assert!(error.message.contains("line 2") && !error.message.contains("hunter2"), "{}", error.message);
        }
    }
}
