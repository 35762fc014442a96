//! The agents of the other hosts, as this one reaches them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::agent::config::Config;
use crate::base::clock::Clock;
use crate::base::retry::RetryPolicy;
use crate::error::{Error, Kind, Result};
use crate::model::check::CheckItem;
use crate::peer::api::{Request, Response};
use crate::peer::client::{Client, PeerObjects};
use crate::peer::tls::TlsIdentity;
use crate::store::peer::PeerStore;
use crate::store::{ByteStream, Store};

/// A client for each configured peer; connections are made when they are needed.
pub struct Peers {
    clients: BTreeMap<String, Arc<Client>>,
    identity: Option<Arc<TlsIdentity>>,
    clock: Arc<dyn Clock>,
}

impl Peers {
    /// Takes the configured peers. Without TLS in the configuration there are none to be reached.
    pub fn new(config: &Config, identity: Option<&Arc<TlsIdentity>>, clock: Arc<dyn Clock>) -> Peers {
        let mut clients = BTreeMap::new();
        if let Some(identity) = identity {
            for peer in &config.peers {
                clients.insert(peer.name.clone(), Arc::new(Client::tls(&peer.address, &peer.name, identity.clone())));
            }
        }
        Peers { clients, identity: identity.cloned(), clock }
    }

    /// What `doctor` says about this host's own certificate; nothing where none is configured.
    pub fn certificate_item(&self) -> Option<CheckItem> {
        self.identity.as_ref().map(|identity| identity.check(self.clock.now()))
    }

    /// Asks the agent of a host by name.
    pub async fn ask(&self, host: &str, request: Request) -> Result<Response> {
        self.client(host)?.ask(request).await
    }

    /// Asks the agent of a host for bytes, which come with their number.
    pub async fn ask_for_body(&self, host: &str, request: Request) -> Result<(u64, ByteStream)> {
        self.client(host)?.ask_for_body(request).await
    }

    /// The repository of another agent, as a store.
    pub fn store(&self, host: &str) -> Result<Arc<dyn Store>> {
        let objects = Arc::new(PeerObjects::new(self.client(host)?.clone(), host));
        Ok(Arc::new(PeerStore::over(objects, self.clock.clone(), RetryPolicy::brief())))
    }

    fn client(&self, host: &str) -> Result<&Arc<Client>> {
        self.clients.get(host).ok_or_else(|| {
            let known = self.clients.keys().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none is configured".to_string() } else { format!("known are {known}") };
            Error::new(Kind::NotFound, format!("host '{host}' is not a peer of this one"))
                .hint(format!("{known}; add it as a [[peer]] in the configuration"))
        })
    }
}
