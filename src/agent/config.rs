//! The configuration of an agent, `/etc/keiki/keiki.toml`.
//!
//! It is read in two stages: `raw` holds what was typed, this file what it means, with every default filled in.
//! Nothing below this module reads the file or the environment; each part gets its own values. A mistake is reported
//! with file, line and key, and where a word looks misspelt with the word that was probably meant.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::base::words::nearest;
use crate::error::{Context, Error, Kind, Result};
use crate::model::engine_kind::EngineKind;
use crate::model::group::Group;
use crate::model::id::check_name;
pub use crate::peer::access::AllowRule;
use crate::peer::access::{Permission, check_who};
pub use crate::peer::tls::TlsConfig;
pub use repository::{RepositoryConfig, RepositoryUrl, S3Config};
pub use schedule::{BackupWindow, next_start};
pub use value::parse_duration;

mod group;
mod place;
mod prices;
mod raw;
mod repository;
mod schedule;
mod value;

/// Where the configuration is if nobody says otherwise.
pub const CONFIG_PATH_DEFAULT: &str = "/etc/keiki/keiki.toml";
/// Where the agent listens for the command line of its own host.
pub const CONTROL_SOCKET_DEFAULT: &str = "/run/keiki/keiki.sock";
/// Where Debian's and Red Hat's MariaDB and Debian's MySQL listen.
const MYSQL_SOCKET_DEFAULT: &str = "/run/mysqld/mysqld.sock";
/// A configuration is a page of text; what is longer is some other file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Everything that the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub host: HostConfig,
    /// Where other hosts reach this agent; nothing means that they cannot.
    pub listen: Option<SocketAddr>,
    pub tls: Option<TlsConfig>,
    pub repository: RepositoryConfig,
    pub peers: Vec<PeerConfig>,
    pub instances: Vec<InstanceConfig>,
    pub groups: Vec<Group>,
    pub clone: CloneConfig,
    pub allow: Vec<AllowRule>,
    pub limits: LimitsConfig,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostConfig {
    pub name: String,
    pub state_dir: PathBuf,
    pub control_socket: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    pub name: String,
    /// `name:port` or a numeric address with port; names are resolved at each connection.
    pub address: String,
}

/// Where the log of a Redis or Valkey server comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedisLog {
    /// Its append-only file.
    Aof,
    /// What it sends to its replicas.
    Replication,
}

/// How the log of an instance leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShipMode {
    /// A physical replication slot of the agent's holds the log on the server.
    Slot,
    /// The server calls `keiki wal-push` for each segment.
    ArchiveCommand,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceConfig {
    pub name: String,
    pub engine: EngineKind,
    pub data_dir: PathBuf,
    /// The server's programs; found by the agent if nothing is said.
    pub bin_dir: Option<PathBuf>,
    /// Where a PostgreSQL server has its socket.
    pub socket_dir: PathBuf,
    /// The socket of a MariaDB, MySQL or Redis server; without it the agent connects to Redis' port on loopback.
    pub socket: Option<PathBuf>,
    pub port: u16,
    /// The role with which the agent logs in, and the database to which it connects. Empty is the server's default user.
    pub user: String,
    pub database: String,
    /// A file whose first line is the agent's password for a MariaDB, MySQL or Redis server.
    pub password_file: Option<PathBuf>,
    /// The operating system user who runs the server.
    pub run_as: String,
    pub ship: ShipMode,
    /// Redis and Valkey.
    pub log: RedisLog,
    pub ship_every: Duration,
    /// How much log the agent's slot may hold back before it is given up.
    pub slot_limit_bytes: u64,
    /// Where a MySQL server puts the copy of itself that a backup is made of; beside its data directory if nothing is said.
    pub backup_dir: Option<PathBuf>,
    /// MariaDB and MySQL: the agent lets the server purge binary logs once they are shipped.
    pub purge_shipped: bool,
    /// Nothing means: backups only by hand.
    pub backup: Option<BackupSchedule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupSchedule {
    /// At least one; see [`next_start`].
    pub schedule: Vec<BackupWindow>,
    pub keep_for: Duration,
    pub keep_at_least: u32,
    /// Redis and Valkey: whether a copy of its data that the server makes by itself becomes a backup too.
    pub also_when_saved: bool,
}

/// What clones on this host get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneConfig {
    pub data_root: PathBuf,
    pub bin_dir: Option<PathBuf>,
    pub ports: RangeInclusive<u16>,
    /// What a clone leaves free on its disk, for whatever else lives there.
    pub keep_free_bytes: u64,
    pub run_as: String,
    pub listen_addresses: String,
    pub mariadb: CloneEngineConfig,
    pub mysql: CloneEngineConfig,
    pub redis: CloneEngineConfig,
    pub valkey: CloneEngineConfig,
}

