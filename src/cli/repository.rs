//! `keiki repository`: prepare the place where everything is kept, show what is in it, and what it costs.

use jiff::Timestamp;

use crate::cli::Outcome;
use crate::cli::arguments::RepositoryAction;
use crate::cli::connection::{Connection, expect_response};
use crate::cli::output::duration::human_seconds;
use crate::cli::output::{json, table};
use crate::error::Result;
use crate::model::bytes_text::human_bytes;
use crate::model::cost::{CostLine, Prices, RequestKind, monthly};
use crate::model::inventory::Total;
use crate::model::target::utc_text;
use crate::peer::api::{RepositoryCost, RepositoryFacts, Request, Response};

pub async fn run(agent: &Connection, action: RepositoryAction, as_json: bool) -> Result<Outcome> {
    match action {
        RepositoryAction::Init => {
            expect_response!(agent.ask(Request::InitRepository).await?, "init", Response::Done => ());
            if as_json {
                println!("{}", serde_json::json!({ "initialised": true }));
            } else {
                println!("the repository is ready");
            }
        }
        RepositoryAction::Show => {
            let answer = agent.ask(Request::ShowRepository).await?;
            let facts = expect_response!(answer, "repository show", Response::Repository(facts) => facts);
            println!("{}", if as_json { json::repository(&facts).to_string() } else { facts_text(&facts) });
        }
        RepositoryAction::Cost => {
            let answer = agent.ask(Request::ShowCost).await?;
            let cost = expect_response!(answer, "repository cost", Response::RepositoryCost(cost) => cost);
            println!("{}", if as_json { json::repository_cost(&cost).to_string() } else { cost_text(&cost) });
        }
    }
    Ok(Outcome::Good)
}

/// What an agent asks when it starts says nothing about a month.
const SECONDS_THAT_SAY_SOMETHING: u64 = 1800;

fn facts_text(facts: &RepositoryFacts) -> String {
    let mut lines = vec![
        format!("repository  {}", facts.url),
        format!("id          {}", facts.id),
        format!("format      {}", facts.format_version),
        format!("created     {}", second_text(facts.created_at)),
    ];
    lines.extend(facts.capabilities.iter().map(|(name, value)| format!("{name:<11} {value}")));
    let mut all = facts.inventory.rest;
    let mut rows = Vec::new();
    for (incarnation, holdings) in &facts.inventory.incarnations {
        all.join(holdings.all());
        rows.push(vec![
            format!("{}/{}", incarnation.host, incarnation.instance),
            incarnation.id.to_string(),
            second_text(incarnation.began_at),
            holdings.manifests.objects.to_string(),
            total_text(holdings.log),
            total_text(holdings.packs),
            total_text(holdings.all()),
        ]);
    }
    if !rows.is_empty() {
        let headings = ["INSTANCE", "INCARNATION", "BEGAN", "BACKUPS", "LOG", "PACKS", "ALL"];
        lines.push(format!("\n{}", table::render(&headings, rows)));
    }
    lines.push(format!("\nbeside      {}", total_text(facts.inventory.rest)));
    lines.push(format!("all         {}", total_text(all)));
    lines.join("\n")
}

/// An instant to the second: nobody clones to these.
fn second_text(instant: Timestamp) -> String {
    utc_text(Timestamp::from_second(instant.as_second()).unwrap_or(instant))
}

fn total_text(total: Total) -> String {
    format!("{} in {}", human_bytes(total.bytes), total.objects)
}

fn cost_text(cost: &RepositoryCost) -> String {
    let reading = &cost.reading;
    let no_prices = Prices::default();
    let lines = monthly(reading, cost.stored_bytes, cost.prices.as_ref().unwrap_or(&no_prices));
    let last = match reading.last_hour_seconds {
        3600 => String::from("LAST HOUR"),
        seconds => format!("LAST {}", human_seconds(seconds).to_uppercase()),
    };
    let mut headings = vec!["", last.as_str(), "SINCE START", "A MONTH LIKE THIS"];
    if cost.prices.is_some() {
        headings.push("COST");
    }
    let mut rows = Vec::new();
    for line in &lines {
        let kind = RequestKind::ALL.into_iter().find(|kind| kind.name() == line.what);
        let (last_hour, total, month) = match (kind, line.what) {
            (Some(kind), _) => (
                reading.last_hour.requests(kind).to_string(),
                reading.total.requests(kind).to_string(),
                line.monthly.to_string(),
            ),
            (None, "received") => bytes_of(reading.last_hour.received_bytes, reading.total.received_bytes, line),
            (None, "sent") => bytes_of(reading.last_hour.sent_bytes, reading.total.sent_bytes, line),
            (None, _) => (String::from("-"), String::from("-"), human_bytes(line.monthly)),
        };
        let mut row = vec![line.what.to_string(), last_hour, total, month];
        if cost.prices.is_some() {
            row.push(line.amount.map_or(String::from("-"), amount_text));
        }
        rows.push(row);
    }
    let mut parts = vec![
        format!("repository  {}\ncounted     by this agent since {}", cost.repository, second_text(reading.since)),
        table::render(&headings, rows),
    ];
    if reading.last_hour_seconds < SECONDS_THAT_SAY_SOMETHING {
        let counted = human_seconds(reading.last_hour_seconds);
        parts.push(format!(
            "this agent has counted for {counted} only, and what begins asks for more than what goes on: look again later"
        ));
    }
    parts.push(match &cost.prices {
        Some(prices) => {
            let sum = lines.iter().filter_map(|line| line.amount).fold(0u64, u64::saturating_add);
            format!("a month like this costs {} {}", amount_text(sum), prices.currency)
        }
        None => String::from(
            "no prices are known: add [repository.prices] to the configuration of this agent to see what a month costs",
        ),
    });
    parts.join("\n\n")
}

