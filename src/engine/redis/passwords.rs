//! New passwords for users of a clone, `default` among them, whose password is `requirepass`.
//!
//! They go into the clone's own access control list as the server writes them there: SHA-256 in hexadecimal (Redis
//! documentation, "ACL"). A user keeps all its rights and loses its other passwords.

use std::collections::BTreeSet;

use ring::digest::{SHA256, digest};

use crate::base::bulk::run_blocking;
use crate::base::ownership::write_owned;
use crate::base::users::User;
use crate::engine::accounts::missing;
use crate::engine::redis::settings::{ACL_FILE, AGENT_USER, acl_lines};
use crate::engine::{CleanUpItem, CloneSite};
use crate::error::{Context, Result};
use crate::model::check::CheckItem;
use crate::model::password::{Password, Passwords};

/// Whether the users of an order are those of the backup. Says nothing where no password is ordered.
pub(super) fn check(site: &CloneSite) -> Option<CheckItem> {
    if site.passwords_for.is_empty() {
        return None;
    }
    let lines = acl_lines(&site.facts);
    Some(match missing("user", &site.passwords_for, &users_of(lines.iter().map(String::as_str))) {
        None => CheckItem::pass("passwords", format!("{} will be changed", site.passwords_for.len())),
        Some(error) => CheckItem::fail("passwords", error.message(), error.hint_text().unwrap_or_default()),
    })
}

/// Changes them in the list that `clean_up` has written, which the accepted clone's server reads.
pub(super) async fn change(user: &User, site: &CloneSite, passwords: &Passwords) -> Result<Vec<CleanUpItem>> {
    let (user, path, passwords) = (user.clone(), site.data_dir.join(ACL_FILE), passwords.clone());
    run_blocking("passwords", move || {
        let text = std::fs::read_to_string(&path).context(|| format!("cannot read '{}'", path.display()))?;
        let wanted = passwords.keys().cloned().collect();
        if let Some(error) = missing("user", &wanted, &users_of(text.lines())) {
            return Err(error);
        }
        let mut items = Vec::new();
        let lines = text.lines().map(|line| match passwords.get_key_value(user_of(line).unwrap_or_default()) {
            None => line.to_string(),
            Some((user, password)) => {
                items.push(item(user, line));
                with_password(line, password)
            }
        });
        let changed = lines.map(|line| line + "\n").collect::<String>();
        write_owned(&user, &path, changed.as_bytes())?;
        Ok(items)
    })
    .await
}

fn item(user: &str, line: &str) -> CleanUpItem {
    let mut done = "changed".to_string();
    if words_of_rules(line).any(|word| word == "nopass") {
        done += "; it needed none before";
    }
    if words_of_rules(line).any(|word| word == "off") {
        done += "; the user is off";
    }
    CleanUpItem { what: format!("password of '{user}'"), done }
}

/// `app` of `user app on #… ~* +@all`.
fn user_of(line: &str) -> Option<&str> {
    line.strip_prefix("user ")?.split(' ').next()
}

fn users_of<'a>(lines: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    lines.filter_map(user_of).filter(|user| *user != AGENT_USER).map(str::to_string).collect()
}

/// The rules of a user, without its name, which may be called like one of them.
fn words_of_rules(line: &str) -> impl Iterator<Item = &str> {
    line.split(' ').skip(2)
}

/// The line with this password and no other.
fn with_password(line: &str, password: &Password) -> String {
    let hash = digest(&SHA256, password.expose().as_bytes());
    let hash: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let name = user_of(line).unwrap_or_default();
    let state = words_of_rules(line).filter(|word| ["on", "off"].contains(word));
    let rest = words_of_rules(line)
        .filter(|word| !word.starts_with('#') && !["on", "off", "nopass", "resetpass"].contains(word));
    let words: Vec<&str> = ["user", name].into_iter().chain(state).collect();
    let rest: Vec<&str> = rest.collect();
    format!("{} #{hash} {}", words.join(" "), rest.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_gets_the_password_and_keeps_its_rights() {
        let password = Password::new("foobared").unwrap();
        // `echo -n foobared | sha256sum`
        let hash = "#1b58ee375b42e41f0e48ef2ff27d10a5b1f6924a9acdcdba7cae868e7adce6bf";
        let cases = [
            (
                "user default on nopass sanitize-payload ~* &* +@all",
                format!("user default on {hash} sanitize-payload ~* &* +@all"),
            ),
            (
                "user app on #aa #bb ~a:* resetchannels -@all +get (~b:* +set)",
                format!("user app on {hash} ~a:* resetchannels -@all +get (~b:* +set)"),
            ),
            ("user nopass off #aa ~*", format!("user nopass off {hash} ~*")),
        ];
        for (line, expected) in cases {
            assert_eq!(with_password(line, &password), expected);
        }
    }
}
