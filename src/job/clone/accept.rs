//! The last step: the copy stops being a stranger. It is handed over, gets an incarnation of its own in the repository,
//! and becomes an instance of this host.

use std::sync::Arc;

use crate::engine::CloneSite;
use crate::error::{Error, Kind, Result};
use crate::job::StepContext;
use crate::job::archive::{Binding, write_binding};
use crate::job::clone::{CloneHost, facts};
use crate::job::ports::NewInstance;
use crate::model::id::IncarnationId;
use crate::model::incarnation::Incarnation;
use crate::model::position::Position;
use crate::repo::incarnations::Incarnations;
use crate::repo::repository::Repository;

/// Hands the clone over and registers it. May be repeated after a crash anywhere in it: the id of the new incarnation is
/// recorded before anything uses it.
pub async fn accept(
    host: &CloneHost,
    repository: &Arc<Repository>,
    source: &Incarnation,
    site: &CloneSite,
    context: &StepContext,
) -> Result<()> {
    let id = match context.fact(facts::INCARNATION) {
        Some(text) => IncarnationId::parse(&text)?,
        None => {
            let fresh = IncarnationId::fresh();
            context.record(facts::INCARNATION, fresh.to_string()).await?;
            fresh
        }
    };
    let departed_at = Position::parse(&context.need_fact(facts::DEPARTED_AT)?)?;
    let began_at = context.need_fact(facts::BEGAN_AT)?;
    let began_at =
        began_at.parse().map_err(|_| Error::new(Kind::Damaged, format!("the journal says time '{began_at}'")))?;
    let identity = host.grower(source.engine)?.engine.hand_over(site, true).await?;
    let incarnation = Incarnation {
        id,
        engine: source.engine,
        engine_version: identity.version.clone(),
        instance: site.clone_name.clone(),
        host: host.host_name.clone(),
        system_id: identity.system_id.clone(),
        // The same at each repetition, so that the document is the same.
        began_at,
        parent: Some((source.id, departed_at)),
    };
    Incarnations::new(repository.clone()).create(&incarnation).await?;
    // Before the archiver looks: a directory without a binding would begin a life without a parent.
    let binding = Binding { incarnation, data_dir: identity.data_dir.clone(), data_dir_inode: identity.data_dir_inode };
    write_binding(&host.state_dir, &site.clone_name, &binding)?;
    host.registry
        .register(NewInstance {
            name: site.clone_name.clone(),
            engine: source.engine,
            incarnation: id,
            parent: (source.id, departed_at),
            data_dir: site.data_dir.clone(),
            run_dir: site.run_dir.clone(),
            bin_dir: site.bin_dir.clone(),
            port: site.port,
            listen_addresses: site.listen_addresses.clone(),
            run_as: site.run_as.clone(),
        })
        .await?;
    host.registry.order_first_backup(&site.clone_name).await?;
    context.result("incarnation", id.to_string());
    context.result("listens on", format!("{} port {}", site.listen_addresses, site.port));
    Ok(())
}
