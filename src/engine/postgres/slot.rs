//! The physical replication slot that holds the log of a server until the agent has shipped it.
//!
//! A slot needs no restart and no changed setting, but it holds log back for as long as nobody advances it. So it has
//! a limit: when it holds back more, it is dropped, because a hole in the archive is better than a database that
//! stops on a full disk. A slot that the server itself gave up (`wal_status` = lost) is dropped as well. Either way the
//! next look at the log makes a new one and says whether something is missing.
//!
//! Source: manual, chapters "Replication Slots" and "pg_replication_slots".

use crate::engine::postgres::session::{Session, column, lsn_column};
use crate::engine::postgres::source::SourceSession;
use crate::engine::postgres::{PostgresEngine, ShipMode};
use crate::error::{Context, Error, Kind, Result};
use crate::model::bytes_text::human_bytes;
use crate::model::position::{Lsn, Position};

/// What the server says about our slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    /// The server keeps all log from here on; `None` once it gave up keeping it.
    pub restart_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: String,
    /// How much log the server keeps because of this slot, at most.
    pub retained_bytes: u64,
    /// Somebody streams from the slot: it is not only ours.
    pub active: bool,
}

/// The name of an instance's slot. Slot names have lower-case letters, digits and `_` only, 63 at most
/// (`src/backend/replication/slot.c`, ReplicationSlotValidateName); the name of an instance may have more.
pub fn slot_name(instance: &str) -> String {
    let plain: String = instance
        .chars()
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' { c } else { '_' })
        .collect();
    let name = format!("keiki_{plain}");
    if plain == instance && name.len() <= 63 {
        return name;
    }
    // Two instances must not share a slot because their names look alike without capitals or hyphens.
    let digest = blake3::hash(instance.as_bytes()).to_hex();
    let room: String = name.chars().take(63 - 9).collect();
    format!("{room}_{}", &digest.as_str()[..8])
}

/// What the server says about the slot, or nothing if it has none of this name.
pub async fn look(session: &Session, name: &str) -> Result<Option<SlotState>> {
    let rows = session
        .rows(
            "SELECT restart_lsn::text, coalesce(wal_status, ''), active, slot_type, \
             coalesce(greatest(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0), 0)::int8 \
             FROM pg_replication_slots WHERE slot_name = $1",
            &[&name],
        )
        .await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let kind: String = column(row, 3)?;
    if kind != "physical" {
        return Err(Error::new(Kind::Conflict, format!("replication slot '{name}' is a {kind} slot and not ours"))
            .hint("drop it if nothing uses it, or give the instance another name"));
    }
    let restart: Option<String> = column(row, 0)?;
    Ok(Some(SlotState {
        restart_lsn: restart.map(|text| Lsn::parse(&text)).transpose()?,
        wal_status: column(row, 1)?,
        active: column(row, 2)?,
        retained_bytes: u64::try_from(column::<i64>(row, 4)?).unwrap_or(0),
    }))
}

/// Makes sure that the slot is there and within its limit, and returns the position from which on the server keeps
/// its log. A slot over the limit is dropped and that is an error, once; the next call makes a new one.
pub(super) async fn ensure(engine: &PostgresEngine, source: &SourceSession, limit_bytes: u64) -> Result<Lsn> {
    let name = slot_name(&engine.source.name);
    match look(&source.session, &name).await? {
        Some(slot) if slot.wal_status == "lost" || slot.restart_lsn.is_none() => {
            tracing::warn!(
                "replication slot '{name}' was given up by the server (wal_status '{}'): making a new one",
                slot.wal_status
            );
            drop_slot(&source.session, &name).await?;
            create(&source.session, &name).await
        }
        Some(slot) => {
            keep_within(&source.session, &name, &slot, limit_bytes).await?;
            slot.restart_lsn.ok_or_else(|| Error::new(Kind::Internal, "a slot without a position was not replaced"))
        }
        None => create(&source.session, &name).await,
    }
}

/// Keeps the slot within its limit, if there is one: for a time in which nothing is shipped.
pub(super) async fn guard(engine: &PostgresEngine, limit_bytes: u64) -> Result<()> {
    let name = slot_name(&engine.source.name);
    let source = engine.session().await?;
    match look(&source.session, &name).await? {
        Some(slot) => keep_within(&source.session, &name, &slot, limit_bytes).await,
        None => Ok(()),
    }
}

