//! Unit tests of `config`.

use super::*;
use crate::model::cost::Price;
use crate::store::s3::{Encryption, PutOptions};

const SMALL: &str = "[host]\nname = \"a\"\n[repository]\nurl = \"file:///srv/keiki\"\n";
const TLS: &str = "[tls]\nca = \"/t/ca.pem\"\ncertificate = \"/t/a.pem\"\nkey = \"/t/a.key\"\n";
const INSTANCE: &str = "[[instance]]\nname = \"orders\"\nengine = \"postgres\"\ndata_dir = \"/pg\"\n";

fn parse(text: &str) -> Result<Config> {
    Config::parse(Path::new("/etc/keiki/keiki.toml"), text)
}

/// What the command line would print, without the name of the file.
fn refusal(text: &str) -> String {
    let error = parse(text).expect_err("this configuration should be refused");
    assert!(matches!(error.kind(), Kind::BadInput | Kind::Unsupported), "{error:?}");
    let message = error.message().strip_prefix("cannot read configuration '/etc/keiki/keiki.toml': ");
    let message = message.expect("the message should name the file");
    match error.hint_text() {
        Some(hint) => format!("{message}\nhint: {hint}"),
        None => message.to_string(),
    }
}

#[test]
fn the_smallest_configuration_gets_every_default() {
    let config = parse(&format!("{SMALL}{INSTANCE}")).unwrap();
    assert_eq!(config.host.control_socket, Path::new(CONTROL_SOCKET_DEFAULT));
    assert_eq!(config.repository.url, RepositoryUrl::File("/srv/keiki".into()));
    assert_eq!(config.clone.ports, 5500..=5599);
    assert_eq!((config.listen, config.tls.clone()), (None, None));
    let instance = config.instance("orders").unwrap();
    assert_eq!(instance.ship, ShipMode::Slot);
    assert_eq!(instance.ship_every, Duration::from_secs(5));
    assert_eq!(instance.slot_limit_bytes, 16 << 30);
    assert_eq!((instance.port, instance.user.as_str(), instance.run_as.as_str()), (5432, "postgres", "postgres"));
    assert_eq!(instance.backup, None);
}

#[test]
fn a_misspelt_key_is_named_with_its_line_and_the_key_that_was_meant() {
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}ship_evry = \"5s\"\n")),
        @r#"
    line 9, key 'instance.ship_evry': there is no such key
    hint: did you mean 'ship_every'?
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[hosts]\n")),
        @r#"
    line 5, key 'hosts': there is no such key
    hint: did you mean 'host'?
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}wal_level = 1\n")),
        @r#"
    line 5, key 'repository.wal_level': there is no such key
    hint: known here: url, endpoint, public_endpoint, region, path_style, ca, credentials_file, profile, encryption, kms_key, storage_class, tags, part_size, timeout, connections, prices
    "#
    );
}

#[test]
fn a_value_that_makes_no_sense_is_named_with_its_line_and_key() {
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}ship_every = \"soon\"\n")),
        @r#"
    line 9, key 'instance.ship_every': 'soon' is not a duration
    hint: write a number with a unit, as in '5s', '10min', '12h' or '7d'
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}ship_every = \"1ms\"\n")),
        @r#"
    line 9, key 'instance.ship_every': '1ms' is not from '100ms' to '1h'
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}ship = \"wal\"\n")),
        @r#"
    line 9, key 'instance.ship': 'wal' is not a way to ship
    hint: write 'slot' (works on a stock server) or 'archive_command'
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}port = 70000\n")),
        @r#"
    line 9, key 'instance.port': '70000' is not from 1 to 65535
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}slot_limit = \"16 gigs\"\n")),
        @r#"
    line 9, key 'instance.slot_limit': '16 gigs' is not a size
    hint: write a number with a unit, as in '512MiB' or '16GiB'
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}run_as = \"\"\n")),
        @r#"
    line 9, key 'instance.run_as': it must not be empty
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}[instance.backup]\nschedule = \"nightly\"\n")),
        @r#"
    line 10, key 'instance.backup.schedule': 'nightly' is not a backup window: it needs times and days
    hint: write it like '02:00-08:00 daily', '22:00-04:00 mon-fri' or '01:00-05:00 sat,sun Europe/Berlin'
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}[instance.backup]\nschedule = []\n")),
        @r#"
    line 10, key 'instance.backup.schedule': it names no window
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[clone]\nports = \"5599-5500\"\n")),
        @r#"
    line 6, key 'clone.ports': '5599-5500' is not a range of ports
    hint: write the first and the last port, as in '5500-5599'
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[clone]\ndata_root = \"clones\"\n")),
        @r#"
    line 6, key 'clone.data_root': 'clones' is not an absolute path
    hint: begin it with '/' and leave out '..': the agent has no current directory
    "#
    );
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_its_line_and_key() {
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}ship_every = 5\n")),
        @r#"
    line 9, key 'instance.ship_every': this is an integer '5', expected text in double quotes
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}port = \"5432\"\n")),
        @r#"
    line 9, key 'instance.port': this is a string "5432", expected a whole number
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}[instance.backup]\nschedule = 5\n")),
        @r#"
    line 10, key 'instance.backup.schedule': expected a text or a list of texts
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[[clone]]\nports = \"1-2\"\n")),
        @r#"
    line 5, key 'clone': this is a map, expected text in double quotes
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
}