/// What clones of one engine get, where it differs from the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneEngineConfig {
    pub bin_dir: Option<PathBuf>,
    pub run_as: String,
}

/// How much the agent does at the same time. A lane holds at most a few MiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Sealed log files of one instance that are shipped at the same time.
    pub ship_lanes: usize,
    /// Files that a backup reads and stores at the same time.
    pub backup_lanes: usize,
    /// Packs that a clone fetches and writes at the same time.
    pub clone_lanes: usize,
    /// Connections that are served at the same time, over TLS and over the control socket each.
    pub connections: usize,
    /// Bytes per second to and from the object store, of everything that the agent does together; nothing means as
    /// many as there can be.
    pub upload_bytes_per_second: Option<u64>,
    pub download_bytes_per_second: Option<u64>,
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Config> {
        let what = || format!("cannot read configuration '{}'", path.display());
        let length = std::fs::metadata(path).context(what).map_err(|error| match error.kind() {
            Kind::NotFound => error.hint("write one, or name it with '--config FILE'; packages put one with every key explained in '/etc/keiki/keiki.toml'"),
            _ => error,
        })?;
        if length.is_dir() || length.len() > CONFIG_BYTES_MAX {
            return Err(Error::new(Kind::BadInput, format!("{}: it is not a file of text", what())));
        }
        let bytes = std::fs::read(path).context(what)?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
            Error::new(Kind::BadInput, format!("{}: line {line}: this is not UTF-8 text", what()))
        })?;
        Config::parse(path, &text)
    }

    /// Reads `text`; `path` is for messages only.
    pub fn parse(path: &Path, text: &str) -> Result<Config> {
        let reader = Reader { text };
        let result = place::deserialize(text).and_then(|raw| reader.resolve(raw));
        result.map_err(|error| {
            // A mistake in a configuration is bad input, whatever the part that found it calls it.
            let kind = if error.kind() == Kind::Unsupported { Kind::Unsupported } else { Kind::BadInput };
            let error = error.with_kind(kind).while_doing(format!("cannot read configuration '{}'", path.display()));
            error.hint("the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key")
        })
    }

    /// The instance with this name.
    pub fn instance(&self, name: &str) -> Option<&InstanceConfig> {
        self.instances.iter().find(|instance| instance.name == name)
    }

    /// The peer with this name.
    pub fn peer(&self, name: &str) -> Option<&PeerConfig> {
        self.peers.iter().find(|peer| peer.name == name)
    }
}

/// Turns what was typed into what it means, and knows the text to say where something stands.
struct Reader<'t> {
    text: &'t str,
}