/// Drops a slot that holds back more than its limit, which is an error; warns from half of it on.
async fn keep_within(session: &Session, name: &str, slot: &SlotState, limit_bytes: u64) -> Result<()> {
    let (held, limit) = (human_bytes(slot.retained_bytes), human_bytes(limit_bytes));
    if slot.retained_bytes > limit_bytes {
        drop_slot(session, name).await?;
        let reason = format!(
            "replication slot '{name}' held back {held} of log, more than its limit of {limit}, and was dropped so that \
             the disk of the server does not fill"
        );
        return Err(Error::new(Kind::Full, reason)
            .hint("can the agent reach the repository? if log is missing afterwards, a new backup closes the hole"));
    }
    if slot.retained_bytes > limit_bytes / 2 {
        tracing::warn!("replication slot '{name}' holds back {held} of log; at {limit} it will be dropped");
    }
    Ok(())
}

async fn create(session: &Session, name: &str) -> Result<Lsn> {
    let what = || format!("cannot create replication slot '{name}'");
    // `true`: the log is kept from this moment on and not only from the first reader on.
    session
        .rows("SELECT 1 FROM pg_create_physical_replication_slot($1, true)", &[&name])
        .await
        .map_err(|error| match error.kind() {
            Kind::Forbidden => error.hint("as a superuser: ALTER ROLE <role of the agent> REPLICATION"),
            Kind::Server => {
                error.hint("is wal_level 'minimal', or are all of max_replication_slots taken? 'keiki doctor' says")
            }
            _ => error,
        })
        .context(what)?;
    let row = session.row("SELECT restart_lsn::text FROM pg_replication_slots WHERE slot_name = $1", &[&name]).await;
    lsn_column(&row.context(what)?, 0).context(what)
}

async fn drop_slot(session: &Session, name: &str) -> Result<()> {
    session
        .rows("SELECT 1 FROM pg_drop_replication_slot($1)", &[&name])
        .await
        .map(|_| ())
        .context(|| format!("cannot drop replication slot '{name}'"))
}

/// Lets the server forget the log before `position`. Positions at or before the slot's own change nothing.
pub(super) async fn advance(engine: &PostgresEngine, position: Position) -> Result<()> {
    let (_, lsn) = position.wal()?;
    let name = slot_name(&engine.source.name);
    let source = engine.session().await?;
    let what = || format!("cannot advance replication slot '{name}' to {lsn}");
    // Asked and done in one statement. A lost or missing slot is the business of the next look at the log.
    source
        .session
        .rows(
            "SELECT pg_replication_slot_advance(slot_name, least($2::text::pg_lsn, pg_current_wal_flush_lsn())) \
             FROM pg_replication_slots WHERE slot_name = $1 AND NOT active AND wal_status IS DISTINCT FROM 'lost' \
             AND restart_lsn < least($2::text::pg_lsn, pg_current_wal_flush_lsn())",
            &[&name, &lsn.to_string()],
        )
        .await
        .map(|_| ())
        .context(what)
}

/// Drops the slot of this instance if the server has it. Without a slot there is nothing to do in any ship mode: it
/// may be left over from a time when the instance was configured otherwise.
pub(super) async fn drop_if_there(engine: &PostgresEngine) -> Result<()> {
    let name = slot_name(&engine.source.name);
    let source = engine.session().await?;
    match look(&source.session, &name).await? {
        Some(_) => drop_slot(&source.session, &name).await,
        None => Ok(()),
    }
}

impl PostgresEngine {
    /// What the server says about the slot of this instance; nothing if it has none.
    pub async fn slot_state(&self) -> Result<Option<SlotState>> {
        let source = self.session().await?;
        look(&source.session, &slot_name(&self.source.name)).await
    }

    /// What the slot may hold back, if there is to be one.
    pub fn slot_limit_bytes(&self) -> Option<u64> {
        match self.source.ship {
            ShipMode::ArchiveCommand => None,
            ShipMode::Slot { limit_bytes } => Some(limit_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instance_has_a_slot_name_of_its_own_that_the_server_takes() {
        assert_eq!(slot_name("orders"), "keiki_orders");
        let names = ["orders-1", "orders_1", "Orders_1", &"x".repeat(63), &format!("{}y", "x".repeat(62))];
        let slots: std::collections::BTreeSet<String> = names.iter().map(|name| slot_name(name)).collect();
        assert_eq!(slots.len(), names.len());
        for slot in slots {
            assert!(slot.len() <= 63, "{slot}");
            assert!(slot.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'), "{slot}");
        }
    }
}
