//! Passwords on their way from an order to the accounts of a clone.
//!
//! Invariant: the text of a password leaves this type by [`Password::expose`] only. It is in no order and so in no
//! journal, report or list of jobs; `Debug` shows none of it.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Error, Kind, Result};

/// A password is a line of text of at most so many bytes; no server takes more from a person.
pub const PASSWORD_BYTES_MAX: usize = 1024;
/// The longest name of an account that any of the servers knows is a fraction of this.
const ACCOUNT_BYTES_MAX: usize = 255;

/// A new password, or the shortest text that must not be seen.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

/// New passwords by the name of the account.
pub type Passwords = BTreeMap<String, Password>;

impl Password {
    /// Takes one line of text: not empty, no control characters that a protocol could stumble over.
    pub fn new(text: impl Into<String>) -> Result<Password> {
        let text = text.into();
        let refuse = |why: &str| Err(Error::new(Kind::BadInput, format!("a password {why}")));
        match () {
            () if text.is_empty() => refuse("is empty"),
            () if text.len() > PASSWORD_BYTES_MAX => refuse(&format!("has more than {PASSWORD_BYTES_MAX} bytes")),
            () if text.contains(['\0', '\n', '\r']) => refuse("is not one line of text"),
            () => Ok(Password(text)),
        }
    }

    /// The text itself, for the server whose account it is for.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(not shown)")
    }
}

/// Whether this can be the name of an account.
pub fn check_account(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > ACCOUNT_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(Error::new(Kind::BadInput, format!("'{}' is not the name of an account", name.escape_debug()))
            .hint("write it as --password USER=FILE"));
    }
    Ok(())
}

/// The error without any of these passwords, should a server have repeated one in what it said.
pub fn hidden_in(error: Error, passwords: &Passwords) -> Error {
    let hide = |text: &str| {
        passwords.values().fold(text.to_string(), |text, password| text.replace(password.expose(), "(a password)"))
    };
    let clean = Error::new(error.kind(), hide(error.message()));
    match error.hint_text() {
        Some(hint) => clean.hint(hide(hint)),
        None => clean,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_one_line_and_is_never_shown() {
        let password = Password::new("s3cret").unwrap();
        assert_eq!(password.expose(), "s3cret");
        let passwords: Passwords = [("app".to_string(), password)].into();
        assert!(!format!("{passwords:?}").contains("s3cret"));
        for bad in ["", "a\nb", "a\0", &"x".repeat(PASSWORD_BYTES_MAX + 1)] {
            let error = Password::new(bad).unwrap_err();
            assert!(error.kind() == Kind::BadInput && (bad.is_empty() || !error.message().contains(bad)), "{error}");
        }
        for bad in ["", "a\nb", &"x".repeat(300)] {
            check_account(bad).unwrap_err();
        }
        check_account("app user").unwrap();
    }

    #[test]
    fn what_a_server_repeats_is_hidden() {
        let passwords: Passwords = [("app".to_string(), Password::new("s3cret").unwrap())].into();
        let error = Error::new(Kind::Server, "syntax error near 's3cret'").hint("not s3cret");
        let error = hidden_in(error, &passwords);
        assert_eq!(error.message(), "syntax error near '(a password)'");
        assert_eq!(error.hint_text(), Some("not (a password)"));
    }
}
