//! What the engines share about new passwords: which accounts are meant, and what is said about those that are not there.

use std::collections::BTreeSet;

use crate::base::words::nearest_few;
use crate::error::{Error, Kind};

/// Names that are shown where one is not there.
const SHOWN_MAX: usize = 5;

/// Accounts of an order that are not among those of the server; the error names them and the nearest that are. `what` is
/// how the server calls them: `role`, `user`.
pub(super) fn missing(what: &str, wanted: &BTreeSet<String>, known: &BTreeSet<String>) -> Option<Error> {
    let missing: Vec<&String> = wanted.difference(known).collect();
    let first = missing.first()?;
    let names = missing.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
    let near = nearest_few(first, known.iter().map(String::as_str), SHOWN_MAX);
    let message = format!("cannot change the password of {names}: there is no such {what}");
    Some(Error::new(Kind::NotFound, message).hint(match near.is_empty() {
        true => format!("there is no {what} with a password at all"),
        false => {
            format!("the nearest names are {}", near.iter().map(|n| format!("'{n}'")).collect::<Vec<_>>().join(", "))
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_named_with_what_is_nearest() {
        let set = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<BTreeSet<_>>();
        let known = set(&["app", "reports", "web", "backup", "postgres", "monitoring"]);
        assert_eq!(missing("role", &set(&["app", "web"]), &known), None);
        let error = missing("role", &set(&["app", "wep", "zzz"]), &known).unwrap();
        assert_eq!(error.message(), "cannot change the password of 'wep', 'zzz': there is no such role");
        let hint = error.hint_text().unwrap();
        assert!(hint.starts_with("the nearest names are 'web', 'app'") && !hint.contains("monitoring"), "{hint}");
        assert!(missing("role", &set(&["a"]), &set(&[])).unwrap().hint_text().unwrap().contains("no role"));
    }
}
