//! Twins of what is said about a repository.

use serde::{Deserialize, Serialize};

use super::Twin;
use super::noun::{WireInstant, WirePosition};
use crate::error::{Error, Kind, Result};
use crate::model::cost::{Price, Prices, Reading, Usage};
use crate::model::engine_kind::EngineKind;
use crate::model::id::{IncarnationId, RepositoryId};
use crate::model::incarnation::Incarnation;
use crate::model::inventory::{Holdings, Inventory, Total};
use crate::peer::api::{RepositoryCost, RepositoryFacts};

/// Requests by kind, bytes received, bytes sent.
#[derive(Serialize, Deserialize)]
pub struct WireUsage([u64; 6], u64, u64);

impl Twin for Usage {
    type Wire = WireUsage;

    fn to_wire(&self) -> WireUsage {
        WireUsage(self.requests, self.received_bytes, self.sent_bytes)
    }

    fn from_wire(wire: WireUsage) -> Result<Usage> {
        Ok(Usage { requests: wire.0, received_bytes: wire.1, sent_bytes: wire.2 })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireReading {
    since: WireInstant,
    total: WireUsage,
    last_hour: WireUsage,
    last_hour_seconds: u64,
}

impl Twin for Reading {
    type Wire = WireReading;

    fn to_wire(&self) -> WireReading {
        WireReading {
            since: self.since.to_wire(),
            total: self.total.to_wire(),
            last_hour: self.last_hour.to_wire(),
            last_hour_seconds: self.last_hour_seconds,
        }
    }

    fn from_wire(wire: WireReading) -> Result<Reading> {
        Ok(Reading {
            since: Twin::from_wire(wire.since)?,
            total: Twin::from_wire(wire.total)?,
            last_hour: Twin::from_wire(wire.last_hour)?,
            last_hour_seconds: wire.last_hour_seconds,
        })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WirePrices {
    currency: String,
    put_per_1000: Option<u64>,
    list_per_1000: Option<u64>,
    get_per_1000: Option<u64>,
    delete_per_1000: Option<u64>,
    stored_per_gib_month: Option<u64>,
    received_per_gib: Option<u64>,
    sent_per_gib: Option<u64>,
}

impl Twin for Prices {
    type Wire = WirePrices;

    fn to_wire(&self) -> WirePrices {
        let number = |price: Option<Price>| price.map(|price| price.0);
        WirePrices {
            currency: self.currency.clone(),
            put_per_1000: number(self.put_per_1000),
            list_per_1000: number(self.list_per_1000),
            get_per_1000: number(self.get_per_1000),
            delete_per_1000: number(self.delete_per_1000),
            stored_per_gib_month: number(self.stored_per_gib_month),
            received_per_gib: number(self.received_per_gib),
            sent_per_gib: number(self.sent_per_gib),
        }
    }

    fn from_wire(wire: WirePrices) -> Result<Prices> {
        let price = |number: Option<u64>| number.map(Price);
        Ok(Prices {
            currency: wire.currency,
            put_per_1000: price(wire.put_per_1000),
            list_per_1000: price(wire.list_per_1000),
            get_per_1000: price(wire.get_per_1000),
            delete_per_1000: price(wire.delete_per_1000),
            stored_per_gib_month: price(wire.stored_per_gib_month),
            received_per_gib: price(wire.received_per_gib),
            sent_per_gib: price(wire.sent_per_gib),
        })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireRepositoryCost {
    repository: String,
    reading: WireReading,
    stored_bytes: u64,
    prices: Option<WirePrices>,
}

impl Twin for RepositoryCost {
    type Wire = WireRepositoryCost;

    fn to_wire(&self) -> WireRepositoryCost {
        WireRepositoryCost {
            repository: self.repository.clone(),
            reading: self.reading.to_wire(),
            stored_bytes: self.stored_bytes,
            prices: self.prices.to_wire(),
        }
    }

    fn from_wire(wire: WireRepositoryCost) -> Result<RepositoryCost> {
        Ok(RepositoryCost {
            repository: wire.repository,
            reading: Twin::from_wire(wire.reading)?,
            stored_bytes: wire.stored_bytes,
            prices: Twin::from_wire(wire.prices)?,
        })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireIncarnation {
    id: String,
    engine: String,
    engine_version: String,
    instance: String,
    host: String,
    system_id: String,
    began_at: WireInstant,
    parent: Option<(String, WirePosition)>,
}

impl Twin for Incarnation {
    type Wire = WireIncarnation;

    fn to_wire(&self) -> WireIncarnation {
        WireIncarnation {
            id: self.id.to_wire(),
            engine: self.engine.name().to_string(),
            engine_version: self.engine_version.clone(),
            instance: self.instance.clone(),
            host: self.host.clone(),
            system_id: self.system_id.clone(),
            began_at: self.began_at.to_wire(),
            parent: self.parent.as_ref().map(|(id, position)| (id.to_wire(), position.to_wire())),
        }
    }

    fn from_wire(wire: WireIncarnation) -> Result<Incarnation> {
        let parent = match wire.parent {
            Some((id, position)) => Some((IncarnationId::from_wire(id)?, Twin::from_wire(position)?)),
            None => None,
        };
        Ok(Incarnation {
            id: Twin::from_wire(wire.id)?,
            engine: EngineKind::parse(&wire.engine)?,
            engine_version: wire.engine_version,
            instance: wire.instance,
            host: wire.host,
            system_id: wire.system_id,
            began_at: Twin::from_wire(wire.began_at)?,
            parent,
        })
    }
}

/// Objects and bytes of log, packs, manifests and the rest.
#[derive(Serialize, Deserialize)]
pub struct WireHoldings([(u64, u64); 4]);

fn pair(total: Total) -> (u64, u64) {
    (total.objects, total.bytes)
}

fn total((objects, bytes): (u64, u64)) -> Total {
    Total { objects, bytes }
}

impl Twin for Holdings {
    type Wire = WireHoldings;

    fn to_wire(&self) -> WireHoldings {
        WireHoldings([self.log, self.packs, self.manifests, self.rest].map(pair))
    }

    fn from_wire(wire: WireHoldings) -> Result<Holdings> {
        let [log, packs, manifests, rest] = wire.0.map(total);
        Ok(Holdings { log, packs, manifests, rest })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireRepositoryFacts {
    url: String,
    id: String,
    format_version: u16,
    created_at: WireInstant,
    capabilities: Vec<(String, String)>,
    incarnations: Vec<(WireIncarnation, WireHoldings)>,
    rest: (u64, u64),
}

impl Twin for RepositoryFacts {
    type Wire = WireRepositoryFacts;

    fn to_wire(&self) -> WireRepositoryFacts {
        let incarnations = self.inventory.incarnations.iter();
        WireRepositoryFacts {
            url: self.url.clone(),
            id: self.id.to_string(),
            format_version: self.format_version,
            created_at: self.created_at.to_wire(),
            capabilities: self.capabilities.clone(),
            incarnations: incarnations.map(|(one, holdings)| (one.to_wire(), holdings.to_wire())).collect(),
            rest: pair(self.inventory.rest),
        }
    }

    fn from_wire(wire: WireRepositoryFacts) -> Result<RepositoryFacts> {
        let incarnations = wire.incarnations.into_iter();
        let incarnations = incarnations.map(|(one, holdings)| Ok((Twin::from_wire(one)?, Twin::from_wire(holdings)?)));
        Ok(RepositoryFacts {
            url: wire.url,
            id: RepositoryId::parse(&wire.id).map_err(|error| Error::new(Kind::Damaged, error.message()))?,
            format_version: wire.format_version,
            created_at: Twin::from_wire(wire.created_at)?,
            capabilities: wire.capabilities,
            inventory: Inventory { incarnations: incarnations.collect::<Result<_>>()?, rest: total(wire.rest) },
        })
    }
}
