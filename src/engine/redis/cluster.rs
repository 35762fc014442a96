//! Shards of a Redis Cluster: what a backup remembers of the cluster, and how clones of all shards become a cluster of
//! their own.
//!
//! Invariants: a clone that is made alone belongs to no cluster, as ever. In a group, the node table of each clone names
//! the new nodes and nobody else, and is complete before any of them opens a port, so that they cannot meet the source's
//! nodes; in quarantine a clone is no node at all. Which slots a shard serves is what its own backup says; that no key of
//! another slot is in the clone is asked of the data.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::base::ownership::write_owned;
use crate::base::random::random_u64;
use crate::base::users::User;
use crate::engine::redis::clone::endpoint_of_clone;
use crate::engine::redis::ondisk::nodes_conf::{
    self, BUS_PORT_OFFSET, ID_DIGITS, NewNode, Node, Slots, is_id, slot_of_key,
};
use crate::engine::redis::session::{Endpoint, Reply, Session, database_number};
use crate::engine::redis::settings::{LOG_FILE, SETTING_FACT_PREFIX};
use crate::engine::{CleanUpItem, CloneSite, TiedMember, Ties};
use crate::error::{Context, Error, Kind, Result};
use crate::model::check::CheckItem;

/// Facts of a backup: that the server is a node; its own id; the slots of each primary that it knew, by the id; that slots
/// of it were on their way.
const CLUSTER_FACT: &str = "cluster";
const NODE_FACT: &str = "cluster.node";
const SHARD_FACT_PREFIX: &str = "cluster.shard.";
const MOVING_FACT: &str = "cluster.moving";
/// What the group tells a clone: its whole node table.
const TABLE_TIE: &str = "tie.cluster";

/// In the data directory of a node.
pub const NODES_FILE: &str = "nodes.conf";

/// How many databases a node has (Valkey 9).
const DATABASES: &str = "cluster-databases";

/// The settings of a node that a clone of the whole cluster takes over.
const KEPT: [&str; 9] = [
    DATABASES,
    "cluster-node-timeout",
    "cluster-require-full-coverage",
    "cluster-migration-barrier",
    "cluster-allow-replica-migration",
    "cluster-replica-validity-factor",
    "cluster-allow-reads-when-down",
    "cluster-allow-pubsubshard-when-down",
    "cluster-link-sendbuf-limit",
];

const CONFIRM_SECONDS_MAX: u64 = 120;
const CONFIRM_POLL: Duration = Duration::from_millis(100);
/// Keys that are asked for at a time.
const SCAN_COUNT_MAX: u32 = 1000;

/// What a backup remembers of the cluster that the server is a node of; nothing if it is none. A server that does not tell
/// its agent is backed up all the same: only a clone of the whole cluster needs to know.
pub async fn facts_of(session: &mut Session, settings: &BTreeMap<String, String>) -> Result<Vec<(String, String)>> {
    if settings.get("cluster-enabled").is_none_or(|value| value != "yes") {
        return Ok(Vec::new());
    }
    let mut facts = vec![(CLUSTER_FACT.to_string(), "yes".to_string())];
    let kept = KEPT.iter().filter_map(|name| Some((*name, settings.get(*name)?)));
    facts.extend(kept.map(|(name, value)| (format!("{SETTING_FACT_PREFIX}{name}"), value.clone())));
    let table = match session.ask_bytes(&[b"CLUSTER", b"NODES"]).await? {
        Reply::Error(_) => return Ok(facts),
        reply => nodes_conf::parse(&reply.text()?).context(|| "cannot understand the server's CLUSTER NODES")?,
    };
    for Node { id, is_myself, slots, is_moving_slots } in table {
        if is_myself {
            facts.push((NODE_FACT.to_string(), id.clone()));
        }
        if is_moving_slots {
            facts.push((MOVING_FACT.to_string(), "yes".to_string()));
        }
        if !slots.is_empty() {
            facts.push((format!("{SHARD_FACT_PREFIX}{id}"), slots.to_string()));
        }
    }
    Ok(facts)
}

/// A shard as its backup describes it.
struct Shard<'m> {
    /// Its place among the members.
    number: usize,
    member: &'m TiedMember,
    id: &'m str,
    slots: Slots,
    /// All primaries that it knew, by their ids.
    table: BTreeMap<&'m str, Slots>,
}