#[test]
fn a_missing_key_or_section_is_named() {
    insta::assert_snapshot!(
        refusal("[host]\nname = \"a\"\n"),
        @r#"
    section 'repository' is missing
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(""),
        @r#"
    section 'host' is missing
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[[instance]]\nname = \"orders\"\nengine = \"postgres\"\n")),
        @r#"
    line 5, section 'instance': key 'data_dir' is missing
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}[instance.backup]\nkeep_for = \"7d\"\n")),
        @r#"
    line 9, section 'instance.backup': key 'schedule' is missing
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
}

#[test]
fn what_is_not_toml_is_named_with_its_line() {
    insta::assert_snapshot!(
        refusal("[host]\nname = db1\n"),
        @r#"
    line 2: string values must be quoted, expected literal string
    hint: a line is 'key = value' with text in double quotes, or a [section]; the sample 'config/keiki.toml' shows all
    "#
    );
    insta::assert_snapshot!(
        refusal("[host\nname = \"db1\"\n"),
        @r#"
    line 1: unclosed table, expected ']'
    hint: a line is 'key = value' with text in double quotes, or a [section]; the sample 'config/keiki.toml' shows all
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[host]\nname = \"b\"\n")),
        @r#"
    line 5: duplicate key
    hint: a [section] can stand there once, a [[section]] as often as there are such things
    "#
    );
}

#[test]
fn a_repository_that_cannot_be_used_is_refused() {
    let url = |url: &str| refusal(&format!("[host]\nname = \"a\"\n[repository]\nurl = \"{url}\"\n"));
    insta::assert_snapshot!(
        url("/srv/keiki"),
        @r#"
    line 4, key 'repository.url': '/srv/keiki' is not the URL of a repository
    hint: use 's3://BUCKET/PREFIX', 'file:///srv/keiki' (a directory, a mounted share) or 'peer://HOST' (through another agent)
    "#
    );
    insta::assert_snapshot!(
        url("file://srv/keiki"),
        @r#"
    line 4, key 'repository.url': 'file://srv/keiki' does not name an absolute path
    hint: write three slashes, as in 'file:///srv/keiki'
    "#
    );
    insta::assert_snapshot!(
        url("peer://b"),
        @r#"
    line 4, key 'repository.url': 'peer://b' names a host that is not a peer
    hint: add a [[peer]] with name = "b" and its address
    "#
    );
}

/// A repository in S3 with these lines beside its URL.
fn s3(url: &str, lines: &str) -> String {
    format!("[host]\nname = \"a\"\n[repository]\nurl = \"{url}\"\n{lines}")
}

