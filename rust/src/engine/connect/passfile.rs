//! The password file, `~/.pgpass` unless told otherwise: `host:port:database:user:password`, the first line that fits counts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key<'a> {
    /// `localhost` for the default socket.
    pub(super) host: &'a str,
    pub(super) port: &'a str,
    pub(super) database: &'a str,
    pub user: &'a str,
}

/// What the file says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Password(String),
    /// No file, or no line for this.
    Nothing,
    /// The file is there, and for this reason it is not used.
    Ignored(String),
}

/// Looks a password up. As libpq does it, a file that can't be read is as good as none, and one that others may read is not used.
pub(super) fn look_up(path: &Path, key: Key<'_>) -> Found {
    let Ok(about) = fs::metadata(path) else { return Found::Nothing };
    if !about.is_file() {
        return Found::Ignored(format!("the passfile {} is not used: it is not a plain file", path.display()));
    }
    if about.permissions().mode() & 0o077 != 0 {
        return Found::Ignored(format!(
            "the passfile {} is not used: others may read it (chmod 0600 makes it private)",
            path.display()
        ));
    }
    let Ok(text) = fs::read(path) else {
        return Found::Ignored(format!("the passfile {} is not used: it can't be read", path.display()));
    };
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    let found = lines.find_map(|line| match_line(line, key));
    found.map_or(Found::Nothing, Found::Password)
}

fn match_line(line: &str, key: Key<'_>) -> Option<String> {
    let parts = [key.host, key.port, key.database, key.user];
    let rest = parts.into_iter().try_fold(line, match_field)?;
    let mut password = String::new();
    let mut chars = rest.chars();
    while let Some(c) = chars.next().filter(|&c| c != ':') {
        password.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    Some(password)
}

/// What follows the first field of `line`, if that is `*` or `wanted`.
fn match_field<'a>(line: &'a str, wanted: &str) -> Option<&'a str> {
    if let Some(rest) = line.strip_prefix("*:") {
        return Some(rest);
    }
    let (mut chars, mut wanted) = (line.chars(), wanted.chars());
    loop {
        match (chars.next()?, wanted.as_str()) {
            (':', "") => return Some(chars.as_str()),
            (c, _) => {
                let c = if c == '\\' { chars.next()? } else { c };
                if wanted.next()? != c {
                    return None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key<'_> = Key { host: "h", port: "5432", database: "d:b", user: "u" };

    #[test]
    fn matches_as_libpq_does() {
        for (line, password) in [
            (r"h:5432:d\:b:u:secret", Some("secret")),
            (r"*:*:*:*:se\:cr\\et:rest", Some(r"se:cr\et")),
            (r"h:5432:d\:b:u:", Some("")),
            (r"h:5432:d\:b:u", None),
            (r"h:5432:d:b:u:secret", Some("secret")),
            (r"h:5432:d:u:secret", None),
            (r"hh:5432:d\:b:u:secret", None),
            (r"h:543:d\:b:u:secret", None),
            (r"*h:5432:d\:b:u:secret", None),
            ("", None),
        ] {
            assert_eq!(match_line(line, KEY).as_deref(), password, "{line}");
        }
    }

    #[test]
    fn a_file_for_all_to_read_is_not_used() {
        let path = std::env::temp_dir().join(format!("fastq-passfile-{}", std::process::id()));
        fs::write(&path, "# c\n*:*:*:*:secret\n").expect("written");
        let mut seen = Vec::new();
        for mode in [0o600, 0o640] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
            seen.push(look_up(&path, KEY));
        }
        fs::remove_file(&path).expect("removed");
        assert_eq!(seen[0], Found::Password("secret".to_owned()));
        assert!(matches!(&seen[1], Found::Ignored(why) if why.contains("others may read it")), "{seen:?}");
        assert_eq!(look_up(&path, KEY), Found::Nothing);
    }
}