impl<'m> Shard<'m> {
    /// The shard that a member is; nothing if its server is no node.
    fn of(number: usize, member: &'m TiedMember) -> Result<Option<Shard<'m>>> {
        let (facts, source) = (&member.facts, &member.source);
        if facts.get(CLUSTER_FACT).is_none_or(|value| value != "yes") {
            return Ok(None);
        }
        let instance = source.rsplit('/').next().unwrap_or(source);
        let refuse = |why: String, hint: String| Err(Error::new(Kind::BadInput, why).hint(hint));
        let Some(id) = facts.get(NODE_FACT).filter(|id| is_id(id)) else {
            return refuse(
                format!("the backup of '{source}' does not say which slots of its cluster it serves"),
                format!("give the agent's user +cluster|nodes there, then 'keiki backup create {instance}'"),
            );
        };
        if facts.contains_key(MOVING_FACT) {
            return refuse(
                format!("slots of '{source}' were being moved when its backup was taken"),
                format!("when that is over, 'keiki backup create {instance}', and clone to a moment after it"),
            );
        }
        let mut table = BTreeMap::new();
        for (key, slots) in facts {
            if let Some(id) = key.strip_prefix(SHARD_FACT_PREFIX) {
                table.insert(id, Slots::parse(slots).context(|| format!("the backup of '{source}' is damaged"))?);
            }
        }
        let Some(slots) = table.get(id.as_str()).cloned() else {
            return refuse(
                format!("'{source}' served no slots of its cluster when its backup was taken: was it a replica?"),
                "name the primaries in [[group]]; 'redis-cli CLUSTER NODES' shows them".to_string(),
            );
        };
        Ok(Some(Shard { number, member, id, slots, table }))
    }

    fn knows(&self, other: &Shard<'_>) -> bool {
        self.table.contains_key(other.id) || other.table.contains_key(self.id)
    }
}

/// Makes the node tables of all clusters whose shards are among the members.
pub fn tie(members: &[TiedMember], listen_addresses: &str) -> Result<(Vec<CheckItem>, Vec<Ties>)> {
    let mut clusters: Vec<Vec<Shard<'_>>> = Vec::new();
    for (number, member) in members.iter().enumerate() {
        let Some(shard) = Shard::of(number, member)? else { continue };
        match clusters.iter_mut().find(|cluster| cluster.iter().any(|other| other.knows(&shard))) {
            Some(cluster) => cluster.push(shard),
            None => clusters.push(vec![shard]),
        }
    }
    let mut ties = vec![Ties::new(); members.len()];
    let mut items = Vec::new();
    for cluster in &clusters {
        require_all_slots(cluster)?;
        let address = address_of_nodes(listen_addresses)?;
        let node = |shard: &Shard<'_>| {
            require_bus_port(shard.member.port)?;
            Ok(NewNode { id: fresh_id(), address, port: shard.member.port, slots: shard.slots.clone() })
        };
        let nodes = cluster.iter().map(node).collect::<Result<Vec<_>>>()?;
        for (place, shard) in cluster.iter().enumerate() {
            ties[shard.number].insert(TABLE_TIE.to_string(), nodes_conf::render(&nodes, place));
        }
        let names: Vec<&str> = cluster.iter().map(|shard| shard.member.name.as_str()).collect();
        let found = format!("{} become a cluster of {} new nodes at {address}", names.join(", "), nodes.len());
        items.push(CheckItem::pass("cluster", found));
    }
    Ok((items, ties))
}

/// Each slot that the source's cluster serves is served by exactly one of the shards.
fn require_all_slots(cluster: &[Shard<'_>]) -> Result<()> {
    let mut served = Slots::default();
    for (number, shard) in cluster.iter().enumerate() {
        for other in &cluster[..number] {
            let both = shard.slots.intersection(&other.slots);
            if !both.is_empty() {
                return Err(Error::new(
                    Kind::BadInput,
                    format!(
                        "slots {both} were served by '{}' when its backup was taken, and by '{}' at its own",
                        other.member.source, shard.member.source
                    ),
                )
                .hint("slots were moved in between: take a backup of each shard, and clone to a moment after them"));
            }
        }
        served = served.union(&shard.slots);
    }
    let known = cluster.iter().flat_map(|shard| shard.table.values());
    let missing = known.fold(Slots::default(), |all, slots| all.union(slots)).without(&served);
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::new(Kind::BadInput, format!("no member of the group serves slots {missing} of the cluster"))
        .hint("name the primaries of all shards in [[group]]; if slots were moved, take a backup of each shard first"))
}

