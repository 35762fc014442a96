//! The answering side: one HTTP/1.1 server on a TCP socket with TLS and on a Unix socket.
//!
//! A request is `POST /v1/request` with the header `keiki-protocol`; body and answer are as `wire` says. Whatever was
//! asked and whatever was wrong with it, there is an answer with an error in it if there is anybody left to read it.
//!
//! Limits, so that nobody can use up the agent: connections, half-open handshakes, the time for a handshake, for a
//! request's head, for its message and between two pieces of a body; the size of head, message and body. Whoever
//! stops reading is dropped. Shutting down lets requests finish for a while, then ends them.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::base::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use crate::peer::access::Caller;
use crate::peer::api::{Request, Response};
use crate::peer::server::exchange::{Connection, Trust};
use crate::peer::tls::{Identity, TlsIdentity};
use crate::store::ByteStream;

mod exchange;
mod local;
mod stall;

pub use local::LocalUsers;

/// Callers who have not yet proved who they are.
const HANDSHAKES_MAX: usize = 64;
const HANDSHAKE_SECONDS_MAX: u64 = 10;

/// What answers requests.
#[async_trait]
pub trait Service: Send + Sync {
    /// Decides whether the caller may ask this, and answers. A body comes with `PutObject` only; a body goes back with
    /// `Response::Body` only, with exactly the size that it says.
    ///
    /// The future is dropped if the caller goes away or the agent shuts down: what must not stop in the middle is
    /// spawned by the implementation.
    async fn handle(
        &self,
        caller: Caller,
        request: Request,
        body: Option<ByteStream>,
    ) -> Result<(Response, Option<ByteStream>)>;
}

/// How much a server bears.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Connections at the same time; one more is told to come back later.
    pub connections_max: usize,
    /// From one request to the next, and for the head of a request.
    pub idle: Duration,
    /// Between two pieces of a body, in both directions.
    pub stall: Duration,
    /// For requests that run when the server is shut down.
    pub drain: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            connections_max: 128,
            idle: Duration::from_secs(60),
            stall: Duration::from_secs(60),
            drain: Duration::from_secs(10),
        }
    }
}

/// A server that can be given sockets.
#[derive(Clone)]
pub struct Server {
    service: Arc<dyn Service>,
    clock: Arc<dyn Clock>,
    options: ServerOptions,
}

impl Server {
    pub fn new(service: Arc<dyn Service>, clock: Arc<dyn Clock>, options: ServerOptions) -> Server {
        Server { service, clock, options }
    }

    /// Serves other hosts until `stop`, then lets requests finish. Returns whether all of them did.
    pub async fn serve_tls(self, listener: TcpListener, identity: Arc<TlsIdentity>, stop: CancellationToken) -> bool {
        let mut connections = JoinSet::new();
        let open = Arc::new(Semaphore::new(self.options.connections_max));
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            reap(&mut connections);
            // Never closed, so there is always a permit sooner or later.
            let Ok(handshake) = handshakes.clone().acquire_owned().await else { break };
            let Some((socket, address)) = accept(&stop, || listener.accept()).await else { break };
            let (server, identity, open, stop) = (self.clone(), identity.clone(), open.clone(), stop.clone());
            connections.spawn(async move {
                crate::peer::client::tune(&socket);
                let deadline = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
                let accepted = match tokio::time::timeout(deadline, identity.accept(socket)).await {
                    Ok(Ok(accepted)) => accepted,
                    Ok(Err(error)) => return tracing::warn!("refused a connection from '{address}': {error}"),
                    Err(_) => return tracing::warn!("refused a connection from '{address}': no handshake in time"),
                };
                drop(handshake);
                let caller = match accepted.peer.identity {
                    Identity::Host(name) => Caller::Host(name),
                    Identity::Operator(name) => Caller::Operator(name),
                };
                let trust = Trust::Certificate {
                    identity,
                    generation: accepted.generation,
                    not_after: accepted.peer.not_after,
                };
                server.connection(caller, trust).serve(accepted.stream, open, stop).await;
            });
        }
        drop(listener);
        self.drain(connections).await
    }

    /// Serves this host's own users until `stop`, then lets requests finish. Returns whether all of them did.
    pub async fn serve_unix(self, listener: UnixListener, users: LocalUsers, stop: CancellationToken) -> bool {
        let mut connections = JoinSet::new();
        let open = Arc::new(Semaphore::new(self.options.connections_max));
        let users = Arc::new(users);
        loop {
            reap(&mut connections);
            let Some((socket, _)) = accept(&stop, || listener.accept()).await else { break };
            let (server, users, open, stop) = (self.clone(), users.clone(), open.clone(), stop.clone());
            connections.spawn(async move {
                let caller = match users.who_is_at(&socket).await {
                    Ok(caller) => caller,
                    Err(error) => return tracing::warn!("refused a connection on the control socket: {error}"),
                };
                server.connection(caller, Trust::Credentials).serve(socket, open, stop).await;
            });
        }
        drop(listener);
        self.drain(connections).await
    }

    fn connection(&self, caller: Caller, trust: Trust) -> Connection {
        Connection {
            service: self.service.clone(),
            clock: self.clock.clone(),
            options: self.options.clone(),
            caller,
            trust: Arc::new(trust),
        }
    }

    async fn drain(&self, mut connections: JoinSet<()>) -> bool {
        let all_ended = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(self.options.drain, all_ended).await.is_ok() {
            return true;
        }
        tracing::warn!("ended {} connections that were still busy", connections.len());
        connections.shutdown().await;
        false
    }
}