fn bytes_of(last_hour: u64, total: u64, line: &CostLine) -> (String, String, String) {
    (human_bytes(last_hour), human_bytes(total), human_bytes(line.monthly))
}

/// Billionths as an amount: two digits behind the point, four for what would be nothing with two.
fn amount_text(billionths: u64) -> String {
    let amount = billionths as f64 / 1e9;
    if billionths > 0 && amount < 0.1 { format!("{amount:.4}") } else { format!("{amount:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::cost::{Price, Reading, Usage};
    use crate::model::engine_kind::EngineKind;
    use crate::model::id::{IncarnationId, RepositoryId};
    use crate::model::incarnation::Incarnation;
    use crate::model::inventory::{Holdings, Inventory};

    fn cost(last_hour_seconds: u64, prices: Option<Prices>) -> RepositoryCost {
        let last_hour = Usage { requests: [4, 1, 2, 60, 0, 0], received_bytes: 5000, sent_bytes: 30 << 20 };
        let mut total = last_hour;
        total.add(&last_hour);
        let since = "2026-11-21T09:00:00Z".parse().unwrap();
        let reading = Reading { since, total, last_hour, last_hour_seconds };
        RepositoryCost { repository: "s3://backups/keiki".into(), reading, stored_bytes: 100 << 30, prices }
    }

    #[test]
    fn with_prices_the_cost_of_a_month_is_shown_and_without_them_how_to_get_it() {
        let prices = Prices {
            currency: "USD".into(),
            put_per_1000: Some(Price(5_000_000)),
            get_per_1000: Some(Price(400_000)),
            stored_per_gib_month: Some(Price(23_000_000)),
            ..Prices::default()
        };
        insta::assert_snapshot!(cost_text(&cost(3600, Some(prices))), @r"
        repository  s3://backups/keiki
        counted     by this agent since 2026-11-21 09:00:00Z

                  LAST HOUR  SINCE START  A MONTH LIKE THIS  COST
        get       4          8            2922               0.0012
        head      1          2            730                0.0003
        list      2          4            1461               -
        put       60         120          43830              0.22
        part      0          0            0                  0.00
        delete    0          0            0                  -
        received  4.9 KiB    9.8 KiB      3.5 MiB            -
        sent      30.0 MiB   60.0 MiB     21.4 GiB           -
        stored    -          -            100.0 GiB          2.30

        a month like this costs 2.52 USD
        ");
        let text = cost_text(&cost(90, None));
        assert!(text.contains("LAST 1M 30S") && !text.contains("COST"), "{text}");
        assert!(text.contains("has counted for 1m 30s only"), "{text}");
        assert!(text.ends_with("add [repository.prices] to the configuration of this agent to see what a month costs"));
    }

    #[test]
    fn what_a_repository_holds_is_shown_by_instance() {
        let id = "01938c5e-0000-7000-8000-000000000001";
        let incarnation = Incarnation {
            id: IncarnationId::parse(id).unwrap(),
            engine: EngineKind::Postgres,
            engine_version: "15.8".into(),
            instance: "orders".into(),
            host: "db1".into(),
            system_id: "7".into(),
            began_at: "2026-11-21T09:00:00Z".parse().unwrap(),
            parent: None,
        };
        let total = |objects, bytes| Total { objects, bytes };
        let holdings = Holdings {
            log: total(10, 5 << 20),
            packs: total(3, 64 << 20),
            manifests: total(2, 9000),
            rest: total(2, 700),
        };
        let facts = RepositoryFacts {
            url: "file:///srv/keiki".into(),
            id: RepositoryId::parse(id).unwrap(),
            format_version: 1,
            created_at: "2026-11-21T08:00:00.628026506Z".parse().unwrap(),
            capabilities: vec![("listing".into(), "in order".into())],
            inventory: Inventory { incarnations: vec![(incarnation, holdings)], rest: total(1, 200) },
        };
        insta::assert_snapshot!(facts_text(&facts), @r"
        repository  file:///srv/keiki
        id          01938c5e-0000-7000-8000-000000000001
        format      1
        created     2026-11-21 08:00:00Z
        listing     in order

        INSTANCE    INCARNATION                           BEGAN                 BACKUPS  LOG            PACKS          ALL
        db1/orders  01938c5e-0000-7000-8000-000000000001  2026-11-21 09:00:00Z  2        5.0 MiB in 10  64.0 MiB in 3  69.0 MiB in 17

        beside      200 B in 1
        all         69.0 MiB in 18
        ");
    }
}
