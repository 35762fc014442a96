//! The agents that archive the sources of clones: those of other hosts, and this one, which is no peer of its own.

use std::sync::Arc;

use async_trait::async_trait;

use crate::agent::host::Host;
use crate::agent::views;
use crate::engine::DurableEnd;
use crate::error::{Error, Kind, Result};
use crate::job::ports::SourceAgents;
use crate::model::id::IncarnationId;
use crate::peer::api::{Request, Response};

/// Asks the agent of a host by the host's name.
pub struct Sources(pub Arc<Host>);

#[async_trait]
impl SourceAgents for Sources {
    async fn ship_now(&self, host: &str, incarnation: IncarnationId) -> Result<DurableEnd> {
        let answer = if host == self.0.config.host.name {
            views::ship_now(&self.0, incarnation).await?
        } else {
            self.0.peers.ask(host, Request::ShipNow { incarnation }).await?
        };
        match answer {
            Response::Shipped { position, observed_at } => Ok(DurableEnd { position, observed_at }),
            _ => Err(Error::new(Kind::Internal, format!("the agent of host '{host}' answered something else"))
                .hint("install the same version of keiki on both hosts")),
        }
    }
}