/// The address that nodes tell each other and their clients.
fn address_of_nodes(listen_addresses: &str) -> Result<IpAddr> {
    let words = listen_addresses.split([',', ' ']).filter(|word| !word.is_empty());
    let address = |word: &str| match word {
        "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        word => word.parse::<IpAddr>().ok().filter(|address| !address.is_unspecified()),
    };
    words.filter_map(address).next().ok_or_else(|| {
        Error::new(
            Kind::BadInput,
            format!("nodes of a cluster tell their clients an address, and '{listen_addresses}' is none"),
        )
        .hint("put an address of this host, by number, first in '[clone] listen_addresses' of its configuration")
    })
}

fn require_bus_port(port: u16) -> Result<()> {
    let hint = "widen '[clone] ports' of this host: a node needs a free port below 55536, and 10000 above it another";
    match port.checked_add(BUS_PORT_OFFSET) {
        None => Err(Error::new(Kind::BadInput, format!("port {port} leaves none for the bus of a cluster")).hint(hint)),
        Some(bus) => match TcpListener::bind(("0.0.0.0", bus)) {
            Ok(_) => Ok(()),
            Err(_) => {
                Err(Error::new(Kind::Conflict, format!("port {bus}, for the bus of a node, is in use")).hint(hint))
            }
        },
    }
}

fn fresh_id() -> String {
    let digits = format!("{:016x}{:016x}{:016x}", random_u64(), random_u64(), random_u64());
    digits[..ID_DIGITS].to_string()
}

/// What a clone of a whole cluster has in its configuration file beside the rest; nothing for one that stands alone. Takes
/// the facts of its backup, and how many databases its log was found to need if that is more than the backup knows.
pub fn settings_of(facts: &BTreeMap<String, String>, databases: Option<u64>) -> Vec<(&'static str, String)> {
    if !facts.contains_key(TABLE_TIE) {
        return Vec::new();
    }
    let kept = KEPT.iter().filter_map(|name| {
        let value = facts.get(&format!("{SETTING_FACT_PREFIX}{name}"))?.clone();
        Some((*name, databases.filter(|_| *name == DATABASES).map_or(value, |number| number.to_string())))
    });
    let own = [("cluster-enabled", "yes".to_string()), ("cluster-config-file", NODES_FILE.to_string())];
    own.into_iter().chain(kept.filter(|(_, value)| !value.contains(['\n', '\r']))).collect()
}

/// Writes the node table of a clone that belongs to a group of shards, once it is known that all its keys are in slots of
/// its own. Nothing for a clone that stands alone. Takes where the server in quarantine is. Repeating it is harmless.
pub async fn place_table(endpoint: &Endpoint, user: &User, site: &CloneSite) -> Result<Option<CleanUpItem>> {
    let Some(table) = site.facts.get(TABLE_TIE) else { return Ok(None) };
    let nodes = nodes_conf::parse(table)?;
    let own = nodes.iter().find(|node| node.is_myself);
    let own = own.ok_or_else(|| Error::new(Kind::Internal, "the new node table does not name its own node"))?;
    let keys = require_own_slots(endpoint, &own.slots).await?;
    write_owned(user, &site.data_dir.join(NODES_FILE), table.as_bytes())?;
    Ok(Some(CleanUpItem {
        what: String::from("cluster"),
        done: format!("one of {} new nodes, {}; slots {}, {keys} keys in them", nodes.len(), own.id, own.slots),
    }))
}

/// Looks at every key of every database; how many there are. A key of another slot came or went when slots were moved.
async fn require_own_slots(endpoint: &Endpoint, slots: &Slots) -> Result<u64> {
    let info = Session::open(endpoint).await?.info(&["keyspace"]).await?;
    let mut keys = 0;
    for database in info.keys().filter_map(|name| database_number(name)) {
        keys += require_own_slots_in(endpoint, database, slots).await?;
    }
    Ok(keys)
}