#[test]
fn a_bucket_needs_a_place_and_gets_every_default() {
    let place = |text: &str| match parse(text).unwrap().repository.url {
        RepositoryUrl::S3(place) => *place,
        other => panic!("{other:?}"),
    };
    let own = place(&s3("s3://backups/keiki/", "endpoint = \"http://10.0.0.5:8333/\"\n"));
    assert_eq!((own.bucket.as_str(), own.prefix.as_str()), ("backups", "keiki"));
    assert_eq!(own.endpoint.as_deref(), Some("http://10.0.0.5:8333"));
    assert_eq!((own.path_style, own.region.as_str(), own.connections), (true, "us-east-1", 32));
    assert_eq!(own.put, PutOptions::default());
    let amazon = place(&s3("s3://backups", "region = \"eu-central-1\"\nencryption = \"aws:kms\"\ntags = [\"a=b\"]\n"));
    assert_eq!((amazon.path_style, amazon.prefix.as_str()), (false, ""));
    assert_eq!(amazon.put.encryption, Encryption::Kms(None));
    assert_eq!(amazon.put.tags, [("a".to_string(), "b".to_string())]);
}

#[test]
fn a_bucket_that_cannot_be_used_is_refused() {
    insta::assert_snapshot!(
        refusal(&s3("s3://backups/keiki", "")),
        @r#"
    line 4, key 'repository.url': neither 'region' nor 'endpoint' says where the bucket is
    hint: add region = "eu-central-1" for Amazon S3, or endpoint = "https://s3.example.net"
    "#
    );
    insta::assert_snapshot!(
        refusal(&s3("s3://b/keiki", "region = \"x\"\n")),
        @r#"
    line 4, key 'repository.url': 'b' cannot be the name of a bucket
    hint: write 's3://BUCKET/PREFIX'; a bucket has 3 to 63 letters, digits, '.' or '-'
    "#
    );
    insta::assert_snapshot!(
        refusal(&s3("s3://backups//x", "region = \"x\"\n")),
        @r#"
    line 4, key 'repository.url': '/x' cannot be a prefix
    hint: use up to 200 letters, digits, '.', '-' or '_', with single slashes between them
    "#
    );
    insta::assert_snapshot!(
        refusal(&s3("s3://backups/x", "endpoint = \"https://key:secret@host\"\n")),
        @r#"
    line 5, key 'repository.endpoint': '…@host' is not an endpoint
    hint: write it like 'https://s3.example.net' or 'http://10.0.0.5:8333', without the bucket
    "#
    );
    insta::assert_snapshot!(
        refusal(&s3("s3://backups/x", "region = \"x\"\nstorage_class = \"GLACIER\"\n")),
        @r#"
    line 6, key 'repository.storage_class': objects of class 'GLACIER' cannot be read when they are needed
    hint: use 'STANDARD_IA', 'INTELLIGENT_TIERING' or 'GLACIER_IR'
    "#
    );
    insta::assert_snapshot!(
        refusal(&s3("s3://backups/x", "region = \"x\"\nkms_key = \"k\"\n")),
        @r#"
    line 6, key 'repository.kms_key': a key is for encryption = "aws:kms"
    hint: write that too, or leave 'kms_key' out
    "#
    );
    insta::assert_snapshot!(
        refusal(&s3("file:///srv/keiki", "region = \"x\"\n")),
        @r#"
    line 5, key 'repository.region': this is for a repository in S3
    hint: leave it out, or write url = "s3://BUCKET/PREFIX"
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[limits]\nupload = \"1kB\"\n")),
        @r#"
    line 6, key 'limits.upload': '1kB' per second is too little to work with
    hint: write at least '64KiB', or 'unlimited'
    "#
    );
}

#[test]
fn names_that_appear_twice_are_refused_with_both_lines() {
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}{INSTANCE}")),
        @r#"
    line 10, key 'instance.name': 'orders' is there already, in line 6
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    let other_name = INSTANCE.replace("orders", "stock");
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{INSTANCE}{other_name}")),
        @r#"
    line 12, key 'instance.data_dir': '/pg' is there already, in line 8
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    let peer = "[[peer]]\nname = \"b\"\naddress = \"b:7420\"\n";
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{TLS}{peer}{peer}")),
        @r#"
    line 13, key 'peer.name': 'b' is there already, in line 10
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
}