/// Forgets connections that have ended.
fn reap(connections: &mut JoinSet<()>) {
    while let Some(ended) = connections.try_join_next() {
        if let Err(error) = ended
            && error.is_panic()
        {
            tracing::error!("a connection ended by a defect: {error}");
        }
    }
}

/// The next connection; nothing once the server is to stop.
async fn accept<T, F>(stop: &CancellationToken, mut next: impl FnMut() -> F) -> Option<T>
where
    F: Future<Output = std::io::Result<T>>,
{
    loop {
        let outcome = tokio::select! {
            biased;
            () = stop.cancelled() => return None,
            outcome = next() => outcome,
        };
        match outcome {
            Ok(connection) => return Some(connection),
            Err(error) => {
                // The caller hung up already, or there are no file descriptors left; the latter takes a while.
                tracing::warn!("cannot accept a connection: {error}");
                tokio::select! {
                    () = stop.cancelled() => return None,
                    () = tokio::time::sleep(Duration::from_millis(100)) => {}
                }
            }
        }
    }
}

/// Binds the address where other hosts reach this agent.
pub async fn bind_tcp(address: std::net::SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let taken = error.kind() == std::io::ErrorKind::AddrInUse;
        let error = Error::io(format!("cannot listen at '{address}'"), error);
        if taken {
            return error.hint("is another agent or another program running there? see 'ss -ltnp'");
        }
        error.hint("is 'address' in [listen] an address of this host?")
    })
}

/// Binds the control socket. A socket left behind by an agent that died is replaced; one that is answered is not.
/// Everybody may connect: who it is decides what is answered.
pub async fn bind_unix(path: &Path) -> Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let what = || format!("cannot listen at the control socket '{}'", path.display());
    if tokio::net::UnixStream::connect(path).await.is_ok() {
        return Err(Error::new(Kind::Conflict, format!("{}: another agent answers there", what()))
            .hint("'systemctl status keiki' shows it; a second agent needs its own 'control_socket' and 'state_dir'"));
    }
    let directory = crate::base::durable::parent_of(path);
    crate::base::durable::create_dir_all_durable(directory, 0o755).context(what)?;
    // Bound under another name first, so that nobody connects before everybody may.
    let mut unready = PathBuf::from(path);
    unready.as_mut_os_string().push(format!(".{}", std::process::id()));
    for old in [&unready, &path.to_path_buf()] {
        match std::fs::symlink_metadata(old) {
            Ok(meta) if std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
                std::fs::remove_file(old).context(what)?;
            }
            Ok(_) => return Err(Error::new(Kind::Conflict, format!("{}: a file is there", what()))),
            Err(_) => {}
        }
    }
    let listener = UnixListener::bind(&unready).context(what)?;
    std::fs::set_permissions(&unready, std::fs::Permissions::from_mode(0o666)).context(what)?;
    std::fs::rename(&unready, path).context(what)?;
    Ok(listener)
}
