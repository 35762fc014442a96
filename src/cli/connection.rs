//! The way to the agent: over the control socket of this host, and through it to others.

use std::sync::Arc;

use crate::agent::config::{CONTROL_SOCKET_DEFAULT, Config};
use crate::base::clock::SystemClock;
use crate::base::retry::RetryPolicy;
use crate::cli::arguments::Connect;
use crate::error::{Error, Kind, Result};
use crate::peer::api::{Request, Response};
use crate::peer::client::{Client, PeerObjects};
use crate::store::Store;
use crate::store::peer::PeerStore;

/// A way to ask the agent of this host, or one of its peers.
pub struct Connection {
    client: Arc<Client>,
    on: Option<String>,
}

impl Connection {
    /// Finds the control socket: the option, else the configuration, else the usual place. Does not connect yet.
    pub fn open(connect: &Connect) -> Result<Connection> {
        let socket = match &connect.socket {
            Some(socket) => socket.clone(),
            None => match Config::load(&connect.config) {
                Ok(config) => config.host.control_socket,
                // A member of the group `keiki` need not be able to read the configuration.
                Err(error) if matches!(error.kind(), Kind::NotFound | Kind::System | Kind::Forbidden) => {
                    CONTROL_SOCKET_DEFAULT.into()
                }
                Err(error) => return Err(error),
            },
        };
        Ok(Connection { client: Arc::new(Client::unix(&socket)), on: connect.on.clone() })
    }

    /// Asks the agent that the person meant: this host's, or that of `--on`.
    pub async fn ask(&self, request: Request) -> Result<Response> {
        match &self.on {
            Some(host) => self.ask_host(Some(host), request).await,
            None => self.ask_host(None, request).await,
        }
    }

    /// Asks the agent of a given host, whatever `--on` says; `None` is this host.
    pub async fn ask_host(&self, host: Option<&str>, request: Request) -> Result<Response> {
        match host {
            Some(host) => {
                self.client.ask(Request::Forward { host: host.to_string(), request: Box::new(request) }).await
            }
            None => self.client.ask(request).await,
        }
    }

    /// The objects of the repository of the agent that the person meant, to be read.
    pub fn objects(&self) -> Arc<dyn Store> {
        let carrier = Arc::new(match &self.on {
            Some(host) => PeerObjects::through(self.client.clone(), host),
            None => PeerObjects::new(self.client.clone(), "this host"),
        });
        Arc::new(PeerStore::over(carrier, Arc::new(SystemClock), RetryPolicy::brief()))
    }

    /// The host that was named with `--on`, if any.
    pub fn host(&self) -> Option<&str> {
        self.on.as_deref()
    }
}

/// The error for an agent that answers something else than it was asked: a defect, or a newer agent.
pub fn unexpected(request: &str, response: &Response) -> Error {
    let kind = format!("{response:?}");
    let kind = kind.split(['(', ' ', '{']).next().unwrap_or("something").to_string();
    Error::new(Kind::Internal, format!("the agent answered '{request}' with '{kind}'"))
        .hint("do the command line and the agent have the same version? compare 'keiki --version' with 'keiki status'")
}

/// Unpacks the one answer that a request can have.
macro_rules! expect_response {
    ($response:expr, $request:literal, $pattern:pat => $value:expr) => {
        match $response {
            $pattern => $value,
            other => return Err($crate::cli::connection::unexpected($request, &other)),
        }
    };
}
pub(crate) use expect_response;