#[test]
fn a_group_has_two_members_or_more_each_once_and_a_name_of_its_own() {
    let group =
        |name: &str, members: &str| format!("{SMALL}{INSTANCE}[[group]]\nname = \"{name}\"\nmembers = [{members}]\n");
    let groups = parse(&group("shop", "\"orders\", \"b/cart\", \"stock@c\"")).unwrap().groups;
    assert_eq!(groups[0].name, "shop");
    assert_eq!(groups[0].members, ["orders", "b/cart", "c/stock"]);
    insta::assert_snapshot!(
        refusal(&group("shop", "\"orders\"")),
        @r#"
    line 11, key 'group.members': a group of 1 is none: it has 2 to 64 members
    hint: name the instances as 'keiki instances' shows them, as in ["orders", "db2/cart"]
    "#
    );
    insta::assert_snapshot!(
        refusal(&group("shop", "\"b/orders\", \"orders@b\"")),
        @r#"
    line 11, key 'group.members': 'b/orders' is a member twice
    hint: name it once
    "#
    );
    insta::assert_snapshot!(
        refusal(&group("orders", "\"orders\", \"cart\"")),
        @r#"
    line 10, key 'group.name': 'orders' is the name of an instance
    hint: 'keiki clone' takes either: choose another name
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{}[[group]]\nname = \"shop\"\nmembers = [\"a\", \"b\"]\n", group("shop", "\"a\", \"b\""))),
        @r#"
    line 13, key 'group.name': 'shop' is there already, in line 10
    hint: the sample 'config/keiki.toml', in packages '/etc/keiki/keiki.toml', explains every key
    "#
    );
    insta::assert_snapshot!(
        refusal(&group("shop", "\"orders\", \"../x\"")),
        @r#"
    line 11, key 'group.members': '..' cannot be the name of an instance
    hint: use 1 to 63 letters, digits, '-' or '_', beginning with a letter or a digit
    "#
    );
}

#[test]
fn other_hosts_need_certificates_names_and_addresses() {
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[listen]\naddress = \"0.0.0.0:7420\"\n")),
        @r#"
    line 6, key 'listen.address': to listen to other hosts, a host needs a certificate
    hint: add [tls] with 'ca', 'certificate' and 'key'; 'keiki ca init' and 'keiki ca issue' make them
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{TLS}[listen]\naddress = \"7420\"\n")),
        @r#"
    line 10, key 'listen.address': '7420' is not a numeric address with a port
    hint: write it like '0.0.0.0:7420', '10.0.0.1:7420' or '[::]:7420'
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[[peer]]\nname = \"b\"\naddress = \"b:7420\"\n")),
        @r#"
    line 6, key 'peer.name': to talk to other hosts, a host needs a certificate
    hint: add [tls] with 'ca', 'certificate' and 'key'; 'keiki ca init' and 'keiki ca issue' make them
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{TLS}[[peer]]\nname = \"b\"\naddress = \"b\"\n")),
        @r#"
    line 11, key 'peer.address': 'b' is not an address with a port
    hint: write it like 'db2.example.net:7420' or '10.0.0.2:7420'
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{TLS}[[peer]]\nname = \"a\"\naddress = \"a:7420\"\n")),
        @r#"
    line 10, key 'peer.name': 'a' is this host itself
    hint: leave it out, or is 'host.name' wrong?
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}{TLS}[[peer]]\nname = \"../b\"\naddress = \"b:1\"\n")),
        @r#"
    line 10, key 'peer.name': '../b' cannot be the name of a host
    hint: use 1 to 63 letters, digits, '-' or '_', beginning with a letter or a digit
    "#
    );
}

#[test]
fn a_rule_that_allows_nothing_known_is_refused() {
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[[allow]]\nwho = \"operator:*\"\nmay = [\"clones\"]\n")),
        @r#"
    line 7, key 'allow.may': 'clones' is not something that can be allowed
    hint: did you mean 'clone'?
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[[allow]]\nwho = \"operator:*\"\nmay = [\"root\"]\n")),
        @r#"
    line 7, key 'allow.may': 'root' is not something that can be allowed
    hint: it is one of: status, backup, clone, accept, discard, job, ship, read-repository, write-repository
    "#
    );
    insta::assert_snapshot!(
        refusal(&format!("{SMALL}[[allow]]\nwho = \"ann\"\nmay = [\"clone\"]\n")),
        @r#"
    line 6, key 'allow.who': 'ann' does not say who may
    hint: write 'operator:NAME' or 'host:NAME' as in the certificates; '*' stands for any name
    "#
    );
}

#[test]
fn a_star_allows_everything() {
    let config = parse(&format!("{SMALL}[[allow]]\nwho = \"operator:ann\"\nmay = [\"*\"]\n")).unwrap();
    assert_eq!(config.allow[0].may, Permission::all());
    assert_eq!(config.allow[0].instances, ["*"]);
}

