//! What the use of a store costs: requests by kind, bytes, prices, and what follows from them for a month.

use jiff::Timestamp;

/// The kinds of requests that object storage tells apart, in its prices or in its limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RequestKind {
    Get,
    Head,
    List,
    Put,
    /// One of the requests of a put in parts: its beginning, a part, its end.
    Part,
    Delete,
}

impl RequestKind {
    /// All kinds, in the order in which they are shown.
    pub const ALL: [RequestKind; 6] = [
        RequestKind::Get,
        RequestKind::Head,
        RequestKind::List,
        RequestKind::Put,
        RequestKind::Part,
        RequestKind::Delete,
    ];

    /// `get`, `head`, ..., for tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            RequestKind::Get => "get",
            RequestKind::Head => "head",
            RequestKind::List => "list",
            RequestKind::Put => "put",
            RequestKind::Part => "part",
            RequestKind::Delete => "delete",
        }
    }
}

/// How much was asked of a store in some time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// In the order of [`RequestKind::ALL`].
    pub requests: [u64; RequestKind::ALL.len()],
    /// Bytes of bodies that came from the store.
    pub received_bytes: u64,
    /// Bytes of bodies that went to the store.
    pub sent_bytes: u64,
}

impl Usage {
    /// Requests of one kind.
    pub fn requests(&self, kind: RequestKind) -> u64 {
        self.requests[kind as usize]
    }

    /// Requests of all kinds.
    pub fn all_requests(&self) -> u64 {
        self.requests.iter().fold(0, |sum, more| sum.saturating_add(*more))
    }

    /// Adds what was asked in some other time.
    pub fn add(&mut self, other: &Usage) {
        for (sum, more) in self.requests.iter_mut().zip(other.requests) {
            *sum = sum.saturating_add(more);
        }
        self.received_bytes = self.received_bytes.saturating_add(other.received_bytes);
        self.sent_bytes = self.sent_bytes.saturating_add(other.sent_bytes);
    }
}

/// What a meter shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Since when it counts: the agent's start.
    pub since: Timestamp,
    pub total: Usage,
    /// The last sixty minutes, or less if it has not counted for so long.
    pub last_hour: Usage,
    /// How many seconds `last_hour` is about: 3600 unless it has not counted for so long. At least 1.
    pub last_hour_seconds: u64,
}

/// A price in billionths of the currency's unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price(pub u64);

/// What the operator of the store asks for, as the configuration says. What has no price there is not counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prices {
    /// As it is shown after an amount: `USD`.
    pub currency: String,
    /// For a thousand requests: puts and parts, lists, gets and heads, deletes.
    pub put_per_1000: Option<Price>,
    pub list_per_1000: Option<Price>,
    pub get_per_1000: Option<Price>,
    pub delete_per_1000: Option<Price>,
    /// For 2^30 bytes, kept for a month.
    pub stored_per_gib_month: Option<Price>,
    /// For 2^30 bytes that leave the store, and that come to it.
    pub received_per_gib: Option<Price>,
    pub sent_per_gib: Option<Price>,
}

impl Prices {
    /// The price of a thousand requests of a kind.
    pub fn per_1000(&self, kind: RequestKind) -> Option<Price> {
        match kind {
            RequestKind::Put | RequestKind::Part => self.put_per_1000,
            RequestKind::List => self.list_per_1000,
            RequestKind::Get | RequestKind::Head => self.get_per_1000,
            RequestKind::Delete => self.delete_per_1000,
        }
    }
}

/// Hours of an average month: 365.25 days a year.
const MONTH_SECONDS: u128 = 2_629_800;
const GIB: u128 = 1 << 30;

/// One line of a month's bill.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CostLine {
    /// `get`, ..., `received`, `sent`, `stored`.
    pub what: &'static str,
    /// Requests, or bytes, in a month in which every hour is like the one that was read; for `stored` the bytes that are
    /// there now.
    pub monthly: u64,
    /// In billionths of the currency's unit; nothing if there is no price for it.
    pub amount: Option<u64>,
}

/// A month in which every hour is like the last one, and nothing more is stored than now.
pub fn monthly(reading: &Reading, stored_bytes: u64, prices: &Prices) -> Vec<CostLine> {
    let seconds = u128::from(reading.last_hour_seconds.max(1));
    let a_month = |count: u64| u128::from(count) * MONTH_SECONDS / seconds;
    let line = |what, monthly: u128, price: Option<Price>, unit: u128| CostLine {
        what,
        monthly: u64::try_from(monthly).unwrap_or(u64::MAX),
        amount: price
            .map(|price| u64::try_from(monthly.saturating_mul(u128::from(price.0)) / unit).unwrap_or(u64::MAX)),
    };
    let usage = &reading.last_hour;
    let mut lines: Vec<CostLine> = RequestKind::ALL
        .iter()
        .map(|kind| line(kind.name(), a_month(usage.requests(*kind)), prices.per_1000(*kind), 1000))
        .collect();
    lines.push(line("received", a_month(usage.received_bytes), prices.received_per_gib, GIB));
    lines.push(line("sent", a_month(usage.sent_bytes), prices.sent_per_gib, GIB));
    lines.push(line("stored", u128::from(stored_bytes), prices.stored_per_gib_month, GIB));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_month_is_the_last_hour_seven_hundred_and_thirty_times_and_what_has_no_price_is_not_counted() {
        let mut last_hour = Usage { received_bytes: 0, sent_bytes: 1 << 30, ..Usage::default() };
        last_hour.requests[RequestKind::Put as usize] = 1000;
        last_hour.requests[RequestKind::Head as usize] = 2000;
        let reading =
            |seconds| Reading { since: Timestamp::UNIX_EPOCH, total: last_hour, last_hour, last_hour_seconds: seconds };
        let prices = Prices {
            currency: String::from("USD"),
            put_per_1000: Some(Price(5_000_000)),
            stored_per_gib_month: Some(Price(23_000_000)),
            sent_per_gib: Some(Price(0)),
            ..Prices::default()
        };
        let find = |lines: &[CostLine], what: &str| lines.iter().find(|line| line.what == what).unwrap().clone();
        let lines = monthly(&reading(3600), 100 << 30, &prices);
        assert_eq!(find(&lines, "put"), CostLine { what: "put", monthly: 730_500, amount: Some(3_652_500_000) });
        assert_eq!(find(&lines, "head"), CostLine { what: "head", monthly: 1_461_000, amount: None });
        assert_eq!(find(&lines, "sent").amount, Some(0));
        assert_eq!(find(&lines, "stored").amount, Some(2_300_000_000));
        // Half an hour with the same requests is twice as much a month.
        assert_eq!(find(&monthly(&reading(1800), 0, &prices), "put").monthly, 1_461_000);
        // Nothing overflows.
        let endless = Usage { requests: [u64::MAX; 6], received_bytes: u64::MAX, sent_bytes: u64::MAX };
        let dear = Prices { put_per_1000: Some(Price(u64::MAX)), ..prices };
        let reading = Reading { last_hour: endless, ..reading(1) };
        assert_eq!(find(&monthly(&reading, u64::MAX, &dear), "put").amount, Some(u64::MAX));
    }
}
