//! Rights of roles that own nothing: what each kind needs, read from sql/grants, and what the role of a connection lacks of it.

use crate::engine::connect::Link;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::sql::GRANTS;

/// SQLSTATE of a right that is missing.
const MISSING: &str = "42501";

/// One right on one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Right {
    /// `schema`, `table` or `sequence`; a view counts as a table.
    pub on: String,
    /// The object's name without its schema; empty for the schema.
    pub name: String,
    /// SELECT, INSERT, …
    pub privilege: String,
    /// The only column that it is for; empty: all.
    pub column: String,
}

/// The rights that the kind of role of this name is granted, in order; none for a name that sql/grants does not hold.
pub fn of(role: &str) -> Vec<Right> {
    GRANTS.iter().filter(|(name, _)| *name == role).flat_map(|(_, text)| read(text)).collect()
}

/// Reads `GRANT privileges ON kind objects TO role;`, one after the other, with comments in lines of their own.
fn read(text: &str) -> Vec<Right> {
    let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("--")).collect();
    code.join(" ").split(';').filter_map(read_grant).flatten().collect()
}

fn read_grant(grant: &str) -> Option<Vec<Right>> {
    let (what, rest) = grant.trim().strip_prefix("GRANT ")?.split_once(" ON ")?;
    let (on, rest) = rest.split_once(' ')?;
    let (objects, _) = rest.split_once(" TO ")?;
    let on = on.to_lowercase();
    // With columns there is one privilege: GRANT SELECT (id, lane) ON …
    let (privileges, columns): (Vec<&str>, Vec<&str>) = match what.split_once(" (") {
        Some((privilege, columns)) => (vec![privilege], names(columns.trim_end_matches(')'))),
        None => (names(what), vec![""]),
    };
    let mut rights = Vec::new();
    for object in names(objects) {
        for privilege in &privileges {
            for column in &columns {
                rights.push(Right {
                    name: object.strip_prefix("fastq.").unwrap_or_default().to_owned(),
                    on: on.clone(),
                    privilege: (*privilege).to_owned(),
                    column: (*column).to_owned(),
                });
            }
        }
    }
    Some(rights)
}

fn names(list: &str) -> Vec<&str> {
    list.split(',').map(str::trim).collect()
}

/// Refuses a connection whose role lacks rights that this kind of role (`worker`, `producer`) needs, and names them all: a statement that
/// is refused later names one table and nobody.
pub async fn check(link: &Link, role: &str) -> Result<()> {
    let rights = of(role);
    let column = |get: fn(&Right) -> &String| rights.iter().map(get).collect::<Vec<_>>();
    let (on, names) = (column(|r| &r.on), column(|r| &r.name));
    let (privileges, columns) = (column(|r| &r.privilege), column(|r| &r.column));
    let schema = link.schema();
    let row = link.query_opt("check_rights", &[&schema, &on, &names, &privileges, &columns]).await?;
    let Some((name, Some(lacking))) = row.map(|r| (r.get::<_, String>(0), r.get::<_, Option<String>>(1))) else {
        return Ok(());
    };
    let what = if role == "producer" { "enqueue" } else { "work" };
    let message = format!(
        "permission denied: role {name:?} may not {what} in schema {schema:?}: it lacks {lacking}. The schema's owner can grant what \
         `fastq migrate --grants --{role} {name}` prints [{MISSING}]"
    );
    Err(Error::new(Kind::Database { sqlstate: MISSING.to_owned(), transient: false }, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(on: &str, name: &str, privilege: &str, column: &str) -> Right {
        Right { on: on.into(), name: name.into(), privilege: privilege.into(), column: column.into() }
    }

    #[test]
    fn grants_are_read_as_postgresql_reads_them() {
        let text = "-- GRANT ALL ON x TO y;\nGRANT USAGE ON SCHEMA fastq TO r;\nGRANT SELECT, INSERT ON TABLE fastq.a,\n  fastq.b TO r;\n\
                    GRANT SELECT (id, x) ON TABLE fastq.c TO r;\nGRANT USAGE ON SEQUENCE fastq.d TO r;\n";
        assert_eq!(
            read(text),
            [
                right("schema", "", "USAGE", ""),
                right("table", "a", "SELECT", ""),
                right("table", "a", "INSERT", ""),
                right("table", "b", "SELECT", ""),
                right("table", "b", "INSERT", ""),
                right("table", "c", "SELECT", "id"),
                right("table", "c", "SELECT", "x"),
                right("sequence", "d", "USAGE", ""),
            ]
        );
    }

    #[test]
    fn every_grant_of_every_kind_is_read() {
        for (role, text) in GRANTS {
            let grants = text.lines().filter(|line| line.starts_with("GRANT ")).count();
            assert_eq!(read(text).iter().filter(|r| r.on == "schema").count(), 1, "{role}");
            let code: String = text.lines().filter(|line| !line.starts_with("--")).collect();
            assert_eq!(code.split(';').filter_map(read_grant).count(), grants, "{role}");
        }
    }

    #[test]
    fn a_worker_may_all_that_the_others_may() {
        let worker = of("worker");
        for right in ["producer", "handler", "viewer"].into_iter().flat_map(of) {
            let whole = Right { column: String::new(), ..right.clone() };
            assert!(worker.contains(&right) || worker.contains(&whole), "{right:?}");
        }
        assert!(of("nobody").is_empty());
    }
}
