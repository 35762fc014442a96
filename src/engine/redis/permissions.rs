//! What the agent's user of a source must be allowed to do.

use crate::engine::redis::LogKind;
use crate::engine::redis::session::{Endpoint, NEEDED_RULES, Session};
use crate::error::Result;
use crate::model::check::CheckItem;

const DEFAULT_USER: &str = "default";

/// Tries everything that changes nothing, and reads in the access control list whether the rest is allowed. An error is
/// what the server refused. That a replica may follow is not asked here: it does.
pub(super) async fn check(session: &mut Session, endpoint: &Endpoint, log: LogKind) -> Result<CheckItem> {
    let user = endpoint.user.as_deref().unwrap_or(DEFAULT_USER);
    session.ask(&["TIME"]).await?;
    session.ask(&["MODULE", "LIST"]).await?;
    let mut lines = Vec::new();
    for line in session.ask(&["ACL", "LIST"]).await?.list()? {
        lines.push(line.text()?);
    }
    let own = format!("user {user} ");
    let what = "permissions";
    Ok(match lines.iter().find_map(|line| line.strip_prefix(&own)) {
        Some(rules) if log == LogKind::AppendOnlyFile && !may_rewrite(rules) => CheckItem::fail(
            what,
            format!("user '{user}' may not call BGREWRITEAOF, which a backup needs when the log has become long"),
            needed(user),
        ),
        _ => CheckItem::pass(what, format!("user '{user}' may do what keiki needs")),
    })
}

/// The command that gives a user what it needs.
fn needed(user: &str) -> String {
    format!("redis-cli ACL SETUSER {user} {NEEDED_RULES}")
}

/// Whether these rules of a user let it call BGREWRITEAOF: later ones win, and it is of the categories admin, slow and
/// dangerous (Redis documentation, "ACL" and "BGREWRITEAOF").
fn may_rewrite(rules: &str) -> bool {
    let matters = |name: &str| ["@all", "@admin", "@slow", "@dangerous", "bgrewriteaof"].contains(&name);
    rules.split(' ').fold(false, |may, rule| match (rule, rule.split_at_checked(1)) {
        ("allcommands", _) => true,
        ("nocommands", _) => false,
        (_, Some(("+", name))) if matters(name) => true,
        (_, Some(("-", name))) if matters(name) => false,
        _ => may,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rule_about_a_rewrite_counts() {
        for (rules, may) in [
            ("on nopass ~* &* +@all", true),
            ("on #aa resetchannels -@all +info +bgrewriteaof", true),
            ("on #aa -@all +info +config|get", false),
            ("on #aa +@all -@dangerous", false),
            ("on #aa +@all -@dangerous +bgrewriteaof", true),
            ("on #aa allcommands -bgrewriteaof", false),
            ("", false),
        ] {
            assert_eq!(may_rewrite(rules), may, "{rules}");
        }
        assert!(may_rewrite(NEEDED_RULES));
    }
}