impl Reader<'_> {
    /// The error `why` about the value at `span`.
    fn wrong(&self, span: Range<usize>, why: Error) -> Error {
        why.while_doing(place::describe(self.text, span))
    }

    fn bad(&self, span: Range<usize>, why: impl Into<String>) -> Error {
        self.wrong(span, Error::new(Kind::BadInput, why))
    }

    fn parse<T>(&self, text: &raw::Text, parse: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        parse(text.get_ref()).map_err(|error| self.wrong(text.span(), error))
    }

    fn parse_or<T>(&self, text: &Option<raw::Text>, default: T, parse: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        text.as_ref().map_or(Ok(default), |text| self.parse(text, parse))
    }

    fn path(&self, text: &raw::Text) -> Result<PathBuf> {
        self.parse(text, |path| {
            let path = Path::new(path);
            let goes_up = path.components().any(|part| part == std::path::Component::ParentDir);
            if path.is_absolute() && !goes_up {
                return Ok(path.to_path_buf());
            }
            Err(Error::new(Kind::BadInput, format!("'{}' is not an absolute path", path.display()))
                .hint("begin it with '/' and leave out '..': the agent has no current directory"))
        })
    }

    fn path_or(&self, text: &Option<raw::Text>, default: &str) -> Result<PathBuf> {
        text.as_ref().map_or_else(|| Ok(PathBuf::from(default)), |text| self.path(text))
    }

    fn name(&self, what: &str, text: &raw::Text) -> Result<String> {
        self.parse(text, |name| check_name(what, name).map(|()| name.to_string()))
    }

    /// The text, which must not be empty and must fit on a command line.
    fn word_or(&self, text: &Option<raw::Text>, default: &str) -> Result<String> {
        self.parse_or(text, default.to_string(), |word| {
            if word.trim().is_empty() || word.chars().any(char::is_control) {
                return Err(Error::new(Kind::BadInput, "it must not be empty"));
            }
            Ok(word.to_string())
        })
    }

    fn number_or<T: TryFrom<i64>>(
        &self,
        number: &Option<raw::Number>,
        default: T,
        allowed: RangeInclusive<i64>,
    ) -> Result<T> {
        let Some(number) = number else { return Ok(default) };
        let (first, last) = (*allowed.start(), *allowed.end());
        match T::try_from(*number.get_ref()) {
            Ok(value) if allowed.contains(number.get_ref()) => Ok(value),
            _ => Err(self.bad(number.span(), format!("'{}' is not from {first} to {last}", number.get_ref()))),
        }
    }

    fn resolve(&self, raw: raw::RawConfig) -> Result<Config> {
        let host = HostConfig {
            name: self.name("a host", &raw.host.name)?,
            state_dir: self.path_or(&raw.host.state_dir, "/var/lib/keiki")?,
            control_socket: self.path_or(&raw.host.control_socket, CONTROL_SOCKET_DEFAULT)?,
        };
        let tls = match &raw.tls {
            None => None,
            Some(tls) => Some(TlsConfig {
                ca: self.path(&tls.ca)?,
                certificate: self.path(&tls.certificate)?,
                key: self.path(&tls.key)?,
            }),
        };
        let listen = raw.listen.as_ref().map(|listen| self.listen(&listen.address, tls.is_some())).transpose()?;
        let peers = self.peers(&raw.peer, &host.name, tls.is_some())?;
        Ok(Config {
            repository: self.repository(&raw.repository, &peers)?,
            groups: self.groups(&raw.group, &raw.instance)?,
            instances: self.instances(&raw.instance)?,
            clone: self.clone_config(&raw.clone)?,
            allow: raw.allow.iter().map(|rule| self.allow(rule)).collect::<Result<_>>()?,
            limits: LimitsConfig {
                ship_lanes: self.number_or(&raw.limits.ship_lanes, 4, 1..=64)?,
                backup_lanes: self.number_or(&raw.limits.backup_lanes, 4, 1..=64)?,
                clone_lanes: self.number_or(&raw.limits.clone_lanes, 4, 1..=64)?,
                connections: self.number_or(&raw.limits.connections, 128, 4..=4096)?,
                upload_bytes_per_second: self.rate(&raw.limits.upload)?,
                download_bytes_per_second: self.rate(&raw.limits.download)?,
            },
            host,
            listen,
            tls,
            peers,
        })
    }

    /// Bytes per second: `50MiB`. Slower than anything that can work is a mistake.
    fn rate(&self, text: &Option<raw::Text>) -> Result<Option<u64>> {
        let Some(text) = text else { return Ok(None) };
        self.parse(text, |rate| {
            if rate == "unlimited" {
                return Ok(None);
            }
            match value::parse_size(rate)? {
                bytes if bytes >= 64 << 10 => Ok(Some(bytes)),
                _ => Err(Error::new(Kind::BadInput, format!("'{rate}' per second is too little to work with"))
                    .hint("write at least '64KiB', or 'unlimited'")),
            }
        })
    }

    fn listen(&self, address: &raw::Text, has_tls: bool) -> Result<SocketAddr> {
        if !has_tls {
            return Err(self.wrong(address.span(), needs_tls("to listen to other hosts")));
        }
        self.parse(address, |text| {
            text.parse().map_err(|_| {
                Error::new(Kind::BadInput, format!("'{text}' is not a numeric address with a port"))
                    .hint("write it like '0.0.0.0:7420', '10.0.0.1:7420' or '[::]:7420'")
            })
        })
    }

    fn peers(&self, raw: &[raw::RawPeer], own_name: &str, has_tls: bool) -> Result<Vec<PeerConfig>> {
        let mut seen = Seen::default();
        let mut peers = Vec::new();
        for peer in raw {
            let name = self.name("a host", &peer.name)?;
            if !has_tls {
                return Err(self.wrong(peer.name.span(), needs_tls("to talk to other hosts")));
            }
            if name == own_name {
                let error = Error::new(Kind::BadInput, format!("'{name}' is this host itself"));
                return Err(self.wrong(peer.name.span(), error.hint("leave it out, or is 'host.name' wrong?")));
            }
            seen.check(self, &name, peer.name.span())?;
            let address = self.parse(&peer.address, |text| value::check_address(text).map(|()| text.to_string()))?;
            peers.push(PeerConfig { name, address });
        }
        Ok(peers)
    }

    fn instances(&self, raw: &[raw::RawInstance]) -> Result<Vec<InstanceConfig>> {
        let mut names = Seen::default();
        let mut directories = Seen::default();
        let mut instances = Vec::new();
        for instance in raw {
            let resolved = self.instance(instance)?;
            names.check(self, &resolved.name, instance.name.span())?;
            directories.check(self, instance.data_dir.get_ref().trim_end_matches('/'), instance.data_dir.span())?;
            instances.push(resolved);
        }
        Ok(instances)
    }

    fn instance(&self, raw: &raw::RawInstance) -> Result<InstanceConfig> {
        let engine = self.parse(&raw.engine, EngineKind::parse)?;
        self.only_keys_of(engine, raw)?;
        let is_redis = matches!(engine, EngineKind::Redis | EngineKind::Valkey);
        let (account, port) = match engine {
            EngineKind::Redis => ("redis", 6379),
            EngineKind::Valkey => ("valkey", 6379),
            EngineKind::MariaDb | EngineKind::MySql => ("mysql", 3306),
            EngineKind::Postgres | EngineKind::Fake => ("postgres", 5432),
        };
        let socket = match (&raw.socket, engine) {
            (None, EngineKind::MariaDb | EngineKind::MySql) => Some(PathBuf::from(MYSQL_SOCKET_DEFAULT)),
            (socket, _) => socket.as_ref().map(|path| self.path(path)).transpose()?,
        };
        let run_as = self.word_or(&raw.run_as, account)?;
        let user = match (&raw.user, is_redis) {
            (None, true) => String::new(),
            (user, _) => self.word_or(user, &run_as)?,
        };
        Ok(InstanceConfig {
            name: self.name("an instance", &raw.name)?,
            engine,
            data_dir: self.path(&raw.data_dir)?,
            bin_dir: raw.bin_dir.as_ref().map(|path| self.path(path)).transpose()?,
            socket_dir: self.path_or(&raw.socket_dir, "/var/run/postgresql")?,
            socket,
            port: self.number_or(&raw.port, port, 1..=65535)?,
            user,
            database: self.word_or(&raw.database, "postgres")?,
            password_file: raw.password_file.as_ref().map(|path| self.path(path)).transpose()?,
            run_as,
            ship: self.parse_or(&raw.ship, ShipMode::Slot, parse_ship)?,
            log: self.parse_or(&raw.log, RedisLog::Aof, parse_log)?,
            ship_every: self.parse_or(&raw.ship_every, Duration::from_secs(5), |text| {
                let every = value::parse_duration(text)?;
                let allowed = Duration::from_millis(100)..=Duration::from_secs(3600);
                if allowed.contains(&every) {
                    return Ok(every);
                }
                Err(Error::new(Kind::BadInput, format!("'{text}' is not from '100ms' to '1h'")))
            })?,
            slot_limit_bytes: self.parse_or(&raw.slot_limit, 16 << 30, value::parse_size)?,
            backup_dir: raw.backup_dir.as_ref().map(|path| self.path(path)).transpose()?,
            purge_shipped: raw.purge_shipped.as_ref().is_some_and(|purge| *purge.get_ref()),
            backup: raw.backup.as_ref().map(|backup| self.backup(backup, engine)).transpose()?,
        })
    }

    /// A key that says nothing about an engine is a mistake and not a wish.
    fn only_keys_of(&self, engine: EngineKind, raw: &raw::RawInstance) -> Result<()> {
        let (socket, password_file) = (("socket", &raw.socket), ("password_file", &raw.password_file));
        let [socket_dir, database, ship] =
            [("socket_dir", &raw.socket_dir), ("database", &raw.database), ("ship", &raw.ship)];
        let (log, backup_dir) = (("log", &raw.log), ("backup_dir", &raw.backup_dir));
        let is_mysql = matches!(engine, EngineKind::MariaDb | EngineKind::MySql);
        let strangers: Vec<(&str, &Option<raw::Text>)> = match engine {
            EngineKind::Redis | EngineKind::Valkey => vec![socket_dir, database, ship, backup_dir],
            EngineKind::MariaDb => vec![socket_dir, database, ship, backup_dir, log],
            EngineKind::MySql => vec![socket_dir, database, ship, log],
            EngineKind::Postgres | EngineKind::Fake => vec![socket, password_file, backup_dir, log],
        };
        let purge = raw.purge_shipped.as_ref().filter(|_| !is_mysql).map(|value| ("purge_shipped", value.span()));
        let found = strangers.iter().find_map(|(key, value)| value.as_ref().map(|text| (*key, text.span()))).or(purge);
        match found {
            None => Ok(()),
            Some((key, span)) => Err(self.wrong(
                span,
                Error::new(Kind::BadInput, format!("'{key}' means nothing for engine '{}'", engine.name()))
                    .hint("leave it out; config/keiki.toml in the documentation shows what each engine wants"),
            )),
        }
    }

    fn backup(&self, raw: &raw::RawBackup, engine: EngineKind) -> Result<BackupSchedule> {
        let saves_by_itself = matches!(engine, EngineKind::Redis | EngineKind::Valkey);
        if let Some(wanted) = raw.also_when_saved.as_ref().filter(|_| !saves_by_itself) {
            let why = format!("'also_when_saved' means nothing for engine '{}'", engine.name());
            return Err(self.bad(wanted.span(), why));
        }
        let span = raw.schedule.span();
        let lines = match raw.schedule.get_ref() {
            raw::OneOrMany::One(line) => std::slice::from_ref(line),
            raw::OneOrMany::Many(lines) => lines,
        };
        if lines.is_empty() {
            return Err(self.bad(span, "it names no window"));
        }
        let windows = lines.iter().map(|line| BackupWindow::parse(line)).collect::<Result<Vec<_>>>();
        Ok(BackupSchedule {
            schedule: windows.map_err(|error| self.wrong(span, error))?,
            keep_for: self.parse_or(&raw.keep_for, Duration::from_secs(7 * 86400), value::parse_duration)?,
            keep_at_least: self.number_or(&raw.keep_at_least, 2, 1..=100_000)?,
            also_when_saved: raw.also_when_saved.as_ref().is_some_and(|wanted| *wanted.get_ref()),
        })
    }

    fn clone_engine(&self, raw: &raw::RawCloneEngine, account: &str) -> Result<CloneEngineConfig> {
        Ok(CloneEngineConfig {
            bin_dir: raw.bin_dir.as_ref().map(|path| self.path(path)).transpose()?,
            run_as: self.word_or(&raw.run_as, account)?,
        })
    }

    fn clone_config(&self, raw: &raw::RawClone) -> Result<CloneConfig> {
        Ok(CloneConfig {
            data_root: self.path_or(&raw.data_root, "/var/lib/keiki/clones")?,
            bin_dir: raw.bin_dir.as_ref().map(|path| self.path(path)).transpose()?,
            ports: self.parse_or(&raw.ports, 5500..=5599, value::parse_ports)?,
            keep_free_bytes: self.parse_or(&raw.keep_free, 0, value::parse_size)?,
            run_as: self.word_or(&raw.run_as, "postgres")?,
            listen_addresses: self.word_or(&raw.listen_addresses, "localhost")?,
            mariadb: self.clone_engine(&raw.mariadb, "mysql")?,
            mysql: self.clone_engine(&raw.mysql, "mysql")?,
            redis: self.clone_engine(&raw.redis, "redis")?,
            valkey: self.clone_engine(&raw.valkey, "valkey")?,
        })
    }

    fn allow(&self, raw: &raw::RawAllow) -> Result<AllowRule> {
        let mut may = Vec::new();
        for word in &raw.may {
            may.extend(self.parse(word, parse_permissions)?);
        }
        let instances = match &raw.instances {
            None => vec!["*".to_string()],
            Some(patterns) => patterns.iter().map(|pattern| pattern.get_ref().clone()).collect(),
        };
        Ok(AllowRule { who: self.parse(&raw.who, |who| check_who(who).map(|()| who.to_string()))?, may, instances })
    }
}

