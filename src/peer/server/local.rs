//! Who is at the other end of the control socket.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;

use crate::base::bulk::run_blocking;
use crate::base::users::{User, group_id};
use crate::error::{Context, Error, Kind, Result};
use crate::peer::access::Caller;

/// Whoever is in this group may do everything with the agent of the host.
pub const ADMIN_GROUP: &str = "keiki";
/// A change of groups counts after this at the latest; a directory service is not asked for each connection.
const REMEMBER: Duration = Duration::from_secs(15);
const REMEMBERED_MAX: usize = 1024;

/// Looks up local users by the credentials of their connections (unix(7), SO_PEERCRED), and remembers them shortly.
#[derive(Default)]
pub struct LocalUsers {
    known: Mutex<HashMap<u32, (Caller, Instant)>>,
}

impl LocalUsers {
    /// The user whose process connected.
    pub async fn who_is_at(&self, socket: &UnixStream) -> Result<Caller> {
        let uid = socket.peer_cred().context(|| "cannot see who connected")?.uid();
        if let Some(caller) = self.remembered(uid) {
            return Ok(caller);
        }
        let caller = run_blocking("user lookup", move || look_up(uid)).await?;
        let mut known = self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if known.len() >= REMEMBERED_MAX {
            known.clear();
        }
        known.insert(uid, (caller.clone(), Instant::now()));
        Ok(caller)
    }

    fn remembered(&self, uid: u32) -> Option<Caller> {
        let known = self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        known.get(&uid).filter(|(_, at)| at.elapsed() < REMEMBER).map(|(caller, _)| caller.clone())
    }
}

fn look_up(uid: u32) -> Result<Caller> {
    let is_ours = uid == 0 || uid == nix::unistd::geteuid().as_raw();
    match User::by_uid(uid) {
        Ok(user) => {
            let is_member = !is_ours && group_id(ADMIN_GROUP)?.is_some_and(|gid| user.groups.contains(&gid));
            Ok(Caller::Local { uid, name: user.name, is_admin: is_ours || is_member })
        }
        // Without a name or without an answer of the directory service nobody is in a group.
        Err(error) if is_ours || matches!(error.kind(), Kind::NotFound | Kind::Unreachable) => {
            Ok(Caller::Local { uid, name: uid.to_string(), is_admin: is_ours })
        }
        Err(error) => Err(Error::while_doing(error, format!("cannot look up user {uid}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_admin(uid: u32) -> bool {
        matches!(look_up(uid).unwrap(), Caller::Local { is_admin: true, .. })
    }

    #[test]
    fn root_and_the_user_of_the_agent_are_administrators_and_strangers_are_not() {
        let ours = nix::unistd::geteuid().as_raw();
        assert!(is_admin(0) && is_admin(ours));
        // The users 'daemon' and 'bin' of every distribution, and a number that nobody has.
        for stranger in [1, 2, 4_000_000_000].into_iter().filter(|uid| *uid != ours) {
            assert!(!is_admin(stranger), "{stranger}");
        }
        let unnamed = look_up(4_000_000_000).unwrap();
        assert_eq!(unnamed.to_string(), "local:4000000000");
    }
}
