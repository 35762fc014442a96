//! The configuration as it was typed. Each key stands here once, each text with its place in the file, so that
//! whatever turns out to be wrong with it later can still name its line.

use serde::Deserialize;
use toml::Spanned;

pub type Text = Spanned<String>;
pub type Number = Spanned<i64>;
pub type Amount = Spanned<f64>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    pub host: RawHost,
    pub listen: Option<RawListen>,
    pub tls: Option<RawTls>,
    pub repository: RawRepository,
    #[serde(default)]
    pub peer: Vec<RawPeer>,
    #[serde(default)]
    pub instance: Vec<RawInstance>,
    #[serde(default)]
    pub group: Vec<RawGroup>,
    #[serde(default)]
    pub clone: RawClone,
    #[serde(default)]
    pub allow: Vec<RawAllow>,
    #[serde(default)]
    pub limits: RawLimits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawHost {
    pub name: Text,
    pub state_dir: Option<Text>,
    pub control_socket: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawListen {
    pub address: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawTls {
    pub ca: Text,
    pub certificate: Text,
    pub key: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawRepository {
    pub url: Text,
    pub endpoint: Option<Text>,
    pub public_endpoint: Option<Text>,
    pub region: Option<Text>,
    pub path_style: Option<Spanned<bool>>,
    pub ca: Option<Text>,
    pub credentials_file: Option<Text>,
    pub profile: Option<Text>,
    pub encryption: Option<Text>,
    pub kms_key: Option<Text>,
    pub storage_class: Option<Text>,
    pub tags: Option<Spanned<Vec<String>>>,
    pub part_size: Option<Text>,
    pub timeout: Option<Text>,
    pub connections: Option<Number>,
    pub prices: Option<RawPrices>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPrices {
    pub currency: Text,
    pub put_per_1000: Option<Amount>,
    pub list_per_1000: Option<Amount>,
    pub get_per_1000: Option<Amount>,
    pub delete_per_1000: Option<Amount>,
    pub stored_per_gib_month: Option<Amount>,
    pub received_per_gib: Option<Amount>,
    pub sent_per_gib: Option<Amount>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPeer {
    pub name: Text,
    pub address: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawInstance {
    pub name: Text,
    pub engine: Text,
    pub data_dir: Text,
    pub bin_dir: Option<Text>,
    pub socket_dir: Option<Text>,
    pub socket: Option<Text>,
    pub port: Option<Number>,
    pub user: Option<Text>,
    pub database: Option<Text>,
    pub password_file: Option<Text>,
    pub run_as: Option<Text>,
    pub ship: Option<Text>,
    pub log: Option<Text>,
    pub ship_every: Option<Text>,
    pub slot_limit: Option<Text>,
    pub backup_dir: Option<Text>,
    pub purge_shipped: Option<Spanned<bool>>,
    pub backup: Option<RawBackup>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawBackup {
    pub schedule: Spanned<OneOrMany>,
    pub keep_for: Option<Text>,
    pub keep_at_least: Option<Number>,
    pub also_when_saved: Option<Spanned<bool>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawGroup {
    pub name: Text,
    pub members: Spanned<Vec<String>>,
}

/// One text, or a list of them.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct RawClone {
    pub data_root: Option<Text>,
    pub bin_dir: Option<Text>,
    pub ports: Option<Text>,
    pub keep_free: Option<Text>,
    pub run_as: Option<Text>,
    pub listen_addresses: Option<Text>,
    #[serde(default)]
    pub mariadb: RawCloneEngine,
    #[serde(default)]
    pub mysql: RawCloneEngine,
    #[serde(default)]
    pub redis: RawCloneEngine,
    #[serde(default)]
    pub valkey: RawCloneEngine,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct RawCloneEngine {
    pub bin_dir: Option<Text>,
    pub run_as: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawAllow {
    pub who: Text,
    pub may: Vec<Text>,
    pub instances: Option<Vec<Text>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct RawLimits {
    pub ship_lanes: Option<Number>,
    pub backup_lanes: Option<Number>,
    pub clone_lanes: Option<Number>,
    pub connections: Option<Number>,
    pub upload: Option<Text>,
    pub download: Option<Text>,
}
