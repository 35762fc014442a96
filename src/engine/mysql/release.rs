//! Lets the server forget log that is shipped, where the configuration asks for that (`purge_shipped`).
//!
//! Invariants: only files of which every byte is durable in the repository are purged, and never the open one; a
//! statement purges a few files only, because the server holds the lock of its index meanwhile and writers that switch
//! files wait; the server itself keeps what a connected replica still reads (`sql/log.cc`, purge_logs).

use std::time::Duration;

use crate::base::bulk::run_blocking;
use crate::engine::mysql::MySqlEngine;
use crate::engine::mysql::log_files::LogPlace;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::session::{Session, quoted};
use crate::error::{Context, Error, Kind, Result};
use crate::model::position::Position;

/// Files that one statement purges.
const FILES_PER_STATEMENT: usize = 4;
/// A server says nothing when it purges less than it was told to. MariaDB does so while a file that was just ended may be
/// needed after a crash (`sql/log.cc`, can_purge_log), which is over soon; a replica may read for long. What is left then
/// goes when the next file has been shipped.
const ATTEMPTS: u32 = 5;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(100);
/// Of a long backlog the rest is purged when the next file has been shipped.
const STATEMENTS_MAX: usize = 64;

/// Purges what lies before the file of `position`: see [`crate::engine::Engine::release_log`].
pub(super) async fn release(engine: &MySqlEngine, position: Position) -> Result<()> {
    if !engine.source.purge_shipped {
        return Ok(());
    }
    let what = || format!("cannot purge what is shipped of the log of instance '{}'", engine.source.name);
    purge(engine, position).await.context(what)
}

async fn purge(engine: &MySqlEngine, position: Position) -> Result<()> {
    let (number, _) = position.file()?;
    let source = engine.session().await?;
    let place = LogPlace::ask(&source.session).await?;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            tokio::time::sleep(BETWEEN_ATTEMPTS).await;
        }
        let index = place.clone();
        let numbers = run_blocking("list binary logs", move || index.numbers(u64::MAX)).await?;
        let steps = ends_of_steps(&numbers, number);
        if steps.is_empty() {
            break;
        }
        purge_steps(engine, &source.session, &place, &steps).await?;
    }
    Ok(())
}

async fn purge_steps(engine: &MySqlEngine, session: &Session, place: &LogPlace, steps: &[u64]) -> Result<()> {
    for kept in steps {
        let sql = format!("PURGE BINARY LOGS TO {}", quoted(&format!("{}.{kept:06}", place.base_name())));
        session.execute(&sql).await.map_err(|error| refused(error, engine.source.product))?;
    }
    Ok(())
}

fn refused(error: Error, product: Product) -> Error {
    let right = match product {
        Product::MariaDb => "BINLOG ADMIN",
        Product::MySql => "BINLOG_ADMIN",
    };
    match error.kind() {
        Kind::Forbidden => {
            error.hint(format!("GRANT {right} ON *.* TO the account in 'user', or leave out 'purge_shipped'"))
        }
        _ => error,
    }
}

/// The first file that each statement keeps, the oldest statement first. Nothing from `number` on is purged, nor is the
/// last file of the index. Pure.
fn ends_of_steps(numbers: &[u64], number: u64) -> Vec<u64> {
    let last_purged = numbers.len().saturating_sub(1);
    let shipped = numbers.iter().take(last_purged).take_while(|found| **found < number).count();
    let ends = (0..shipped).step_by(FILES_PER_STATEMENT).map(|start| (start + FILES_PER_STATEMENT).min(shipped));
    ends.take(STATEMENTS_MAX).map(|end| numbers[end]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_files_go_at_a_time_and_neither_the_open_one_nor_one_that_is_not_shipped() {
        let numbers: Vec<u64> = (11..=22).collect();
        assert_eq!(ends_of_steps(&numbers, 20), [15, 19, 20]);
        assert_eq!(ends_of_steps(&numbers, 12), [12]);
        assert_eq!(ends_of_steps(&numbers, 11), [0u64; 0]);
        assert_eq!(ends_of_steps(&numbers, 3), [0u64; 0]);
        assert_eq!(ends_of_steps(&numbers, 99), [15, 19, 22]);
        assert_eq!(ends_of_steps(&[7], 99), [0u64; 0]);
        assert_eq!(ends_of_steps(&[], 99), [0u64; 0]);
        // Names that are not there are not asked for.
        assert_eq!(ends_of_steps(&[3, 9, 12], 10), [12]);
        let many: Vec<u64> = (1..=1000).collect();
        assert_eq!(ends_of_steps(&many, 1000).last(), Some(&(STATEMENTS_MAX as u64 * 4 + 1)));
    }
}
