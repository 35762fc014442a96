//! What the agent answers: one arm for each request, after the caller was found to be allowed to ask.

use std::sync::Arc;

use async_trait::async_trait;

use crate::agent::host::Host;
use crate::agent::{doctor, objects, views};
use crate::error::{Error, Kind, Result};
use crate::model::job::Order;
use crate::peer::access::{self, Caller};
use crate::peer::api::{HostStatus, PeerFacts, Request, Response};
use crate::peer::server::Service;
use crate::store::ByteStream;

/// The service behind both sockets.
pub struct AgentService {
    pub host: Arc<Host>,
    pub workshop: Arc<crate::agent::workshop::AgentWorkshop>,
}

#[async_trait]
impl Service for AgentService {
    async fn handle(
        &self,
        caller: Caller,
        request: Request,
        body: Option<ByteStream>,
    ) -> Result<(Response, Option<ByteStream>)> {
        access::decide(&caller, &request, &self.host.config.allow)
            .inspect_err(|error| tracing::warn!("refused: {error}"))
            .map_err(|error| self.as_heard_by(&caller, error))?;
        if let Request::Forward { host, request: object } = &request
            && matches!(**object, Request::GetObject { .. })
        {
            let (size_bytes, bytes) = self.host.peers.ask_for_body(host, (**object).clone()).await?;
            return Ok((Response::Body { size_bytes }, Some(bytes)));
        }
        if objects::is_about_objects(&request) {
            return objects::handle(&self.host, &caller, request, body).await;
        }
        self.answer(&caller, request).await.map(|response| (response, None)).map_err(with_hint)
    }
}

impl AgentService {
    /// A refusal speaks of "this host", which means another one to somebody who reads it elsewhere.
    fn as_heard_by(&self, caller: &Caller, refusal: Error) -> Error {
        match caller {
            Caller::Local { .. } => refusal,
            Caller::Host(_) | Caller::Operator(_) => {
                refusal.while_doing(format!("host '{}' refuses", self.host.config.host.name))
            }
        }
    }

    async fn answer(&self, caller: &Caller, request: Request) -> Result<Response> {
        let host = &self.host;
        match request {
            Request::Hello => Ok(Response::Hello {
                host: host.config.host.name.clone(),
                version: env!("CARGO_PKG_VERSION").to_string(),
                now: host.clock.now(),
            }),
            Request::Status => Ok(Response::Status(self.status().await)),
            Request::Doctor => Ok(Response::Checks(doctor::examine(host).await)),
            Request::Submit { order, passwords } => {
                host.runner()?.submit_with(signed(order, caller), passwords).await.map(Response::Job)
            }
            Request::Check { order } => self.workshop.check_clone(&order).await.map(Response::Checks),
            Request::ListJobs => Ok(Response::Jobs(host.runner()?.list())),
            Request::ShowJob { id } => host.runner()?.show(id).map(Response::Job),
            Request::CancelJob { id } => {
                self.workshop.refuse_member(id, "cancel")?;
                host.runner()?.cancel(id).await.map(Response::Job)
            }
            Request::ResumeJob { id } => {
                self.workshop.refuse_member(id, "resume")?;
                host.runner()?.resume(id).await.map(Response::Job)
            }
            Request::Accept { clone } => {
                self.workshop.refuse_member_named(&clone, "accept")?;
                host.runner()?.accept(&clone).await.map(Response::Job)
            }
            Request::Discard { clone } => self.workshop.discard(&clone).await.map(Response::Job),
            Request::ListBackups { instance } => views::backups(host, &instance).await.map(Response::Backups),
            Request::ShowWindow { instance } => views::window(host, &instance).await,
            Request::ShipNow { incarnation } => views::ship_now(host, incarnation).await,
            Request::ShowRepository => views::repository(host).await.map(Response::Repository),
            Request::ShowCost => views::cost(host).await.map(Response::RepositoryCost),
            Request::InitRepository => host.repository.init().await.map(|()| Response::Done),
            Request::PushLog { data_dir, file } => views::push_log(host, caller, &data_dir, &file).await,
            Request::Forward { host: name, request } => {
                // A peer sees this host, not the person: what this host may do there is what its users may.
                self.host.peers.ask(&name, *request).await
            }
            Request::GetObject { .. }
            | Request::HeadObject { .. }
            | Request::ListObjects { .. }
            | Request::PutObject { .. }
            | Request::LinkObjects { .. }
            | Request::DeleteObjects { .. } => {
                Err(Error::new(Kind::Internal, "a request about objects went the wrong way"))
            }
        }
    }

    async fn status(&self) -> HostStatus {
        let host = &self.host;
        let mut instances = Vec::new();
        for instance in host.instances() {
            instances.push(instance.status().await);
        }
        HostStatus {
            host: host.config.host.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            began_at: host.began_at,
            now: host.clock.now(),
            repository: host.repository.describe(),
            repository_error: host.repository.problem().await,
            instances,
            groups: host.config.groups.clone(),
            peers: host
                .config
                .peers
                .iter()
                .map(|peer| PeerFacts { name: peer.name.clone(), address: peer.address.clone() })
                .collect(),
        }
    }
}

/// The error with a hint if no part that knew more gave one.
fn with_hint(error: Error) -> Error {
    match error.kind() {
        Kind::Damaged => error.hint(
            "something in the repository is not what it should be: put it back from a copy of the repository, or take a \
             new backup",
        ),
        Kind::Unreachable => error.hint("try again later; 'keiki status' and 'keiki doctor' show what does not answer"),
        _ => error.hint("the log of the agent says more: 'journalctl -u keiki'"),
    }
}

/// The order with the name of who asked, as authenticated; what the caller wrote there does not count.
fn signed(mut order: Order, caller: &Caller) -> Order {
    order.by = caller.to_string();
    order
}
