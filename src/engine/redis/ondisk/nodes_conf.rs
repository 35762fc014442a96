//! The node table of a Redis Cluster: `nodes.conf`, which `CLUSTER NODES` prints in the same lines. Pure.
//!
//! A line is `<id> <ip:port@bus-port[,hostname[,name=value]]> <flags> <primary or -> <ping sent> <pong received> <config
//! epoch> <link state> <slot or range or [slot-being-moved]>...`; one line `vars currentEpoch N lastVoteEpoch N` ends the
//! file (`src/cluster.c` of Redis 7.0, clusterLoadConfig and clusterGenNodeDescription). Whatever the bytes, reading ends
//! in a value or an error.

use std::fmt;
use std::net::IpAddr;

use crate::error::{Error, Kind, Result};

/// Keys are divided into so many slots (`CLUSTER_SLOTS` in `src/cluster.h`).
pub const SLOTS: u16 = 16384;
/// The bus of a node listens at its port and this (`CLUSTER_PORT_INCR` in `src/cluster.h`).
pub const BUS_PORT_OFFSET: u16 = 10_000;
/// An id is so many lower case hexadecimal digits (`CLUSTER_NAMELEN` in `src/cluster.h`).
pub const ID_DIGITS: usize = 40;

/// A set of slots.
#[derive(Clone, PartialEq, Eq)]
pub struct Slots(Vec<u64>);

impl Default for Slots {
    fn default() -> Slots {
        Slots(vec![0; usize::from(SLOTS) / 64])
    }
}

impl Slots {
    /// Reads slots and ranges with blanks between them: `0-5460 5462`.
    pub fn parse(text: &str) -> Result<Slots> {
        let mut slots = Slots::default();
        for word in text.split_whitespace() {
            slots.insert_range(word)?;
        }
        Ok(slots)
    }

    fn insert_range(&mut self, word: &str) -> Result<()> {
        let (from, to) = word.split_once('-').unwrap_or((word, word));
        let slot = |text: &str| text.parse::<u16>().ok().filter(|slot| *slot < SLOTS);
        match (slot(from), slot(to)) {
            (Some(from), Some(to)) if from <= to => {
                (from..=to).for_each(|slot| self.insert(slot));
                Ok(())
            }
            _ => Err(Error::new(Kind::Damaged, format!("'{}' is no range of slots", word.escape_default()))),
        }
    }

    fn insert(&mut self, slot: u16) {
        self.0[usize::from(slot / 64)] |= 1 << (slot % 64);
    }

    /// Whether a slot below [`SLOTS`] is in the set.
    pub fn contains(&self, slot: u16) -> bool {
        self.0.get(usize::from(slot / 64)).is_some_and(|word| word & (1 << (slot % 64)) != 0)
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub fn union(&self, other: &Slots) -> Slots {
        Slots(self.0.iter().zip(&other.0).map(|(one, other)| one | other).collect())
    }

    pub fn intersection(&self, other: &Slots) -> Slots {
        Slots(self.0.iter().zip(&other.0).map(|(one, other)| one & other).collect())
    }

    /// What is in this set and not in the other.
    pub fn without(&self, other: &Slots) -> Slots {
        Slots(self.0.iter().zip(&other.0).map(|(one, other)| one & !other).collect())
    }
}

impl fmt::Display for Slots {
    /// As the node table writes them: `0-5460 5462`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut slot = 0;
        let mut separator = "";
        while slot < SLOTS {
            if !self.contains(slot) {
                slot += 1;
                continue;
            }
            let from = slot;
            while slot + 1 < SLOTS && self.contains(slot + 1) {
                slot += 1;
            }
            match from == slot {
                true => write!(f, "{separator}{from}")?,
                false => write!(f, "{separator}{from}-{slot}")?,
            }
            separator = " ";
            slot += 1;
        }
        Ok(())
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slots({self})")
    }
}

/// A node as a server knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub id: String,
    /// The server that wrote the table.
    pub is_myself: bool,
    pub slots: Slots,
    /// A slot of it is on its way to another node, or the other way round. Known of the writer itself only.
    pub is_moving_slots: bool,
}

/// Reads a node table.
pub fn parse(text: &str) -> Result<Vec<Node>> {
    text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with("vars ")).map(parse_line).collect()
}

fn parse_line(line: &str) -> Result<Node> {
    let damaged = || Error::new(Kind::Damaged, format!("'{}' is no line of a node table", line.escape_default()));
    let mut words = line.split_whitespace();
    let id = words.next().filter(|id| is_id(id)).ok_or_else(damaged)?;
    let flags = words.nth(1).ok_or_else(damaged)?;
    // Primary, ping, pong, epoch and link state.
    words.nth(4).ok_or_else(damaged)?;
    let mut node = Node {
        id: id.to_string(),
        is_myself: flags.split(',').any(|flag| flag == "myself"),
        slots: Slots::default(),
        is_moving_slots: false,
    };
    for word in words {
        match word.starts_with('[') {
            true => node.is_moving_slots = true,
            false => node.slots.insert_range(word).map_err(|_| damaged())?,
        }
    }
    Ok(node)
}

/// Whether this can be the id of a node.
pub fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A primary of a cluster that is about to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewNode {
    pub id: String,
    pub address: IpAddr,
    pub port: u16,
    pub slots: Slots,
}

