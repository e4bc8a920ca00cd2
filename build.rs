//! Lists the SQL files for `engine::sql`: one statement a file under sql/queries, one pair a schema step under sql/migrations (and its
//! indexes, where it has some), one file a kind of role under sql/grants.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn files(folder: &Path) -> Vec<PathBuf> {
    println!("cargo::rerun-if-changed={}", folder.display());
    let entries = fs::read_dir(folder).expect("sql/ is part of the source tree");
    let mut found: Vec<_> = entries
        .map(|e| e.expect("a readable folder").path())
        .filter(|p| p.extension().is_some_and(|x| x == "sql"))
        .collect();
    found.sort();
    found
}

/// The files of a folder by their names.
fn list(out: &mut String, folder: &Path) {
    for path in files(folder) {
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        writeln!(out, "    ({name:?}, include_str!({:?})),", path.display().to_string()).expect("a String takes all");
    }
}

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let mut out = String::from("/// Every statement by its name, sorted.\npub static QUERIES: &[(&str, &str)] = &[\n");
    list(&mut out, &root.join("sql/queries"));
    out.push_str("];\n/// What each kind of role is granted.\npub static GRANTS: &[(&str, &str)] = &[\n");
    list(&mut out, &root.join("sql/grants"));
    out.push_str(
        "];\n/// Every schema step: version, name, up, down, indexes.\npub static MIGRATIONS: &[(i32, &str, &str, &str, &str)] = &[\n",
    );
    for up in files(&root.join("sql/migrations")).into_iter().filter(|p| p.to_string_lossy().ends_with(".up.sql")) {
        let stem = up.file_name().expect("a file").to_string_lossy().trim_end_matches(".up.sql").to_owned();
        let (version, name) = stem.split_once('_').expect("a step is named 0001_name.up.sql");
        let version: i32 = version.parse().expect("a step's name starts with its number");
        let down = up.with_file_name(format!("{stem}.down.sql"));
        let indexes = up.with_file_name(format!("{stem}.indexes.sql"));
        let indexes = if indexes.exists() {
            format!("include_str!({:?})", indexes.display().to_string())
        } else {
            String::from("\"\"")
        };
        writeln!(
            out,
            "    ({version}, {name:?}, include_str!({:?}), include_str!({:?}), {indexes}),",
            up.display().to_string(),
            down.display().to_string()
        )
        .expect("a String takes all");
    }
    out.push_str("];\n");
    let target = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("sql.rs");
    fs::write(target, out).expect("OUT_DIR is writable");
}