#[test]
fn a_file_that_cannot_be_read_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keiki.toml");
    assert_eq!(Config::load(&path).unwrap_err().kind(), Kind::NotFound);
    std::fs::write(&path, b"[host]\nname = \"\xff\"\n").unwrap();
    let error = Config::load(&path).unwrap_err();
    assert!(error.message().ends_with("line 2: this is not UTF-8 text"), "{error}");
    assert!(Config::load(directory.path()).unwrap_err().message().ends_with("it is not a file of text"));
    std::fs::write(&path, SMALL).unwrap();
    assert_eq!(Config::load(&path).unwrap().host.name, "a");
}

#[test]
fn a_redis_server_has_its_own_defaults_and_its_own_keys() {
    let redis = "[[instance]]\nname = \"cart\"\nengine = \"redis\"\ndata_dir = \"/var/lib/redis\"\n";
    let config = parse(&format!("{SMALL}{redis}")).unwrap();
    let instance = &config.instances[0];
    assert_eq!((instance.port, instance.run_as.as_str(), instance.user.as_str()), (6379, "redis", ""));
    assert_eq!((&instance.socket, &instance.password_file), (&None, &None));
    let error = parse(&format!("{SMALL}{redis}ship = \"slot\"\n")).unwrap_err();
    assert!(error.message().contains("'ship' means nothing for engine 'redis'"), "{error}");
    let error = parse(&format!("{SMALL}{INSTANCE}socket = \"/s\"\n")).unwrap_err();
    assert!(error.message().contains("'socket' means nothing for engine 'postgres'"), "{error}");
}

#[test]
fn a_mariadb_server_has_its_own_defaults_and_its_own_keys() {
    let mariadb = "[[instance]]\nname = \"shop\"\nengine = \"mariadb\"\ndata_dir = \"/var/lib/mysql\"\n";
    let config = parse(&format!("{SMALL}{mariadb}")).unwrap();
    let instance = &config.instances[0];
    assert_eq!((instance.port, instance.run_as.as_str(), instance.user.as_str()), (3306, "mysql", "mysql"));
    assert_eq!(instance.socket.as_deref(), Some(Path::new("/run/mysqld/mysqld.sock")));
    assert_eq!((&instance.password_file, instance.purge_shipped), (&None, false));
    assert!(parse(&format!("{SMALL}{mariadb}purge_shipped = true\n")).unwrap().instances[0].purge_shipped);
    let error =
        parse(&format!("{SMALL}{}purge_shipped = true\n", mariadb.replace("\"mariadb\"", "\"redis\""))).unwrap_err();
    assert!(error.message().contains("'purge_shipped' means nothing for engine 'redis'"), "{error}");
    let error = parse(&format!("{SMALL}{mariadb}socket_dir = \"/s\"\n")).unwrap_err();
    assert!(error.message().contains("'socket_dir' means nothing for engine 'mariadb'"), "{error}");
}

#[test]
fn a_mysql_server_has_a_directory_for_backups_and_others_have_none() {
    let mysql =
        "[[instance]]\nname = \"shop\"\nengine = \"mysql\"\ndata_dir = \"/var/lib/mysql\"\nbackup_dir = \"/srv/b\"\n";
    let config = parse(&format!("{SMALL}{mysql}")).unwrap();
    let instance = &config.instances[0];
    assert_eq!((instance.port, instance.user.as_str()), (3306, "mysql"));
    assert_eq!(instance.backup_dir.as_deref(), Some(Path::new("/srv/b")));
    for other in ["mariadb", "redis", "postgres"] {
        let error = parse(&format!("{SMALL}{}", mysql.replace("\"mysql\"", &format!("\"{other}\"")))).unwrap_err();
        assert!(error.message().contains("'backup_dir' means nothing for engine"), "{error}");
    }
}