/// The node table that one of these nodes, number `myself`, is started with: all know each other, and nobody else.
pub fn render(nodes: &[NewNode], myself: usize) -> String {
    let mut text = String::new();
    for (number, node) in nodes.iter().enumerate() {
        let NewNode { id, address, port, slots } = node;
        let flags = if number == myself { "myself,master" } else { "master" };
        let bus = u32::from(*port) + u32::from(BUS_PORT_OFFSET);
        // Each primary has an epoch of its own, as after an election of each.
        text += &format!("{id} {address}:{port}@{bus} {flags} - 0 0 {} connected {slots}\n", number + 1);
    }
    text + &format!("vars currentEpoch {} lastVoteEpoch 0\n", nodes.len())
}

/// The slot of a key: CRC16 (XMODEM) of what stands between the first `{` and the next `}` if that is not empty, else of
/// all of it (`src/cluster.c`, keyHashSlot; `src/crc16.c`).
pub fn slot_of_key(key: &[u8]) -> u16 {
    let tag = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = key.get(open + 1..)?;
        let close = rest.iter().position(|byte| *byte == b'}')?;
        rest.get(..close).filter(|tag| !tag.is_empty())
    });
    let crc = tag.unwrap_or(key).iter().fold(0u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| match crc & 0x8000 {
            0 => crc << 1,
            _ => (crc << 1) ^ 0x1021,
        })
    });
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As Redis 7.0.15 and Valkey 8.1 print it: with and without a host name and further values behind the address.
    const TABLE: &str = "\
07c37dfeb235213a872192d90877d0cd55635b91 127.0.0.1:30004@31004,hostname4 slave e7d1eecce10fd6bb5eb35b9f99a514335d9ba9ca 0 1426238317239 4 connected
67ed2db8d677e59ec4a4cefb06858cf2a1a89fa1 127.0.0.1:30002@31002,,shard-id=aa master - 0 1426238316232 2 connected 5461-10922
e7d1eecce10fd6bb5eb35b9f99a514335d9ba9ca 127.0.0.1:30001@31001 myself,master - 0 0 1 connected 0-5460 10923 [93-<-292f8b365bb7edb5e285caf0b7e6ddc7265d2f4f]
vars currentEpoch 6 lastVoteEpoch 0
";

    #[test]
    fn a_table_is_read_as_servers_print_it() {
        let nodes = parse(TABLE).unwrap();
        let shown: Vec<String> = nodes.iter().map(|node| node.slots.to_string()).collect();
        assert_eq!(shown, ["", "5461-10922", "0-5460 10923"]);
        assert_eq!(nodes.iter().map(|node| node.is_myself).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(nodes.iter().map(|node| node.is_moving_slots).collect::<Vec<_>>(), [false, false, true]);
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let good = TABLE.lines().nth(1).unwrap();
        for bad in [
            "x".to_string(),
            good.replace("67ed", "67ED"),
            good.replace("5461-10922", "5461-16384"),
            good.replace("5461-10922", "10922-5461"),
            good.replace("5461-10922", "-"),
            good.split(" connected").next().unwrap().to_string(),
        ] {
            assert_eq!(parse(&bad).unwrap_err().kind(), Kind::Damaged, "{bad}");
        }
    }

    #[test]
    fn a_table_that_was_made_names_the_new_nodes_and_nobody_else() {
        let node = |digit: &str, port, slots| NewNode {
            id: digit.repeat(ID_DIGITS),
            address: "127.0.0.1".parse().unwrap(),
            port,
            slots: Slots::parse(slots).unwrap(),
        };
        let nodes = [node("a", 5500, "0-100 200"), node("b", 5501, "101-199 201-16383")];
        let text = render(&nodes, 1);
        let (a, b) = ("a".repeat(40), "b".repeat(40));
        let wanted = format!(
            "{a} 127.0.0.1:5500@15500 master - 0 0 1 connected 0-100 200\n\
             {b} 127.0.0.1:5501@15501 myself,master - 0 0 2 connected 101-199 201-16383\n\
             vars currentEpoch 2 lastVoteEpoch 0\n"
        );
        assert_eq!(text, wanted);
        let read = parse(&text).unwrap();
        assert!(read.iter().zip(&nodes).all(|(read, node)| read.id == node.id && read.slots == node.slots));
    }

    #[test]
    fn keys_have_the_slots_that_servers_give_them() {
        // CLUSTER KEYSLOT of Redis 7.0.15.
        for (key, slot) in
            [("foo", 12182), ("bar", 5061), ("{user1000}.following", 3443), ("foo{}{bar}", 8363), ("", 0)]
        {
            assert_eq!(slot_of_key(key.as_bytes()), slot, "{key}");
        }
        assert_eq!(slot_of_key(b"foo{bar}{zap}"), slot_of_key(b"bar"));
        assert_eq!(slot_of_key(b"123456789"), 0x31C3);
    }

    proptest! {
        #[test]
        fn sets_of_slots_are_read_as_they_are_written(slots in proptest::collection::btree_set(0..SLOTS, 0..40)) {
            let mut set = Slots::default();
            slots.iter().for_each(|slot| set.insert(*slot));
            prop_assert_eq!(&Slots::parse(&set.to_string()).unwrap(), &set);
            prop_assert!((0..SLOTS).all(|slot| set.contains(slot) == slots.contains(&slot)));
            prop_assert_eq!(set.is_empty(), slots.is_empty());
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in ".{0,200}") {
            let _ = (parse(&text), Slots::parse(&text), slot_of_key(text.as_bytes()));
        }
    }
}