/// Values that must not appear twice, with where they appeared first.
#[derive(Default)]
struct Seen(BTreeMap<String, usize>);

impl Seen {
    fn check(&mut self, reader: &Reader<'_>, value: &str, span: Range<usize>) -> Result<()> {
        let line = place::line_of(reader.text, span.start);
        match self.0.insert(value.to_string(), line) {
            None => Ok(()),
            Some(first) => Err(reader.bad(span, format!("'{value}' is there already, in line {first}"))),
        }
    }
}

fn needs_tls(what: &str) -> Error {
    Error::new(Kind::BadInput, format!("{what}, a host needs a certificate"))
        .hint("add [tls] with 'ca', 'certificate' and 'key'; 'keiki ca init' and 'keiki ca issue' make them")
}

fn parse_ship(text: &str) -> Result<ShipMode> {
    match text {
        "slot" => Ok(ShipMode::Slot),
        "archive_command" => Ok(ShipMode::ArchiveCommand),
        _ => Err(Error::new(Kind::BadInput, format!("'{text}' is not a way to ship"))
            .hint("write 'slot' (works on a stock server) or 'archive_command'")),
    }
}

fn parse_log(text: &str) -> Result<RedisLog> {
    match text {
        "aof" => Ok(RedisLog::Aof),
        "replication" => Ok(RedisLog::Replication),
        _ => Err(Error::new(Kind::BadInput, format!("'{text}' is not a log of Redis or Valkey"))
            .hint("write 'aof' (the append-only file) or 'replication' (what the server sends to replicas)")),
    }
}

/// The permission with this name, or all of them for `*`.
fn parse_permissions(word: &str) -> Result<Vec<Permission>> {
    if word == "*" {
        return Ok(Permission::all());
    }
    Permission::from_name(word).map(|permission| vec![permission]).ok_or_else(|| {
        let names = Permission::names();
        let hint = match nearest(word, names.iter().copied()) {
            Some(meant) => format!("did you mean '{meant}'?"),
            None => format!("it is one of: {}", names.join(", ")),
        };
        Error::new(Kind::BadInput, format!("'{word}' is not something that can be allowed")).hint(hint)
    })
}

#[cfg(test)]
mod tests;