async fn require_own_slots_in(endpoint: &Endpoint, database: u32, slots: &Slots) -> Result<u64> {
    let mut session = session_in(endpoint, database).await?;
    let (mut cursor, mut keys, mut count) = (b"0".to_vec(), 0, SCAN_COUNT_MAX);
    loop {
        let (next, found) = match scan(&mut session, &cursor, count).await {
            Ok(page) => page,
            // Names may be so long that an answer with so many is too long; what is left of it makes the session useless.
            Err(_) if count > 1 => {
                count = (count / 10).max(1);
                session = session_in(endpoint, database).await?;
                continue;
            }
            Err(error) => return Err(error),
        };
        cursor = next;
        for key in found {
            let slot = slot_of_key(&key.bytes()?);
            if !slots.contains(slot) {
                return Err(Error::new(
                    Kind::BadInput,
                    format!("the clone has keys of slot {slot}, which its source did not serve when its backup was taken"),
                )
                .hint(
                    "slots were moved between the backup and the moment of the clone: clone to a moment before that, or \
                     take a backup of each shard and clone to one after them",
                ));
            }
            keys += 1;
        }
        if cursor == b"0" {
            return Ok(keys);
        }
    }
}

async fn session_in(endpoint: &Endpoint, database: u32) -> Result<Session> {
    let mut session = Session::open(endpoint).await?;
    session.ask(&["SELECT", &database.to_string()]).await?;
    Ok(session)
}

/// One page of keys: where the next one begins, and what is in it.
async fn scan(session: &mut Session, cursor: &[u8], count: u32) -> Result<(Vec<u8>, Vec<Reply>)> {
    let count = count.to_string();
    let page = session.ask_bytes(&[b"SCAN", cursor, b"COUNT", count.as_bytes()]).await?.list()?;
    let [next, found] = <[Reply; 2]>::try_from(page)
        .map_err(|_| Error::new(Kind::Server, "the server's answer to SCAN is no cursor with keys"))?;
    Ok((next.bytes()?, found.list()?))
}

