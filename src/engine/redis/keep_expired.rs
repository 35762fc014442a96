//! `--keep-expired`: keys that were there at the target stay in the clone, also those whose time has come since.
//!
//! A server expires nothing while it loads its append-only file (`keyIsExpired` in `src/db.c`): it has every key that the
//! log has not deleted, with its time. So the last thing that a clone loads is a script, in an increment of its own, that
//! takes the times away. Keys whose time had come by the target, and that the source had only not removed yet, are deleted.
//! Afterwards no key of the clone has a time to live; when it is loaded again, the script does the same again. Fields of
//! hashes with times of their own are treated alike, as far as the server shows those that have expired: Valkey does,
//! Redis 8 hides them even while it loads.
//!
//! The script leaves its counts in a key with a random name, which is read and deleted before anybody sees the clone.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use jiff::Timestamp;

use crate::base::ownership::give_to;
use crate::base::random::random_u64;
use crate::base::users::User;
use crate::engine::redis::session::Session;
use crate::error::{Context, Error, Kind, Result};
use crate::model::check::CheckItem;
use crate::model::target::utc_text;

/// KEYS: where the counts go. ARGV: milliseconds before which a time had come by the target, milliseconds of now, the
/// number of databases. INFO says whether a database has hashes with times of their own (Redis 7.4: `subexpiry`, Valkey 9:
/// `keys_with_volatile_items`).
const SCRIPT: &str = "\
local limit, now = tonumber(ARGV[1]), tonumber(ARGV[2])
local kept, expired, gone, fields, hidden = 0, 0, 0, 0, 0
local function keep_fields(key)
  local names = redis.call('HKEYS', key)
  hidden = hidden + redis.call('HLEN', key) - #names
  for first = 1, #names, 1000 do
    local some = {}
    for at = first, math.min(first + 999, #names) do some[#some + 1] = names[at] end
    local times = redis.call('HPEXPIRETIME', key, 'FIELDS', #some, unpack(some))
    for at, time in ipairs(times) do
      if time >= 0 and time < limit then
        redis.call('HDEL', key, some[at])
      elseif time >= 0 then
        fields = fields + 1
        redis.call('HPERSIST', key, 'FIELDS', 1, some[at])
      end
    end
  end
end
local keyspace = redis.call('INFO', 'keyspace')
for db = 0, tonumber(ARGV[3]) - 1 do
  redis.call('SELECT', db)
  local line = string.match(keyspace, 'db' .. db .. ':([^\\r\\n]*)') or ''
  local volatile = string.match(line, 'subexpiry=(%d+)') or string.match(line, 'keys_with_volatile_items=(%d+)') or '0'
  local cursor = '0'
  repeat
    local page = redis.call('SCAN', cursor, 'COUNT', 1000)
    cursor = page[1]
    for _, key in ipairs(page[2]) do
      local at = redis.call('PEXPIRETIME', key)
      if at >= 0 and at < limit then
        gone = gone + 1
        redis.call('UNLINK', key)
      else
        if at >= 0 then
          kept = kept + 1
          if at < now then expired = expired + 1 end
          redis.call('PERSIST', key)
        end
        if volatile ~= '0' and redis.call('TYPE', key).ok == 'hash' then keep_fields(key) end
      end
    end
  until cursor == '0'
end
redis.call('SELECT', 0)
redis.call('SET', KEYS[1], table.concat({kept, expired, gone, fields, hidden}, ' '))
";

/// What the script of a clone will leave, and what it was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    /// The key with the counts.
    key: String,
    /// The millisecond before which a time had come; nothing if the log does not say.
    by_millis: Option<i64>,
}

/// Writes the increment that is loaded last, for a clone with so many databases. Blocking.
pub(super) fn write(path: &Path, user: &User, databases: u64, by_millis: Option<i64>) -> Result<Kept> {
    let key = format!("keiki:kept:{:016x}{:016x}", random_u64(), random_u64());
    let databases = databases.to_string();
    let limit = by_millis.unwrap_or(0).to_string();
    let now = Timestamp::now().as_millisecond().to_string();
    let words = ["EVAL", SCRIPT, "1", &key, &limit, &now, &databases];
    let mut command = format!("*{}\r\n", words.len());
    for word in words {
        command += &format!("${}\r\n{word}\r\n", word.len());
    }
    let what = || format!("cannot write '{}'", path.display());
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(path).context(what)?;
    file.write_all(command.as_bytes()).context(what)?;
    give_to(user, path)?;
    Ok(Kept { key, by_millis })
}

/// Reads what the script has counted and removes it from the clone.
pub(super) async fn report(session: &mut Session, kept: &Kept) -> Result<CheckItem> {
    let counts = session.ask(&["GET", &kept.key]).await?.text();
    session.ask(&["DEL", &kept.key]).await?;
    let counts = counts.ok().and_then(|text| {
        let numbers = text.split(' ').map(|word| word.parse().ok()).collect::<Option<Vec<u64>>>()?;
        <[u64; 5]>::try_from(numbers).ok()
    });
    let counts = counts.ok_or_else(|| {
        Error::new(Kind::Server, "the server did not run the script that keeps expired keys")
            .hint("order the clone without --keep-expired")
    })?;
    Ok(item(counts, kept.by_millis))
}

/// The line of the report. Pure.
fn item([kept, expired, gone, fields, hidden]: [u64; 5], by_millis: Option<i64>) -> CheckItem {
    let what = "expired keys";
    let mut found =
        format!("{kept} keys that had a time to live are kept without one; {expired} of them have expired since");
    if fields > 0 {
        found += &format!("; so are {fields} fields of hashes");
    }
    found += &match by_millis.and_then(|millis| Timestamp::from_millisecond(millis).ok()) {
        Some(at) => format!("; {gone} that had expired by {} are gone", utc_text(at)),
        None => "; the log has no times: what had expired before and was not removed yet is kept too".to_string(),
    };
    match hidden {
        0 => CheckItem::pass(what, found),
        hidden => CheckItem::warn(
            what,
            format!("{found}; {hidden} expired fields of hashes are gone"),
            "Redis does not show fields that have expired, even while it loads; Valkey does",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::check::Verdict;

    #[test]
    fn the_report_counts_what_is_kept_and_what_is_not() {
        let found = item([7, 3, 2, 0, 0], Some(1_795_247_841_000));
        assert_eq!(
            found.found,
            "7 keys that had a time to live are kept without one; 3 of them have expired since; 2 that had expired by \
             2026-11-21 07:57:21Z are gone"
        );
        let without_times = item([7, 3, 0, 0, 0], None);
        assert!(without_times.found.ends_with("was not removed yet is kept too"), "{without_times:?}");
        let hidden = item([1, 0, 0, 4, 2], None);
        assert!(hidden.verdict == Verdict::Warn && hidden.found.contains("4 fields"), "{hidden:?}");
        assert!(hidden.found.ends_with("2 expired fields of hashes are gone"), "{hidden:?}");
    }
}
