//! `--password USER=FILE`: passwords come out of files, so that none is ever an argument of a program, which everybody on
//! the host can read.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::{Context, Error, Kind, Result};
use crate::model::password::{PASSWORD_BYTES_MAX, Password, Passwords, check_account};

/// Reads the files that were named. Each error says which, and never what is in it.
pub fn read(typed: &[String]) -> Result<Passwords> {
    let mut passwords = Passwords::new();
    for one in typed {
        let (account, file) = one.split_once('=').ok_or_else(|| {
            Error::new(Kind::BadInput, "cannot read --password: there is no '='")
                .hint("write it as --password USER=FILE; the file has the password in its first line")
        })?;
        check_account(account)?;
        let password = read_file(Path::new(file)).context(|| format!("cannot take the password of '{account}'"))?;
        if passwords.insert(account.to_string(), password).is_some() {
            return Err(Error::new(Kind::BadInput, format!("--password names '{account}' twice"))
                .hint("an account has one password"));
        }
    }
    Ok(passwords)
}

/// The first line of a file that not everybody can read.
fn read_file(path: &Path) -> Result<Password> {
    let what = || format!("cannot read '{}'", path.display());
    let file = File::open(path)
        .context(what)
        .map_err(|error| error.hint("write it as --password USER=FILE; the file has the password in its first line"))?;
    let mode = file.metadata().context(what)?.permissions().mode();
    if mode & 0o004 != 0 {
        return Err(Error::new(Kind::Forbidden, format!("everybody on this host can read '{}'", path.display()))
            .hint(format!("chmod 600 '{}', and choose another password if others were here", path.display())));
    }
    let mut bytes = Vec::new();
    file.take(PASSWORD_BYTES_MAX as u64 + 2).read_to_end(&mut bytes).context(what)?;
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let what = || format!("the first line of '{}' is no password", path.display());
    let text = std::str::from_utf8(line).map_err(|_| Error::new(Kind::BadInput, "it is not text"));
    text.and_then(Password::new)
        .context(what)
        .map_err(|error| error.hint("put the password into the first line of the file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &tempfile::TempDir, name: &str, content: &[u8], mode: u32) -> String {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.display().to_string()
    }

    #[test]
    fn the_first_line_without_its_end_is_the_password() {
        let dir = tempfile::tempdir().unwrap();
        let typed = [
            format!("app={}", file(&dir, "one", b"s3cret\nmore\n", 0o600)),
            format!("web={}", file(&dir, "two", b"with blank \r\n", 0o640)),
            format!("a@b={}", file(&dir, "x=y", "p\u{e4}ss".as_bytes(), 0o400)),
        ];
        let read = read(&typed).unwrap();
        let texts: Vec<(&str, &str)> = read.iter().map(|(account, text)| (account.as_str(), text.expose())).collect();
        assert_eq!(texts, [("a@b", "p\u{e4}ss"), ("app", "s3cret"), ("web", "with blank ")]);
    }

    #[test]
    fn what_is_no_secret_or_no_password_is_refused_with_a_hint_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let good = file(&dir, "good", b"s3cret", 0o600);
        let cases = [
            vec!["s3cret".to_string()],
            vec![format!("={good}")],
            vec![format!("app={good}"), format!("app={good}")],
            vec![format!("app={}", file(&dir, "open", b"s3cret", 0o644))],
            vec![format!("app={}", file(&dir, "empty", b"", 0o600))],
            vec![format!("app={}", file(&dir, "blank", b"\ns3cret", 0o600))],
            vec![format!("app={}", file(&dir, "long", "s3cret".repeat(1000).as_bytes(), 0o600))],
            vec![format!("app={}", file(&dir, "bytes", b"s3cret\xff", 0o600))],
            vec![format!("app={}", dir.path().display())],
            vec![format!("app={}/nothing", dir.path().display())],
        ];
        for typed in cases {
            let error = read(&typed).unwrap_err();
            assert!(!error.to_string().contains("s3cret"), "{error}");
            let has_hint = error.hint_text().is_some_and(|hint| !hint.contains("s3cret"));
            assert!(has_hint || error.kind() != Kind::BadInput, "{error:?}");
        }
    }
}