/// Waits until an accepted clone of a shard serves together with the others, and makes sure that it knows nobody else.
pub async fn confirm(site: &CloneSite, cancel: &CancellationToken) -> Result<Vec<CleanUpItem>> {
    let Some(table) = site.facts.get(TABLE_TIE) else { return Ok(Vec::new()) };
    let wanted: BTreeSet<String> = nodes_conf::parse(table)?.into_iter().map(|node| node.id).collect();
    let what = || format!("cannot open clone '{}' as a node of its cluster", site.clone_name);
    let mut session = Session::open(&endpoint_of_clone(&site.run_dir, &site.run_as)).await.context(what)?;
    let began = Instant::now();
    loop {
        let text = session.ask(&["CLUSTER", "INFO"]).await.context(what)?.text()?;
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap_or("?");
        let nodes = nodes_conf::parse(&session.ask(&["CLUSTER", "NODES"]).await.context(what)?.text()?)?;
        let known: BTreeSet<String> = nodes.into_iter().map(|node| node.id).collect();
        if let Some(stranger) = known.difference(&wanted).next() {
            return Err(Error::new(
                Kind::Server,
                format!("{}: it knows node {stranger}, which is none of them", what()),
            )
            .hint("stop it: was another server told to meet it?"));
        }
        if value("cluster_state") == "ok" && known == wanted {
            let done = format!("ok, {} nodes, {} slots served", known.len(), value("cluster_slots_ok"));
            return Ok(vec![CleanUpItem { what: format!("{}: cluster", site.clone_name), done }]);
        }
        if began.elapsed() > Duration::from_secs(CONFIRM_SECONDS_MAX) {
            let state = value("cluster_state");
            return Err(Error::new(Kind::Server, format!("{}: its cluster is '{state}'", what()))
                .hint(format!("'{}' says more", site.run_dir.join(LOG_FILE).display())));
        }
        tokio::select! {
            () = tokio::time::sleep(CONFIRM_POLL) => {}
            () = cancel.cancelled() => return Err(Error::new(Kind::Cancelled, "cancelled while waiting for a cluster")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> String {
        format!("{number:040}")
    }

    /// The primaries of a cluster, each with a backup that knows all of them.
    fn members(slots: &[&str]) -> Vec<TiedMember> {
        let table = slots.iter().enumerate().map(|(number, slots)| (id(number), slots.to_string()));
        let table: Vec<(String, String)> = table.collect();
        let member = |number: usize| {
            let mut facts: BTreeMap<String, String> =
                [(CLUSTER_FACT.to_string(), "yes".to_string()), (NODE_FACT.to_string(), id(number))].into();
            facts.extend(table.iter().map(|(id, slots)| (format!("{SHARD_FACT_PREFIX}{id}"), slots.clone())));
            let name = format!("check-s{number}");
            TiedMember { name, source: format!("db1/s{number}"), port: 20100 + number as u16, facts }
        };
        (0..slots.len()).map(member).collect()
    }

    const THREE: [&str; 3] = ["0-5460", "5461-10922", "10923-16383"];

    #[test]
    fn all_shards_become_one_cluster_that_knows_nobody_of_the_source() {
        let mut all = members(&THREE);
        let alone = TiedMember { facts: BTreeMap::new(), ..all[0].clone() };
        all.insert(1, alone);
        let (items, ties) = tie(&all, "127.0.0.1").unwrap();
        assert_eq!(items.len(), 1);
        assert!(ties[1].is_empty(), "a server that is no node is tied to a cluster");
        for (place, number) in [0, 2, 3].into_iter().enumerate() {
            let table = nodes_conf::parse(&ties[number][TABLE_TIE]).unwrap();
            assert_eq!(table.len(), 3);
            assert!(table.iter().all(|node| (0..3).all(|old| node.id != id(old))));
            assert!(table[place].is_myself && table[place].slots.to_string() == THREE[place], "{table:?}");
            assert!(settings_of(&ties[number], None).contains(&("cluster-enabled", "yes".to_string())));
        }
    }

    #[test]
    fn shards_that_do_not_fit_together_are_refused_with_what_to_do() {
        let refusal = |members: &[TiedMember], listen: &str| {
            let error = tie(members, listen).unwrap_err();
            assert!(error.hint_text().is_some(), "{error}");
            error.message().to_string()
        };
        let all = members(&THREE);
        assert_eq!(refusal(&all[..2], "localhost"), "no member of the group serves slots 10923-16383 of the cluster");
        let changed = |change: &dyn Fn(&mut BTreeMap<String, String>)| {
            let mut all = members(&THREE);
            change(&mut all[1].facts);
            refusal(&all, "localhost")
        };
        let own = format!("{SHARD_FACT_PREFIX}{}", id(1));
        assert!(
            changed(&|facts| drop(facts.insert(own.clone(), "5000-10922".into())))
                .contains("slots 5000-5460 were served")
        );
        assert!(changed(&|facts| drop(facts.remove(&own))).contains("was it a replica?"));
        assert!(changed(&|facts| drop(facts.remove(NODE_FACT))).contains("does not say which slots"));
        assert!(changed(&|facts| drop(facts.insert(MOVING_FACT.into(), "yes".into()))).contains("being moved"));
        assert!(refusal(&all, "*").contains("an address, and '*' is none"));
        let mut high = members(&THREE);
        high[2].port = 60000;
        assert!(refusal(&high, "127.0.0.1").contains("port 60000"));
    }

    #[test]
    fn a_clone_that_stands_alone_gets_nothing_of_a_cluster() {
        let facts = &members(&THREE)[0].facts;
        assert!(settings_of(facts, None).is_empty());
    }

    #[test]
    fn a_node_has_as_many_databases_as_its_source_or_as_its_log_needs() {
        let (_, ties) = tie(&members(&THREE), "127.0.0.1").unwrap();
        let mut facts = members(&THREE)[0].facts.clone();
        facts.extend(ties[0].clone());
        facts.insert(format!("{SETTING_FACT_PREFIX}{DATABASES}"), "4".to_string());
        assert!(settings_of(&facts, None).contains(&(DATABASES, "4".to_string())));
        assert!(settings_of(&facts, Some(21)).contains(&(DATABASES, "21".to_string())));
        let (items, ties) = tie(&[], "*").unwrap();
        assert!(items.is_empty() && ties.is_empty());
    }
}