#[test]
fn prices_are_read_to_the_billionth_and_what_is_no_price_is_refused() {
    let with = |prices: &str| format!("{SMALL}[repository.prices]\ncurrency = \"USD\"\n{prices}");
    let prices = |text: &str| parse(&with(text)).unwrap().repository.prices.unwrap();
    let some = prices("get_per_1000 = 0.0004\nput_per_1000 = 5\n");
    assert_eq!((some.get_per_1000, some.put_per_1000), (Some(Price(400_000)), Some(Price(5_000_000_000))));
    assert_eq!((some.currency.as_str(), some.delete_per_1000), ("USD", None));
    assert_eq!(parse(SMALL).unwrap().repository.prices, None);
    let refused = refusal(&with("sent_per_gib = -1.0\n"));
    let reason = "line 7, key 'repository.prices.sent_per_gib': '-1' is not a price from 0 to 1000000";
    assert!(refused.starts_with(reason), "{refused}");
    // As in the sample, where nobody has filled in anything.
    assert_eq!(parse(&with("sent_per_gib = 0.0\n")).unwrap().repository.prices, None);
    assert!(refusal(&with("sent_per_gib = nan\n")).contains("is not a price"));
    assert!(refusal(&format!("{SMALL}[repository.prices]\nput_per_1000 = 1.0\n")).contains("'currency' is missing"));
}

fn sample() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/keiki.toml")).unwrap()
}

/// Goal: nobody reads about a key that does not exist, and no key exists that nobody reads about.
/// Method: every section is asked for the keys that it knows, by giving it one that it cannot know.
#[test]
fn the_sample_file_shows_exactly_the_keys_that_exist() {
    let sections = [
        ("", "?"),
        ("host", "[host]\n?"),
        ("listen", "[listen]\n?"),
        ("tls", "[tls]\n?"),
        ("repository", "[repository]\n?"),
        ("repository.prices", "[repository]\n[repository.prices]\n?"),
        ("peer", "[[peer]]\n?"),
        ("instance", "[[instance]]\n?"),
        ("instance.backup", "[[instance]]\n[instance.backup]\n?"),
        ("group", "[[group]]\n?"),
        ("clone", "[clone]\n?"),
        ("clone.mariadb", "[clone.mariadb]\n?"),
        ("clone.mysql", "[clone.mysql]\n?"),
        ("clone.redis", "[clone.redis]\n?"),
        ("clone.valkey", "[clone.valkey]\n?"),
        ("allow", "[[allow]]\n?"),
        ("limits", "[limits]\n?"),
    ];
    let mut known = Vec::new();
    for (section, text) in sections {
        let error = toml::from_str::<raw::RawConfig>(&text.replace('?', "no-such-key = 1")).err().unwrap();
        assert!(error.message().starts_with("unknown field"), "{section}: {}", error.message());
        let prefix = if section.is_empty() { String::new() } else { format!("{section}.") };
        known.extend(place::quoted(error.message()).skip(1).map(|key| format!("{prefix}{key}")));
    }
    known.sort();
    let text = sample();
    let tree = toml::de::DeTable::parse(&text).unwrap();
    let mut shown = Vec::new();
    place::visit(tree.get_ref(), "", &mut |_, key| shown.push(key.to_string()));
    shown.sort();
    shown.dedup();
    assert_eq!(shown, known);
}

#[test]
fn the_sample_file_is_a_good_configuration_and_shows_the_defaults() {
    let config = parse(&sample()).unwrap();
    let defaults = parse(&format!("{SMALL}{INSTANCE}")).unwrap();
    assert_eq!(config.limits, defaults.limits);
    assert_eq!(config.host.state_dir, defaults.host.state_dir);
    assert_eq!(config.clone.data_root, defaults.clone.data_root);
    assert_eq!(config.clone.ports, defaults.clone.ports);
    let (shown, default) = (&config.instances[0], &defaults.instances[0]);
    assert_eq!(
        (shown.ship, shown.ship_every, shown.slot_limit_bytes, &shown.socket_dir, &shown.run_as),
        (default.ship, default.ship_every, default.slot_limit_bytes, &default.socket_dir, &default.run_as)
    );
}

#[test]
fn every_key_of_the_sample_has_a_comment() {
    let mut explained = false;
    for line in sample().lines() {
        let is_key = line.contains(" = ") && !line.starts_with('#');
        explained = match line {
            _ if line.starts_with('#') => true,
            // A comment above a section or a group of keys speaks for all of it.
            "" => false,
            _ => explained,
        };
        assert!(!is_key || explained || line.contains('#'), "{line}");
    }
}
