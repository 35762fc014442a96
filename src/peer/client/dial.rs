//! Making connections: to a control socket, or by name and address to another host.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::base::resolve::resolve;
use crate::error::{Error, Kind, Result};
use crate::peer::body::{Outgoing, broken};
use crate::peer::tls::{TlsIdentity, explain_client_side};

/// For one address: the connection and the handshake.
const CONNECT_SECONDS_MAX: u64 = 10;
/// A host that has vanished is noticed after this, even in the middle of waiting. Longer than the servers' own
/// patience, because Linux also ends connections whose other end merely does not read (tcp(7), TCP_USER_TIMEOUT).
const SILENCE_SECONDS_MAX: u32 = 120;

/// Where an agent is.
pub enum Place {
    Socket(PathBuf),
    Network { address: String, host: String, identity: Arc<TlsIdentity> },
}

impl Place {
    /// How messages name the agent.
    pub fn describe(&self) -> String {
        match self {
            Place::Socket(_) => String::from("the agent on this host"),
            Place::Network { address, host, .. } => format!("the agent of host '{host}' at '{address}'"),
        }
    }

    pub fn cannot_reach(&self) -> String {
        format!("cannot reach {}", self.describe())
    }

    /// A new connection.
    pub async fn connect(&self) -> Result<SendRequest<Outgoing>> {
        match self {
            Place::Socket(path) => {
                let socket = UnixStream::connect(path).await.map_err(|error| self.no_socket(path, error))?;
                self.begin(socket).await
            }
            Place::Network { address, host, identity } => {
                let addresses = resolve(address).await.map_err(|error| error.while_doing(self.cannot_reach()))?;
                let mut last = Error::new(Kind::Unreachable, format!("{}: it has no address", self.cannot_reach()));
                for address in addresses {
                    let attempt = self.dial(address, host, identity);
                    let deadline = Duration::from_secs(CONNECT_SECONDS_MAX);
                    match tokio::time::timeout(deadline, attempt).await {
                        Ok(Ok(sender)) => return Ok(sender),
                        Ok(Err(error)) => last = error,
                        Err(_) => last = self.no_answer(),
                    }
                    // Another address of a host that refuses us will not be of another opinion.
                    if last.kind() == Kind::Forbidden {
                        break;
                    }
                }
                Err(last)
            }
        }
    }

    async fn dial(&self, address: SocketAddr, host: &str, identity: &TlsIdentity) -> Result<SendRequest<Outgoing>> {
        let socket = TcpStream::connect(address).await.map_err(|error| self.no_connection(error))?;
        tune(&socket);
        match identity.connect(socket, host).await {
            Ok(stream) => self.begin(stream).await,
            Err(error) => Err(match explain_client_side(&error, host) {
                Some(explained) => explained.while_doing(self.cannot_reach()),
                None => self.no_connection(error),
            }),
        }
    }

    async fn begin<I>(&self, socket: I) -> Result<SendRequest<Outgoing>>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let begun = handshake(TokioIo::new(socket)).await;
        let (sender, connection) = begun.map_err(|error| broken(&error).while_doing(self.cannot_reach()))?;
        // It ends when the sender is dropped or the other side hangs up; its error reaches whoever waits for an answer.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(sender)
    }

    fn no_socket(&self, path: &Path, error: std::io::Error) -> Error {
        use std::io::ErrorKind as Io;
        let what = self.cannot_reach();
        let shown = path.display();
        match error.kind() {
            Io::NotFound => Error::new(Kind::Unreachable, format!("{what}: there is no control socket '{shown}'"))
                .hint("is it running? 'systemctl status keiki' shows it, 'keiki agent' runs it in the foreground"),
            Io::ConnectionRefused => Error::new(Kind::Unreachable, format!("{what}: nobody listens at '{shown}'"))
                .hint("it has stopped: 'systemctl status keiki' says why, 'systemctl restart keiki' starts it again"),
            Io::PermissionDenied => Error::new(Kind::Forbidden, format!("{what}: no permission for '{shown}'"))
                .hint("run it as root or as a member of the group 'keiki'"),
            _ => Error::io(format!("{what} at '{shown}'"), error),
        }
    }

    fn no_connection(&self, error: std::io::Error) -> Error {
        let hint = match error.kind() {
            std::io::ErrorKind::ConnectionRefused => {
                "is it running there? does its [listen] address fit the address of the [[peer]] here?"
            }
            std::io::ErrorKind::HostUnreachable | std::io::ErrorKind::NetworkUnreachable => {
                "is the host up, and is there a route to it?"
            }
            _ => "did it stop or restart just now? the log of the other agent says more",
        };
        // Whatever it is: the other side may come back.
        Error::io(self.cannot_reach(), error).with_kind(Kind::Unreachable).hint(hint)
    }

    fn no_answer(&self) -> Error {
        let message = format!("{}: no answer within {CONNECT_SECONDS_MAX} seconds", self.cannot_reach());
        Error::new(Kind::Unreachable, message).hint("is the host up? does a firewall drop the packets?")
    }
}

/// Sets what every TCP connection between agents has: small messages at once, and an end when the other host is gone.
pub fn tune(socket: &TcpStream) {
    // None of these can fail on a connected socket, and without them it works as well.
    let _ = socket.set_nodelay(true);
    let _ = setsockopt(socket, sockopt::KeepAlive, &true);
    let _ = setsockopt(socket, sockopt::TcpKeepIdle, &(SILENCE_SECONDS_MAX / 4));
    let _ = setsockopt(socket, sockopt::TcpKeepInterval, &10);
    let _ = setsockopt(socket, sockopt::TcpUserTimeout, &(SILENCE_SECONDS_MAX * 1000));
}
